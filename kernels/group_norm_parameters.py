"""The gradients of what scales and shifts a channel, from sums over positions.

Names and shapes: group_norm_walks.py.
"""
# pyright: reportGeneralTypeIssues=false, reportAttributeAccessIssue=false

from typing import Any, NamedTuple

import triton
import triton.language as tl


class ParameterGradients(NamedTuple):
    """In the dtype of what each belongs to; None for what nobody wants."""

    scale: Any = None  # (N, Cs), in fp32
    weight: Any = None  # (C,)
    bias: Any = None  # (C,)
    gain: Any = None  # (N, C)
    shift: Any = None  # (N, C)


@triton.jit
def _sum_parts(parts_ptr, n, c, mask, C, num_parts, BLOCK_PARTS: tl.constexpr, VEC: tl.constexpr):
    """Of (N, C, parts) the sums of all parts, at images and channels (BLOCK_N, BLOCK_C)."""
    pointers = parts_ptr + (n.to(tl.int64) * C + c) * num_parts
    total = tl.zeros((mask.shape[0], mask.shape[1], BLOCK_PARTS), tl.float32)
    for first in range(0, num_parts, BLOCK_PARTS):
        part = first + tl.arange(0, BLOCK_PARTS)[None, None, :]
        inside = tl.max_constancy(mask[:, :, None] & (part < num_parts), [1, 1, VEC])
        of_parts = tl.max_contiguous(tl.multiple_of(pointers[:, :, None] + part, [1, 1, 4 * VEC]), [1, 1, VEC])
        total += tl.load(of_parts, mask=inside, other=0.0)
    return tl.sum(total, 2)


@triton.jit(do_not_specialize=("N", "Ch", "Cs", "num_parts", "num_scale_parts"))
def _parameters_bwd_kernel(
    sums_ptr,  # (2, N, C, parts): over positions, of dz and of dz * xhat
    scale_sums_ptr,  # (N, C, scale_parts): over positions, of dx * cat([h, s]), for channels of s; or None
    parameters,
    gradients,
    N,
    Ch,
    Cs,
    num_parts,
    num_scale_parts,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
    VEC: tl.constexpr,  # parts that lie side by side and aligned
):
    C = Ch + Cs
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    weight = tl.full(c.shape, 1.0, tl.float32)
    bias = tl.full(c.shape, 0.0, tl.float32)
    if parameters.weight is not None:
        weight = tl.load(parameters.weight + c, mask=c < C, other=0.0).to(tl.float32)
        bias = tl.load(parameters.bias + c, mask=c < C, other=0.0).to(tl.float32)
    dweight = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    dbias = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    for first in range(0, N, BLOCK_N):
        n = first + tl.arange(0, BLOCK_N)[:, None]
        mask = (n < N) & (c < C)
        if gradients.scale is not None:
            dscale = _sum_parts(scale_sums_ptr, n, c, mask & (c >= Ch), C, num_scale_parts, BLOCK_PARTS, VEC)
            tl.store(gradients.scale + n.to(tl.int64) * Cs + c - Ch, dscale, mask=mask & (c >= Ch))
        if sums_ptr is not None:
            sum_dz = _sum_parts(sums_ptr, n, c, mask, C, num_parts, BLOCK_PARTS, VEC)
            xhat_ptr = sums_ptr + N.to(tl.int64) * C * num_parts
            sum_dz_xhat = _sum_parts(xhat_ptr, n, c, mask, C, num_parts, BLOCK_PARTS, VEC)
            if gradients.shift is not None:
                tl.store(gradients.shift + n.to(tl.int64) * C + c, sum_dz, mask=mask)
            if gradients.gain is not None:
                dgain = weight * sum_dz_xhat + bias * sum_dz
                tl.store(gradients.gain + n.to(tl.int64) * C + c, dgain, mask=mask)
            if parameters.gain is not None:
                offsets = n.to(tl.int64) * parameters.gain_stride_n + c * parameters.gain_stride_c
                gain = 1 + tl.load(parameters.gain + offsets, mask=mask, other=0.0).to(tl.float32)
                sum_dz *= gain
                sum_dz_xhat *= gain
            dweight += sum_dz_xhat
            dbias += sum_dz
    if gradients.weight is not None:
        tl.store(gradients.weight + c, tl.sum(dweight, 0)[None, :], mask=c < C)
    if gradients.bias is not None:
        tl.store(gradients.bias + c, tl.sum(dbias, 0)[None, :], mask=c < C)
