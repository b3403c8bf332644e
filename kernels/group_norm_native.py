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
    parameters = (_floats(scale), float_scale, _floats(weight), _floats(bias), _floats(gain), _floats(shift))
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
    """Fills dh and ds; returns the gradients of scale, weight, bias, gain and shift, in fp32."""
    grads = tuple(
        None if x is None else torch.empty(x.shape, dtype=torch.float32) for x in (scale, weight, bias, gain, shift)
    )
    torch.ops.scalelong_native.group_norm_backward.default(
        *(dh, ds, *grads, dy, h, s, _floats(scale), float_scale, _floats(weight), _floats(bias), _floats(gain)),
        *(_floats(shift), mean, rstd, groups, _ACTS[act], channels_last),
    )
    return grads


def _floats(parameter: Tensor | None) -> Tensor | None:
    if parameter is None or (parameter.dtype == torch.float32 and parameter.is_contiguous()):
        return parameter
    return parameter.to(torch.float32).contiguous()
