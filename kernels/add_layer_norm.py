"""The residual sum of a transformer and the LayerNorm after it, in the adaptive form of DiT (arXiv:2212.09748).

stream = x + gate * branch
y = R(angle) ((normalised(stream) * weight + bias) * (1 + gain) + shift)

R turns each pair of features (i, i + D / 2) by an angle of its own, as rotation modulation does (arXiv:2505.19122).
Eager PyTorch reads the stream again for the norm, casts y for the next product in a pass of its own, and in backward
adds the norm's gradient to the residual's in another. Here forward reads x and branch and writes stream and y, and
backward reads the stream and both gradients and writes theirs; it recomputes from the stream and fp32 statistics.

Shapes: B samples, T rows of each, D features of a row; without what belongs to samples any leading dimensions.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from scalelong.kernels import add_layer_norm_native, add_layer_norm_triton
from scalelong.kernels.add_layer_norm_tensors import Gradients, Inputs, Outputs
from scalelong.kernels.arguments import described, none_as_empty
from scalelong.kernels.backend import Backends, backend_of, forced_backend, is_compiled, is_traced, tells
from scalelong.kernels.launches import Kept
from scalelong.kernels.precision import autocast_dtype, without_autocast

_LAUNCHERS = {"triton": add_layer_norm_triton, "native": add_layer_norm_native}
_HALVES = (torch.bfloat16, torch.float16)


def add_layer_norm_ref(
    x: Tensor,
    branch: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    gain: Tensor | None = None,
    shift: Tensor | None = None,
    gate: Tensor | None = None,
    angle: Tensor | None = None,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    """The specification, in plain PyTorch; fp64 included."""
    stream = x
    if branch is not None:
        stream = (x + (branch if gate is None else _over_rows(gate, x) * branch)).to(x.dtype)
    y = _normalised(Inputs(stream, None, weight, bias, gain, shift, None, angle), eps)
    return stream, y.to(autocast_dtype(x))


def rotated_ref(y: Tensor, angle: Tensor) -> Tensor:
    """The specification of the rotation: y (B, ..., D) with each pair (i, i + D / 2) turned by its angle, (B, D / 2).

    The rows of a sample share its angles; norms stay what they are, and ``-angle`` turns back (arXiv:2505.19122, eq. 6,
    whose pairs lie side by side: the same but for the order of the features).
    """
    first, second = y.chunk(2, dim=-1)
    cos, sin = _over_rows(angle.cos(), y), _over_rows(angle.sin(), y)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def add_layer_norm(
    x: Tensor,
    branch: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    gain: Tensor | None = None,
    shift: Tensor | None = None,
    gate: Tensor | None = None,
    angle: Tensor | None = None,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    """The new stream ``x + gate * branch`` and its LayerNorm, ``(norm * weight + bias) * (1 + gain) + shift``, turned.

    Args:
        x: (B, T, D), or (..., D) without gain, shift, gate and angle; fp32, bf16 or fp16; fp64 runs the reference.
        branch: what is added to x, of its shape, and any floating dtype; None where there is nothing to add. The
            stream then is x; taking it from here still lets backward add the residual's gradient in the same pass.
        weight, bias: (D,) or None, each; any floating dtype.
        gain, shift, gate: (B, D) or None, each; any floating dtype.
        angle: (B, D / 2) or None; any floating dtype. Turns each pair (i, i + D / 2) of what the norm puts out, by
            radians, from the first of the pair to the second.
        eps: added to the variance.

    Returns:
        The stream, in the dtype of x, and y: under autocast in its dtype, else in that of x, so that the product after
        it casts nothing. Both are differentiable in every tensor argument; statistics are fp32; two runs give the same
        bits. Backward keeps the stream and fp32 statistics of the rows; branch only where gate wants a gradient.

    Raises:
        ValueError: arguments that do not fit, naming their shapes.
    """
    inputs = Inputs(x, branch, weight, bias, gain, shift, gate, angle)
    backend = _backend_of(x)
    if backend == "reference":
        _check(inputs, eps)
        return add_layer_norm_ref(*inputs[:4], gain=gain, shift=shift, gate=gate, angle=angle, eps=eps)
    if is_traced():
        _check(inputs, eps)
        dtype, own_dtype, branch_dtype = _dtypes(inputs, autocast_dtype(x))
        branch = None if branch is None or branch_dtype is None else branch.to(branch_dtype)
        stream, y, *_ = torch.ops.scalelong.add_layer_norm(x, branch, *inputs[2:], eps, own_dtype)
        stream = x if branch is None else stream
        return stream, y if dtype == own_dtype else y.to(dtype)
    kind = _kind_of_call(inputs, eps, backend, autocast_dtype(x))
    if kind.casts_branch:
        inputs = inputs._replace(branch=branch.to(kind.branch_dtype))  # type: ignore[union-attr]
    # Without the Python that torch.library wraps around an operator.
    stream, y = _AddLayerNorm.apply(*inputs, kind)
    return stream, y if kind.casts_y is None else y.to(kind.casts_y)


def _backend_of(x: Tensor) -> str:
    """On a CPU torch.compile fuses the formula with what stands around it, which our operator would cut in two."""
    backend = backend_of(x)
    return "reference" if backend == "native" and forced_backend() is None and is_compiled() else backend


@tells(add_layer_norm)
def _(x: Tensor, *_: Any, **__: Any) -> Backends:
    return Backends(_backend_of(x), _backend_of(x))


def _dtypes(inputs: Inputs, dtype: torch.dtype) -> tuple[torch.dtype, torch.dtype, torch.dtype | None]:
    """Of y, of y as a kernel writes it, and of branch as one reads it.

    The kernels know streams in fp32 with 16-bit tensors beside them, and tensors of one dtype.
    """
    x, branch, *_ = inputs
    own_dtype = dtype if x.dtype == torch.float32 else x.dtype
    if branch is None:
        return dtype, own_dtype, None
    is_known = x.dtype == torch.float32 and branch.dtype in _HALVES and own_dtype in (branch.dtype, x.dtype)
    return dtype, own_dtype, branch.dtype if is_known else x.dtype


@dataclass(frozen=True, eq=False, slots=True)  # compared as an object, as the key of a plan
class _Kind:
    """What calls share whose eps, backend, dtype of products and ``signature`` of each tensor are the same."""

    eps: float
    backend: str
    dtype: torch.dtype
    """Of y, as a kernel writes it."""
    branch_dtype: torch.dtype | None
    """Of branch, as a kernel reads it."""
    casts_branch: bool
    casts_y: torch.dtype | None
    """To this dtype afterwards."""


_KINDS: Kept[_Kind] = Kept()


def _kind_of_call(inputs: Inputs, eps: float, backend: str, dtype: torch.dtype) -> _Kind:
    """Raises ValueError where the arguments do not fit; those of a kind that has been seen need no check."""
    return _KINDS.of_call(inputs, (eps, backend, dtype), partial(_new_kind, inputs, eps, backend, dtype))


def _new_kind(inputs: Inputs, eps: float, backend: str, dtype: torch.dtype) -> _Kind:
    _check(inputs, eps)
    branch = inputs.branch
    dtype, own_dtype, branch_dtype = _dtypes(inputs, dtype)
    return _Kind(
        eps=eps,
        backend=backend,
        dtype=own_dtype,
        branch_dtype=branch_dtype,
        casts_branch=branch is not None and branch.dtype != branch_dtype,
        casts_y=None if dtype == own_dtype else dtype,
    )


def _normalised(inputs: Inputs, eps: float) -> Tensor:
    """y in the dtype of the stream, which is ``inputs.x``."""
    stream, parameters = inputs.x, (*inputs[2:6], inputs.angle)
    weight, bias, gain, shift, angle = (None if p is None else p.to(stream.dtype) for p in parameters)
    with without_autocast(stream):
        y = F.layer_norm(stream, stream.shape[-1:], weight, bias, eps)
    if gain is not None:
        y = y * (1 + _over_rows(gain, y))
    if shift is not None:
        y = y + _over_rows(shift, y)
    return y if angle is None else rotated_ref(y, angle)


def _over_rows(parameter: Tensor, x: Tensor) -> Tensor:
    """(B, D) as (B, 1, ..., D)."""
    return parameter[(slice(None), *[None] * (x.dim() - 2))]


class _AddLayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor]:
        *tensors, ctx.kind = arguments
        inputs = Inputs(*tensors)
        stream, y, mean, rstd = _forward(inputs, ctx.kind)
        ctx.save_for_backward(*_kept(inputs, stream, ctx.needs_input_grad[6]), mean, rstd)
        ctx.set_materialize_grads(False)
        return inputs.x.detach() if stream is None else stream, y

    @staticmethod
    def backward(ctx: Any, dstream: Tensor | None, dy: Tensor | None) -> Any:  # type: ignore[override]
        *kept, mean, rstd = ctx.saved_tensors
        kept, wanted, kind = Inputs(*kept), ctx.needs_input_grad[:8], ctx.kind
        if torch.is_grad_enabled():  # with create_graph=True the reference, which is differentiable again
            return *_gradients_of_reference(dstream, dy, kept, kind.branch_dtype, kind.eps, wanted), None
        gradients = _backward(dstream, dy, kept, mean, rstd, kind.branch_dtype, kind.eps, wanted, kind.backend, kind)
        dx, dbranch, *rest = gradients
        return dx, dx if wanted[1] and dbranch is None else dbranch, *rest, None


def _kept(inputs: Inputs, stream: Tensor | None, keeps_branch: bool) -> Inputs:
    """What backward reads."""
    return inputs._replace(x=inputs.x if stream is None else stream, branch=inputs.branch if keeps_branch else None)


def _forward(inputs: Inputs, kind: _Kind) -> Outputs:
    x, branch, *_ = inputs
    outputs = _empty_outputs(inputs, kind.dtype)
    stream, y, mean, rstd = outputs
    if y.numel() == 0:
        return outputs._replace(mean=mean.zero_(), rstd=rstd.zero_())
    if kind.backend == "reference":
        parameters = inputs._asdict()
        found, _ = add_layer_norm_ref(**parameters, eps=kind.eps)
        rows = found.to(mean.dtype).flatten(0, -2)
        variance, average = torch.var_mean(rows, dim=1, correction=0)
        own = inputs._replace(x=found)
        y.copy_(_normalised(own, kind.eps))
        return Outputs(None if stream is None else stream.copy_(found), y, average, (variance + kind.eps).rsqrt())
    if not (x.is_contiguous() and (branch is None or branch.is_contiguous())):
        inputs = inputs._replace(x=x.contiguous(), branch=None if branch is None else branch.contiguous())
    _LAUNCHERS[kind.backend].forward(inputs, kind.eps, outputs, kind)
    return outputs


def _backward(
    dstream: Tensor | None,
    dy: Tensor | None,
    kept: Inputs,
    mean: Tensor,
    rstd: Tensor,
    branch_dtype: torch.dtype | None,
    eps: float,
    wanted: tuple[bool, ...],
    backend: str,
    kind: _Kind | None = None,
) -> Gradients:
    """The wanted gradients; that of branch is left out where it is that of x.

    ``kind``: that of the forward pass, where it is known.
    """
    stream = kept.x
    if backend == "reference" or stream.numel() == 0 or dy is None:
        kept = Inputs(*(None if p is None else p.detach() for p in kept))  # type: ignore[arg-type]
        gradients = _gradients_of_reference(dstream, dy, kept, branch_dtype, eps, wanted)
        shares = wanted[1] and _shares_gradient(kept, branch_dtype)
        return gradients._replace(dx=gradients.dbranch, dbranch=None) if shares else gradients
    gradients = _empty_gradients(kept, branch_dtype, wanted, torch.float32)
    branch = None if kept.branch is None or gradients.dgate is None else kept.branch.contiguous()
    if branch is not kept.branch or not stream.is_contiguous():
        kept = kept._replace(x=stream.contiguous(), branch=branch)
    dstream = None if dstream is None else dstream.contiguous()
    _LAUNCHERS[backend].backward(dstream, dy.contiguous(), kept, mean, rstd, gradients, kind)
    small = zip(gradients[2:], kept[2:], strict=True)
    own = [grad if grad is None or grad.dtype == p.dtype else grad.to(p.dtype) for grad, p in small]  # type: ignore[union-attr]
    return Gradients(*gradients[:2], *own)


def _gradients_of_reference(
    dstream: Tensor | None,
    dy: Tensor | None,
    kept: Inputs,
    branch_dtype: torch.dtype | None,
    eps: float,
    wanted: tuple[bool, ...],
) -> Gradients:
    """The wanted gradients, differentiable in all that they are made of.

    They are taken by aliases of the kept tensors: taken by the tensors themselves, paths that join these outside the
    operator would be counted here too.
    """
    create_graph, needs_total = torch.is_grad_enabled(), wanted[0] or wanted[1] or wanted[6]
    stream, branch, gate = kept.x, kept.branch, kept.gate
    with torch.enable_grad():
        leaves = Inputs(*(None if p is None else p.view_as(p) if p.requires_grad else _leaf(p) for p in kept))  # type: ignore[arg-type]
        needs = (needs_total, False, *wanted[2:6], False, wanted[7])
        sought = [p for p, is_needed in zip(leaves, needs, strict=True) if is_needed and p is not None]
        found: list[Tensor | None] = [torch.zeros_like(p) for p in sought]
        if dy is not None and sought:
            y = _normalised(leaves, eps).to(dy.dtype)
            found = list(torch.autograd.grad(y, sought, dy, create_graph=create_graph))
    rest = iter(found)
    total, _, *parameters, _, dangle = (next(rest) if is_needed else None for is_needed in needs)
    if total is not None and dstream is not None:
        total = total + dstream
    dbranch = dgate = None
    if total is not None and wanted[1]:
        dbranch = (total if gate is None else _over_rows(gate, total) * total).to(branch_dtype)
    if total is not None and wanted[6] and branch is not None and gate is not None:
        dgate = (branch * total).flatten(1, -2).sum(1) if stream.dim() > 2 else branch * total
        dgate = dgate.to(gate.dtype)
    return Gradients(total if wanted[0] else None, dbranch, *parameters, dgate=dgate, dangle=dangle)


def _leaf(p: Tensor) -> Tensor:
    return p.detach().requires_grad_()


def _shares_gradient(kept: Inputs, branch_dtype: torch.dtype | None) -> bool:
    """Whether the gradients of x and branch are one tensor."""
    return kept.gate is None and branch_dtype == kept.x.dtype


def _empty_outputs(inputs: Inputs, dtype: torch.dtype) -> Outputs:
    x, dense = inputs.x, torch.contiguous_format
    stream = None if inputs.branch is None else torch.empty_like(x, memory_format=dense)
    # torch takes a microsecond more for each of the arguments that it need not be given.
    y = (
        torch.empty_like(x, memory_format=dense)
        if x.dtype == dtype
        else torch.empty_like(x, dtype=dtype, memory_format=dense)
    )
    of_rows = torch.float64 if x.dtype == torch.float64 else torch.float32
    mean = x.new_empty_strided((math.prod(x.shape[:-1]),), (1,), dtype=of_rows)
    return Outputs(stream, y, mean, torch.empty_like(mean))


def _empty_gradients(
    kept: Inputs, branch_dtype: torch.dtype | None, wanted: tuple[bool, ...], dtype: torch.dtype | None
) -> Gradients:
    """Of the parameters in ``dtype``, or in their own."""
    stream, dense, dbranch = kept.x, torch.contiguous_format, None
    shares = wanted[1] and _shares_gradient(kept, branch_dtype)
    dx = torch.empty_like(stream, memory_format=dense) if wanted[0] or shares else None
    if wanted[1] and not shares:
        dbranch = torch.empty_like(stream, dtype=branch_dtype, memory_format=dense)
    parameters = [
        None
        if p is None or not is_wanted
        else torch.empty_like(p, memory_format=dense)
        if dtype is None or p.dtype == dtype
        else torch.empty_like(p, dtype=dtype, memory_format=dense)
        for p, is_wanted in zip(kept[2:], wanted[2:], strict=True)
    ]
    return Gradients(dx, dbranch, *parameters)


_ARGUMENTS = "Tensor? branch, Tensor? weight, Tensor? bias, Tensor? gain, Tensor? shift, Tensor? gate, Tensor? angle"
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)
torch.library.define(
    "scalelong::add_layer_norm",
    f"(Tensor x, {_ARGUMENTS}, float eps, ScalarType dtype) -> (Tensor, Tensor, Tensor, Tensor)",
    tags=_TAGS,
)
torch.library.define(
    "scalelong::add_layer_norm_backward",
    f"(Tensor? dstream, Tensor? dy, Tensor stream, {_ARGUMENTS}, Tensor mean, Tensor rstd, ScalarType? branch_dtype, "
    "float eps, bool[] wanted) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    tags=_TAGS,
)


@torch.library.impl("scalelong::add_layer_norm", "default")
def _(x: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    """Without a branch, an empty tensor stands for the stream, which may not be x itself."""
    *tensors, eps, dtype = arguments
    inputs = Inputs(x, *tensors)
    return none_as_empty(_forward(inputs, _kind_of_call(inputs, eps, backend_of(x), dtype)), x)


@torch.library.register_fake("scalelong::add_layer_norm")
def _(x, branch, weight, bias, gain, shift, gate, angle, eps, dtype):
    inputs = Inputs(x, branch, weight, bias, gain, shift, gate, angle)
    return none_as_empty(_empty_outputs(inputs, dtype), x)


@torch.library.impl("scalelong::add_layer_norm_backward", "default")
def _(dstream: Tensor | None, dy: Tensor | None, *arguments: Any) -> tuple[Tensor, ...]:
    kept, (mean, rstd, branch_dtype, eps, wanted) = Inputs(*arguments[:8]), arguments[8:]
    backend = backend_of(kept.x)
    gradients = _backward(dstream, dy, kept, mean, rstd, branch_dtype, eps, tuple(wanted), backend)
    return none_as_empty(gradients, kept.x)


@torch.library.register_fake("scalelong::add_layer_norm_backward")
def _(dstream, dy, stream, branch, weight, bias, gain, shift, gate, angle, mean, rstd, branch_dtype, eps, wanted):
    kept = Inputs(stream, branch, weight, bias, gain, shift, gate, angle)
    return none_as_empty(_empty_gradients(kept, branch_dtype, wanted, None), stream)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.eps, _ = inputs
    tensors = Inputs(*tensors)
    stream, _, mean, rstd = output
    stream = None if tensors.branch is None else stream
    ctx.save_for_backward(*_kept(tensors, stream, ctx.needs_input_grad[6]), mean, rstd)
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)
    ctx.branch_dtype = None if tensors.branch is None else tensors.branch.dtype


def _backward_of_operator(ctx: Any, dstream: Tensor | None, dy: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    *kept, mean, rstd = ctx.saved_tensors
    dstream = None if ctx.branch_dtype is None else dstream
    wanted = ctx.needs_input_grad[:8]
    if not any(wanted) or (dstream is None and dy is None):
        return (None,) * 10
    found = torch.ops.scalelong.add_layer_norm_backward(
        dstream, dy, *kept, mean, rstd, ctx.branch_dtype, ctx.eps, list(wanted)
    )
    gradients = [grad if is_wanted else None for grad, is_wanted in zip(found, wanted, strict=True)]
    if wanted[1] and _shares_gradient(Inputs(*kept), ctx.branch_dtype):
        gradients[1] = found[0]
    return *gradients, None, None


def _setup_backward_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, _, _, ctx.branch_dtype, ctx.eps, ctx.wanted = inputs
    ctx.save_for_backward(*tensors)
    ctx.set_materialize_grads(False)


def _backward_of_backward(ctx: Any, *outer: Tensor | None) -> tuple[Any, ...]:
    """By the reference, whose gradients are differentiable; mean and rstd are functions of the stream there."""
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        leaves = [None if p is None else p.view_as(p) if p.requires_grad else p for p in ctx.saved_tensors]
        dstream, dy, *tensors = leaves
        kept = Inputs(*tensors)  # type: ignore[arg-type]
        gradients = _gradients_of_reference(dstream, dy, kept, ctx.branch_dtype, ctx.eps, tuple(ctx.wanted))
        if ctx.wanted[1] and _shares_gradient(kept, ctx.branch_dtype):
            gradients = gradients._replace(dx=gradients.dbranch, dbranch=None)
        pairs = [(g, o) for g, o in zip(gradients, outer, strict=True) if g is not None and o is not None]
        sought = [p for p in leaves if p is not None and p.requires_grad]
        found = iter(
            torch.autograd.grad(
                [g for g, _ in pairs], sought, [o for _, o in pairs], create_graph=create_graph, allow_unused=True
            )
        )
    return *(next(found) if p is not None and p.requires_grad else None for p in leaves), None, None, None, None, None


torch.library.register_autograd("scalelong::add_layer_norm", _backward_of_operator, setup_context=_setup_context)
torch.library.register_autograd(
    "scalelong::add_layer_norm_backward", _backward_of_backward, setup_context=_setup_backward_context
)


def _check(inputs: Inputs, eps: float) -> None:
    x, branch, gate = inputs.x, inputs.branch, inputs.gate
    if x.dim() < 1 or not x.is_floating_point():
        raise ValueError(f"add_layer_norm: needs a floating x of (..., D), got {described(x)}")
    if branch is None and gate is not None:
        raise ValueError(f"add_layer_norm: gate {tuple(gate.shape)} without a branch")
    shape = x.shape
    of_row = shape[-1:]
    of_sample = (*shape[:1], *of_row) if len(shape) > 1 else None
    if inputs.angle is not None and shape[-1] % 2:
        raise ValueError(f"add_layer_norm: angle turns pairs of features, of which x {tuple(shape)} has an odd number")
    of_pairs = None if of_sample is None else (*shape[:1], shape[-1] // 2)
    expected = (shape, of_row, of_row, of_sample, of_sample, of_sample, of_pairs)
    for name, p, wanted in zip(Inputs._fields[1:], inputs[1:], expected, strict=True):
        if p is not None and (p.shape != wanted or p.device != x.device or not p.is_floating_point()):
            if p.shape != wanted:
                fits = "more dimensions" if wanted is None else tuple(wanted)
                raise ValueError(
                    f"add_layer_norm: {name} has shape {tuple(p.shape)}, but x {tuple(shape)} needs {fits}"
                )
            raise ValueError(f"add_layer_norm: {name} is {described(p)}, but x is {described(x)}")
    if not 0 <= eps < math.inf:
        raise ValueError(f"add_layer_norm: eps must be a finite number from 0 up, got {eps}")
