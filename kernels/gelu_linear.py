"""The second half of a transformer's MLP, linear(gelu(x)), that keeps x alone for backward.

Eager PyTorch keeps gelu(x) as well, a quarter of what backward of a U-ViT block needs; computing it again costs one
pass.

Shapes: M rows (any leading dimensions), D width of x, O width of the output.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from scalelong.kernels.backend import get_backend
from scalelong.kernels.products import cast_by_autocast, product_dtype


def gelu_linear_ref(x_MD: Tensor, weight_OD: Tensor, bias_O: Tensor | None) -> Tensor:
    """The specification."""
    return F.linear(F.gelu(x_MD), weight_OD, bias_O)


def gelu_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``linear(gelu(x), weight, bias)`` with the exact gelu.

    torch.compile sees the plain formula, which it recomputes by itself.

    Args:
        x: (..., D).
        weight: (O, D).
        bias: (O,) or None.

    Returns:
        (..., O), differentiable in every argument. Under autocast computed in its dtype, as torch's linear.

    Raises:
        ValueError: widths that do not fit, naming both shapes.
    """
    if weight.dim() != 2 or x.dim() < 1 or x.shape[-1] != weight.shape[1]:
        raise ValueError(f"gelu_linear: weight {tuple(weight.shape)} does not fit x {tuple(x.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"gelu_linear: bias {tuple(bias.shape)} does not fit weight {tuple(weight.shape)}")
    if torch.compiler.is_compiling():
        return gelu_linear_ref(x, weight, bias)
    return _GeluLinear.apply(*cast_by_autocast(x, weight, bias))


def _gelu(x: Tensor) -> Tensor:
    if get_backend(x) != "native":
        return F.gelu(x)
    x = x.contiguous()
    y = torch.empty_like(x)
    torch.ops.scalelong_native.gelu_forward.default(y, x)
    return y


def _gelu_backward(dy: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient of x, and gelu(x) anew; the native library makes both in one pass and may overwrite ``dy``."""
    if get_backend(x) != "native" or torch.is_grad_enabled():
        return torch.ops.aten.gelu_backward(dy, x), F.gelu(x)
    dy, x = dy.contiguous(), x.contiguous()
    y = torch.empty_like(x)
    torch.ops.scalelong_native.gelu_backward.default(dy, y, dy, x)
    return dy, y


class _GeluLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        dtype = product_dtype(x)
        y = F.linear(_gelu(x).to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))
        return y.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        dtype = product_dtype(x)
        dx = dweight = activated = None
        dy_MO = dy.to(dtype).reshape(-1, dy.shape[-1])
        if needs_x:
            dx, activated = _gelu_backward((dy_MO @ weight.to(dtype)).to(x.dtype).view(x.shape), x)
        if needs_weight:
            activated = _gelu(x) if activated is None else activated
            dweight = (dy_MO.t() @ activated.to(dtype).reshape(-1, x.shape[-1])).to(weight.dtype)
        return dx, dweight, dy_MO.sum(dim=0).to(x.dtype) if needs_bias else None
