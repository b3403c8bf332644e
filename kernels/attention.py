"""Softmax attention over a packed projection (Vaswani et al., arXiv:1706.03762).

Heads are strided views into the projection: q, k and v are never copied and never cast.

Shapes: B batch, T tokens, H heads, D model width, E = D / H width of a head.
"""

import math
import warnings
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from scalelong.kernels import attention_backends
from scalelong.kernels.attention_backends import PACKAGES, Backend, join_heads, split_heads
from scalelong.kernels.backend import forced_backend, in_transform
from scalelong.kernels.double_backward import differentiable_gradients
from scalelong.kernels.precision import without_autocast


def attention_ref(qkv_BT3D: Tensor, num_heads: int) -> Tensor:
    """The specification: softmax(q kᵀ / √E) v for each head, written out."""
    q_BHTE, k_BHTE, v_BHTE = split_heads(qkv_BT3D, num_heads)
    weights_BHTT = (q_BHTE @ k_BHTE.transpose(-2, -1) / math.sqrt(q_BHTE.shape[-1])).softmax(dim=-1)
    return join_heads(weights_BHTT @ v_BHTE)


BACKENDS = {**attention_backends.BACKENDS, "reference": Backend("reference", attention_ref)}


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """The row of a CSV under bench/results that has ``provider`` as the fastest, forward with backward ("both")."""

    file: str
    date: str
    commit: str
    shape: str


@dataclass(frozen=True, kw_only=True)
class Fastest:
    """Where ``backend`` was measured to be the fastest; the ranges include both ends."""

    backend: str
    capability: tuple[int, int] | None
    """CUDA compute capability; None: a CPU."""
    dtype: torch.dtype
    head_dims: tuple[int, int]
    lengths: tuple[int, int]
    measured: Measurement


# "auto" takes the first entry that fits, else "sdpa". Empty until bench_attention.py has rows of a GPU.
FASTEST: tuple[Fastest, ...] = ()


def attention_backend(qkv: Tensor, num_heads: int) -> str:
    """What ``attention(qkv, num_heads)`` runs: by the table ``FASTEST``, else PyTorch's own choice, "sdpa".

    Under torch.use_deterministic_algorithms only what has a deterministic backward; the reference inside the transforms
    of torch.func and where ``use_backend`` forces it.
    """
    if forced_backend() == "reference" or in_transform():
        return "reference"
    T, E = qkv.shape[1], qkv.shape[2] // (3 * num_heads)
    for entry in FASTEST:
        if (
            entry.dtype == qkv.dtype
            and entry.head_dims[0] <= E <= entry.head_dims[1]
            and entry.lengths[0] <= T <= entry.lengths[1]
            and entry.capability == _capability(qkv.device)
            and _runs_on(entry.backend, qkv.device, torch.are_deterministic_algorithms_enabled())
        ):
            return entry.backend
    return "sdpa"


def attention(qkv: Tensor, num_heads: int, *, backend: str = "auto") -> Tensor:
    """Softmax self-attention over a packed projection.

    Args:
        qkv: (B, T, 3D), the projections to queries, keys and values side by side, each split into heads.
        num_heads: H, must divide D.
        backend: "fa4", "fa3", "fa2" are the FlashAttention packages; "sdpa" is PyTorch's
            scaled_dot_product_attention with the kernel of its choice, "cudnn", "flash", "efficient" and "math" with
            the one of that name; "reference" is the plain formula; "auto" takes what ``attention_backend`` says.

    Returns:
        (B, T, D) in the dtype of ``qkv``, differentiable; under create_graph=True by the plain formula, which can be
        differentiated again.

    Raises:
        ValueError: a shape that cannot be, no such backend, or a length, head count or dtype that it cannot take;
            names the backends that can.
        RuntimeError: the machine lacks what the backend needs, says what and how to get it; or
            torch.use_deterministic_algorithms is on, ``qkv`` requires grad and the backward is not deterministic.
            torch.compile leaves these checks out: PyTorch and the packages raise errors of their own there. So does
            backward under create_graph=True by one of the packages, whose derivatives end there.
    """
    if qkv.dim() != 3 or qkv.shape[-1] % 3:
        raise ValueError(f"attention: qkv must be (B, T, 3D), got {tuple(qkv.shape)}")
    if num_heads < 1 or qkv.shape[-1] // 3 % num_heads:
        raise ValueError(f"attention: {num_heads} heads do not divide the width {qkv.shape[-1] // 3}")
    if not qkv.is_floating_point():
        raise ValueError(f"attention: qkv must be of a floating-point dtype, got {qkv.dtype}")
    if backend == "auto":
        backend = attention_backend(qkv, num_heads)
    elif backend not in BACKENDS:
        raise ValueError(f"attention: unknown backend {backend!r}; there are auto, {', '.join(BACKENDS)}")
    elif not torch.compiler.is_compiling():
        _assert_runs(BACKENDS[backend], qkv, num_heads)
    out = BACKENDS[backend].call(qkv, num_heads)
    if backend in ("math", "reference") or not out.requires_grad or torch.compiler.is_compiling():
        return out
    return _TwiceDifferentiable.apply(out, qkv, num_heads, backend)


class _TwiceDifferentiable(torch.autograd.Function):
    """``out``, attention over ``qkv`` by kernels without a second derivative, with one by the plain formula.

    It goes round those kernels: under create_graph=True they get no gradient, and ``qkv`` gets that of the formula.
    """

    @staticmethod
    def forward(ctx: Any, out: Tensor, qkv: Tensor, num_heads: int, backend: str) -> Tensor:
        ctx.save_for_backward(qkv)
        ctx.num_heads, ctx.backend = num_heads, backend
        return out.detach()

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        if not torch.is_grad_enabled():
            return d_out, None, None, None
        if ctx.backend in PACKAGES:
            raise RuntimeError(
                f"attention: backend {ctx.backend!r} has no second derivative, as create_graph=True asks for; "
                "sdpa, math, reference have one"
            )
        (qkv,) = ctx.saved_tensors
        with without_autocast(qkv):
            formula = partial(attention_ref, num_heads=ctx.num_heads)
            (d_qkv,) = differentiable_gradients(formula, (qkv,), (True,), d_out)
        return None, d_qkv, None, None


def _assert_runs(backend: Backend, qkv: Tensor, num_heads: int) -> None:
    start = f"attention: backend {backend.name!r}"
    if missing := backend.missing(qkv.device):
        raise RuntimeError(f"{start} cannot run here: {missing}. {_able(qkv, num_heads)} can")
    if refusal := backend.refuses(qkv, num_heads):
        raise ValueError(
            f"{start} cannot take {tuple(qkv.shape)}, {num_heads} heads: {refusal}. {_able(qkv, num_heads)} can"
        )
    if not torch.are_deterministic_algorithms_enabled() or backend.is_deterministic(qkv.device):
        return
    if qkv.requires_grad and torch.is_grad_enabled():
        message = (
            f"{start} has no deterministic backward, and torch.use_deterministic_algorithms is on. "
            f"{_able(qkv, num_heads, deterministic=True)} have one"
        )
        if not torch.is_deterministic_algorithms_warn_only_enabled():
            raise RuntimeError(message)
        warnings.warn(message, stacklevel=3)


def _able(qkv: Tensor, num_heads: int, *, deterministic: bool = False) -> str:
    return ", ".join(
        name
        for name, backend in BACKENDS.items()
        if backend.why_not(qkv, num_heads) is None and (backend.is_deterministic(qkv.device) or not deterministic)
    )


# torch.compile evaluates these two while it traces.
@torch.compiler.assume_constant_result
def _capability(device: torch.device) -> tuple[int, int] | None:
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else None


@torch.compiler.assume_constant_result
def _runs_on(name: str, device: torch.device, deterministic: bool) -> bool:
    backend = BACKENDS[name]
    return backend.missing(device) is None and (backend.is_deterministic(device) or not deterministic)
