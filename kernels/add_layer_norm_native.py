"""Calls the native CPU kernels of the fused residual sum and LayerNorm (kernels/native/layer_norm.cpp)."""

from collections.abc import Hashable

import torch
from torch import Tensor

from scalelong.kernels.add_layer_norm_tensors import Gradients, Inputs, Outputs


def forward(inputs: Inputs, eps: float, outputs: Outputs, kind: Hashable = None) -> None:
    """Fills the outputs."""
    x, branch, *parameters, angle = inputs
    torch.ops.scalelong_native.add_layer_norm_forward.default(
        *outputs, x, branch, *map(_floats, parameters), *_turns(angle), inputs.num_samples, eps
    )


def backward(
    dstream: Tensor | None,
    dy: Tensor,
    inputs: Inputs,
    mean: Tensor,
    rstd: Tensor,
    gradients: Gradients,
    kind: Hashable = None,
) -> None:
    """Fills the gradients; those of the parameters are in fp32."""
    stream, branch, *parameters, angle = inputs
    torch.ops.scalelong_native.add_layer_norm_backward.default(
        *(*gradients, dstream, dy, stream, mean, rstd, branch, *map(_floats, parameters)),
        *(*_turns(angle), inputs.num_samples),
    )


def _turns(angle: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Cosines and sines of the angles."""
    angle = _floats(angle)
    return (None, None) if angle is None else (angle.cos(), angle.sin())


def _floats(parameter: Tensor | None) -> Tensor | None:
    if parameter is None or (parameter.dtype == torch.float32 and parameter.is_contiguous()):
        return parameter
    return parameter.to(torch.float32).contiguous()
