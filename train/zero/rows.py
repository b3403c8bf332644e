"""What is done to rows of parameters after each step of the optimizer, though ZeRO cuts parameters anywhere."""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from scalelong.train.zero import shards

CACHED_NUMBERS = 1 << 17
"""How many numbers are worked on at a time: what a core's cache holds, so that memory is read and written once."""


@torch.no_grad()
def apply_to_rows(engine) -> None:
    """Puts what ``Backbone.after_step`` makes of parameters in their place. Every rank must call it.

    All ranks compute the same bits of whole parameters in fp32: nothing is sent under ZeRO 0 to 2, and ZeRO 3 gathers
    one parameter at a time.
    """
    parameters = dict(engine.module.named_parameters())
    for name, function in engine.row_functions.items():
        parameter, stage = parameters[name], engine.zero_optimization_stage()
        if stage == 3:
            _replace_shard(parameter, function(shards.gather(parameter, parameter.ds_tensor.to(engine.device), stage)))
        else:
            replace_rows(parameter, function)
            _copy_to_master(parameter, stage)


@torch.no_grad()
def follow_weights(engine) -> None:
    """Where layers follow the largest singular values of their weights, takes a power step of each. Every rank must
    call it: all compute the same bits of whole weights, of which ZeRO 3 gathers one at a time."""
    for _, layer in engine.sigma_layers:
        weight = layer.weight
        if not weight.requires_grad:
            continue
        if engine.zero_optimization_stage() == 3:
            weight = shards.gather(weight, weight.ds_tensor.to(engine.device), 3)
        layer.power_step(weight)


def replace_rows(parameter: Tensor, function: Callable[[Tensor], Tensor]) -> None:
    """Puts ``function(rows)`` in the place of some rows at a time."""
    for rows in parameter.split(max(1, CACHED_NUMBERS // max(1, parameter[0].numel()))):
        rows.copy_(function(rows))


def _copy_to_master(parameter: Any, stage: int) -> None:
    """ZeRO 1 and 2 update a fragment of their own, of which parameters are whole copies."""
    if stage > 0 and parameter._hp_mapping is not None:
        parameter._hp_mapping.hp_fragment.copy_(shards.cut(parameter, parameter, stage))


def _replace_shard(parameter: Any, whole: Tensor) -> None:
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
    from deepspeed.utils import safe_set_local_fp32_param

    shard = shards.cut(parameter, whole, 3)
    parameter.ds_tensor.copy_(shard)
    safe_set_local_fp32_param(parameter, shard)  # the same memory, but for an optimizer that is offloaded
    if parameter.ds_status == ZeroParamStatus.AVAILABLE:  # small ones stay gathered from step to step
        cast(Tensor, parameter.data).copy_(whole)
