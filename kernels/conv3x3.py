"""The 3x3 convolution of residual blocks, with the gradients of its parameters from the native library on a CPU.

Most of a UNet's training step on a CPU goes into convolutions, and most of theirs into the gradient of the weights,
where PyTorch's library reaches half the speed it has elsewhere. Forward and the gradient of the input are PyTorch's.

Shapes: N batch, C channels of the input, O channels of the output, H height, W width.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.flop_counter import register_flop_formula

from scalelong.kernels import native_library
from scalelong.kernels.arguments import described
from scalelong.kernels.backend import Backends, backend_of, is_traced, tells


def conv3x3_ref(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The specification."""
    return F.conv2d(x, weight, bias, padding=1)


def conv3x3(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``conv2d(x, weight, bias, padding=1)``.

    PyTorch's own wherever the native library does not run (GPUs, 16 bits, fp64, autocast, torch.compile, fake tensors).

    Args:
        x: (N, C, H, W), contiguous or channels_last, or (C, H, W).
        weight: (O, C, 3, 3).
        bias: (O,) or None.

    Returns:
        (N, O, H, W), or (O, H, W), differentiable in every argument.

    Raises:
        ValueError: shapes that do not fit, naming both.
    """
    if x.dim() not in (3, 4) or tuple(weight.shape[1:]) != (x.shape[-3], 3, 3):
        raise ValueError(f"conv3x3: weight {tuple(weight.shape)} does not fit x {described(x)}")
    if not _runs_natively(x, weight, bias):
        return conv3x3_ref(x, weight, bias)
    return _Conv3x3.apply(x, weight, bias)


@tells(conv3x3)
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Backends:
    """The formula is PyTorch's convolution."""
    plain = "reference" if backend_of(x) == "reference" else "torch"
    return Backends(plain, "native" if _runs_natively(x, weight, bias) else plain)


def _runs_natively(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    return (
        not is_traced()
        and backend_of(x) == "native"
        and not torch.is_autocast_enabled("cpu")
        and all(y is None or y.dtype == torch.float32 for y in (x, weight, bias))
        and weight.requires_grad
        and not isinstance(x, FakeTensor)
        and x.dim() == 4
        and x.numel() > 0
    )


class _Conv3x3(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return conv3x3_ref(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph=True: what PyTorch can differentiate again
            return _backward_of_reference(dy, x, weight, list(ctx.needs_input_grad))
        dx, _, _ = _backward_of_reference(dy, x, weight, [ctx.needs_input_grad[0], False, False])
        dweight, dbias = weight.new_empty(weight.shape), weight.new_empty(weight.shape[0])
        native = torch.ops.scalelong_native
        scratch = x.new_empty(native.conv3x3_scratch.default(dy, x))
        native.conv3x3_weight_grad.default(dweight, dbias, scratch, dy, x)
        return dx, dweight, dbias if ctx.needs_input_grad[2] else None


def _backward_of_reference(dy: Tensor, x: Tensor, weight: Tensor, wanted: list[bool]) -> tuple[Tensor, ...]:
    return torch.ops.aten.convolution_backward(
        dy, x, weight, [weight.shape[0]], [1, 1], [1, 1], [1, 1], False, [0, 0], 1, wanted
    )


if native_library.ERROR is None:

    @register_flop_formula(torch.ops.scalelong_native.conv3x3_weight_grad)
    def _(dweight: Any, dbias: Any, scratch: Any, dy: Any, x: Any, *_: Any, **__: Any) -> int:
        """Shapes in; two for each multiply-add, as torch counts the gradients of its convolutions."""
        return 2 * math.prod(dweight) * dy[0] * math.prod(dy[2:])
