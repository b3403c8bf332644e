"""GroupNorm whose groups are cut into tiles for several programs: sums, combine, apply.

A first walk over the tiles leaves sums of each channel; a small kernel combines those of a group, in a fixed order,
into what the second walk needs: fp32 coefficients of each channel. The second walk begins where the first ended, so
that part of what it reads is still in L2. Names and shapes: group_norm_walks.py.
"""
# pyright: reportGeneralTypeIssues=false, reportAttributeAccessIssue=false

from typing import NamedTuple

import triton
import triton.language as tl

from scalelong.kernels.group_norm_walks import (
    aligned,
    channel_affine,
    channel_scale,
    channels_of,
    is_folded,
    load_coefficient,
    load_tile,
    locate,
    over_channels,
    quotient,
    source_of,
    store_tile,
    sum_over_positions,
    tile_mask,
    widened,
)
from scalelong.kernels.triton_activations import activate, activation_slope

# Neither divisibility by 16 (VEC carries what matters) nor the value 1 is worth a compilation of its own.
_SIZES = ("N", "P", "Ch", "Cs", "D", "walk", "num_chunks")


@triton.jit(do_not_specialize=_SIZES)
def _split_fwd_sums_kernel(
    h_ptr,  # (N, Ch, P)
    s_ptr,  # (N, Cs, P) or None
    partial_ptr,  # (N, chunks, 2, C): the mean of cat([h, s]) over a chunk's positions, and squared distances from it
    P,
    Ch,
    Cs,
    walk,  # positions of a chunk
    num_chunks,
    TILE: tl.constexpr,
):
    n, chunk, in_skip, first = locate(tl.program_id(0), Ch, Cs, num_chunks, TILE)
    x_ptr, num_channels = source_of(h_ptr, s_ptr, in_skip, Ch, Cs)
    c, exists = channels_of(first, num_channels, TILE)
    begin = chunk * walk
    count = tl.minimum(P - begin, walk)

    # Distances from about the mean cost no digits, wherever that lies; tiles are filled up with distance 0.
    x = widened(load_tile(x_ptr, n, begin, first, exists, P, num_channels, 0.0, TILE, "evict_last"))
    about = sum_over_positions(x, TILE) / tl.minimum(count, TILE.positions).to(tl.float32)
    filling = over_channels(about.to(x_ptr.dtype.element_ty), TILE)
    about = filling.to(tl.float32)
    filling = tl.broadcast_to(filling, TILE.shape)
    total = x - about
    if TILE.masked:
        total = tl.where(tile_mask(exists, begin, P, TILE), total, 0.0)
    squares = total * total
    for position in range(begin + TILE.positions, begin + count, TILE.positions):
        values = load_tile(x_ptr, n, position, first, exists, P, num_channels, filling, TILE, "evict_last")
        distance = widened(values) - about
        total += distance
        squares += distance * distance
    mean = sum_over_positions(total, TILE) / count.to(tl.float32)
    squares = sum_over_positions(squares, TILE) - mean * mean * count.to(tl.float32)
    c += tl.where(in_skip, Ch, 0)
    partial_ptr += (n.to(tl.int64) * num_chunks + chunk) * 2 * (Ch + Cs)
    tl.store(partial_ptr + c, tl.reshape(about, (TILE.channels,)) + mean, mask=exists)
    tl.store(partial_ptr + (Ch + Cs) + c, tl.maximum(squares, 0.0), mask=exists)


class Combined(NamedTuple):
    """What a program of a combine kernel holds at once: powers of two."""

    groups: int
    chunks: int
    channels: int  # of a group

    @property
    def shape(self) -> tuple[int, int, int]:
        return (self.groups, self.chunks, self.channels)


@triton.jit
def _groups_of_program(C, D, BLOCK: tl.constexpr):
    """Image, groups (groups, 1, 1), and which exist."""
    GROUPS: tl.constexpr = BLOCK.groups
    blocks = tl.cdiv(C // D, GROUPS)
    n = tl.program_id(0) // blocks
    g = (tl.program_id(0) - n * blocks) * GROUPS + tl.arange(0, GROUPS)[:, None, None]
    return n, g, g < C // D


@triton.jit
def _members(g, exists, d, D, BLOCK: tl.constexpr):
    """Channels (groups, 1, channels), from the d-th of each group on, and which belong to it."""
    CHANNELS: tl.constexpr = BLOCK.channels
    i = d + tl.arange(0, CHANNELS)[None, None, :]
    return g * D + i, exists & (i < D)


@triton.jit
def _parts(first, c, exists, P, C, walk, num_chunks, BLOCK: tl.constexpr):
    """Offsets of the partial sums of these channels in chunks from ``first`` on, a mask, positions of each chunk."""
    CHUNKS: tl.constexpr = BLOCK.chunks
    chunk = first + tl.arange(0, CHUNKS)[None, :, None]
    count = tl.minimum(P - chunk * walk, walk).to(tl.float32)
    return chunk * 2 * C + c, (chunk < num_chunks) & exists, count


@triton.jit
def _sum_of_group(x):
    """(groups, 1, 1)"""
    return tl.sum(tl.sum(x, 2, keep_dims=True), 1, keep_dims=True)


@triton.jit(do_not_specialize=_SIZES)
def _split_fwd_combine_kernel(
    partial_ptr,  # (N, chunks, 2, C), from the sums
    parameters,
    mean_ptr,  # (N, G)
    rstd_ptr,  # (N, G)
    coefficients_ptr,  # (N, 4, C): A and B of z = A * x + B; scale; mean
    eps,
    P,
    Ch,
    Cs,
    D,
    walk,
    num_chunks,
    FOLDED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """For each group, the update formula of Chan, Golub and LeVeque (1979) over all parts at once."""
    C = Ch + Cs
    n, g, exists = _groups_of_program(C, D, BLOCK)
    partial_ptr += n.to(tl.int64) * num_chunks * 2 * C
    size = D.to(tl.float32) * P.to(tl.float32)

    total = tl.full(BLOCK.shape, 0.0, tl.float32)
    for d in range(0, D, BLOCK.channels):
        c, is_member = _members(g, exists, d, D, BLOCK)
        scale = channel_scale(parameters, n, c, Ch, is_member)
        for chunk in range(0, num_chunks, BLOCK.chunks):
            parts, mask, count = _parts(chunk, c, is_member, P, C, walk, num_chunks, BLOCK)
            total += count * scale * tl.load(partial_ptr + parts, mask=mask, other=0.0)
    mean = _sum_of_group(total) / size

    total = tl.full(BLOCK.shape, 0.0, tl.float32)
    for d in range(0, D, BLOCK.channels):
        c, is_member = _members(g, exists, d, D, BLOCK)
        scale = channel_scale(parameters, n, c, Ch, is_member)
        for chunk in range(0, num_chunks, BLOCK.chunks):
            parts, mask, count = _parts(chunk, c, is_member, P, C, walk, num_chunks, BLOCK)
            distance = scale * tl.load(partial_ptr + parts, mask=mask, other=0.0) - mean
            squares = tl.load(partial_ptr + C + parts, mask=mask, other=0.0)
            total += tl.where(mask, scale * scale * squares + count * distance * distance, 0.0)
    rstd = tl.rsqrt(_sum_of_group(total) / size + eps)
    tl.store(mean_ptr + n * (C // D) + g, mean, mask=exists)
    tl.store(rstd_ptr + n * (C // D) + g, rstd, mask=exists)

    coefficients_ptr += n.to(tl.int64) * 4 * C
    for d in range(0, D, BLOCK.channels):
        c, is_member = _members(g, exists, d, D, BLOCK)
        scale = channel_scale(parameters, n, c, Ch, is_member)
        a, b = channel_affine(parameters, n, c, is_member)
        a *= rstd
        if FOLDED:
            tl.store(coefficients_ptr + c, a * scale, mask=is_member)
            tl.store(coefficients_ptr + C + c, b - a * mean, mask=is_member)
        else:
            tl.store(coefficients_ptr + c, a, mask=is_member)
            tl.store(coefficients_ptr + C + c, b, mask=is_member)
            tl.store(coefficients_ptr + 2 * C + c, scale, mask=is_member)
            tl.store(coefficients_ptr + 3 * C + c, tl.zeros_like(scale) + mean, mask=is_member)


@triton.jit(do_not_specialize=_SIZES)
def _split_fwd_apply_kernel(
    h_ptr,  # (N, Ch, P)
    s_ptr,  # (N, Cs, P) or None
    coefficients_ptr,  # (N, 4, C)
    y_ptr,  # (N, C, P)
    P,
    Ch,
    Cs,
    walk,
    num_chunks,
    TILE: tl.constexpr,
    ACT: tl.constexpr,
):
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    n, chunk, in_skip, first = locate(program, Ch, Cs, num_chunks, TILE)
    x_ptr, num_channels = source_of(h_ptr, s_ptr, in_skip, Ch, Cs)
    c, exists = channels_of(first, num_channels, TILE)
    C, first_of_y = Ch + Cs, first + tl.where(in_skip, Ch, 0)
    coefficients_ptr += n.to(tl.int64) * 4 * C + tl.where(in_skip, Ch, 0)
    a = load_coefficient(coefficients_ptr, c, exists, TILE)
    b = load_coefficient(coefficients_ptr + C, c, exists, TILE)
    if not is_folded(h_ptr):
        scale = load_coefficient(coefficients_ptr + 2 * C, c, exists, TILE)
        mean = load_coefficient(coefficients_ptr + 3 * C, c, exists, TILE)
    begin = chunk * walk
    for position in range(begin, tl.minimum(begin + walk, P), TILE.positions):
        x = widened(load_tile(x_ptr, n, position, first, exists, P, num_channels, 0.0, TILE, "evict_first"))
        if not is_folded(h_ptr):
            x = x * scale - mean
        store_tile(y_ptr, activate(x * a + b, ACT), n, position, first_of_y, exists, P, C, TILE)


@triton.jit(do_not_specialize=_SIZES)
def _split_bwd_sums_kernel(
    dy_ptr,  # (N, C, P)
    h_ptr,  # (N, Ch, P)
    s_ptr,  # (N, Cs, P) or None
    parameters,
    mean_ptr,  # (N, G)
    rstd_ptr,  # (N, G)
    partial_ptr,  # (N, chunks, 2, C): over a chunk's positions, the sums of dz and of dz * xhat
    P,
    Ch,
    Cs,
    D,
    walk,
    num_chunks,
    TILE: tl.constexpr,
    ACT: tl.constexpr,
):
    n, chunk, in_skip, first = locate(tl.program_id(0), Ch, Cs, num_chunks, TILE)
    x_ptr, num_channels = source_of(h_ptr, s_ptr, in_skip, Ch, Cs)
    c, exists = channels_of(first, num_channels, TILE)
    C, first_of_dy = Ch + Cs, first + tl.where(in_skip, Ch, 0)
    c = aligned(c + tl.where(in_skip, Ch, 0), TILE)
    statistic = n * (C // D) + quotient(c, D)
    rstd = tl.load(rstd_ptr + statistic, mask=exists, other=0.0)
    mean = tl.load(mean_ptr + statistic, mask=exists, other=0.0)
    scale = channel_scale(parameters, n, c, Ch, exists)
    if is_folded(h_ptr):
        scale, mean = scale * rstd, mean * rstd
    scale, mean, rstd = over_channels(scale, TILE), over_channels(mean, TILE), over_channels(rstd, TILE)
    a, b = channel_affine(parameters, n, c, exists)
    a, b = over_channels(a, TILE), over_channels(b, TILE)

    sum_dz = tl.full(TILE.shape, 0.0, tl.float32)
    sum_dz_xhat = tl.full(TILE.shape, 0.0, tl.float32)
    begin = chunk * walk
    for position in range(begin, tl.minimum(begin + walk, P), TILE.positions):
        x = load_tile(x_ptr, n, position, first, exists, P, num_channels, 0.0, TILE, "evict_last")
        dy = load_tile(dy_ptr, n, position, first_of_dy, exists, P, C, 0.0, TILE, "evict_last")
        xhat = widened(x) * scale - mean
        if not is_folded(h_ptr):
            xhat *= rstd
        dz = widened(dy) * activation_slope(xhat * a + b, ACT)
        sum_dz += dz
        sum_dz_xhat += dz * xhat
    partial_ptr += (n.to(tl.int64) * num_chunks + chunk) * 2 * C
    tl.store(partial_ptr + c, sum_over_positions(sum_dz, TILE), mask=exists)
    tl.store(partial_ptr + C + c, sum_over_positions(sum_dz_xhat, TILE), mask=exists)


@triton.jit(do_not_specialize=_SIZES)
def _split_bwd_combine_kernel(
    partial_ptr,  # (N, chunks, 2, C), from the sums
    parameters,
    mean_ptr,  # (N, G)
    rstd_ptr,  # (N, G)
    sums_ptr,  # (2, N, C): over all positions, the sums of dz and of dz * xhat
    coefficients_ptr,  # (N, 7, C): A, B, K1, K2, K3 of z = A * x + B and dx = K1 * dz + (K2 * x + K3); scale; mean
    N,
    P,
    Ch,
    Cs,
    D,
    walk,
    num_chunks,
    FOLDED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    C = Ch + Cs
    n, g, exists = _groups_of_program(C, D, BLOCK)
    partial_ptr += n.to(tl.int64) * num_chunks * 2 * C
    sums_ptr += n.to(tl.int64) * C
    mean_dz = tl.zeros_like(g).to(tl.float32)
    mean_dz_xhat = tl.zeros_like(g).to(tl.float32)
    for d in range(0, D, BLOCK.channels):
        c, is_member = _members(g, exists, d, D, BLOCK)
        dz = tl.full(BLOCK.shape, 0.0, tl.float32)
        dz_xhat = tl.full(BLOCK.shape, 0.0, tl.float32)
        for chunk in range(0, num_chunks, BLOCK.chunks):
            parts, mask, _ = _parts(chunk, c, is_member, P, C, walk, num_chunks, BLOCK)
            dz += tl.load(partial_ptr + parts, mask=mask, other=0.0)
            dz_xhat += tl.load(partial_ptr + C + parts, mask=mask, other=0.0)
        dz, dz_xhat = tl.sum(dz, 1, keep_dims=True), tl.sum(dz_xhat, 1, keep_dims=True)
        tl.store(sums_ptr + c, dz, mask=is_member)
        tl.store(sums_ptr + N.to(tl.int64) * C + c, dz_xhat, mask=is_member)
        a, _ = channel_affine(parameters, n, c, is_member)
        mean_dz += tl.sum(a * dz, 2, keep_dims=True)
        mean_dz_xhat += tl.sum(a * dz_xhat, 2, keep_dims=True)
    size = D.to(tl.float32) * P.to(tl.float32)
    mean = tl.load(mean_ptr + n * (C // D) + g, mask=exists, other=0.0)
    rstd = tl.load(rstd_ptr + n * (C // D) + g, mask=exists, other=0.0)
    mean_dz, mean_dz_xhat = mean_dz / size, mean_dz_xhat / size

    coefficients_ptr += n.to(tl.int64) * 7 * C
    for d in range(0, D, BLOCK.channels):
        c, is_member = _members(g, exists, d, D, BLOCK)
        scale = channel_scale(parameters, n, c, Ch, is_member)
        a, b = channel_affine(parameters, n, c, is_member)
        a *= rstd
        k2 = tl.zeros_like(scale) - rstd * rstd * mean_dz_xhat
        k3 = tl.zeros_like(scale) - rstd * mean_dz
        tl.store(coefficients_ptr + 2 * C + c, a, mask=is_member)
        if FOLDED:
            a, b, k2, k3 = a * scale, b - a * mean, k2 * scale, k3 - k2 * mean
        tl.store(coefficients_ptr + c, a, mask=is_member)
        tl.store(coefficients_ptr + C + c, b, mask=is_member)
        tl.store(coefficients_ptr + 3 * C + c, k2, mask=is_member)
        tl.store(coefficients_ptr + 4 * C + c, k3, mask=is_member)
        tl.store(coefficients_ptr + 5 * C + c, scale, mask=is_member)
        tl.store(coefficients_ptr + 6 * C + c, tl.zeros_like(scale) + mean, mask=is_member)


@triton.jit(do_not_specialize=_SIZES)
def _split_bwd_apply_kernel(
    dy_ptr,  # (N, C, P)
    h_ptr,  # (N, Ch, P)
    s_ptr,  # (N, Cs, P) or None
    coefficients_ptr,  # (N, 7, C)
    dh_ptr,  # (N, Ch, P), or None where nobody wants it
    ds_ptr,  # (N, Cs, P), or None
    scale_sums_ptr,  # (N, C, chunks): over a chunk's positions, the sum of dx * s, for channels of s; or None
    P,
    Ch,
    Cs,
    walk,
    num_chunks,
    TILE: tl.constexpr,
    ACT: tl.constexpr,
):
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    n, chunk, in_skip, first = locate(program, Ch, Cs, num_chunks, TILE)
    x_ptr, num_channels = source_of(h_ptr, s_ptr, in_skip, Ch, Cs)
    if ds_ptr is None:
        if in_skip:
            return
        dx_ptr = dh_ptr
    elif dh_ptr is None:
        if not in_skip:
            return
        dx_ptr = ds_ptr
    else:
        dx_ptr = tl.where(in_skip, ds_ptr, dh_ptr)
    c, exists = channels_of(first, num_channels, TILE)
    C, first_of_dy = Ch + Cs, first + tl.where(in_skip, Ch, 0)
    coefficients_ptr += n.to(tl.int64) * 7 * C + tl.where(in_skip, Ch, 0)
    a = load_coefficient(coefficients_ptr, c, exists, TILE)
    b = load_coefficient(coefficients_ptr + C, c, exists, TILE)
    k1 = load_coefficient(coefficients_ptr + 2 * C, c, exists, TILE)
    k2 = load_coefficient(coefficients_ptr + 3 * C, c, exists, TILE)
    k3 = load_coefficient(coefficients_ptr + 4 * C, c, exists, TILE)
    scale = load_coefficient(coefficients_ptr + 5 * C, c, exists, TILE)
    mean = load_coefficient(coefficients_ptr + 6 * C, c, exists, TILE)
    if scale_sums_ptr is None:  # else the gradient of the scaled skip is needed as well
        k1, k2, k3 = k1 * scale, k2 * scale, k3 * scale

    dscale = tl.full(TILE.shape, 0.0, tl.float32)
    begin = chunk * walk
    for position in range(begin, tl.minimum(begin + walk, P), TILE.positions):
        x = widened(load_tile(x_ptr, n, position, first, exists, P, num_channels, 0.0, TILE, "evict_first"))
        dy = widened(load_tile(dy_ptr, n, position, first_of_dy, exists, P, C, 0.0, TILE, "evict_first"))
        distance = x if is_folded(h_ptr) else x * scale - mean
        dx = dy * activation_slope(distance * a + b, ACT) * k1 + (distance * k2 + k3)
        if scale_sums_ptr is not None:
            dscale += dx * x
            dx *= scale
        store_tile(dx_ptr, dx, n, position, first, exists, P, num_channels, TILE)
    if scale_sums_ptr is not None:
        scale_sums_ptr += (n.to(tl.int64) * C + tl.where(in_skip, Ch, 0)) * num_chunks + chunk
        tl.store(scale_sums_ptr + c * num_chunks, sum_over_positions(dscale, TILE), mask=exists & in_skip)
