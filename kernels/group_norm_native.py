"""Calls the native CPU kernels of the fused GroupNorm (kernels/native/group_norm.cpp)."""

import torch
from torch import Tensor

_ACTS = {None: 0, "silu": 1, "gelu": 2}  # enum class Act in kernels/native/group_norm.h


def forward(
    h: Tensor,
    s: Tensor | None,
    scale: Tensor | None,
    float_scale: float,
    weight: Tensor | None,
    bias: Tensor | None,
    gain: Tensor | None,
    shift: Tensor | None,
    groups: int,
    eps: float,
    act: str | None,
    channels_last: bool,
    y: Tensor,
    mean: Tensor,
    rstd: Tensor,
) -> None:
    """Fills y, and mean and rstd of (N, G)."""
    parameters = (_factors(scale, s), float_scale, _floats(weight), _floats(bias), _floats(gain), _floats(shift))
    torch.ops.scalelong_native.group_norm_forward.default(
        y, mean, rstd, h, s, *parameters, groups, eps, _ACTS[act], channels_last
    )


def backward(
    dy: Tensor,
    h: Tensor,
    s: Tensor | None,
    scale: Tensor | None,
    float_scale: float,
    weight: Tensor | None,
    bias: Tensor | None,
    gain: Tensor | None,
    shift: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    groups: int,
    act: str | None,
    channels_last: bool,
    dh: Tensor,
    ds: Tensor | None,
) -> tuple[Tensor | None, ...]:
    """Fills dh and ds; returns, in fp32, dscale of (N, Cs), dweight and dbias of (C,), dgain and dshift of (N, C)."""
    N, C = dy.shape[:2]
    dscale = None if s is None or scale is None else mean.new_empty(s.shape[:2])
    dweight, dbias = (None if x is None else mean.new_empty(C) for x in (weight, bias))
    dgain, dshift = mean.new_empty((N, C)), mean.new_empty((N, C))
    torch.ops.scalelong_native.group_norm_backward.default(
        *(dh, ds, dscale, dweight, dbias, dgain, dshift, dy, h, s, _factors(scale, s), float_scale),
        *(_floats(weight), _floats(bias), _floats(gain), _floats(shift), mean, rstd, groups, _ACTS[act], channels_last),
    )
    return dscale, dweight, dbias, dgain, dshift


def _floats(parameter: Tensor | None) -> Tensor | None:
    return None if parameter is None else parameter.to(torch.float32).contiguous()


def _factors(scale: Tensor | None, s: Tensor | None) -> Tensor | None:
    return None if scale is None or s is None else scale.to(torch.float32).expand(s.shape[:2])
