"""The gradients that a step is about to take, parameter by parameter, under every ZeRO stage."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from scalelong.train.zero.shards import master_shard, stage_of


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


class AgainstWeights(NamedTuple):
    """What gradients are to the weights that they are of: (P,) each, fp32, one for each parameter."""

    weight_norms_P: Tensor
    """L2 norms of the weights."""
    products_P: Tensor
    """Inner products of weight and gradient."""


def gradients_against_weights(engine, *, scale: float = 1.0) -> AgainstWeights:
    """Weights and their gradients before a step, the same on all ranks, which all must call it.

    Args:
        scale: the loss scale, which is taken out.
    """
    stage, gradients = engine.zero_optimization_stage(), local_gradients(engine)
    squares, products = [], []
    for parameter, gradient in zip(engine.module.parameters(), gradients, strict=True):
        weight = _without_padding(parameter, master_shard(parameter, stage), stage).to(gradient.device).flatten()
        if stage > 0 and stage_of(parameter, stage) == 0 and torch.distributed.get_rank() > 0:
            weight = weight.new_empty(0)  # whole on every rank, and counted once
        gradient = _without_padding(parameter, gradient, stage).flatten()
        squares.append(torch.linalg.vector_norm(weight, dtype=torch.float32).double().square())
        # A parameter that the loss does not reach has no gradient without ZeRO, and none but zeros elsewhere.
        has_gradient = gradient.numel() == weight.numel()
        products.append(torch.dot(weight, gradient.to(weight.dtype)) if has_gradient else weight.new_zeros(()))
    sums_2P = torch.stack([torch.stack(squares), torch.stack(products).double()])
    if stage > 0 and torch.distributed.get_world_size() > 1:
        sums_2P = sums_2P.to(engine.device)
        torch.distributed.all_reduce(sums_2P)
    return AgainstWeights(sums_2P[0].sqrt().float(), (sums_2P[1] / scale).float())


def scale_gradients(engine, factor: float) -> None:
    """Multiplies the gradient, before the step."""
    if factor != 1.0:
        for gradient in local_gradients(engine):
            gradient.mul_(factor)


def _without_padding(parameter: Any, shard: Tensor, stage: int) -> Tensor:
    """What belongs to the parameter: shards of ZeRO 3 are of one size, and the last one may end behind it."""
    if stage < 3:
        return shard
    begin = torch.distributed.get_rank() * parameter.ds_tensor.numel()
    return shard.flatten()[: max(0, parameter.ds_numel - begin)]


def _local_gradient(engine, parameter: Any, stage: int) -> Tensor:
    if not parameter.requires_grad:
        return parameter.new_empty(0)
    if stage == 0:
        return parameter.new_empty(0) if parameter.grad is None else parameter.grad
    if stage == 3:
        return engine.optimizer._get_fp32_grad_state_partition(parameter, release_swap_buffers=True)[0]
    fragment = parameter._hp_mapping
    if fragment is None:
        return parameter.new_empty(0)
    return fragment.get_lp_grad_fragment(parameter._index_in_param_group)
