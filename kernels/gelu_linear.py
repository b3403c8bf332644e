"""The second half of a transformer's MLP, linear(gelu(x)), that keeps x alone for backward.

Eager PyTorch keeps gelu(x) as well, a quarter of what backward of a U-ViT block needs; computing it again costs one
pass.

Shapes: M rows (any leading dimensions), D width of x, O width of the output.
"""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from scalelong.kernels import gelu_linear_triton
from scalelong.kernels.backend import Backends, backend_of, is_traced, tells
from scalelong.kernels.double_backward import differentiable_gradients
from scalelong.kernels.precision import autocast_dtype, product_dtype, without_autocast

APPROXIMATE = {"gelu": "none", "gelu-tanh": "tanh"}  # as torch names it, by act


def gelu_linear_ref(x_MD: Tensor, weight_OD: Tensor, bias_O: Tensor | None, *, act: str = "gelu") -> Tensor:
    """The specification."""
    return F.linear(F.gelu(x_MD, approximate=APPROXIMATE[act]), weight_OD, bias_O)


def gelu_linear(x: Tensor, weight: Tensor, bias: Tensor | None, *, act: str = "gelu") -> Tensor:
    """``linear(gelu(x), weight, bias)``.

    torch.compile and torch.func's transforms see the plain formula, which torch.compile recomputes by itself.

    Args:
        x: (..., D).
        weight: (O, D).
        bias: (O,) or None.
        act: "gelu", the exact one, or "gelu-tanh", its approximation by tanh (arXiv:1606.08415), which DiT uses.

    Returns:
        (..., O), differentiable in every argument. Under autocast the product is in its dtype, as
        torch's linear has it, whatever that of x.

    Raises:
        ValueError: widths that do not fit, naming both shapes; an unknown act.
    """
    if weight.dim() != 2 or x.dim() < 1 or x.shape[-1] != weight.shape[1]:
        raise ValueError(f"gelu_linear: weight {tuple(weight.shape)} does not fit x {tuple(x.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"gelu_linear: bias {tuple(bias.shape)} does not fit weight {tuple(weight.shape)}")
    if act not in APPROXIMATE:
        raise ValueError(f"gelu_linear: act {act!r} is none of {', '.join(map(repr, APPROXIMATE))}")
    if _backend_of(x) == "reference":
        return gelu_linear_ref(x, weight, bias, act=act)
    return _GeluLinear.apply(x, weight, bias, autocast_dtype(x), act)


def _backend_of(x: Tensor) -> str:
    return "reference" if is_traced() else backend_of(x)


@tells(gelu_linear)
def _(x: Tensor, *_: Any, **__: Any) -> Backends:
    """Of gelu; the products beside it are PyTorch's."""
    return Backends(_backend_of(x), _backend_of(x))


class _GeluLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype, act: str) -> Tensor:
        ctx.save_for_backward(x, weight, bias)
        ctx.dtype, ctx.act = dtype, act
        product = product_dtype(x, dtype)
        with without_autocast(x):
            activated = _gelu(x, product, act)
            y = F.linear(activated, weight.to(product), None if bias is None else bias.to(product))
            return y.to(dtype).detach()  # linear may have returned a view, which nobody could change in place

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias = ctx.saved_tensors
        needed = needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        if torch.is_grad_enabled():  # with create_graph=True
            formula = partial(_reference, ctx.dtype, ctx.act)
            return *differentiable_gradients(formula, (x, weight, bias), needed, dy), None, None
        dx = dweight = dbias = activated = None
        product = product_dtype(x, ctx.dtype)
        with without_autocast(x):
            dy_MO = dy.reshape(-1, dy.shape[-1]).to(product)
            if needs_x:
                dx, activated = _gelu_backward((dy_MO @ weight.to(product)).view(x.shape), x, ctx.act)
            if needs_weight:
                activated = _gelu(x, product, ctx.act) if activated is None else activated
                dweight = (dy_MO.t() @ activated.reshape(-1, x.shape[-1])).to(weight.dtype)
            if needs_bias:
                dbias = torch.sum(dy_MO, 0, dtype=bias.dtype)
        return dx, dweight, dbias, None, None


def _gelu(x: Tensor, dtype: torch.dtype, act: str) -> Tensor:
    backend = backend_of(x)
    if backend == "reference":
        return F.gelu(x, approximate=APPROXIMATE[act]).to(dtype)
    x = x.contiguous()
    if backend == "triton":
        y = torch.empty_like(x, dtype=dtype)
        gelu_linear_triton.forward(x, y, act)
        return y
    y = torch.empty_like(x)
    torch.ops.scalelong_native.gelu_forward.default(y, x, act == "gelu-tanh")
    return y.to(dtype)


def _gelu_backward(dy: Tensor, x: Tensor, act: str) -> tuple[Tensor, Tensor]:
    """The gradient of x in its dtype, and gelu(x) anew in that of ``dy``, which may be overwritten."""
    backend = backend_of(x)
    if backend == "reference":
        approximate = APPROXIMATE[act]
        dx = torch.ops.aten.gelu_backward(dy.to(x.dtype), x, approximate=approximate)
        return dx, F.gelu(x, approximate=approximate).to(dy.dtype)
    dtype, x = dy.dtype, x.contiguous()
    if backend == "triton":
        dx, y = torch.empty_like(x), torch.empty_like(x, dtype=dtype)
        gelu_linear_triton.backward(dy, x, dx, y, act)
        return dx, y
    dy, y = dy.to(x.dtype), torch.empty_like(x)
    torch.ops.scalelong_native.gelu_backward.default(dy, y, dy, x, act == "gelu-tanh")
    return dy, y.to(dtype)


def _reference(dtype: torch.dtype, act: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    with without_autocast(x):
        bias = None if bias is None else bias.to(dtype)
        return F.linear(F.gelu(x, approximate=APPROXIMATE[act]).to(dtype), weight.to(dtype), bias)
