"""GroupNorm of contiguous tensors whose groups fit into registers: a program for each, and each input is read once.

A group's channels lie side by side, so that it is one run of D * P elements in memory (two, where it has channels of h
and of s). A program takes it in pieces of ROWS rows of vec elements; a row has one channel. The pieces stay as they
were read, 16 bits wide where the tensors are. Names and shapes: group_norm_walks.py.
"""
# pyright: reportGeneralTypeIssues=false, reportAttributeAccessIssue=false

from typing import NamedTuple

import triton
import triton.language as tl

from scalelong.kernels.group_norm_walks import (
    channel_affine,
    channel_scale,
    is_folded,
    narrowed,
    quotient,
    widened,
)
from scalelong.kernels.triton_activations import activate, activation_slope

_SIZES = ("N", "R", "Ch", "Cs", "D", "G")


class Pieces(NamedTuple):
    """What a kernel is compiled for."""

    number: int
    rows: int  # of a piece, a power of two
    vec: int  # elements of a row; divides P
    masked: bool  # whether the last piece reaches beyond the group
    segment: int  # rows whose sums backward stores as one: a power of two, divides the rows of a channel

    @property
    def shape(self) -> tuple[int, int]:
        """Of a piece."""
        return (self.rows, self.vec)


@triton.jit
def _group(R, Ch, D, G):
    """Of this program's group: its image, first channel, rows, and rows of h."""
    n = tl.program_id(0) // G
    first = (tl.program_id(0) - n * G) * D
    return n, first, D * R, tl.minimum(tl.maximum(Ch - first, 0), D) * R


@triton.jit
def _pointers(x_ptr, n, first, num_channels, R, row, PIECES: tl.constexpr):
    """Rows of a group that starts at channel ``first`` of (N, num_channels, P), which may be negative."""
    return _over_vectors(_starts(x_ptr, n, first, num_channels, R, row, PIECES), PIECES)


@triton.jit
def _starts(x_ptr, n, first, num_channels, R, row, PIECES: tl.constexpr):
    """The address of each row's first element."""
    return x_ptr + (n.to(tl.int64) * num_channels + first) * R * PIECES.vec + row * PIECES.vec


@triton.jit
def _over_vectors(starts, PIECES: tl.constexpr):
    """The addresses of all elements of rows, which lie side by side and aligned: the compiler is told."""
    VEC: tl.constexpr = PIECES.vec
    VEC_BYTES: tl.constexpr = VEC * starts.dtype.element_ty.primitive_bitwidth // 8
    pointers = starts[:, None] + tl.arange(0, VEC)[None, :]
    return tl.max_contiguous(tl.multiple_of(pointers, [1, VEC_BYTES]), [1, VEC])


@triton.jit
def _pointers_of_two(h_ptr, s_ptr, n, first, Ch, Cs, R, row, rows_of_h, PIECES: tl.constexpr):
    """Into h, and from row ``rows_of_h`` on into s; into one alone where the other is None."""
    if s_ptr is None:
        return _pointers(h_ptr, n, first, Ch, R, row, PIECES)
    elif h_ptr is None:
        return _pointers(s_ptr, n, first - Ch, Cs, R, row, PIECES)
    else:
        in_h = _starts(h_ptr, n, first, Ch, R, row, PIECES)
        in_s = _starts(s_ptr, n, first - Ch, Cs, R, row, PIECES)
        return _over_vectors(tl.where(row < rows_of_h, in_h, in_s), PIECES)


@triton.jit
def _rows(k, num_rows, PIECES: tl.constexpr):
    """Those of the k-th piece, and which exist: all, except in the last piece of a group that does not fill it."""
    ROWS: tl.constexpr = PIECES.rows
    row = k * ROWS + tl.arange(0, ROWS)
    if PIECES.masked and k == PIECES.number - 1:
        return row, row < num_rows
    else:
        return row, tl.full((ROWS,), 1, tl.int1)


@triton.jit
def _over_row(mask, PIECES: tl.constexpr):
    VEC: tl.constexpr = PIECES.vec
    everywhere = tl.arange(0, VEC)[None, :] < VEC
    return tl.max_constancy(mask[:, None] & everywhere, [1, VEC])


@triton.jit(do_not_specialize=_SIZES)
def _flat_fwd_kernel(
    h_ptr,  # (N, Ch, P)
    s_ptr,  # (N, Cs, P) or None
    parameters,
    mean_ptr,  # (N, G)
    rstd_ptr,  # (N, G)
    y_ptr,  # (N, C, P)
    eps,
    R,  # rows of a channel: P / vec
    Ch,
    Cs,
    D,
    G,
    PIECES: tl.constexpr,
    ACT: tl.constexpr,
):
    NUMBER: tl.constexpr = PIECES.number
    n, first, num_rows, rows_of_h = _group(R, Ch, D, G)
    size = (num_rows * PIECES.vec).to(tl.float32)
    xs, scales = (), ()
    total = tl.full(PIECES.shape, 0.0, tl.float32)
    for k in tl.static_range(NUMBER):
        row, exists = _rows(k, num_rows, PIECES)
        pointers = _pointers_of_two(h_ptr, s_ptr, n, first, Ch, Cs, R, row, rows_of_h, PIECES)
        xs += (tl.load(pointers, mask=_over_row(exists, PIECES), other=0.0, eviction_policy="evict_first"),)
    for k in tl.static_range(NUMBER):
        row, exists = _rows(k, num_rows, PIECES)
        x = widened(xs[k])
        if s_ptr is not None:
            scales += (channel_scale(parameters, n, first + quotient(row, R), Ch, exists),)
            x *= scales[k][:, None]
        total += x
    mean = tl.sum(tl.sum(total, 1), 0) / size

    squares = tl.full(PIECES.shape, 0.0, tl.float32)
    for k in tl.static_range(NUMBER):
        row, exists = _rows(k, num_rows, PIECES)
        x = widened(xs[k])
        distance = x * scales[k][:, None] - mean if s_ptr is not None else x - mean
        distance = tl.where(exists[:, None], distance, 0.0)
        squares += distance * distance
    rstd = tl.rsqrt(tl.sum(tl.sum(squares, 1), 0) / size + eps)
    tl.store(mean_ptr + tl.program_id(0), mean)
    tl.store(rstd_ptr + tl.program_id(0), rstd)

    for k in tl.static_range(NUMBER):
        row, exists = _rows(k, num_rows, PIECES)
        a, b = channel_affine(parameters, n, first + quotient(row, R), exists)
        a *= rstd
        x = widened(xs[k])
        if is_folded(h_ptr):
            b -= mean * a
            if s_ptr is not None:
                a *= scales[k]
        else:
            x = x * scales[k][:, None] - mean if s_ptr is not None else x - mean
        y = activate(x * a[:, None] + b[:, None], ACT)
        pointers = _pointers(y_ptr, n, first, Ch + Cs, R, row, PIECES)
        mask = _over_row(exists, PIECES)
        tl.store(pointers, narrowed(y, y_ptr.dtype.element_ty), mask=mask, eviction_policy="evict_first")


@triton.jit(do_not_specialize=_SIZES)
def _flat_bwd_kernel(
    dy_ptr,  # (N, C, P)
    h_ptr,  # (N, Ch, P)
    s_ptr,  # (N, Cs, P) or None
    parameters,
    mean_ptr,  # (N, G)
    rstd_ptr,  # (N, G)
    dh_ptr,  # (N, Ch, P), or None where nobody wants it
    ds_ptr,  # (N, Cs, P), or None
    partial_ptr,  # (3, N, C, segments): sums over a segment of dz, of dz * xhat, and of dx * cat([h, s]); or None
    N,
    R,  # rows of a channel: P / vec
    Ch,
    Cs,
    D,
    G,
    PIECES: tl.constexpr,
    ACT: tl.constexpr,
    WANTS_SUMS: tl.constexpr,  # the first two
    WANTS_DSCALE: tl.constexpr,  # the third
):
    NUMBER: tl.constexpr = PIECES.number
    ROWS: tl.constexpr = PIECES.rows
    n, first, num_rows, rows_of_h = _group(R, Ch, D, G)
    C = Ch + Cs
    size = (num_rows * PIECES.vec).to(tl.float32)
    mean, rstd = tl.load(mean_ptr + tl.program_id(0)), tl.load(rstd_ptr + tl.program_id(0))
    if partial_ptr is not None:
        num_segments = R // PIECES.segment
        partial_ptr += (n.to(tl.int64) * C + first) * num_segments
        stride = N.to(tl.int64) * C * num_segments

    xs, dys = (), ()
    for k in tl.static_range(NUMBER):
        row, exists = _rows(k, num_rows, PIECES)
        pointers = _pointers_of_two(h_ptr, s_ptr, n, first, Ch, Cs, R, row, rows_of_h, PIECES)
        xs += (tl.load(pointers, mask=_over_row(exists, PIECES), other=0.0, eviction_policy="evict_first"),)
        pointers = _pointers(dy_ptr, n, first, C, R, row, PIECES)
        dys += (tl.load(pointers, mask=_over_row(exists, PIECES), other=0.0, eviction_policy="evict_first"),)

    mean_dz = tl.zeros((ROWS,), tl.float32)
    mean_dz_xhat = tl.zeros((ROWS,), tl.float32)
    dzs, slopes, scales, sums_dz_x = (), (), (), ()
    for k in tl.static_range(NUMBER):
        row, exists = _rows(k, num_rows, PIECES)
        c = first + quotient(row, R)
        a, b = channel_affine(parameters, n, c, exists)
        scale = tl.full((ROWS,), 1.0, tl.float32)
        if s_ptr is not None:
            scale = channel_scale(parameters, n, c, Ch, exists)
        x = widened(xs[k])
        if is_folded(h_ptr):
            xhat = x * (scale * rstd)[:, None] - mean * rstd
        else:
            xhat = (x * scale[:, None] - mean) * rstd
        dz = widened(dys[k]) * activation_slope(xhat * a[:, None] + b[:, None], ACT)
        sum_dz = tl.sum(dz, 1)
        if is_folded(h_ptr):
            sums_dz_x += (tl.sum(dz * x, 1),)
            sum_dz_xhat = sums_dz_x[k] * (scale * rstd) - sum_dz * (mean * rstd)
        else:
            sum_dz_xhat = tl.sum(dz * xhat, 1)
        # Rounded as by eager PyTorch, for dx alone: cheaper than to compute it again.
        dzs += (narrowed(dz, dys[k].dtype),)
        mean_dz += a * sum_dz
        mean_dz_xhat += a * sum_dz_xhat
        if WANTS_SUMS:
            _store_segments(partial_ptr, sum_dz, k, num_rows, PIECES)
            _store_segments(partial_ptr + stride, sum_dz_xhat, k, num_rows, PIECES)
        slopes += (a,)
        scales += (scale,)
    mean_dz = tl.sum(mean_dz, 0) / size * rstd
    mean_dz_xhat = tl.sum(mean_dz_xhat, 0) / size * rstd

    for k in tl.static_range(NUMBER):
        row, exists = _rows(k, num_rows, PIECES)
        x = widened(xs[k])
        distance = x if is_folded(h_ptr) else x * scales[k][:, None] - mean
        k1 = slopes[k] * rstd
        k2 = tl.zeros((ROWS,), tl.float32) - mean_dz_xhat * rstd
        k3 = tl.zeros((ROWS,), tl.float32) - mean_dz
        if is_folded(h_ptr):
            k2, k3 = k2 * scales[k], k3 - k2 * mean
        if not WANTS_DSCALE:  # else the gradient of the scaled skip is needed as well
            k1, k2, k3 = k1 * scales[k], k2 * scales[k], k3 * scales[k]
        rest = distance * k2[:, None] + k3[:, None]
        dx = widened(dzs[k]) * k1[:, None] + rest
        if WANTS_DSCALE:
            if is_folded(h_ptr):
                dscale = k1 * sums_dz_x[k] + tl.sum(rest * x, 1)
            else:
                dscale = tl.sum(dx * x, 1)
            _store_segments(partial_ptr + 2 * stride, dscale, k, num_rows, PIECES)
            dx *= scales[k][:, None]
        if dh_ptr is not None or ds_ptr is not None:
            pointers = _pointers_of_two(dh_ptr, ds_ptr, n, first, Ch, Cs, R, row, rows_of_h, PIECES)
            if dh_ptr is None:
                exists &= row >= rows_of_h
            elif ds_ptr is None:
                exists &= row < rows_of_h
            mask = _over_row(exists, PIECES)
            tl.store(pointers, narrowed(dx, pointers.dtype.element_ty), mask=mask, eviction_policy="evict_first")


@triton.jit
def _store_segments(partial_ptr, sums, k, num_rows, PIECES: tl.constexpr):
    """Of the k-th piece, whose rows have these sums."""
    ROWS: tl.constexpr = PIECES.rows
    SEGMENT: tl.constexpr = PIECES.segment
    NUM: tl.constexpr = ROWS // SEGMENT
    row, exists = _rows(k, num_rows, PIECES)
    if SEGMENT > 1:  # each row keeps the sum of its segment: to move it elsewhere would take barriers
        sums = tl.sum(tl.reshape(sums, (NUM, SEGMENT)), 1)
        sums = tl.reshape(tl.broadcast_to(sums[:, None], (NUM, SEGMENT)), (ROWS,))
    tl.store(partial_ptr + row // SEGMENT, sums, mask=exists & (row % SEGMENT == 0))
