"""The projection of a normalised long skip, linear(layer_norm(cat([x, scale * s], -1))) (Skip-DiT, arXiv:2411.17616).

Neither the concatenation nor its norm is written. With W the weight times that of the norm, less the mean of each row,
and r = 1 / √(variance + eps) of each token,

    linear(layer_norm(z)) = r * (W z) + (weight bias_of_norm + bias),

for rows of W sum to 0, so that the mean of z drops out. W z is ``skip_linear``; the statistics come from both halves.
Backward keeps x, s and two numbers a token, where PyTorch keeps four times the size of x and a copy of s.

Shapes: B batch, T tokens, D1 width of the stream x, D2 width of the skip s, D = D1 + D2, O width of the output.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from scalelong.kernels.arguments import Scale, concatenated_tokens, described
from scalelong.kernels.backend import is_traced, tells
from scalelong.kernels.double_backward import differentiable_gradients
from scalelong.kernels.precision import autocast_dtype, without_autocast
from scalelong.kernels.skip_linear import (
    backend_of_products,
    backends_of_projection,
    check_projection,
    gradients_of_projection,
    project,
    skip_linear,
)


def skip_norm_linear_ref(
    x_BTD1: Tensor,
    s_BTD2: Tensor,
    scale: Scale,
    norm_weight_D: Tensor | None,
    norm_bias_D: Tensor | None,
    weight_OD: Tensor,
    bias_O: Tensor | None,
    *,
    eps: float = 1e-5,
) -> Tensor:
    """The specification: scale the skip, concatenate, normalise, project."""
    z_BTD = concatenated_tokens(x_BTD1, s_BTD2, scale)
    return F.linear(F.layer_norm(z_BTD, z_BTD.shape[-1:], norm_weight_D, norm_bias_D, eps), weight_OD, bias_O)


def skip_norm_linear(
    x: Tensor,
    s: Tensor,
    scale: Scale,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    *,
    eps: float = 1e-5,
) -> Tensor:
    """``linear(layer_norm(cat([x, scale * s], -1), (D,), norm_weight, norm_bias, eps), weight, bias)``.

    Args:
        x: (*, D1), the hidden stream, with any leading dimensions, for tokens (B, T).
        s: (*, D2), the long skip.
        scale: None for 1, a float, a tensor of one element () or (1,), or one factor a token, (*) or (*, 1).
        norm_weight, norm_bias: (D1 + D2,) or None, each.
        weight: (O, D1 + D2).
        bias: (O,) or None.
        eps: added to the variance.

    All but the scale have one dtype: fp32, bf16 or fp16; fp64 and torch.func's transforms run the reference. Under
    autocast each may have its own, and the product is in autocast's, as torch's linear has it.

    Returns:
        (*, O), differentiable in every tensor argument; statistics are fp32; two runs give the same bits. Backward
        keeps x, s and the parameters as they are given, and fp32 statistics of the tokens.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, naming them.
    """
    _check(x, s, scale, norm_weight, norm_bias, weight, bias, eps)
    if backend_of_products(x, s, weight) == "reference":
        return skip_norm_linear_ref(x, s, scale, norm_weight, norm_bias, weight, bias, eps=eps)
    if isinstance(scale, Tensor):
        # Of one factor, too, a gradient a token: in their sum alone the parts by product and variance would cancel.
        scale = scale.reshape(()).expand(*s.shape[:-1], 1) if scale.numel() == 1 else scale.reshape(*s.shape[:-1], 1)
    if is_traced():
        return _by_statistics(x, s, scale, norm_weight, norm_bias, weight, bias, eps)
    is_tensor = isinstance(scale, Tensor)
    tensors = _Tensors(x, s, scale if is_tensor else None, norm_weight, norm_bias, weight, bias)
    return _SkipNormLinear.apply(*tensors, _Options(None if is_tensor else scale, eps, autocast_dtype(x)))


@tells(skip_norm_linear)
def _(x: Tensor, s: Tensor, scale: Scale, _norm_weight: Any, _norm_bias: Any, weight: Tensor, *_: Any, **__: Any):
    """Of the products; the statistics beside them are PyTorch's."""
    return backends_of_projection(x, s, scale, weight, None)


class _Tensors(NamedTuple):
    x: Tensor
    s: Tensor
    scale: Tensor | None
    norm_weight: Tensor | None
    norm_bias: Tensor | None
    weight: Tensor
    bias: Tensor | None


class _Options(NamedTuple):
    float_scale: float | None
    eps: float
    dtype: torch.dtype
    """Of the output."""


class _Statistics(NamedTuple):
    """Of the concatenation, (..., 1) in fp32."""

    mean: Tensor
    rstd: Tensor


def _statistics(x: Tensor, s: Tensor, scale: Scale, eps: float) -> _Statistics:
    """From those of the halves, whose squares about their own means are small."""
    D1, D2 = x.shape[-1], s.shape[-1]
    (var_x, mean_x), (var_s, mean_s) = _moments(x.float()), _moments(s.float())
    if scale is not None:
        var_s, mean_s = var_s * scale**2, mean_s * scale
    share = D1 / (D1 + D2)
    mean = share * mean_x + (1 - share) * mean_s
    between = share * (1 - share) * (mean_x - mean_s).square()
    variance = share * var_x + (1 - share) * var_s + between
    return _Statistics(mean, (variance + eps).rsqrt())


def _moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """The variance and the mean of each row, (..., 1)."""
    if x.is_cpu and not is_traced():  # where PyTorch's own takes ten times as long as a LayerNorm
        mean = x.mean(-1, keepdim=True)
        return _dot(centred := x - mean, centred) / x.shape[-1], mean
    return torch.var_mean(x, -1, correction=0, keepdim=True)


def _folded(norm_weight: Tensor | None, weight_OD: Tensor) -> Tensor:
    """The weight that the concatenation itself is multiplied by, (O, D): at least fp32, rows that sum to 0."""
    dtype = torch.promote_types(weight_OD.dtype, torch.float32)
    folded_OD = weight_OD.to(dtype) if norm_weight is None else weight_OD.to(dtype) * norm_weight.to(dtype)
    return folded_OD - folded_OD.mean(1, keepdim=True)


def _shift(norm_bias: Tensor | None, weight_OD: Tensor, bias_O: Tensor | None) -> Tensor:
    """What the norm's bias and the layer's add to every token, (O,) in at least fp32."""
    dtype = torch.promote_types(weight_OD.dtype, torch.float32)
    if norm_bias is None:
        return weight_OD.new_zeros(weight_OD.shape[0], dtype=dtype) if bias_O is None else bias_O.to(dtype)
    shift_O = weight_OD.to(dtype) @ norm_bias.to(dtype)
    return shift_O if bias_O is None else shift_O + bias_O.to(dtype)


def _by_statistics(
    x: Tensor,
    s: Tensor,
    scale: Scale,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
) -> Tensor:
    """The folded form, of operators that a compiler fuses and differentiates."""
    dtype = autocast_dtype(x)
    with without_autocast(x):
        _, rstd = _statistics(x, s, scale, eps)
        folded_OD, shift_O = _folded(norm_weight, weight).to(dtype), _shift(norm_bias, weight, bias)
    product = skip_linear(x, s, scale, folded_OD, None)
    return (rstd * product + shift_O).to(dtype)


class _SkipNormLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        *given, ctx.options = arguments
        tensors = _Tensors(*given)
        with without_autocast(tensors.x):
            mean, rstd = _statistics(tensors.x, tensors.s, _scale(tensors, ctx.options), ctx.options.eps)
            folded_OD = _folded(tensors.norm_weight, tensors.weight)
            y = project(*tensors[:3], folded_OD, None, _float_scale(ctx.options), ctx.options.dtype)
            torch.addcmul(_shift(tensors.norm_bias, tensors.weight, tensors.bias), y, rstd, out=y)
        ctx.save_for_backward(*tensors, mean, rstd)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:  # type: ignore[override]
        *saved, mean, rstd = ctx.saved_tensors
        tensors, needed = _Tensors(*saved), ctx.needs_input_grad[:7]
        if torch.is_grad_enabled():  # with create_graph=True
            return *differentiable_gradients(partial(_reference, ctx.options), tensors, needed, dy), None
        with without_autocast(tensors.x):
            return *_gradients(dy, tensors, ctx.options, _Statistics(mean, rstd), needed), None


def _scale(tensors: _Tensors, options: _Options) -> Scale:
    return options.float_scale if tensors.scale is None else tensors.scale


def _float_scale(options: _Options) -> float:
    return 1.0 if options.float_scale is None else float(options.float_scale)


def _gradients(
    dy: Tensor, tensors: _Tensors, options: _Options, statistics: _Statistics, needed: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """The gradients that are needed."""
    x, s, scale, norm_weight, norm_bias, weight, bias = tensors
    needs_x, needs_s, needs_scale, needs_norm_weight, needs_norm_bias, needs_weight, needs_bias = needed
    # The variance tells each of the first three of the products of the others.
    needs_inputs = needs_x or needs_s or needs_scale
    dx = ds = dscale = dfolded_OD = dshift_O = None
    if needs_inputs or needs_norm_weight or needs_weight:
        dproduct = torch.mul(dy, statistics.rstd, out=torch.empty_like(dy))
        needs = (needs_inputs, needs_inputs, needs_scale, needs_weight or needs_norm_weight, False)
        given = (x, s, scale, _folded(norm_weight, weight), None, _float_scale(options), options.dtype, needs)
        dx, ds, dscale, dfolded_OD, _ = gradients_of_projection(dproduct, *given)
        if needs_inputs:
            dscale = dscale if needs_scale else None
            dx, ds, dscale = _through_statistics(tensors, _scale(tensors, options), statistics, dx, ds, dscale)
        dfolded_OD = dfolded_OD if needs[3] else None
    if needs_norm_bias or needs_bias or (needs_weight and norm_bias is not None):
        dshift_O = torch.sum(dy.reshape(-1, dy.shape[-1]), 0, dtype=torch.float32)
    return (
        dx if needs_x else None,
        ds if needs_s else None,
        None if dscale is None or scale is None else dscale.to(scale.dtype),
        *_gradients_of_parameters(tensors, dfolded_OD, dshift_O, needed[3:6]),
        dshift_O.to(bias.dtype) if needs_bias and bias is not None and dshift_O is not None else None,
    )


def _through_statistics(
    tensors: _Tensors,
    scale: Scale,
    statistics: _Statistics,
    dx: Tensor,
    ds: Tensor,
    dscale: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """What the variance takes from the gradients of the product, in place: share * (z - mean), z the concatenation."""
    x, s, mean = tensors.x, tensors.s, statistics.mean
    D = x.shape[-1] + s.shape[-1]
    share = statistics.rstd.square() * (_dot(x, dx) + _dot(s, ds)) / D
    factor: Any = 1.0 if scale is None else scale
    dx.addcmul_(x, -share).add_(share * mean)
    if dscale is not None:
        dscale = dscale - share * (factor * _dot(s, s) - mean * s.sum(-1, keepdim=True, dtype=mean.dtype))
    share_s = share * factor
    ds.addcmul_(s, -share_s * factor).add_(share_s * mean)
    return dx, ds, dscale


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Of each row, (..., 1) in fp32."""
    return torch.linalg.vecdot(a.float(), b.float()).unsqueeze(-1)


def _gradients_of_parameters(
    tensors: _Tensors, dfolded_OD: Tensor | None, dshift_O: Tensor | None, needed: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Of the norm's weight and bias and of the layer's weight."""
    norm_weight, norm_bias, weight = tensors.norm_weight, tensors.norm_bias, tensors.weight
    needs_norm_weight, needs_norm_bias, needs_weight = needed
    dnorm_weight = dnorm_bias = dweight = None
    if dfolded_OD is not None:
        dfolded_OD = dfolded_OD - dfolded_OD.mean(1, keepdim=True)
        if needs_norm_weight and norm_weight is not None:
            dnorm_weight = (dfolded_OD * weight).sum(0).to(norm_weight.dtype)
        if needs_weight:
            dweight = dfolded_OD if norm_weight is None else dfolded_OD.mul_(norm_weight)
            if norm_bias is not None and dshift_O is not None:
                dweight.addr_(dshift_O.to(dweight.dtype), norm_bias.to(dweight.dtype))
            dweight = dweight.to(weight.dtype)
    if needs_norm_bias and norm_bias is not None and dshift_O is not None:
        dnorm_bias = (dshift_O @ weight.to(dshift_O.dtype)).to(norm_bias.dtype)
    return dnorm_weight, dnorm_bias, dweight


def _reference(options: _Options, *given: Tensor | None) -> Tensor:
    tensors = _Tensors(*given)  # type: ignore[arg-type]
    scale, dtype = _scale(tensors, options), options.dtype
    x, s, _, *norm, weight, bias = tensors
    with without_autocast(x):
        z = concatenated_tokens(x, s, scale)
        norm_weight, norm_bias = (None if p is None else p.to(z.dtype) for p in norm)
        y = F.layer_norm(z, z.shape[-1:], norm_weight, norm_bias, options.eps)
        return F.linear(y.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))


def _check(
    x: Tensor,
    s: Tensor,
    scale: Scale,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
) -> None:
    check_projection("skip_norm_linear", x, s, weight, bias)
    D = x.shape[-1] + s.shape[-1]
    for name, p in (("norm_weight", norm_weight), ("norm_bias", norm_bias)):
        if p is not None and (p.shape != (D,) or p.device != x.device or not p.is_floating_point()):
            raise ValueError(f"skip_norm_linear: {name} is {described(p)}, but x {described(x)} and s need {(D,)}")
    if isinstance(scale, Tensor) and scale.numel() != 1 and scale.shape not in (s.shape[:-1], (*s.shape[:-1], 1)):
        raise ValueError(
            f"skip_norm_linear: scale {tuple(scale.shape)} is none of scalar, {tuple(s.shape[:-1])}, "
            f"{(*s.shape[:-1], 1)}"
        )
    if not 0 <= eps < math.inf:
        raise ValueError(f"skip_norm_linear: eps must be a finite number from 0 up, got {eps}")
