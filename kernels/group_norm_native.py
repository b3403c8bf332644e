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
    torch.ops.scalelong_native.group_norm_forward.default(
        *(y, mean, rstd, h, s, _floats(scale), float_scale, _floats(weight), _floats(bias), _floats(gain)),
        *(_floats(shift), groups, eps, _ACTS[act], channels_last),
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
    dh: Tensor | None,
    ds: Tensor | None,
    wanted: tuple[bool, ...] = (True,) * 7,
) -> tuple[Tensor | None, ...]:
    """Fills dh and ds; returns the gradients of scale, weight, bias, gain and shift, in fp32.

    ``wanted`` says which gradients to compute, in the order h, s, scale, weight, bias, gain, shift. Of the others,
    those of parameters come back as None, and dh and ds are left as they are or are None.
    """
    wants_h, wants_s, *_ = wanted
    grads = tuple(
        _empty_floats_like(x) if x is not None and is_wanted else None
        for x, is_wanted in zip((scale, weight, bias, gain, shift), wanted[2:], strict=True)
    )
    if grads[0] is not None and ds is None:
        assert s is not None
        ds = torch.empty_like(s)  # the gradient of scale is summed while that of s is made
    torch.ops.scalelong_native.group_norm_backward.default(
        dh if wants_h else None,
        ds if wants_s or grads[0] is not None else None,
        *(*grads, dy, h, s, _floats(scale), float_scale, _floats(weight), _floats(bias), _floats(gain), _floats(shift)),
        *(mean, rstd, groups, _ACTS[act], channels_last),
    )
    return grads


def _empty_floats_like(x: Tensor) -> Tensor:
    # empty_like costs a third of empty with a shape and a dtype: parts of a call's cost that a small tensor sees.
    if x.dtype == torch.float32 and x.is_contiguous():
        return torch.empty_like(x)
    return torch.empty(x.shape, dtype=torch.float32)


def _floats(parameter: Tensor | None) -> Tensor | None:
    if parameter is None or (parameter.dtype == torch.float32 and parameter.is_contiguous()):
        return parameter
    return parameter.to(torch.float32).contiguous()
