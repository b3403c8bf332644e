"""GroupNorm + activation over a scaled skip concatenation that is never written to memory (arXiv:2310.13545).

y = act((normalised(cat([h, scale * s], 1)) * weight + bias) * (1 + gain) + shift)

Eager PyTorch writes the scaled skip, the concatenation, the normalised and the activated tensor, and keeps three of
them for backward; here forward reads h and s and writes y, and backward recomputes from h, s and fp32 statistics.

Shapes: N batch, C = Ch + Cs channels, G groups, * any number of spatial dimensions.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from scalelong.kernels import group_norm_native, group_norm_triton
from scalelong.kernels.arguments import (
    Scale,
    as_argument,
    as_layout,
    check_scale,
    check_skip,
    concatenated,
    described,
    is_channels_last,
    none_as_empty,
)
from scalelong.kernels.backend import Backends, backend_of, get_backend, in_transform, is_traced, tells
from scalelong.kernels.double_backward import differentiable_gradients, second_derivatives
from scalelong.kernels.group_norm_arguments import Options, Tensors, Wanted
from scalelong.kernels.launches import Kept

ACTIVATIONS = ("silu", "gelu", "gelu-tanh", None)
_LAUNCHERS = {"triton": group_norm_triton, "native": group_norm_native}


def group_norm_ref(
    x: Tensor,
    groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    shift: Tensor | None = None,
    gain: Tensor | None = None,
    eps: float = 1e-5,
    act: str | None = "silu",
) -> Tensor:
    """The specification of ``group_norm``, in plain PyTorch; fp64 included."""
    weight, bias, gain, shift = (None if p is None else p.to(x.dtype) for p in (weight, bias, gain, shift))
    over_space = (..., *[None] * (x.dim() - 2))
    if x.numel() > 0:
        y = F.group_norm(x.contiguous() if in_transform() else x, groups, weight, bias, eps)
    else:  # which torch refuses to normalise
        y = x if weight is None or bias is None else x * weight[over_space] + bias[over_space]
    if gain is not None:
        y = y * (1 + gain[over_space])
    if shift is not None:
        y = y + shift[over_space]
    if act == "silu":
        return F.silu(y)
    return y if act is None else F.gelu(y, approximate="tanh" if act == "gelu-tanh" else "none")


def skip_group_norm_ref(
    h: Tensor,
    s: Tensor,
    scale: Scale,
    groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    shift: Tensor | None = None,
    gain: Tensor | None = None,
    eps: float = 1e-5,
    act: str | None = "silu",
) -> Tensor:
    """The specification of ``skip_group_norm``: scale the skip, concatenate, normalise, activate."""
    return group_norm_ref(concatenated(h, s, scale), groups, weight, bias, shift=shift, gain=gain, eps=eps, act=act)


def group_norm(
    x: Tensor,
    groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    shift: Tensor | None = None,
    gain: Tensor | None = None,
    eps: float = 1e-5,
    act: str | None = "silu",
) -> Tensor:
    """``act((normalised(x) * weight + bias) * (1 + gain) + shift)``, normalised over each of ``groups`` of channels.

    Args:
        x: (N, C, *), fp32, bf16 or fp16, contiguous or channels_last; fp64 runs the reference.
        groups: divides C.
        weight, bias: (C,), both or neither; any floating dtype.
        shift, gain: (N, C) or None: the adaptive form of ADM (arXiv:2105.05233).
        eps: added to the variance.
        act: "silu", "gelu" (the exact one), "gelu-tanh" (its approximation by tanh, arXiv:1606.08415) or None.

    Returns:
        The shape, dtype and layout of x. Differentiable in every tensor argument; statistics are fp32; two runs
        give the same bits. Backward keeps x and fp32 statistics of (N, groups).

    Raises:
        ValueError: arguments that do not fit, naming their shapes.
    """
    return _run("group_norm", Tensors(x, None, None, weight, bias, gain, shift), Options(1.0, groups, eps, act))


def skip_group_norm(
    h: Tensor,
    s: Tensor,
    scale: Scale,
    groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    shift: Tensor | None = None,
    gain: Tensor | None = None,
    eps: float = 1e-5,
    act: str | None = "silu",
) -> Tensor:
    """``group_norm(cat([h, scale * s], 1), ...)`` without the concatenation.

    A group may hold channels of both. Under autocast, h and s of different dtypes are promoted as by torch.cat.

    Args:
        h: (N, Ch, *), the hidden stream.
        s: (N, Cs, *), the long skip, of the dtype and device of h. In another layout than h, it is copied.
        scale: None for 1, a float, a tensor of one element () or (1,), one factor a channel (Cs,) or (N, Cs), or one
            a sample (N, 1).
        groups, weight, bias, shift, gain, eps, act: as for ``group_norm``, with C = Ch + Cs.

    Returns:
        (N, Ch + Cs, *) in the dtype and layout of h. Differentiable in every tensor argument, ``scale`` included.

    Raises:
        ValueError: arguments that do not fit, naming their shapes.
    """
    h, s = _promoted(h, s)
    float_scale = 1.0
    if is_traced() and scale is not None and not isinstance(scale, Tensor):
        scale = as_argument(scale, h)
    if isinstance(scale, Tensor):
        scale = scale.reshape(()) if scale.shape == (1,) else scale
    elif scale is not None:
        scale, float_scale = None, float(scale)
    tensors = Tensors(h, s, scale, weight, bias, gain, shift)
    return _run("skip_group_norm", tensors, Options(float_scale, groups, eps, act))


def _promoted(h: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    if h.dtype == s.dtype or not torch.is_autocast_enabled(h.device.type):
        return h, s
    dtype = torch.promote_types(h.dtype, s.dtype)
    return h.to(dtype), s.to(dtype)


@tells(group_norm)
def _(x: Tensor, *_: Any, **__: Any) -> Backends:
    return Backends(backend_of(x), backend_of(x))


@tells(skip_group_norm)
def _(h: Tensor, s: Tensor, *_: Any, **__: Any) -> Backends:
    return get_backend(group_norm, _promoted(h, s)[0])


def _run(op: str, tensors: Tensors, options: Options) -> Tensor:
    backend = backend_of(tensors.h)
    if backend == "reference":
        _check_arguments(op, tensors, options)
        return _reference(options, *tensors)
    if is_traced():
        _check_arguments(op, tensors, options)
        return torch.ops.scalelong.skip_group_norm(*tensors, *options)[0]
    # An eager call costs half as much without the Python that torch.library wraps around the operator.
    return _SkipGroupNorm.apply(*tensors, _kind_of_call(op, tensors, options, backend))


@dataclass(frozen=True, eq=False, slots=True)  # compared as an object, as the key of a plan
class _Kind:
    """What calls share whose options, backend and ``signature`` of each tensor are the same."""

    options: Options
    backend: str
    channels_last: bool
    y_shape: torch.Size
    y_stride: tuple[int, ...]
    statistics: Tensor
    """Of no element, with dtype and device of mean and rstd."""
    statistics_shape: torch.Size


_KINDS: Kept[_Kind] = Kept()


def _kind_of_call(op: str, tensors: Tensors, options: Options, backend: str) -> _Kind:
    """Raises ValueError where the arguments do not fit; those of a kind that has been seen need no check."""
    return _KINDS.of_call(tensors, (options, backend), partial(_new_kind, op, tensors, options, backend))


def _new_kind(op: str, tensors: Tensors, options: Options, backend: str) -> _Kind:
    _check_arguments(op, tensors, options)
    y, mean, _ = _empty_outputs(tensors.h, tensors.s, options.groups)
    return _Kind(
        options=options,
        backend=backend,
        channels_last=is_channels_last(tensors.h),
        y_shape=y.shape,
        y_stride=y.stride(),
        statistics=mean.new_empty(0),
        statistics_shape=mean.shape,
    )


def _reference(options: Options, *tensors: Tensor | None) -> Tensor:
    h, s, scale, weight, bias, gain, shift = tensors
    assert h is not None
    x = concatenated(h, s, options.float_scale if scale is None else scale)
    return group_norm_ref(x, options.groups, weight, bias, shift=shift, gain=gain, eps=options.eps, act=options.act)


class _SkipGroupNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        *tensors, ctx.kind = arguments
        y, mean, rstd = _forward(Tensors(*tensors), ctx.kind)
        ctx.save_for_backward(*tensors, mean, rstd)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        *tensors, mean, rstd = ctx.saved_tensors
        wanted = ctx.needs_input_grad[:7]  # in the order of Wanted, which takes a microsecond to make
        if torch.is_grad_enabled():  # with create_graph=True
            return *differentiable_gradients(partial(_reference, ctx.kind.options), tensors, wanted, dy), None
        return *_backward(dy, Tensors(*tensors), mean, rstd, ctx.kind, wanted), None


def _forward(tensors: Tensors, kind: _Kind) -> tuple[Tensor, Tensor, Tensor]:
    """y, and the mean and rstd of each group, (N, G), in fp32 (fp64 for fp64)."""
    h, options = tensors.h, kind.options
    # torch takes another microsecond for each dtype and device that it has to read.
    y = h.new_empty_strided(kind.y_shape, kind.y_stride)
    mean = kind.statistics.new_empty_strided(kind.statistics_shape, (options.groups, 1))
    rstd = torch.empty_like(mean)
    if y.numel() == 0:
        return y, mean.zero_(), rstd.zero_()
    if kind.backend == "reference":
        x = concatenated(h, tensors.s, options.float_scale if tensors.scale is None else tensors.scale)
        x = x.to(mean.dtype).unflatten(1, (options.groups, -1)).flatten(2)
        var, mean = torch.var_mean(x, dim=2, correction=0)
        return y.copy_(_reference(options, *tensors)), mean, (var + options.eps).rsqrt()
    tensors = _in_layout(tensors, kind.channels_last)
    _LAUNCHERS[kind.backend].forward(tensors, options, kind.channels_last, y, mean, rstd, kind)
    return y, mean, rstd


def _in_layout(tensors: Tensors, channels_last: bool) -> Tensors:
    h, s = as_layout(tensors.h, channels_last), tensors.s
    s = None if s is None else as_layout(s, channels_last)
    return tensors if h is tensors.h and s is tensors.s else tensors._replace(h=h, s=s)


def _backward(
    dy: Tensor,
    tensors: Tensors,
    mean: Tensor,
    rstd: Tensor,
    kind: _Kind,
    wanted: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    """The gradients of the tensors; None for what is None or not wanted."""
    if dy.numel() == 0:
        return tuple(
            torch.zeros_like(x) if x is not None and want else None for x, want in zip(tensors, wanted, strict=True)
        )
    if kind.backend == "reference":
        return _backward_of_reference(dy, tensors, kind.options, wanted)
    dy, tensors = as_layout(dy, kind.channels_last), _in_layout(tensors, kind.channels_last)
    backward = _LAUNCHERS[kind.backend].backward
    dh, ds, dscale, *grads = backward(dy, tensors, mean, rstd, kind.options, kind.channels_last, wanted, kind)
    if dscale is not None:
        dscale = _as_gradient(dscale, tensors.scale)  # type: ignore[arg-type]
    pairs = zip(grads, tensors[3:], strict=True)
    grads = [grad if grad is None or grad.dtype == x.dtype else grad.to(x.dtype) for grad, x in pairs]  # type: ignore[union-attr]
    return dh, ds, dscale, *grads


def _backward_of_reference(
    dy: Tensor, tensors: Tensors, options: Options, wanted: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """By torch.func, which works below autograd too, where operators run."""
    names = [name for name, x, want in zip(Tensors._fields, tensors, wanted, strict=True) if x is not None and want]

    def f(*values: Tensor) -> Tensor:
        return _reference(options, *tensors._replace(**dict(zip(names, values, strict=True))))

    gradients_for = torch.func.vjp(f, *(getattr(tensors, name) for name in names))[1]
    grads = dict(zip(names, gradients_for(dy), strict=True))
    return tuple(grads.get(name) for name in Tensors._fields)


def _as_gradient(grad: Tensor, x: Tensor) -> Tensor:
    """Of the shape and dtype of x; sums where x was broadcast."""
    if grad.shape != x.shape:
        grad = grad.sum() if x.dim() == 0 else grad.sum_to_size(x.shape)
    return grad.to(x.dtype)


def _empty_outputs(h: Tensor, s: Tensor | None, groups: int) -> tuple[Tensor, Tensor, Tensor]:
    N, C, *spatial = h.shape
    C += 0 if s is None else s.shape[1]
    order = (0, *range(2, h.dim()), 1) if is_channels_last(h) else tuple(range(h.dim()))
    # No view of something else: who gets it may change it in place.
    y = torch.empty_permuted((N, C, *spatial), order, dtype=h.dtype, device=h.device)
    return y, *_empty_statistics(h, groups)


def _empty_statistics(h: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    dtype = torch.float64 if h.dtype == torch.float64 else torch.float32
    mean = h.new_empty((h.shape[0], groups), dtype=dtype)
    return mean, torch.empty_like(mean)


_ARGUMENTS = (
    "Tensor h, Tensor? s, Tensor? scale, Tensor? weight, Tensor? bias, Tensor? gain, Tensor? shift, "
    "{}float float_scale, int groups, float eps, str? act{}"
)
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)
torch.library.define(
    "scalelong::skip_group_norm", f"({_ARGUMENTS.format('', '')}) -> (Tensor, Tensor, Tensor)", tags=_TAGS
)
torch.library.define(
    "scalelong::skip_group_norm_backward",
    f"(Tensor dy, {_ARGUMENTS.format('Tensor mean, Tensor rstd, ', ', bool[] wanted')}) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    tags=_TAGS,
)


@torch.library.impl("scalelong::skip_group_norm", "default")
def _(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    tensors, options = Tensors(*arguments[:7]), Options(*arguments[7:])
    return _forward(tensors, _kind_of_call("skip_group_norm", tensors, options, backend_of(tensors.h)))


@torch.library.impl("scalelong::skip_group_norm_backward", "default")
def _(dy: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    tensors, (mean, rstd), options, wanted = _of_backward(*arguments)
    kind = _kind_of_call("skip_group_norm", tensors, options, backend_of(tensors.h))
    grads = _backward(dy, tensors, mean, rstd, kind, wanted)
    return none_as_empty(grads, dy)


def _of_backward(*arguments: Any) -> tuple[Tensors, tuple[Tensor, Tensor], Options, Wanted]:
    tensors, options, wanted = Tensors(*arguments[:7]), Options(*arguments[9:13]), arguments[13]
    exists = (x is not None and want for x, want in zip(tensors, wanted, strict=True))
    return tensors, arguments[7:9], options, Wanted(*exists)


@torch.library.register_fake("scalelong::skip_group_norm")
def _(h, s, scale, weight, bias, gain, shift, float_scale, groups, eps, act):
    return _empty_outputs(h, s, groups)


@torch.library.register_fake("scalelong::skip_group_norm_backward")
def _(dy: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    tensors, _, _, wanted = _of_backward(*arguments)
    channels_last = is_channels_last(tensors.h)
    large = (None if x is None else torch.empty_like(as_layout(x, channels_last)) for x in tensors[:2])
    small = (None if x is None else x.new_empty(x.shape) for x in tensors[2:])
    grads = (grad if want else None for grad, want in zip((*large, *small), wanted, strict=True))
    return none_as_empty(grads, dy)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, mean, rstd = output
    ctx.save_for_backward(*inputs[:7], mean, rstd)
    ctx.mark_non_differentiable(mean, rstd)
    ctx.options = inputs[7:]
    ctx.set_materialize_grads(False)


def _backward_of_operator(ctx: Any, dy: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if dy is None:
        return (None,) * 11
    wanted = ctx.needs_input_grad[:7]
    grads = torch.ops.scalelong.skip_group_norm_backward(dy, *ctx.saved_tensors, *ctx.options, wanted)
    return *(grad if want else None for grad, want in zip(grads, wanted, strict=True)), None, None, None, None


def _setup_second_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    dy, *arguments = inputs
    tensors, _, ctx.options, ctx.wanted = _of_backward(*arguments)
    ctx.save_for_backward(dy, *tensors)
    ctx.set_materialize_grads(False)


def _backward_of_backward(ctx: Any, *ddgrads: Tensor | None) -> tuple[Tensor | None, ...]:
    dy, *tensors = ctx.saved_tensors
    reference, wanted = partial(_reference, ctx.options), ctx.needs_input_grad[:8]
    return *second_derivatives(reference, tensors, ctx.wanted, dy, ddgrads, wanted), *(None,) * 7


torch.library.register_autograd("scalelong::skip_group_norm", _backward_of_operator, setup_context=_setup_context)
torch.library.register_autograd(
    "scalelong::skip_group_norm_backward", _backward_of_backward, setup_context=_setup_second_context
)


def _check_arguments(op: str, tensors: Tensors, options: Options) -> None:
    h, s, scale, weight, bias, gain, shift = tensors
    _check_norm(op, h, s, options.groups, weight, bias, shift, gain, options.eps, options.act)
    if s is not None and scale is not None:
        check_scale(op, scale, h, s)


def _check_norm(
    op: str,
    h: Tensor,
    s: Tensor | None,
    groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    shift: Tensor | None,
    gain: Tensor | None,
    eps: float,
    act: str | None,
) -> None:
    if h.dim() < 2 or not h.is_floating_point():
        raise ValueError(f"{op}: needs a floating (N, C, *), got {described(h)}")
    N, C = h.shape[:2]
    if s is not None:
        check_skip(op, h, s)
        C += s.shape[1]
    if groups < 1 or C % groups != 0:
        channels = f"the {C} channels of {tuple(h.shape)}"
        if s is not None:
            channels = f"the {C} channels of h {tuple(h.shape)} and s {tuple(s.shape)}"
        raise ValueError(f"{op}: {channels} do not divide into {groups} groups")
    if (weight is None) != (bias is None):
        raise ValueError(f"{op}: {'weight' if bias is None else 'bias'} without {'bias' if bias is None else 'weight'}")
    for name, x, shape in (
        ("weight", weight, (C,)),
        ("bias", bias, (C,)),
        ("gain", gain, (N, C)),
        ("shift", shift, (N, C)),
    ):
        if x is None:
            continue
        if tuple(x.shape) != shape:
            raise ValueError(f"{op}: {name} has shape {tuple(x.shape)}, but {C} channels need {shape}")
        if x.device != h.device or not x.is_floating_point():
            raise ValueError(f"{op}: {name} is {described(x)}, but the input is {described(h)}")
    if act not in ACTIVATIONS:
        raise ValueError(f"{op}: act {act!r} is none of {', '.join(map(repr, ACTIVATIONS))}")
    if not 0 <= eps < math.inf:
        raise ValueError(f"{op}: eps must be a finite number from 0 up, got {eps}")
