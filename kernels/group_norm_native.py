"""Calls the native CPU kernels of the fused GroupNorm (kernels/native/group_norm.cpp)."""

import torch
from torch import Tensor

from scalelong.kernels.group_norm_arguments import Options, Tensors, Wanted

_ACTS = {None: 0, "silu": 1, "gelu": 2}  # enum class Act in kernels/native/group_norm.h


def forward(tensors: Tensors, options: Options, channels_last: bool, y: Tensor, mean: Tensor, rstd: Tensor) -> None:
    """Fills y, and mean and rstd of (N, G)."""
    h, s, *parameters = tensors
    scale, weight, bias, gain, shift = map(_floats, parameters)
    torch.ops.scalelong_native.group_norm_forward.default(
        *(y, mean, rstd, h, s, scale, options.float_scale, weight, bias, gain, shift),
        *(options.groups, options.eps, _ACTS[options.act], channels_last),
    )


def backward(
    dy: Tensor, tensors: Tensors, mean: Tensor, rstd: Tensor, options: Options, channels_last: bool, wanted: Wanted
) -> tuple[Tensor | None, ...]:
    """The gradients that are wanted: of h and s, and of scale, weight, bias, gain and shift in fp32."""
    h, s, *parameters = tensors
    dh, ds = torch.empty_like(h), None if s is None else torch.empty_like(s)
    grads = tuple(None if x is None else torch.empty(x.shape, dtype=torch.float32) for x in parameters)
    scale, weight, bias, gain, shift = map(_floats, parameters)
    torch.ops.scalelong_native.group_norm_backward.default(
        *(dh, ds, *grads, dy, h, s, scale, options.float_scale, weight, bias, gain, shift),
        *(mean, rstd, options.groups, _ACTS[options.act], channels_last),
    )
    return tuple(grad if want else None for grad, want in zip((dh, ds, *grads), wanted, strict=True))


def _floats(parameter: Tensor | None) -> Tensor | None:
    if parameter is None or (parameter.dtype == torch.float32 and parameter.is_contiguous()):
        return parameter
    return parameter.to(torch.float32).contiguous()
