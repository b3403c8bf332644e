"""Softmax attention (Vaswani et al., arXiv:1706.03762), over a packed projection or over queries, keys and values.

Heads are strided views into the projections: q, k and v are never copied and never cast, unless ``qk_norm`` makes new
ones. That normalisation keeps the logits bounded (arXiv:2302.05442); it is a layer that is called, not weights that are
read, so that hooks, adapters and sharding see it.

Shapes: B batch, T tokens, S tokens attended to, H heads, D model width, E = D / H width of a head.
"""

import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from scalelong.kernels import attention_backends
from scalelong.kernels.arguments import described
from scalelong.kernels.attention_backends import (
    PACKAGES,
    Backend,
    Projected,
    heads,
    join_heads,
    queries,
    split_heads,
)
from scalelong.kernels.backend import Backends, forced_backend, in_transform, is_traced, is_wrapper, tells
from scalelong.kernels.double_backward import differentiable_gradients
from scalelong.kernels.precision import cast_by_autocast, is_autocast, without_autocast

Norm = Callable[[Tensor], Tensor]
"""Of (B, T, H, E) to the same shape, over the last dimension: nn.RMSNorm(E), nn.LayerNorm(E), a function."""


def attention_ref(
    qkv: Projected, num_heads: int, *, scale: float | None = None, qk_norm: Norm | tuple[Norm, Norm] | None = None
) -> Tensor:
    """The specification: softmax(scale * q kᵀ) v for each head, written out; by default with scale = 1 / √E."""
    q_BHTE, k_BHSE, v_BHSE = split_heads(normalised(qkv, num_heads, qk_norm), num_heads)
    logits_BHTS = q_BHTE @ k_BHSE.transpose(-2, -1)
    logits_BHTS = logits_BHTS / math.sqrt(q_BHTE.shape[-1]) if scale is None else logits_BHTS * scale
    return join_heads(logits_BHTS.softmax(dim=-1) @ v_BHSE)


def normalised(qkv: Projected, num_heads: int, qk_norm: Norm | tuple[Norm, Norm] | None) -> Projected:
    """The projections with the queries and the keys of each head through ``qk_norm``, in the dtype of the values."""
    if qk_norm is None:
        return qkv
    norm_q, norm_k = qk_norm if isinstance(qk_norm, tuple) else (qk_norm, qk_norm)
    q_BTHE, k_BSHE, v_BSHE = heads(qkv, num_heads)
    return _normalised(norm_q, q_BTHE, v_BSHE), _normalised(norm_k, k_BSHE, v_BSHE), v_BSHE.flatten(2)


def _normalised(norm: Norm, x_BTHE: Tensor, v_BSHE: Tensor) -> Tensor:
    # Under autocast PyTorch's norms return fp32, which nothing but the formula takes beside 16-bit values.
    y_BTHE = norm(x_BTHE).to(v_BSHE.dtype)
    if y_BTHE.shape != x_BTHE.shape:
        raise ValueError(f"attention: qk_norm makes {tuple(y_BTHE.shape)} of {tuple(x_BTHE.shape)}, (B, T, H, E)")
    return y_BTHE.flatten(2)


BACKENDS = {
    **attention_backends.BACKENDS,
    "reference": Backend("reference", lambda qkv, num_heads, scale: attention_ref(qkv, num_heads, scale=scale)),
}


def attention(
    qkv: Projected,
    num_heads: int,
    *,
    backend: str = "auto",
    scale: float | None = None,
    qk_norm: Norm | tuple[Norm, Norm] | None = None,
) -> Tensor:
    """Softmax attention over a packed projection, or over queries, keys and values.

    Args:
        qkv: (B, T, 3D), the projections to queries, keys and values side by side, each split into heads; or the three
            by themselves, (q, k, v) of (B, T, D), (B, S, D) and (B, S, D): with S tokens of another sequence this is
            cross-attention.
        num_heads: H, must divide D.
        backend: "fa4", "fa3", "fa2" are the FlashAttention packages; "sdpa" is PyTorch's
            scaled_dot_product_attention with the kernel of its choice, "cudnn", "flash", "efficient" and "math" with
            the one of that name; "reference" is the plain formula; "auto" takes "sdpa", and the reference inside the
            transforms of torch.func and where ``use_backend`` forces it.
        scale: what the logits q kᵀ are multiplied by; None for 1 / √E.
        qk_norm: a layer or function that normalises queries and keys over the last dimension of (B, T, H, E), or a
            pair, one for the queries and one for the keys: (nn.RMSNorm(E), nn.RMSNorm(E)) for learned weights. Cosine
            attention is ``qk_norm=partial(F.normalize, dim=-1)`` with a ``scale``; a learned temperature is a factor
            in the norm of the queries. The result is cast to the dtype of the values.

    Returns:
        (B, T, D) in the dtype of the values, differentiable in qkv and in what ``qk_norm`` is made of; under
        create_graph=True by the plain formula, which can be differentiated again.

    Raises:
        ValueError: a shape or scale that cannot be, no such backend, or a length, head count or dtype that it cannot
            take; names the backends that can.
        RuntimeError: the machine lacks what the backend needs, says what and how to get it; or
            torch.use_deterministic_algorithms is on, an input requires grad and the backward is not deterministic.
            torch.compile leaves these checks out: PyTorch and the packages raise errors of their own there. So does
            backward under create_graph=True by one of the packages, whose derivatives end there.
    """
    if not isinstance(qkv, Tensor) and is_autocast(qkv[0].device.type):
        qkv = cast_by_autocast(*qkv)  # type: ignore[assignment]
    _check(qkv, num_heads, scale)
    qkv = normalised(qkv, num_heads, qk_norm)
    if backend == "auto":
        backend = _backend_of_auto(qkv)
    elif backend not in BACKENDS:
        raise ValueError(f"attention: unknown backend {backend!r}; there are auto, {', '.join(BACKENDS)}")
    elif not is_traced():
        _assert_runs(BACKENDS[backend], qkv, num_heads)
    out = BACKENDS[backend].call(qkv, num_heads, scale)
    if backend in ("math", "reference") or not out.requires_grad or is_traced():
        return out
    return _TwiceDifferentiable.apply(out, num_heads, backend, scale, *_tensors(qkv))


def _backend_of_auto(qkv: Projected) -> str:
    is_plain = forced_backend() == "reference" or in_transform() or is_wrapper(queries(qkv))
    return "reference" if is_plain else "sdpa"


@tells(attention)
def _(qkv: Projected, num_heads: int, *, backend: str = "auto", **_: Any) -> Backends:
    backend = _backend_of_auto(qkv) if backend == "auto" else backend
    name = backend if backend in ("reference", *PACKAGES) else "torch"
    return Backends(name, name)


def _tensors(qkv: Projected) -> tuple[Tensor, ...]:
    return (qkv,) if isinstance(qkv, Tensor) else qkv


class _TwiceDifferentiable(torch.autograd.Function):
    """``out``, attention by kernels without a second derivative, with one by the plain formula.

    It goes round those kernels: under create_graph=True they get no gradient, and the projections get that of the
    formula.
    """

    @staticmethod
    def forward(
        ctx: Any, out: Tensor, num_heads: int, backend: str, scale: float | None, *projections: Tensor
    ) -> Tensor:
        ctx.save_for_backward(*projections)
        ctx.num_heads, ctx.backend, ctx.scale = num_heads, backend, scale
        return out.detach()

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        projections = ctx.saved_tensors
        if not torch.is_grad_enabled():
            return d_out, None, None, None, *(None for _ in projections)
        if ctx.backend in PACKAGES:
            raise RuntimeError(
                f"attention: backend {ctx.backend!r} has no second derivative, as create_graph=True asks for; "
                "sdpa, math, reference have one"
            )

        def formula(*projections: Tensor) -> Tensor:
            qkv: Any = projections[0] if len(projections) == 1 else projections
            return attention_ref(qkv, ctx.num_heads, scale=ctx.scale)

        with without_autocast(projections[0]):
            grads = differentiable_gradients(formula, projections, ctx.needs_input_grad[4:], d_out)
        return None, None, None, None, *grads


def _check(qkv: Projected, num_heads: int, scale: float | None) -> None:
    if isinstance(scale, Tensor):
        raise ValueError(
            f"attention: scale is one number, not {described(scale)}; a learned one is a factor in qk_norm"
        )
    if isinstance(qkv, Tensor):
        if qkv.dim() != 3 or qkv.shape[-1] % 3:
            raise ValueError(f"attention: qkv must be (B, T, 3D), got {tuple(qkv.shape)}")
        D = qkv.shape[-1] // 3
    else:
        _check_unpacked(*qkv)
        D = qkv[0].shape[-1]
    if num_heads < 1 or D % num_heads:
        raise ValueError(f"attention: {num_heads} heads do not divide the width {D}")
    if not queries(qkv).is_floating_point():
        raise ValueError(f"attention: qkv must be of a floating-point dtype, got {queries(qkv).dtype}")


def _check_unpacked(*q_k_v: Tensor) -> None:
    if len(q_k_v) != 3:
        raise ValueError(f"attention: a tuple must hold q, k and v, got {len(q_k_v)} tensors")
    q, k, v = q_k_v
    if q.dim() != 3 or k.dim() != 3 or k.shape != v.shape or q.shape[0] != k.shape[0] or q.shape[2] != k.shape[2]:
        shapes = ", ".join(str(tuple(x.shape)) for x in q_k_v)
        raise ValueError(f"attention: q, k, v must be (B, T, D), (B, S, D), (B, S, D), got {shapes}")
    for name, x in (("k", k), ("v", v)):
        if x.dtype != q.dtype or x.device != q.device:
            raise ValueError(f"attention: q is {described(q)} but {name} is {described(x)}")


def _assert_runs(backend: Backend, qkv: Projected, num_heads: int) -> None:
    start, device = f"attention: backend {backend.name!r}", queries(qkv).device
    if missing := backend.missing(device):
        raise RuntimeError(f"{start} cannot run here: {missing}. {_able(qkv, num_heads)} can")
    if refusal := backend.refuses(qkv, num_heads):
        shapes = ", ".join(str(tuple(x.shape)) for x in _tensors(qkv))
        raise ValueError(f"{start} cannot take {shapes}, {num_heads} heads: {refusal}. {_able(qkv, num_heads)} can")
    if not torch.are_deterministic_algorithms_enabled() or backend.is_deterministic(device):
        return
    if any(x.requires_grad for x in _tensors(qkv)) and torch.is_grad_enabled():
        message = (
            f"{start} has no deterministic backward, and torch.use_deterministic_algorithms is on. "
            f"{_able(qkv, num_heads, deterministic=True)} have one"
        )
        if not torch.is_deterministic_algorithms_warn_only_enabled():
            raise RuntimeError(message)
        warnings.warn(message, stacklevel=3)


def _able(qkv: Projected, num_heads: int, *, deterministic: bool = False) -> str:
    device = queries(qkv).device
    return ", ".join(
        name
        for name, backend in BACKENDS.items()
        if backend.why_not(qkv, num_heads) is None and (backend.is_deterministic(device) or not deterministic)
    )
