"""DeepSpeed behind one door: the engine, its steps, and the state of its optimizer."""

from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from scalelong.model.backbone import Backbone, ParameterGroup
from scalelong.model.hidden_matrices import HiddenMatrix, hidden_matrices
from scalelong.model.linear_wrappers import sigma_layers
from scalelong.train.config import OptimizerConfig, TrainConfig
from scalelong.train.hosts.processes import Processes
from scalelong.train.zero.engine_config import deepspeed_config
from scalelong.train.zero.muon import HIDDEN, MOMENTUM, Muon, split_group
from scalelong.train.zero.shards import cut

OPTIMIZER_STATES = ("exp_avg", "exp_avg_sq")
LEARNING_RATE_FACTOR = "learning_rate_factor"
EPSILON = 1e-8
"""Of AdamW, times the factor of a group; PyTorch's own."""
SCALER_COUNTS = ("growth_interval", "_growth_tracker")


def make_engine(
    model: Backbone,
    config: TrainConfig,
    processes: Processes,
    micro_batch: int,
    learned_by_loss: Mapping[str, nn.Module] | None = None,
) -> Any:
    """A DeepSpeed engine with the configured optimizer over all parameters, in the groups that the model makes of them.

    Its ``row_functions`` are those of ``model.after_step()``, for ``apply_to_rows``. What the loss learns, if it does,
    is a group of its own, without weight decay.
    """
    import deepspeed
    from deepspeed.runtime import torch_autocast

    # A run in 16 bits that came before in this process has left its mark there.
    torch_autocast.TORCH_AUTOCAST_INITIALIZED = False
    o = config.optimizer
    # Both asked for before ZeRO 3 takes the parameters' shapes away.
    matrices = matrices_of(model, o)
    groups, row_functions = optimizer_groups(model, o.weight_decay, matrices), model.after_step()
    for name, learned in (learned_by_loss or {}).items():
        model.add_module(name, learned)
        groups.append({"params": [*learned.parameters()], "weight_decay": 0.0, LEARNING_RATE_FACTOR: 1.0})
    optimizer = make_optimizer(groups, o, model, matrices)
    num_params = sum(parameter.numel() for parameter in model.parameters())
    initialized = deepspeed.initialize(
        model=model.to(processes.device),
        optimizer=optimizer,
        config=deepspeed_config(config, micro_batch, num_params),
    )
    engine: Any = initialized[0]
    trained = {name for name, _ in trained_parameters(engine)}
    engine.row_functions = {name: function for name, function in row_functions.items() if name in trained}
    engine.hidden_matrices, engine.sigma_layers = matrices, sigma_layers(engine.module)
    scaler = _grad_scaler(engine)
    if scaler is not None:
        scaler.set_growth_interval(scaler.get_growth_interval() * _scaler_updates_per_step(engine))
    if isinstance(optimizer, Muon):
        optimizer.follow(engine)
    if engine.zero_optimization_stage() in (1, 2):
        # DeepSpeed 0.19.8 links parameters to their state when the first group has stepped: the others have none then.
        _start_optimizer(engine, step_count=0)
    return engine


def destroy(engine) -> None:
    """Ends an engine and frees weights, gradients and the optimizer's state, though something may refer to it still.

    DeepSpeed 0.19.8 keeps engines of ZeRO 3: their networks in the list below, and they themselves somewhere else.
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


def matrices_of(model: Backbone, config: OptimizerConfig) -> Mapping[str, HiddenMatrix]:
    """The hidden matrices that the optimizer treats as such, by their names: all of Muon's, none of AdamW's.

    Raises:
        ValueError: Muon, of an architecture that does not say which they are.
    """
    return hidden_matrices(model) if config.kind == "muon" else {}


def make_optimizer(
    groups: list[dict[str, Any]], config: OptimizerConfig, model: Backbone, matrices: Mapping[str, HiddenMatrix]
) -> torch.optim.AdamW:
    """The configured optimizer of the groups of ``optimizer_groups``, whose learning rate is yet to be set."""
    betas = config.beta1, config.beta2
    if config.kind == "adamw":
        return torch.optim.AdamW(groups, lr=0.0, betas=betas, fused=True)
    of_parameters = {model.get_parameter(name): matrix for name, matrix in matrices.items()}
    return Muon(groups, of_parameters, momentum=config.momentum, betas=betas)


def optimizer_groups(
    model: Backbone, weight_decay: float, matrices: Mapping[str, HiddenMatrix] = MappingProxyType({})
) -> list[dict[str, Any]]:
    """The groups of a model as optimizers of torch take them, with the factor of each one's learning rate.

    What is frozen is in none.

    Args:
        matrices: the hidden matrices that Muon updates, in groups of their own.
    """
    parameters, groups = dict(model.named_parameters()), list[dict[str, Any]]()
    for whole in model.parameter_groups():
        whole = whole._replace(names=tuple(name for name in whole.names if parameters[name].requires_grad))
        for group, is_hidden in zip(split_group(whole, matrices), (False, True), strict=True):
            if group is not None:
                groups.append(_group_of_torch(group, parameters, weight_decay) | ({HIDDEN: True} if is_hidden else {}))
    return groups


def _group_of_torch(group: ParameterGroup, parameters: Mapping[str, Any], weight_decay: float) -> dict[str, Any]:
    return {
        "params": [parameters[name] for name in group.names],
        "weight_decay": weight_decay * group.weight_decay_factor,
        "eps": EPSILON * group.epsilon_factor,
        LEARNING_RATE_FACTOR: group.learning_rate_factor,
    }


def set_learning_rate(engine, learning_rate: float) -> None:
    """The run's learning rate, times the factor of each group."""
    for group in engine.optimizer.param_groups:
        group["lr"] = learning_rate * group[LEARNING_RATE_FACTOR]


class StepTaken(NamedTuple):
    """What came of a step of the optimizer."""

    applied: bool
    """Whether the weights have moved. True also where only a GPU knows, which is not waited for: of fp16 without ZeRO,
    if nothing else makes it wait."""
    is_finite: Tensor
    """Whether the gradient was finite, or fp16 was finding its loss scale: a scalar on the engine's device, so that no
    step has to wait for it. The same on all ranks."""
    gradient_norm: float | None
    """Of the whole gradient, without the loss scale and before clipping; None if it was not asked for."""


def take_step(engine, *, only_finite: bool = False, measures: bool = False, norms_P: Tensor | None = None) -> StepTaken:
    """The optimizer's step, at the end of the last micro-batch.

    Args:
        norms_P: of the gradient of each parameter, with the loss scale, where they are known already.
        only_finite: without ZeRO, too, leave the step out if the gradient is not finite, which makes a GPU wait.
        measures: find the norm of the gradient, which makes a GPU wait.
    """
    stage, scaler = engine.zero_optimization_stage(), _grad_scaler(engine)
    waits = only_finite or measures or engine.device.type == "cpu"
    scale = loss_scale(engine) if waits else 1.0
    # ZeRO knows the gradient's norm after its step; without it, the gradients are gone by then.
    norm = _norm_before_step(engine, norms_P) if stage == 0 and (measures or scaler is None) else None
    is_finite = None if norm is None or scaler is not None else norm.isfinite()
    if only_finite and is_finite is not None and not is_finite:
        for parameter in engine.module.parameters():
            # The optimizer passes over parameters without a gradient; DeepSpeed's own counters go on.
            parameter.grad = None
        engine.step()
        return StepTaken(
            applied=False, is_finite=is_finite, gradient_norm=float(norm) if measures and norm is not None else None
        )
    engine.step()
    applied = engine.was_step_applied()
    if is_finite is None:  # ZeRO, or the scaler, has looked
        is_finite = torch.full((), applied or scaler is not None, device=engine.device)
    if not applied and scaler is not None:
        # Under ZeRO, DeepSpeed 0.19.8 skips a step that overflowed without telling the scaler, which would then never
        # lower its scale.
        scaler.update(scaler.get_scale() * scaler.get_backoff_factor())
    elif stage == 0 and scaler is not None and waits:
        applied = loss_scale(engine) >= scale  # DeepSpeed says that it was applied in any case
    if measures:
        norm = engine.get_global_grad_norm() if stage > 0 else norm
    return StepTaken(applied, is_finite, float(norm) / scale if measures and norm is not None else None)


def loss_with_telling_gradient(loss: Tensor) -> Tensor:
    """The same loss; if it is not finite, nor is any gradient of it, which alone is what ZeRO looks at."""
    value = loss.detach()
    return loss * (1 + (value - value))


def _norm_before_step(engine, norms_P: Tensor | None) -> Tensor:
    """Of the whole gradient without ZeRO, before clipping."""
    if norms_P is not None:
        return torch.linalg.vector_norm(norms_P)
    return torch.nn.utils.get_total_norm([p.grad for p in engine.module.parameters() if p.grad is not None])


def loss_scale(engine) -> float:
    """What the loss is multiplied by: 1 unless the precision is fp16."""
    scaler = _grad_scaler(engine)
    return 1.0 if scaler is None else scaler.get_scale()


def optimizer_state(engine) -> Iterator[tuple[str, Tensor]]:
    """("exp_avg.<parameter>", whole tensor on the CPU), ... Every rank must iterate to the end."""
    from deepspeed.utils import safe_get_full_optimizer_state

    untouched = optimizer_step_count(engine) == 0  # every step so far overflowed in fp16: there is no state yet
    for name, parameter in trained_parameters(engine):
        for key in _states_of(engine, name):
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
    _start_optimizer(engine, step_count)
    for name, parameter in trained_parameters(engine):
        for key in _states_of(engine, name):
            value = state[f"{key}.{name}"].to(parameter.device)
            if stage == 0:
                base.state[parameter][key].copy_(value)
            elif stage == 3:
                safe_set_local_optimizer_state(parameter, cut(parameter, value, stage), key)
            else:
                safe_set_full_optimizer_state(parameter, value, key)


def _start_optimizer(engine, step_count: int) -> None:
    """State of zeros, which is otherwise made at the first step."""
    base = _base_optimizer(engine)
    if engine.zero_optimization_stage() == 3:
        groups = engine.optimizer.sub_group_to_group_id
        flats = [
            (flat, base.param_groups[groups[n]]) for n, flat in enumerate(engine.optimizer.fp32_partitioned_groups_flat)
        ]
    else:
        flats = [(flat, group) for group in base.param_groups for flat in group["params"]]
    for flat, group in flats:
        keys = (MOMENTUM,) if group.get(HIDDEN) else OPTIMIZER_STATES
        base.state[flat] = {"step": torch.tensor(float(step_count), device=flat.device)}
        base.state[flat].update({key: torch.zeros_like(flat) for key in keys})
    if engine.zero_optimization_stage() in (1, 2):
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()


def trained_parameters(engine) -> Iterator[tuple[str, Any]]:
    """Those that are not frozen, by their names, with what the loss learns."""
    return ((name, parameter) for name, parameter in engine.module.named_parameters() if parameter.requires_grad)


def _states_of(engine, name: str) -> tuple[str, ...]:
    """What the optimizer remembers of a parameter."""
    return (MOMENTUM,) if name in engine.hidden_matrices else OPTIMIZER_STATES


def scaler_state(engine) -> dict[str, Any] | None:
    """The loss scaler of fp16, JSON-able, counting steps; None in other precisions."""
    scaler = _grad_scaler(engine)
    if scaler is None:
        return None
    state, updates = scaler.state_dict(), _scaler_updates_per_step(engine)
    return {**state, **{key: state[key] // updates for key in SCALER_COUNTS}}


def restore_scaler(engine, state: dict[str, Any] | None) -> None:
    """Puts back what ``scaler_state`` gave, under any ZeRO stage."""
    scaler = _grad_scaler(engine)
    if scaler is not None and state is not None:
        updates = _scaler_updates_per_step(engine)
        scaler.load_state_dict({**state, **{key: state[key] * updates for key in SCALER_COUNTS}})


def _scaler_updates_per_step(engine) -> int:
    """ZeRO updates the scaler once for each group, so that it must count that much further until the scale grows.

    It then grows behind the last group of a step, never between two.
    """
    stage = engine.zero_optimization_stage()
    if stage == 0:
        return 1
    return len(engine.optimizer.fp16_groups if stage == 3 else engine.optimizer.bit16_groups)


def _base_optimizer(engine) -> torch.optim.Optimizer:
    return engine.optimizer.optimizer if engine.zero_optimization_stage() else engine.optimizer


def _grad_scaler(engine) -> torch.amp.GradScaler | None:
    # Stage 0 keeps it on the engine, the other stages on their optimizer.
    if engine.zero_optimization_stage() == 0:
        return engine.torch_autocast_z0_gradscaler
    return engine.optimizer.torch_autocast_gradscaler
