"""The projection of a scaled long skip: linear(cat([x, scale * s], -1)) (arXiv:2209.12152 and 2310.13545).

Neither the concatenation nor the scaled skip is written: linear is the sum of one product with x and one with s. A
scale that does not depend on the token goes into the weights of s, and its gradient comes from the gradient of those
weights, without a pass over activations. On a GPU the sum is one product of two sources, with a factor for each token
applied in between.

Shapes: B batch, T tokens, M = B T, D1 width of the stream x, D2 width of the skip s, O width of the output.
"""

from collections.abc import Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from scalelong.kernels import skip_linear_gemm, skip_linear_triton
from scalelong.kernels.arguments import described, none_as_empty
from scalelong.kernels.backend import forced_backend, get_backend
from scalelong.kernels.products import cast_by_autocast, product_dtype

Scale = Tensor | float | None


def skip_linear_ref(x_BTD1: Tensor, s_BTD2: Tensor, scale: Scale, weight_OD: Tensor, bias_O: Tensor | None) -> Tensor:
    """The specification, as published: scale the skip, concatenate, project."""
    if isinstance(scale, Tensor) and scale.dim() == 2:
        scale = scale.unsqueeze(-1)
    scaled_BTD2 = s_BTD2 if scale is None else (s_BTD2 * scale).to(s_BTD2.dtype)
    return F.linear(torch.cat([x_BTD1, scaled_BTD2], dim=-1), weight_OD, bias_O)


def skip_linear(x: Tensor, s: Tensor, scale: Scale, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``linear(cat([x, scale * s], -1), weight, bias)``.

    Args:
        x: (B, T, D1), the hidden stream.
        s: (B, T, D2), the long skip.
        scale: None for 1, a float, a scalar tensor, one factor a token (B, T) or (B, T, 1), or one a channel (D2,).
        weight: (O, D1 + D2).
        bias: (O,) or None.

    All but the scale have one dtype: fp32, bf16 or fp16; fp64 runs the reference. Under autocast they are cast as for
    torch's linear.

    Returns:
        (B, T, O), differentiable in every tensor argument. Backward keeps x, s and the parameters.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, naming them.
    """
    x, s, weight, bias = cast_by_autocast(x, s, weight, bias)  # type: ignore[assignment]
    _check(x, s, scale, weight, bias)
    if get_backend(x) == "reference":
        return skip_linear_ref(x, s, scale, weight, bias)
    tensors = _Tensors(x, s, scale if isinstance(scale, Tensor) else None, weight, bias)
    float_scale = 1.0 if scale is None or isinstance(scale, Tensor) else float(scale)
    if torch.compiler.is_compiling():
        return torch.ops.scalelong.skip_linear(*tensors, float_scale)
    return _SkipLinear.apply(*tensors, float_scale)


class _Tensors(NamedTuple):
    x: Tensor
    s: Tensor
    scale: Tensor | None
    weight: Tensor
    bias: Tensor | None


class _SkipLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        *tensors, ctx.float_scale = arguments
        ctx.save_for_backward(*tensors)
        return _forward(_Tensors(*tensors), ctx.float_scale)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        tensors = _Tensors(*ctx.saved_tensors)
        return *_backward(dy, tensors, ctx.float_scale, ctx.needs_input_grad), None


class _Products(NamedTuple):
    """What the matrix products work on: the scale is either folded into the weights of s or a factor of each row."""

    x_MD1: Tensor
    s_MD2: Tensor
    row_scale_M: Tensor | None
    weight_x_OD1: Tensor
    weight_s_OD2: Tensor


def _products(tensors: _Tensors, float_scale: float) -> _Products:
    x, s, scale, weight, _ = tensors
    dtype = x.dtype if get_backend(x) == "triton" else product_dtype(x)
    weight_x, weight_s = _dense_rows(weight.to(dtype)).split((x.shape[-1], s.shape[-1]), dim=1)
    row_scale = scale.reshape(-1) if scale is not None and scale.dim() > 1 else None
    if row_scale is None and (scale is not None or float_scale != 1.0):
        weight_s = (weight_s * (float_scale if scale is None else scale)).to(dtype)
    return _Products(_rows(x, dtype), _rows(s, dtype), row_scale, weight_x, weight_s)


def _forward(tensors: _Tensors, float_scale: float) -> Tensor:
    x, _, _, weight, bias = tensors
    products = _products(tensors, float_scale)
    y_MO = products.x_MD1.new_empty(products.x_MD1.shape[0], weight.shape[0])
    _forward_form(x).forward(*products, None if bias is None else bias.to(y_MO.dtype), y_MO)
    return y_MO.to(x.dtype).view(*x.shape[:-1], weight.shape[0])


def _backward(dy: Tensor, tensors: _Tensors, float_scale: float, needed: Sequence[bool]) -> tuple[Tensor | None, ...]:
    """The gradients of the tensors, where they are needed."""
    if torch.is_grad_enabled():  # with create_graph=True
        return _backward_of_reference(dy, tensors, float_scale, needed)
    x, _, scale, weight, _ = tensors
    needs_x, needs_s, needs_scale, needs_weight, needs_bias = needed[:5]
    products = _products(tensors, float_scale)
    x_MD1, s_MD2, row_scale_M, weight_x, weight_s = products
    dy_MO = _rows(dy, x_MD1.dtype)
    form = _backward_form(x)
    dx = ds = dscale = dweight = None

    needs_row_scale = needs_scale and row_scale_M is not None
    if needs_x or needs_s or needs_row_scale:
        dx = x_MD1.new_empty(x_MD1.shape) if needs_x else None
        ds = s_MD2.new_empty(s_MD2.shape) if needs_s or needs_row_scale else None
        if needs_row_scale:
            dscale = s_MD2.new_empty(s_MD2.shape[0], dtype=torch.float32)
        form.backward_inputs(dy_MO, weight_x, weight_s, s_MD2, row_scale_M, dx, ds, dscale)
    if needs_weight or (needs_scale and not needs_row_scale):
        dweight = weight.new_empty(weight.shape, dtype=x_MD1.dtype)
        form.backward_weight(dy_MO, x_MD1, s_MD2, row_scale_M, dweight)
        if row_scale_M is None:
            # So far that of the weights with the scale in them.
            dweight_s = dweight[:, x.shape[-1] :]
            if scale is not None and needs_scale:
                dscale = dweight_s.float() * weight[:, x.shape[-1] :].float()
                dscale = dscale.sum() if scale.dim() == 0 else dscale.sum(dim=0)
            if scale is not None or float_scale != 1.0:
                dweight_s *= float_scale if scale is None else scale
    dbias = dy_MO.sum(dim=0) if needs_bias else None
    grads = zip((dx, ds if needs_s else None, dscale, dweight if needs_weight else None, dbias), tensors, strict=True)
    return tuple(None if x is None or grad is None else grad.to(x.dtype).view(x.shape) for grad, x in grads)


def _backward_of_reference(
    dy: Tensor, tensors: _Tensors, float_scale: float, needed: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    x, s, scale, weight, bias = tensors
    y = skip_linear_ref(x, s, float_scale if scale is None else scale, weight, bias)
    wanted = [x for x, need in zip(tensors, needed, strict=False) if x is not None and need]
    grads = iter(torch.autograd.grad(y, wanted, dy, create_graph=True))
    return tuple(None if x is None or not need else next(grads) for x, need in zip(tensors, needed, strict=False))


def _forward_form(x: Tensor) -> ModuleType:
    """On a GPU in 16 bits one product of two sources: the library would round the first before it adds the second."""
    needs_one_product = x.dtype != torch.float32 and get_backend(x) == "triton"
    return skip_linear_triton if needs_one_product else _backward_form(x)


def _backward_form(x: Tensor) -> ModuleType:
    """The BLAS library, until a GPU has measured the Triton kernels to be faster; those where they are asked for."""
    is_asked = forced_backend() == "triton" or x.device.type == "cpu"
    return skip_linear_triton if is_asked and get_backend(x) == "triton" else skip_linear_gemm


def _rows(x: Tensor, dtype: torch.dtype) -> Tensor:
    return _dense_rows(x.to(dtype).reshape(-1, x.shape[-1]))


def _dense_rows(x: Tensor) -> Tensor:
    """Each row without gaps, as matrix products read it."""
    return x if x.stride(-1) == 1 else x.contiguous()


_ARGUMENTS = "Tensor x, Tensor s, Tensor? scale, Tensor weight, Tensor? bias, float float_scale"
torch.library.define("scalelong::skip_linear", f"({_ARGUMENTS}) -> Tensor", tags=torch.Tag.pt2_compliant_tag)
torch.library.define(
    "scalelong::skip_linear_backward",
    f"(Tensor dy, {_ARGUMENTS}, bool[] needed) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)


@torch.library.impl("scalelong::skip_linear", "default")
def _(*arguments: Any) -> Tensor:
    return _forward(_Tensors(*arguments[:5]), arguments[5])


@torch.library.impl("scalelong::skip_linear_backward", "default")
def _(dy: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    with torch.no_grad():
        return none_as_empty(_backward(dy, _Tensors(*arguments[:5]), *arguments[5:]), dy)


@torch.library.register_fake("scalelong::skip_linear")
def _(x, s, scale, weight, bias, float_scale):
    return x.new_empty(*x.shape[:-1], weight.shape[0])


@torch.library.register_fake("scalelong::skip_linear_backward")
def _(dy, x, s, scale, weight, bias, float_scale, needed):
    tensors = zip((x, s, scale, weight, bias), needed, strict=True)
    return none_as_empty((x.new_empty(x.shape) if x is not None and need else None for x, need in tensors), dy)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:5])
    ctx.float_scale = inputs[5]


def _backward_of_operator(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    needed = ctx.needs_input_grad[:5]
    grads = torch.ops.scalelong.skip_linear_backward(dy, *ctx.saved_tensors, ctx.float_scale, needed)
    return *(grad if need else None for grad, need in zip(grads, needed, strict=True)), None


torch.library.register_autograd("scalelong::skip_linear", _backward_of_operator, setup_context=_setup_context)


def _check(x: Tensor, s: Tensor, scale: Scale, weight: Tensor, bias: Tensor | None) -> None:
    if x.dim() != 3 or s.dim() != 3 or x.shape[:2] != s.shape[:2]:
        raise ValueError(
            f"skip_linear: x and s must be (B, T, D1) and (B, T, D2), got {tuple(x.shape)} and {tuple(s.shape)}"
        )
    if weight.dim() != 2 or weight.shape[1] != x.shape[-1] + s.shape[-1]:
        raise ValueError(
            f"skip_linear: weight {tuple(weight.shape)} does not fit x {tuple(x.shape)} beside s {tuple(s.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"skip_linear: bias {tuple(bias.shape)} does not fit weight {tuple(weight.shape)}")
    for name, tensor in (("s", s), ("weight", weight), ("bias", bias)):
        if tensor is not None and (tensor.dtype != x.dtype or tensor.device != x.device):
            raise ValueError(f"skip_linear: x is {described(x)} but {name} is {described(tensor)}")
    if isinstance(scale, Tensor):
        B, T, D2 = s.shape
        if tuple(scale.shape) not in ((), (B, T), (B, T, 1), (D2,)):
            raise ValueError(
                f"skip_linear: scale {tuple(scale.shape)} is none of scalar, {(B, T)}, {(B, T, 1)}, {(D2,)}"
            )
        if scale.device != x.device or not scale.is_floating_point():
            raise ValueError(f"skip_linear: scale is {described(scale)}, but x is {described(x)}")
