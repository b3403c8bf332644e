"""DeepSpeed behind one door: the engine, and whole tensors in and out of its ZeRO shards.

Weights are fp32 in every precision (bf16 and fp16 are autocast), so the module's parameters are the master weights:
replicated under ZeRO 0 to 2, sharded under ZeRO 3.
"""

import math
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn

from scalelong.train.config import TrainConfig
from scalelong.train.errors import UserError
from scalelong.train.processes import Processes

OPTIMIZER_STATES = ("exp_avg", "exp_avg_sq")


def deepspeed_config(config: TrainConfig, micro_batch: int) -> dict[str, Any]:
    """Every DeepSpeed value that matters, written out: its defaults change between releases."""
    values: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": config.accumulation_steps,
        "gradient_clipping": config.optimizer.clip_grad_norm,
        "zero_optimization": {
            "stage": config.zero_stage,
            "overlap_comm": False,
            "contiguous_gradients": True,
            "reduce_scatter": True,
            "reduce_bucket_size": 200_000_000,
            "allgather_bucket_size": 200_000_000,
        },
        "zero_allow_untested_optimizer": False,
        "steps_per_print": 1_000_000_000,
        "wall_clock_breakdown": False,
    }
    if config.precision != "fp32":
        dtype = {"bf16": "bfloat16", "fp16": "float16"}[config.precision]
        values["torch_autocast"] = {"enabled": True, "dtype": dtype}
    return values


def check_engine_config(config: TrainConfig) -> None:
    """Refuses what DeepSpeed would accept and compute wrongly.

    Raises:
        UserError: fp16 with clipping under ZeRO (0.19.8 clips the gradients before the loss scale is taken out).
    """
    if config.precision == "fp16" and config.zero_stage > 0 and config.optimizer.clip_grad_norm > 0:
        raise UserError("--precision fp16 cannot clip gradients under ZeRO: take bf16, or --zero-stage 0")


def make_engine(model: nn.Module, config: TrainConfig, processes: Processes, micro_batch: int) -> Any:
    """A DeepSpeed engine with AdamW over all parameters."""
    import deepspeed

    o = config.optimizer
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=0.0, betas=(o.beta1, o.beta2), weight_decay=o.weight_decay, fused=True
    )
    engine, *_ = deepspeed.initialize(
        model=model.to(processes.device), optimizer=optimizer, config=deepspeed_config(config, micro_batch)
    )
    return engine


def set_learning_rate(engine, learning_rate: float) -> None:
    for group in engine.optimizer.param_groups:
        group["lr"] = learning_rate


def take_step(engine, *, only_finite: bool = False) -> bool:
    """The optimizer's step, at the end of the last micro-batch.

    Args:
        only_finite: without ZeRO, too, leave the step out if the gradient is not finite, which makes a GPU wait.

    Returns:
        False if it was left out because a gradient is not finite, unless that is fp16 finding its loss scale.
    """
    looks = only_finite and engine.zero_optimization_stage() == 0 and _grad_scaler(engine) is None
    if looks and not math.isfinite(gradient_norm(engine)):
        for parameter in engine.module.parameters():
            # The optimizer passes over parameters without a gradient; DeepSpeed's own counters go on.
            parameter.grad = None
        engine.step()
        return False
    engine.step()
    if engine.was_step_applied():
        return True
    scaler = _grad_scaler(engine)
    if scaler is None:
        return False
    # Under ZeRO, DeepSpeed 0.19.8 skips a step that overflowed without telling the scaler, which would then never
    # lower its scale.
    scaler.update(scaler.get_scale() * scaler.get_backoff_factor())
    return True


def loss_with_telling_gradient(loss: Tensor) -> Tensor:
    """The same loss; if it is not finite, nor is any gradient of it, which alone is what ZeRO looks at."""
    value = loss.detach()
    return loss * (1 + (value - value))


def gradient_norm(engine) -> float:
    """The norm of the whole gradient before clipping, of the step just taken (ZeRO) or about to be (stage 0)."""
    if engine.zero_optimization_stage() > 0:
        return float(engine.get_global_grad_norm())
    return float(torch.nn.utils.get_total_norm([p.grad for p in engine.module.parameters() if p.grad is not None]))


def loss_scale(engine) -> float:
    """What the loss is multiplied by: 1 unless the precision is fp16."""
    scaler = _grad_scaler(engine)
    return 1.0 if scaler is None else scaler.get_scale()


def local_shards(module: nn.Module) -> list[Tensor]:
    """This rank's part of every parameter: all of it, or its shard under ZeRO 3."""
    return [getattr(p, "ds_tensor", p).detach() for p in module.parameters()]


def whole_tensors(module: nn.Module, shards: list[Tensor]) -> Iterator[tuple[str, Tensor]]:
    """(name, whole tensor on the CPU) from tensors laid out as ``local_shards``. Every rank must iterate to the end."""
    for (name, parameter), shard in zip(module.named_parameters(), shards, strict=True):
        yield name, _gather_shard(parameter, shard).cpu()


def optimizer_state(engine) -> Iterator[tuple[str, Tensor]]:
    """("exp_avg.<parameter>", whole tensor on the CPU), ... Every rank must iterate to the end."""
    from deepspeed.utils import safe_get_full_optimizer_state

    untouched = optimizer_step_count(engine) == 0  # every step so far overflowed in fp16: there is no state yet
    for name, parameter in engine.module.named_parameters():
        for key in OPTIMIZER_STATES:
            if untouched:
                value = torch.zeros(getattr(parameter, "ds_shape", parameter.shape))
            elif engine.zero_optimization_stage() == 0:
                value = engine.optimizer.state[parameter][key]
            else:
                value = safe_get_full_optimizer_state(parameter, key)
            assert value is not None, f"DeepSpeed has no {key} for {name}"
            yield f"{key}.{name}", value.cpu()


def optimizer_step_count(engine) -> int:
    """Steps that the optimizer has applied (those that overflowed in fp16 do not count)."""
    state = _base_optimizer(engine).state
    return int(next(iter(state.values()))["step"]) if state else 0


def restore_optimizer(engine, state: dict[str, Tensor], step_count: int) -> None:
    """Puts back what ``optimizer_state`` gave, on any number of ranks and under any ZeRO stage."""
    from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

    stage = engine.zero_optimization_stage()
    base = _base_optimizer(engine)
    if stage == 3:
        flat_params = engine.optimizer.fp32_partitioned_groups_flat
    else:
        flat_params = [p for group in base.param_groups for p in group["params"]]
    for flat in flat_params:
        base.state[flat] = {"step": torch.tensor(float(step_count), device=flat.device)}
        base.state[flat].update({key: torch.zeros_like(flat) for key in OPTIMIZER_STATES})
    if stage in (1, 2):
        # DeepSpeed links its parameters to optimizer state that exists; normally after the first step.
        engine.optimizer._lazy_init_hp_params_optimizer_state()
    for name, parameter in engine.module.named_parameters():
        for key in OPTIMIZER_STATES:
            value = state[f"{key}.{name}"].to(parameter.device)
            if stage == 0:
                base.state[parameter][key].copy_(value)
            elif stage == 3:
                safe_set_local_optimizer_state(parameter, _cut_shard(parameter, value), key)
            else:
                safe_set_full_optimizer_state(parameter, value, key)


def scaler_state(engine) -> dict[str, Any] | None:
    """The loss scaler of fp16, JSON-able; None in other precisions."""
    scaler = _grad_scaler(engine)
    return None if scaler is None else scaler.state_dict()


def restore_scaler(engine, state: dict[str, Any] | None) -> None:
    scaler = _grad_scaler(engine)
    if scaler is not None and state is not None:
        scaler.load_state_dict(state)


def shards_of(module: nn.Module, whole: dict[str, Tensor]) -> list[Tensor]:
    """The inverse of ``whole_tensors``: this rank's part of every tensor."""
    return [_cut_shard(p, whole[name].to(p.device)).clone() for name, p in module.named_parameters()]


def _base_optimizer(engine) -> torch.optim.Optimizer:
    return engine.optimizer.optimizer if engine.zero_optimization_stage() else engine.optimizer


def _grad_scaler(engine) -> torch.amp.GradScaler | None:
    # Stage 0 keeps it on the engine, the other stages on their optimizer.
    if engine.zero_optimization_stage() == 0:
        return engine.torch_autocast_z0_gradscaler
    return engine.optimizer.torch_autocast_gradscaler


def _gather_shard(parameter: nn.Parameter, shard: Tensor) -> Tensor:
    if not hasattr(parameter, "ds_tensor"):
        return shard
    sharded = cast(Any, parameter)
    world_size = torch.distributed.get_world_size()
    parts = [torch.empty_like(shard) for _ in range(world_size)]
    torch.distributed.all_gather(parts, shard.contiguous())
    return torch.cat(parts)[: sharded.ds_numel].view(sharded.ds_shape)


def _cut_shard(parameter: nn.Parameter, whole: Tensor) -> Tensor:
    if not hasattr(parameter, "ds_tensor"):
        return whole
    size = cast(Any, parameter).ds_tensor.numel()
    padded = whole.new_zeros(size * torch.distributed.get_world_size())
    padded[: whole.numel()] = whole.flatten()
    return padded[size * torch.distributed.get_rank() :][:size]
