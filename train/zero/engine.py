"""DeepSpeed behind one door: the engine, and whole tensors in and out of its ZeRO shards.

Weights are fp32 in every precision (bf16 and fp16 are autocast), so the module's parameters are the master weights:
replicated under ZeRO 0 to 2, sharded under ZeRO 3.
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from scalelong.model.linear_layers import GeluLinear, SkipLinear, TokenConv1d
from scalelong.train.config import OffloadName, TrainConfig
from scalelong.train.errors import UserError
from scalelong.train.hosts.processes import Processes
from scalelong.train.zero.user_config import merge_file

OPTIMIZER_STATES = ("exp_avg", "exp_avg_sq")
# Elements that are reduced or gathered at a time.
BUCKET_SIZE = 200_000_000
# Layers whose parameters are sent in 16 bits under autocast: DeepSpeed's own list, which goes by the exact class, and
# what stands in their place in our networks.
HALVED_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, SkipLinear, GeluLinear, TokenConv1d)


def deepspeed_config(config: TrainConfig, micro_batch: int, num_params: int) -> dict[str, Any]:
    """Every DeepSpeed value that matters, written out: its defaults change between releases.

    What the user's own file adds is merged in.

    Raises:
        UserError: the file does not fit, or offloading does not fit the ZeRO stage.
    """
    # DeepSpeed takes memory for a whole bucket, however small the network, and wants an even number of elements.
    bucket_size = min(BUCKET_SIZE, num_params + num_params % 2)
    values: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": config.accumulation_steps,
        "gradient_clipping": config.optimizer.clip_grad_norm,
        "zero_optimization": {
            "stage": config.zero_stage,
            "overlap_comm": False,
            "contiguous_gradients": True,
            "reduce_scatter": True,
            "reduce_bucket_size": bucket_size,
            "allgather_bucket_size": bucket_size,
            **_offload_sections(config.offload),
        },
        # AdamW of torch has a fused kernel on CPUs too, where DeepSpeed's own is compiled on first use.
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": False,
        "steps_per_print": 1_000_000_000,
        "wall_clock_breakdown": False,
    }
    if config.precision != "fp32":
        dtype = {"bf16": "bfloat16", "fp16": "float16"}[config.precision]
        halved = [f"{layer.__module__}.{layer.__qualname__}" for layer in HALVED_LAYERS]
        values["torch_autocast"] = {"enabled": True, "dtype": dtype, "lower_precision_safe_modules": halved}
    if config.deepspeed_config is not None:
        offloads = config.offload != "none"
        values = merge_file(config.deepspeed_config, values, batch=config.images_per_step, offloads=offloads)
    _check_offload(values["zero_optimization"])
    return values


def _offload_sections(offload: OffloadName) -> dict[str, Any]:
    where = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    sections = {"none": (), "optimizer": ("offload_optimizer",), "parameters": ("offload_optimizer", "offload_param")}
    return {section: dict(where) for section in sections[offload]}


def _check_offload(zero: dict[str, Any]) -> None:
    def is_off(section: str) -> bool:
        return (zero.get(section) or {}).get("device", "none") == "none"

    if not is_off("offload_optimizer") and zero["stage"] == 0:
        raise UserError("optimizer state can be offloaded with --zero-stage 1, 2 or 3, not 0")
    if not is_off("offload_param") and zero["stage"] != 3:
        raise UserError(f"parameters can be offloaded with --zero-stage 3, not {zero['stage']}")


def check_engine_config(config: TrainConfig, micro_batch: int) -> None:
    """Refuses what DeepSpeed cannot do, or would accept and compute wrongly.

    Raises:
        UserError: a DeepSpeed file or offloading that does not fit; fp16 with clipping under ZeRO (0.19.8 clips the
            gradients before the loss scale is taken out) or with offloading (not tested).
    """
    zero = deepspeed_config(config, micro_batch, num_params=1)["zero_optimization"]
    if config.precision == "fp16" and (zero.get("offload_optimizer") or {}).get("device") == "cpu":
        raise UserError("--precision fp16 cannot offload: take bf16")
    if config.precision == "fp16" and config.zero_stage > 0 and config.optimizer.clip_grad_norm > 0:
        raise UserError("--precision fp16 cannot clip gradients under ZeRO: take bf16, or --zero-stage 0")


def make_engine(model: nn.Module, config: TrainConfig, processes: Processes, micro_batch: int) -> Any:
    """A DeepSpeed engine with AdamW over all parameters."""
    import deepspeed
    from deepspeed.runtime import torch_autocast

    # A run in 16 bits that came before in this process has left its mark there.
    torch_autocast.TORCH_AUTOCAST_INITIALIZED = False
    o = config.optimizer
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=0.0, betas=(o.beta1, o.beta2), weight_decay=o.weight_decay, fused=True
    )
    num_params = sum(parameter.numel() for parameter in model.parameters())
    engine, *_ = deepspeed.initialize(
        model=model.to(processes.device),
        optimizer=optimizer,
        config=deepspeed_config(config, micro_batch, num_params),
    )
    return engine


def destroy(engine) -> None:
    """Ends an engine and frees weights, gradients and the optimizer's state, though something may refer to it still.

    DeepSpeed 0.19.8 keeps engines of ZeRO 3: their networks in the list below, and they themselves in closures.
    """
    from deepspeed.runtime.zero import parameter_offload

    engine.destroy()
    stack = parameter_offload.FWD_MODULE_STACK
    stack[:] = [module for module in stack if module is not engine.module]
    base = _base_optimizer(engine)
    base.state.clear()
    base.param_groups.clear()
    vars(engine.optimizer).clear()
    for parameter in engine.module.parameters():
        parameter.grad = None
        for tensor in (parameter, getattr(parameter, "ds_tensor", parameter)):
            tensor.data = tensor.data.new_empty(0)


def set_learning_rate(engine, learning_rate: float) -> None:
    for group in engine.optimizer.param_groups:
        group["lr"] = learning_rate


class StepTaken(NamedTuple):
    """What came of a step of the optimizer."""

    applied: bool
    """Whether the weights have moved. True also where only a GPU knows, which is not waited for: of fp16 without ZeRO,
    if nothing else makes it wait."""
    is_finite: bool
    """Whether the gradient was finite, or fp16 was finding its loss scale."""
    gradient_norm: float | None
    """Of the whole gradient, without the loss scale and before clipping; None if it was not asked for."""


def take_step(engine, *, only_finite: bool = False, measures: bool = False) -> StepTaken:
    """The optimizer's step, at the end of the last micro-batch.

    Args:
        only_finite: without ZeRO, too, leave the step out if the gradient is not finite, which makes a GPU wait.
        measures: find the norm of the gradient, which makes a GPU wait.
    """
    stage, scaler = engine.zero_optimization_stage(), _grad_scaler(engine)
    waits = only_finite or measures or engine.device.type == "cpu"
    scale = loss_scale(engine) if waits else 1.0
    looks = only_finite and stage == 0 and scaler is None
    # ZeRO knows the gradient's norm after its step; without it, the gradients are gone by then.
    norm = gradient_norm(engine) if stage == 0 and (measures or looks) else None
    if looks and norm is not None and not math.isfinite(norm):
        for parameter in engine.module.parameters():
            # The optimizer passes over parameters without a gradient; DeepSpeed's own counters go on.
            parameter.grad = None
        engine.step()
        return StepTaken(applied=False, is_finite=False, gradient_norm=norm if measures else None)
    engine.step()
    applied = engine.was_step_applied()
    is_finite = applied or scaler is not None
    if not applied and scaler is not None:
        # Under ZeRO, DeepSpeed 0.19.8 skips a step that overflowed without telling the scaler, which would then never
        # lower its scale.
        scaler.update(scaler.get_scale() * scaler.get_backoff_factor())
    elif stage == 0 and scaler is not None and waits:
        applied = loss_scale(engine) >= scale  # DeepSpeed says that it was applied in any case
    if measures and stage > 0:
        norm = gradient_norm(engine)
    return StepTaken(applied, is_finite, norm / scale if measures and norm is not None else None)


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


def master_shards(engine) -> list[Tensor]:
    """This rank's part of every weight, in the order of the parameters, where its optimizer updates it.

    All of it without ZeRO; under ZeRO 1 and 2 the flat fragment that lies in the rank's partition, for most parameters
    none or all of it; under ZeRO 3 the flat shard, padded.
    """
    stage = engine.zero_optimization_stage()
    return [_master_shard(parameter, stage) for parameter in engine.module.parameters()]


def whole_weights(engine) -> Iterator[tuple[str, Tensor]]:
    """(name, whole weight on the CPU). Every rank must iterate to the end."""
    if engine.zero_optimization_stage() == 3:
        yield from whole_tensors(engine, master_shards(engine))
    else:
        for name, parameter in engine.module.named_parameters():
            yield name, parameter.detach().cpu()


def whole_tensors(engine, shards: list[Tensor]) -> Iterator[tuple[str, Tensor]]:
    """(name, whole tensor on the CPU) from parts laid out as ``master_shards``. Every rank must iterate to the end."""
    stage = engine.zero_optimization_stage()
    for (name, parameter), shard in zip(engine.module.named_parameters(), shards, strict=True):
        yield name, _gather(cast(Any, parameter), shard.to(engine.device), stage).cpu()


def shards_of(engine, whole: dict[str, Tensor]) -> list[Tensor]:
    """The inverse of ``whole_tensors``: this rank's part of every tensor, on the device of its master weights."""
    stage = engine.zero_optimization_stage()
    parts = (_cut(parameter, whole[name], stage) for name, parameter in engine.module.named_parameters())
    return [part.to(master.device, copy=True) for part, master in zip(parts, master_shards(engine), strict=True)]


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
                safe_set_local_optimizer_state(parameter, _cut(parameter, value, stage), key)
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


def _base_optimizer(engine) -> torch.optim.Optimizer:
    return engine.optimizer.optimizer if engine.zero_optimization_stage() else engine.optimizer


def _grad_scaler(engine) -> torch.amp.GradScaler | None:
    # Stage 0 keeps it on the engine, the other stages on their optimizer.
    if engine.zero_optimization_stage() == 0:
        return engine.torch_autocast_z0_gradscaler
    return engine.optimizer.torch_autocast_gradscaler


def _master_shard(parameter: Any, stage: int) -> Tensor:
    if stage == 0:
        return parameter.detach()
    if stage == 3:
        return parameter.ds_tensor.detach()
    fragment = parameter._hp_mapping
    return parameter.new_empty(0).detach() if fragment is None else fragment.hp_fragment.detach()


def _gather(parameter: Any, shard: Tensor, stage: int) -> Tensor:
    if stage == 0:
        return shard
    if stage == 3:
        parts = [torch.empty_like(shard) for _ in range(torch.distributed.get_world_size())]
        torch.distributed.all_gather(parts, shard.contiguous())
        return torch.cat(parts)[: parameter.ds_numel].view(parameter.ds_shape)
    # Fragments differ in size from rank to rank; each element is on one rank, so that the sum is exact.
    whole = shard.new_zeros(parameter.numel())
    if parameter._hp_mapping is not None:
        address = parameter._hp_mapping.lp_fragment_address
        whole[address.start :][: address.numel] = shard
    torch.distributed.all_reduce(whole)
    return whole.view(parameter.shape)


def _cut(parameter: Any, whole: Tensor, stage: int) -> Tensor:
    if stage == 0:
        return whole
    if stage == 3:
        size = parameter.ds_tensor.numel()
        padded = whole.new_zeros(size * torch.distributed.get_world_size())
        padded[: whole.numel()] = whole.flatten()
        return padded[size * torch.distributed.get_rank() :][:size]
    if parameter._hp_mapping is None:
        return whole.new_empty(0)
    address = parameter._hp_mapping.lp_fragment_address
    return whole.flatten()[address.start :][: address.numel]
