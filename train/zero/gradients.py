"""The gradients that a step is about to take, parameter by parameter, under every ZeRO stage."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def local_gradients(engine) -> list[Tensor]:
    """This rank's part of every parameter's gradient, in their order: the memory that the optimizer's step reads.

    There is one between backward of the last micro-batch and the step. It is the mean over ranks and micro-batches,
    times the loss scale; empty for what lies on another rank, or has no gradient.
    """
    stage = engine.zero_optimization_stage()
    return [_local_gradient(engine, parameter, stage) for parameter in engine.module.parameters()]


def gradient_norms(engine, *, scale: float = 1.0) -> Tensor:
    """The L2 norm of every parameter's whole gradient: (P,), fp32, the same on all ranks, which all must call it.

    Args:
        scale: the loss scale, which is taken out.
    """
    norms_P = torch.stack(torch._foreach_norm(local_gradients(engine))).float()
    if engine.zero_optimization_stage() > 0 and torch.distributed.get_world_size() > 1:
        squares_P = norms_P.double().square()
        torch.distributed.all_reduce(squares_P)
        norms_P = squares_P.sqrt().float()
    return norms_P if scale == 1.0 else norms_P / scale


def scale_gradients(engine, factors: Sequence[float]) -> None:
    """Multiplies the gradient of every parameter by its factor, before the step."""
    for gradient, factor in zip(local_gradients(engine), factors, strict=True):
        if factor != 1.0:
            gradient.mul_(factor)


def _local_gradient(engine, parameter: Any, stage: int) -> Tensor:
    if stage == 0:
        return parameter.new_empty(0) if parameter.grad is None else parameter.grad
    if stage == 3:
        return engine.optimizer._get_fp32_grad_state_partition(parameter, release_swap_buffers=True)[0]
    fragment = parameter._hp_mapping
    if fragment is None:
        return parameter.new_empty(0)
    return fragment.get_lp_grad_fragment(parameter._index_in_param_group)
