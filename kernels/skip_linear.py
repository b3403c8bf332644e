"""The projection of a scaled long skip: linear(cat([x, scale * s], -1)) (arXiv:2209.12152 and 2310.13545).

Neither the concatenation nor the scaled skip is written: linear is the sum of one product with x and one with s. A
scale that does not depend on the token goes into the weights of s, and its gradient comes from the gradient of those
weights, without a pass over activations. On a GPU the sum is one product of two sources, with a factor for each token
applied in between; under autocast it reads fp32 inputs as they are and writes their gradients in fp32.

Shapes: B batch, T tokens, M = B T, D1 width of the stream x, D2 width of the skip s, O width of the output.
"""

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from scalelong.kernels import skip_linear_blas, skip_linear_triton
from scalelong.kernels.arguments import Scale, as_argument, concatenated_tokens, described, is_one_of, none_as_empty
from scalelong.kernels.backend import FUSED_DTYPES, Backends, backend_of, forced_backend, is_traced, tells
from scalelong.kernels.double_backward import differentiable_gradients, second_derivatives
from scalelong.kernels.launches import Kept, places
from scalelong.kernels.precision import autocast_dtype, is_autocast, product_dtype, without_autocast

# What runs in Triton on a GPU, the rest by the BLAS library over copies in 16 bits. Chosen by modelled traffic, until
# bench_skip_linear.py has rows of a GPU. One product rounds its sum once, where the library would round twice. fp32
# operands are the heavier case: at 64 x 257 tokens of width 512, forward reads 67 MB where copies would cost 67 read,
# 34 written and 34 read again, 34 us at 3 TB/s beside a product of 30 us; backward's weights read the same 67 MB, and
# its inputs are written once, in fp32, with the scale of their row.
IN_TRITON = {"16 bits": ("forward",), "fp32 operands": ("forward", "inputs", "weight")}


def skip_linear_ref(x_BTD1: Tensor, s_BTD2: Tensor, scale: Scale, weight_OD: Tensor, bias_O: Tensor | None) -> Tensor:
    """The specification, as published: scale the skip, concatenate, project."""
    return F.linear(concatenated_tokens(x_BTD1, s_BTD2, scale), weight_OD, bias_O)


def skip_linear(x: Tensor, s: Tensor, scale: Scale, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``linear(cat([x, scale * s], -1), weight, bias)``.

    Args:
        x: (*, D1), the hidden stream, with any leading dimensions, for tokens (B, T).
        s: (*, D2), the long skip.
        scale: None for 1, a float, a tensor of one element () or (1,), one factor a channel (D2,), or one a token, (*)
            or (*, 1). Where the leading dimensions are one, and as many as D2, a factor a token must be (*, 1).
        weight: (O, D1 + D2).
        bias: (O,) or None.

    All but the scale have one dtype: fp32, bf16 or fp16; fp64 and torch.func's transforms run the reference. Under
    autocast each may have its own, and the product is in autocast's, as torch's linear has it.

    Returns:
        (*, O), differentiable in every tensor argument. Backward keeps x, s and the parameters as they are given.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, naming them.
    """
    if isinstance(scale, Tensor) and scale.dim() == 1 and (scale.numel() == 1 or scale.shape != s.shape[-1:]):
        _check(x, s, scale, weight, bias)  # before it has another shape
        scale = scale.reshape(()) if scale.numel() == 1 else scale[:, None]
    backend = backend_of_products(x, s, weight)
    if backend == "reference":
        _check(x, s, scale, weight, bias)
        return skip_linear_ref(x, s, scale, weight, bias)
    return projected(x, s, scale, weight, bias, channels_last=False, backend=backend, check=_check)


def backend_of_products(x: Tensor, s: Tensor, weight: Tensor) -> str:
    """``backend_of`` x, but the reference for subclasses of tensors, which kernels cannot read."""
    backend = backend_of(x)
    return "reference" if any(map(is_traceable_wrapper_subclass, (x, s, weight))) else backend


@tells(skip_linear)
def backends_of_projection(x: Tensor, s: Tensor, scale: Scale, weight: Tensor, bias: Tensor | None) -> Backends:
    backend = backend_of_products(x, s, weight)
    if backend == "reference":
        return Backends(backend, backend)
    tensors = _Tensors(x, s, scale if isinstance(scale, Tensor) else None, weight, bias)
    kind = _new_kind(tensors, _Options(1.0, autocast_dtype(x)), backend, None)
    names = {skip_linear_triton: "triton", skip_linear_blas: "torch"}
    return Backends(names[kind.forward], "+".join(dict.fromkeys((names[kind.inputs], names[kind.weight]))))


def projected(
    x: Tensor,
    s: Tensor,
    scale: Scale,
    weight: Tensor,
    bias: Tensor | None,
    *,
    channels_last: bool,
    backend: str,
    check: Callable[..., None] | None = None,
) -> Tensor:
    """What ``skip_linear`` computes; or, ``channels_last``, on images (N, C, *) that lie in that layout.

    ``backend`` is that of x. ``check`` is called with the arguments where they are of a kind that it has not seen yet.
    """
    if is_traced() and scale is not None and not isinstance(scale, Tensor):
        scale = as_argument(scale, x)
    is_tensor = isinstance(scale, Tensor)
    tensors = _Tensors(x, s, scale if is_tensor else None, weight, bias)
    float_scale = 1.0 if scale is None or is_tensor else float(scale)
    if is_traced() and not channels_last:
        if check is not None:
            check(x, s, scale, weight, bias)
        return torch.ops.scalelong.skip_linear(*tensors, float_scale, autocast_dtype(x))
    options = _Options(float_scale, autocast_dtype(x), channels_last)
    return _SkipLinear.apply(*tensors, _kind_of_call(tensors, options, backend, check))


class _Tensors(NamedTuple):
    x: Tensor
    s: Tensor
    scale: Tensor | None
    weight: Tensor
    bias: Tensor | None


class _Options(NamedTuple):
    float_scale: float
    dtype: torch.dtype
    """Of the output."""
    channels_last: bool = False


@dataclass(frozen=True, eq=False, slots=True)  # compared as an object, as the key of plans
class _Kind:
    """What calls share whose options, backend and ``signature`` of each tensor are the same."""

    options: _Options
    forward: ModuleType
    """Which of the two ways to multiply takes this product."""
    inputs: ModuleType
    weight: ModuleType
    product: torch.dtype
    """In which the products are computed."""


_KINDS: Kept[_Kind] = Kept()


def _kind_of_call(
    tensors: _Tensors, options: _Options, backend: str, check: Callable[..., None] | None = None
) -> _Kind:
    make = partial(_new_kind, tensors, options, backend, check)
    if backend != "triton":  # which has plans to keep
        return make()
    return _KINDS.of_call(tensors, (options, backend, forced_backend(), check), make)


def _new_kind(tensors: _Tensors, options: _Options, backend: str, check: Callable[..., None] | None) -> _Kind:
    x, s, scale, weight, bias = tensors
    if check is not None:
        check(x, s, options.float_scale if scale is None else scale, weight, bias)
    return _Kind(
        options=options,
        forward=_way_to_multiply("forward", tensors, options, backend),
        inputs=_way_to_multiply("inputs", tensors, options, backend),
        weight=_way_to_multiply("weight", tensors, options, backend),
        product=product_dtype(x, options.dtype),
    )


class _SkipLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        *tensors, ctx.kind = arguments
        ctx.save_for_backward(*tensors)
        return _forward(_Tensors(*tensors), ctx.kind)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        tensors, needed = _Tensors(*ctx.saved_tensors), ctx.needs_input_grad[:5]
        if torch.is_grad_enabled():  # with create_graph=True
            return *differentiable_gradients(partial(_reference, ctx.kind.options), tensors, needed, dy), None
        return *_backward(dy, tensors, ctx.kind, needed), None


class _Products(NamedTuple):
    """What the matrix products work on."""

    x: Tensor  # (..., D1), rows that lie evenly
    s: Tensor  # (..., D2)
    row_scale: Tensor | None  # one factor a row
    weight: Tensor  # (O, D1 + D2), in the dtype of the products
    weight_s: Tensor | None  # (O, D2), with the scale in them that rows share, if there is one

    @property
    def matrices(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor]:
        D1 = self.x.shape[-1]
        row_scale = None if self.row_scale is None else self.row_scale.reshape(-1)
        weight_s = self.weight[:, D1:] if self.weight_s is None else self.weight_s
        return _matrix(self.x), _matrix(self.s), row_scale, self.weight[:, :D1], weight_s


def _products(tensors: _Tensors, kind: _Kind) -> _Products:
    """The weights in the dtype of the product, the activations as they are: copies are up to who needs them."""
    x, s, scale, weight, _ = tensors
    dtype, channels_last = kind.product, kind.options.channels_last
    x, s = _rows(x, channels_last), _rows(s, channels_last)
    weight = _dense_rows(weight if weight.dtype == dtype else weight.to(dtype))
    if scale is None or scale.dim() > 1:
        return _Products(x, s, scale, weight, None)
    return _Products(x, s, None, weight, (weight[:, x.shape[-1] :] * scale).to(dtype))


def _forward(tensors: _Tensors, kind: _Kind) -> Tensor:
    x, bias, (float_scale, _, channels_last) = tensors.x, tensors.bias, kind.options
    with without_autocast(x):
        products = _products(tensors, kind)
        y = _empty(x, tensors.weight.shape[0], kind.options.dtype, channels_last)
        y_rows = _rows(y, channels_last)
        if kind.forward is skip_linear_triton:
            skip_linear_triton.forward(*products, bias, y_rows, float_scale, kind)
        else:
            skip_linear_blas.forward(*products.matrices, bias, _matrix(y_rows), float_scale)
    return y


def _backward(dy: Tensor, tensors: _Tensors, kind: _Kind, needed: Sequence[bool]) -> tuple[Tensor | None, ...]:
    """The gradients of the tensors, where they are needed."""
    x, _, scale, _, bias = tensors
    needs_x, needs_s, needs_scale, needs_weight, needs_bias = needed[:5]
    dx = ds = dscale = dweight = dbias = None
    with without_autocast(x):
        products = _products(tensors, kind)
        dy = _rows(dy, kind.options.channels_last)
        dy = dy if dy.dtype == kind.product else dy.to(kind.product)
        key = None
        if kind.inputs is skip_linear_triton or kind.weight is skip_linear_triton:
            key = (kind, places((*tensors, dy)), needs_x, needs_s)
        needs_row_scale = needs_scale and products.row_scale is not None
        if needs_x or needs_s or needs_row_scale:
            dx, ds, dscale = _gradients_of_inputs(dy, tensors, products, kind, (needs_x, needs_s, needs_row_scale), key)
        if needs_weight or (needs_scale and not needs_row_scale):
            dweight = torch.empty_like(tensors.weight, memory_format=_DENSE)
            if kind.weight is skip_linear_triton:
                given = (dy, products.x, products.s, products.row_scale, dweight)
                skip_linear_triton.backward_weight(*given, kind.options.float_scale, key)
            else:
                given = (_matrix(dy), *products.matrices[:3], dweight)
                skip_linear_blas.backward_weight(*given, kind.options.float_scale)
            if scale is not None and products.row_scale is None:
                # So far that of the weights with the scale in them.
                dweight_s = dweight[:, products.x.shape[-1] :]
                if needs_scale:
                    dscale = dweight_s.float() * products.weight[:, products.x.shape[-1] :].float()
                    dscale = dscale.sum() if scale.dim() == 0 else dscale.sum(dim=0)
                dweight_s *= scale
        if bias is not None and needs_bias:
            dbias = torch.sum(_matrix(dy), 0, dtype=bias.dtype)
    if scale is not None and dscale is not None:
        dscale = dscale.to(scale.dtype).view(scale.shape)
    return dx, ds, dscale, dweight if needs_weight else None, dbias


def _gradients_of_inputs(
    dy: Tensor, tensors: _Tensors, products: _Products, kind: _Kind, needed: tuple[bool, ...], key: Hashable
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Of x, s, and, (M,) in fp32, of the row scale."""
    x, s, *_ = tensors
    (float_scale, _, channels_last), (needs_x, needs_s, needs_row_scale) = kind.options, needed
    dx = _empty_like(x, channels_last) if needs_x else None
    ds = _empty_like(s, channels_last) if needs_s else None
    dscale = None
    if needs_row_scale:
        dscale = torch.empty(math.prod(dy.shape[:-1]), dtype=torch.float32, device=dy.device)
    dx_rows = None if dx is None else _rows(dx, channels_last)
    ds_rows = None if ds is None else _rows(ds, channels_last)
    if kind.inputs is skip_linear_triton:
        _, s_rows, row_scale, weight, weight_s = products
        given = (dy, weight, weight_s, s_rows, row_scale, dx_rows, ds_rows, dscale, float_scale)
        skip_linear_triton.backward_inputs(*given, key)
    else:
        _, s_MD2, row_scale_M, weight_x, weight_s = products.matrices
        dx_MD1 = None if dx_rows is None else _matrix(dx_rows)
        ds_MD2 = None if ds_rows is None else _matrix(ds_rows)
        given = (_matrix(dy), weight_x, weight_s, s_MD2, row_scale_M, dx_MD1, ds_MD2, dscale, float_scale)
        skip_linear_blas.backward_inputs(*given)
    return dx, ds, dscale


def _reference(options: _Options, *tensors: Tensor | None) -> Tensor:
    x, s, scale, weight, bias = tensors
    assert x is not None
    float_scale, dtype, channels_last = options
    with without_autocast(x):
        x, s, weight, bias = (None if tensor is None else tensor.to(dtype) for tensor in (x, s, weight, bias))
        if channels_last:
            x, s = x.movedim(1, -1), s.movedim(1, -1)  # type: ignore[union-attr]
            scale = scale.view(x.shape[:-1]).unsqueeze(-1) if scale is not None and scale.dim() > 1 else scale
        y = skip_linear_ref(x, s, float_scale if scale is None else scale, weight, bias)  # type: ignore[arg-type]
        return y.movedim(-1, 1) if channels_last else y


def _way_to_multiply(product: str, tensors: _Tensors, options: _Options, backend: str) -> ModuleType:
    """Which of the two ways to multiply takes "forward", "inputs" or "weight"."""
    x, s, _, _, _ = tensors
    if backend != "triton":
        return skip_linear_blas
    if forced_backend() == "triton" or x.device.type == "cpu":
        return skip_linear_triton
    if options.dtype == torch.float32:
        return skip_linear_blas
    operands = "16 bits" if x.dtype == s.dtype == options.dtype else "fp32 operands"
    return skip_linear_triton if product in IN_TRITON[operands] else skip_linear_blas


def _empty(x: Tensor, channels: int, dtype: torch.dtype, channels_last: bool) -> Tensor:
    """Shaped and laid out as ``x``, with so many channels."""
    if not channels_last:
        shape = (*x.shape[:-1], channels)
        return x.new_empty(shape) if x.dtype == dtype else x.new_empty(shape, dtype=dtype)
    order = (0, *range(2, x.dim()), 1)
    return torch.empty_permuted((x.shape[0], channels, *x.shape[2:]), order, dtype=dtype, device=x.device)


def _empty_like(x: Tensor, channels_last: bool) -> Tensor:
    return _empty(x, x.shape[1], x.dtype, True) if channels_last else torch.empty_like(x, memory_format=_DENSE)


_DENSE = torch.contiguous_format


def _rows(x: Tensor, channels_last: bool) -> Tensor:
    """(..., D), whose rows lie evenly."""
    x = x.movedim(1, -1) if channels_last else x
    return x if x.is_contiguous() or skip_linear_triton.row_stride(x) is not None else x.contiguous()


def _matrix(x: Tensor) -> Tensor:
    """(M, D), of rows that lie evenly."""
    return x if x.dim() == 2 else x.view(-1, x.shape[-1])


def _dense_rows(x: Tensor) -> Tensor:
    """Each row without gaps, as matrix products read it."""
    return x if x.stride(-1) == 1 else x.contiguous()


_ARGUMENTS = "Tensor x, Tensor s, Tensor? scale, Tensor weight, Tensor? bias, float float_scale"
torch.library.define(
    "scalelong::skip_linear", f"({_ARGUMENTS}, ScalarType? dtype=None) -> Tensor", tags=torch.Tag.pt2_compliant_tag
)
torch.library.define(
    "scalelong::skip_linear_backward",
    f"(Tensor dy, {_ARGUMENTS}, ScalarType dtype, bool[] needed) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)


def project(
    x: Tensor,
    s: Tensor,
    scale: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    float_scale: float,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """The product, of ``dtype``, without autograd: what is registered, and what other operators are built of."""
    tensors = _Tensors(x, s, scale, weight, bias)
    return _forward(tensors, _kind_of_call(tensors, _Options(float_scale, dtype or x.dtype), backend_of(x)))


def gradients_of_projection(
    dy: Tensor,
    x: Tensor,
    s: Tensor,
    scale: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    float_scale: float,
    dtype: torch.dtype,
    needed: Sequence[bool],
) -> tuple[Tensor, ...]:
    """The gradients of the five tensors of ``project``; empty where they are not needed."""
    with torch.no_grad():
        tensors = _Tensors(x, s, scale, weight, bias)
        grads = _backward(dy, tensors, _kind_of_call(tensors, _Options(float_scale, dtype), backend_of(x)), needed)
        return none_as_empty(grads, dy)


torch.library.impl("scalelong::skip_linear", "default", project)
torch.library.impl("scalelong::skip_linear_backward", "default", gradients_of_projection)


@torch.library.register_fake("scalelong::skip_linear")
def _(x, s, scale, weight, bias, float_scale, dtype=None):
    return x.new_empty((*x.shape[:-1], weight.shape[0]), dtype=dtype)


@torch.library.register_fake("scalelong::skip_linear_backward")
def _(dy, x, s, scale, weight, bias, float_scale, dtype, needed):
    tensors = zip((x, s, scale, weight, bias), needed, strict=True)
    return none_as_empty((x.new_empty(x.shape) if x is not None and need else None for x, need in tensors), dy)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.float_scale, ctx.dtype = inputs
    ctx.save_for_backward(*tensors)


def _backward_of_operator(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    needed, tensors = ctx.needs_input_grad[:5], ctx.saved_tensors
    dtype = ctx.dtype or tensors[0].dtype
    grads = torch.ops.scalelong.skip_linear_backward(dy, *tensors, ctx.float_scale, dtype, needed)
    return *(grad if need else None for grad, need in zip(grads, needed, strict=True)), None, None


def _setup_second_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, float_scale, dtype, ctx.needed = inputs
    ctx.options = _Options(float_scale, dtype)
    ctx.save_for_backward(*tensors)


def _backward_of_backward(ctx: Any, *ddgrads: Tensor | None) -> tuple[Tensor | None, ...]:
    dy, *tensors = ctx.saved_tensors
    reference, wanted = partial(_reference, ctx.options), ctx.needs_input_grad[:6]
    return *second_derivatives(reference, tensors, ctx.needed, dy, ddgrads, wanted), None, None, None


torch.library.register_autograd("scalelong::skip_linear", _backward_of_operator, setup_context=_setup_context)
torch.library.register_autograd(
    "scalelong::skip_linear_backward", _backward_of_backward, setup_context=_setup_second_context
)


def check_projection(op: str, x: Tensor, s: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Of x (..., D1) beside s (..., D2) by a weight (O, D1 + D2) and a bias (O,).

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, naming both.
    """
    if x.dim() < 1 or x.shape[:-1] != s.shape[:-1] or s.dim() < 1:
        raise ValueError(
            f"{op}: x and s must be (B, T, D1) and (B, T, D2), or have other leading dimensions that are equal, "
            f"got {tuple(x.shape)} and {tuple(s.shape)}"
        )
    if weight.dim() != 2 or weight.shape[1] != x.shape[-1] + s.shape[-1]:
        raise ValueError(
            f"{op}: weight {tuple(weight.shape)} does not fit x {tuple(x.shape)} beside s {tuple(s.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"{op}: bias {tuple(bias.shape)} does not fit weight {tuple(weight.shape)}")
    casts = x.dtype in FUSED_DTYPES and is_autocast(x.device.type)
    for name, tensor in (("s", s), ("weight", weight), ("bias", bias)):
        if tensor is None:
            continue
        fits = tensor.dtype in FUSED_DTYPES if casts else tensor.dtype == x.dtype
        if not fits or tensor.device != x.device:
            raise ValueError(f"{op}: x is {described(x)} but {name} is {described(tensor)}")


def _check(x: Tensor, s: Tensor, scale: Scale, weight: Tensor, bias: Tensor | None) -> None:
    check_projection("skip_linear", x, s, weight, bias)
    if isinstance(scale, Tensor):
        *leading, D2 = s.shape
        if not is_one_of(scale.shape, ((), (1,), leading, (*leading, 1), (D2,))):
            raise ValueError(
                f"skip_linear: scale {tuple(scale.shape)} is none of scalar, {tuple(leading)}, {(*leading, 1)}, {(D2,)}"
            )
        if scale.device != x.device or not scale.is_floating_point():
            raise ValueError(f"skip_linear: scale is {described(scale)}, but x is {described(x)}")
