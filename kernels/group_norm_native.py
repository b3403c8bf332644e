"""Calls the native CPU kernels of the fused GroupNorm (kernels/native/group_norm.cpp)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from scalelong.kernels.group_norm_arguments import Options, Tensors

_ACTS = {None: 0, "silu": 1, "gelu": 2, "gelu-tanh": 3}  # enum class Act in kernels/native/group_norm.h


def forward(
    tensors: Tensors, options: Options, channels_last: bool, y: Tensor, mean: Tensor, rstd: Tensor, kind: object = None
) -> None:
    """Fills y, and mean and rstd of (N, G)."""
    h, s, *parameters = tensors
    scale, weight, bias, gain, shift = map(_floats, parameters)
    torch.ops.scalelong_native.group_norm_forward.default(
        *(y, mean, rstd, h, s, scale, options.float_scale, weight, bias, gain, shift),
        *(options.groups, options.eps, _ACTS[options.act], channels_last),
    )


def backward(
    dy: Tensor,
    tensors: Tensors,
    mean: Tensor,
    rstd: Tensor,
    options: Options,
    channels_last: bool,
    wanted: Sequence[bool],
    kind: object = None,
) -> tuple[Tensor | None, ...]:
    """The gradients that are wanted: of h and s, and of scale, weight, bias, gain and shift in fp32."""
    h, s, *parameters = tensors
    wants_h, wants_s, *_ = wanted
    grads = tuple(
        _empty_floats_like(x) if x is not None and is_wanted else None
        for x, is_wanted in zip(parameters, wanted[2:], strict=True)
    )
    dh = torch.empty_like(h) if wants_h else None
    # The gradient of scale is summed while that of s is made.
    ds = torch.empty_like(s) if s is not None and (wants_s or grads[0] is not None) else None
    scale, weight, bias, gain, shift = map(_floats, parameters)
    torch.ops.scalelong_native.group_norm_backward.default(
        *(dh, ds, *grads, dy, h, s, scale, options.float_scale, weight, bias, gain, shift),
        *(mean, rstd, options.groups, _ACTS[options.act], channels_last),
    )
    return dh, ds if wants_s else None, *grads


def _empty_floats_like(x: Tensor) -> Tensor:
    # empty_like costs a third of empty with a shape and a dtype: parts of a call's cost that a small tensor sees.
    if x.dtype == torch.float32 and x.is_contiguous():
        return torch.empty_like(x)
    return torch.empty(x.shape, dtype=torch.float32)


def _floats(parameter: Tensor | None) -> Tensor | None:
    if parameter is None or (parameter.dtype == torch.float32 and parameter.is_contiguous()):
        return parameter
    return parameter.to(torch.float32).contiguous()
