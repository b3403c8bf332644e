"""Softmax attention over a packed projection (Vaswani et al., arXiv:1706.03762).

Heads are strided views into the projection: q, k and v are never copied and never cast.

Shapes: B batch, T tokens, H heads, D model width, E = D / H width of a head.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

BACKENDS = ("auto", "sdpa", "reference")


def attention_ref(qkv_BT3D: Tensor, num_heads: int) -> Tensor:
    """The specification: softmax(q kᵀ / √E) v for each head, written out."""
    q_BHTE, k_BHTE, v_BHTE = _split_heads(qkv_BT3D, num_heads)
    weights_BHTT = (q_BHTE @ k_BHTE.transpose(-2, -1) / math.sqrt(q_BHTE.shape[-1])).softmax(dim=-1)
    return _join_heads(weights_BHTT @ v_BHTE)


def attention(qkv: Tensor, num_heads: int, *, backend: str = "auto") -> Tensor:
    """Softmax self-attention over a packed projection.

    Args:
        qkv: (B, T, 3D), the projections to queries, keys and values side by side, each split into heads.
        num_heads: H, must divide D.
        backend: "sdpa" is PyTorch's scaled_dot_product_attention, "reference" the plain formula;
            "auto" takes "sdpa".

    Returns:
        (B, T, D) in the dtype of ``qkv``.

    Raises:
        ValueError: a shape or a backend that cannot be, naming it.
    """
    if qkv.dim() != 3 or qkv.shape[-1] % 3:
        raise ValueError(f"attention: qkv must be (B, T, 3D), got {tuple(qkv.shape)}")
    if num_heads < 1 or qkv.shape[-1] // 3 % num_heads:
        raise ValueError(f"attention: {num_heads} heads do not divide the width {qkv.shape[-1] // 3}")
    if backend not in BACKENDS:
        raise ValueError(f"attention: unknown backend {backend!r}; there are {', '.join(BACKENDS)}")
    if backend == "reference":
        return attention_ref(qkv, num_heads)
    q_BHTE, k_BHTE, v_BHTE = _split_heads(qkv, num_heads)
    return _join_heads(F.scaled_dot_product_attention(q_BHTE, k_BHTE, v_BHTE))


def _split_heads(qkv_BT3D: Tensor, num_heads: int) -> tuple[Tensor, ...]:
    return qkv_BT3D.unflatten(-1, (3, num_heads, -1)).permute(2, 0, 3, 1, 4).unbind()


def _join_heads(x_BHTE: Tensor) -> Tensor:
    return torch.flatten(x_BHTE.transpose(1, 2), start_dim=2)
