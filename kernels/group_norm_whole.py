"""GroupNorm of channels_last tensors with few positions: a program holds whole groups, and each input is read once.

Its block of channels lies in h or in s. It takes the positions tile by tile; the tiles stay as they were read, 16 bits
wide where the tensors are. Names and shapes: group_norm_walks.py.
"""
# pyright: reportGeneralTypeIssues=false, reportAttributeAccessIssue=false

import triton
import triton.language as tl

from scalelong.kernels.group_norm_walks import (
    aligned,
    channel_affine,
    channel_scale,
    is_folded,
    load_tile,
    narrowed,
    quotient,
    source_of,
    store_tile,
    sum_over_positions,
    tile_mask,
    widened,
)
from scalelong.kernels.triton_activations import activate, activation_slope

_SIZES = ("N", "P", "Ch", "Cs", "D", "block")


@triton.jit
def _block(Ch, Cs, block, TILE: tl.constexpr):
    """Of this program: its image, whether it is in the skip, first channel there, channels of both, which exist."""
    VEC: tl.constexpr = TILE.vec
    num_blocks = (Ch + Cs) // block
    n = tl.program_id(0) // num_blocks
    first = (tl.program_id(0) - n * num_blocks) * block
    in_skip = first >= Ch
    i = tl.arange(0, TILE.channels)
    c = aligned(first + i, TILE)
    return n, in_skip, first - tl.where(in_skip, Ch, 0), c, tl.max_constancy(i < block, VEC)


@triton.jit
def _sum_over_group(v, D, GROUPS: tl.constexpr):
    """At each of the channels v (channels,), the sum over its group."""
    if GROUPS == 1:
        return tl.zeros_like(v) + tl.sum(v, 0)
    group = quotient(tl.arange(0, v.shape[0]), D)
    member = tl.arange(0, GROUPS)[:, None] == group[None, :]
    total = tl.sum(tl.where(member, v[None, :], 0.0), 1)
    return tl.sum(tl.where(member, total[:, None], 0.0), 0)


@triton.jit(do_not_specialize=_SIZES)
def _whole_fwd_kernel(
    h_ptr,  # (N, Ch, P)
    s_ptr,  # (N, Cs, P) or None
    parameters,
    mean_ptr,  # (N, G)
    rstd_ptr,  # (N, G)
    y_ptr,  # (N, C, P)
    eps,
    P,
    Ch,
    Cs,
    D,
    block,  # channels of a program
    TILE: tl.constexpr,
    TILES: tl.constexpr,
    GROUPS: tl.constexpr,  # of a block, up to a power of two
    ACT: tl.constexpr,
):
    n, in_skip, first, c, exists = _block(Ch, Cs, block, TILE)
    C = Ch + Cs
    x_ptr, num_channels = source_of(h_ptr, s_ptr, in_skip, Ch, Cs)
    scale = channel_scale(parameters, n, c, Ch, exists)
    size = (D * P).to(tl.float32)
    xs = ()
    total = tl.full(TILE.shape, 0.0, tl.float32)
    for k in tl.static_range(TILES):
        position = k * TILE.positions
        xs += (load_tile(x_ptr, n, position, first, exists, P, num_channels, 0.0, TILE, "evict_first"),)
    for k in tl.static_range(TILES):
        total += widened(xs[k])
    mean = _sum_over_group(sum_over_positions(total, TILE) * scale, D, GROUPS) / size

    squares = tl.full(TILE.shape, 0.0, tl.float32)
    for k in tl.static_range(TILES):
        distance = widened(xs[k]) * scale[None, :] - mean[None, :]
        if TILE.masked:
            distance = tl.where(tile_mask(exists, k * TILE.positions, P, TILE), distance, 0.0)
        squares += distance * distance
    rstd = tl.rsqrt(_sum_over_group(sum_over_positions(squares, TILE), D, GROUPS) / size + eps)
    statistic = n * (C // D) + quotient(c, D)
    starts_group = exists & (c == quotient(c, D) * D)
    tl.store(mean_ptr + statistic, mean, mask=starts_group)
    tl.store(rstd_ptr + statistic, rstd, mask=starts_group)

    a, b = channel_affine(parameters, n, c, exists)
    a *= rstd
    if is_folded(h_ptr):
        a, b = a * scale, b - a * mean
    first += tl.where(in_skip, Ch, 0)
    for k in tl.static_range(TILES):
        x = widened(xs[k])
        if not is_folded(h_ptr):
            x = x * scale[None, :] - mean[None, :]
        y = activate(x * a[None, :] + b[None, :], ACT)
        store_tile(y_ptr, y, n, k * TILE.positions, first, exists, P, C, TILE)


@triton.jit(do_not_specialize=_SIZES)
def _whole_bwd_kernel(
    dy_ptr,  # (N, C, P)
    h_ptr,  # (N, Ch, P)
    s_ptr,  # (N, Cs, P) or None
    parameters,
    mean_ptr,  # (N, G)
    rstd_ptr,  # (N, G)
    dh_ptr,  # (N, Ch, P), or None where nobody wants it
    ds_ptr,  # (N, Cs, P), or None
    sums_ptr,  # (2, N, C): over positions, the sums of dz and of dz * xhat; or None
    scale_sums_ptr,  # (N, C): the sum of dx * s, for channels of s; or None
    N,
    P,
    Ch,
    Cs,
    D,
    block,
    TILE: tl.constexpr,
    TILES: tl.constexpr,
    GROUPS: tl.constexpr,
    ACT: tl.constexpr,
):
    n, in_skip, first, c, exists = _block(Ch, Cs, block, TILE)
    C = Ch + Cs
    x_ptr, num_channels = source_of(h_ptr, s_ptr, in_skip, Ch, Cs)
    xs, dys = (), ()
    for k in tl.static_range(TILES):
        position = k * TILE.positions
        xs += (load_tile(x_ptr, n, position, first, exists, P, num_channels, 0.0, TILE, "evict_first"),)
        first_of_dy = first + tl.where(in_skip, Ch, 0)
        dys += (load_tile(dy_ptr, n, position, first_of_dy, exists, P, C, 0.0, TILE, "evict_first"),)
    statistic = n * (C // D) + quotient(c, D)
    mean = tl.load(mean_ptr + statistic, mask=exists, other=0.0)
    rstd = tl.load(rstd_ptr + statistic, mask=exists, other=0.0)
    scale = channel_scale(parameters, n, c, Ch, exists)
    a, b = channel_affine(parameters, n, c, exists)

    x_factor, x_offset = scale, mean
    if is_folded(h_ptr):
        x_factor, x_offset = scale * rstd, mean * rstd
    dzs = ()
    sum_dz = tl.full(TILE.shape, 0.0, tl.float32)
    sum_dz_xhat = tl.full(TILE.shape, 0.0, tl.float32)
    for k in tl.static_range(TILES):
        x = widened(xs[k])
        xhat = x * x_factor[None, :] - x_offset[None, :]
        if not is_folded(h_ptr):
            xhat *= rstd[None, :]
        dz = widened(dys[k]) * activation_slope(xhat * a[None, :] + b[None, :], ACT)
        sum_dz += dz
        sum_dz_xhat += dz * (x if is_folded(h_ptr) else xhat)
        # Rounded as by eager PyTorch, for dx alone: cheaper than to compute it again.
        dzs += (narrowed(dz, dys[k].dtype),)
    sum_dz, sum_dz_xhat = sum_over_positions(sum_dz, TILE), sum_over_positions(sum_dz_xhat, TILE)
    sum_dz_x = sum_dz_xhat
    if is_folded(h_ptr):
        sum_dz_xhat = sum_dz_x * x_factor - sum_dz * x_offset
    if sums_ptr is not None:
        sums_ptr += n.to(tl.int64) * C
        tl.store(sums_ptr + c, sum_dz, mask=exists)
        tl.store(sums_ptr + N.to(tl.int64) * C + c, sum_dz_xhat, mask=exists)
    size = (D * P).to(tl.float32)
    mean_dz = _sum_over_group(a * sum_dz, D, GROUPS) / size * rstd
    mean_dz_xhat = _sum_over_group(a * sum_dz_xhat, D, GROUPS) / size * rstd

    k1, k2, k3 = a * rstd, -mean_dz_xhat * rstd, -mean_dz
    if is_folded(h_ptr):
        k2, k3 = k2 * scale, k3 - k2 * mean
    if scale_sums_ptr is None:  # else the gradient of the scaled skip is needed as well
        k1, k2, k3 = k1 * scale, k2 * scale, k3 * scale
    dscale = tl.full(TILE.shape, 0.0, tl.float32)
    for k in tl.static_range(TILES):
        x = widened(xs[k])
        distance = x if is_folded(h_ptr) else x * scale[None, :] - mean[None, :]
        rest = distance * k2[None, :] + k3[None, :]
        dx = widened(dzs[k]) * k1[None, :] + rest
        if scale_sums_ptr is not None:
            dscale += (rest if is_folded(h_ptr) else dx) * x
            dx *= scale[None, :]
        position = k * TILE.positions
        if ds_ptr is None:
            if dh_ptr is not None:  # noqa: SIM102 (this one is decided when the kernel is compiled)
                if not in_skip:  # in which there is nothing to store
                    store_tile(dh_ptr, dx, n, position, first, exists, P, num_channels, TILE)
        elif dh_ptr is None:
            if in_skip:
                store_tile(ds_ptr, dx, n, position, first, exists, P, num_channels, TILE)
        else:
            dx_ptr = tl.where(in_skip, ds_ptr, dh_ptr)
            store_tile(dx_ptr, dx, n, position, first, exists, P, num_channels, TILE)
    if scale_sums_ptr is not None:
        dscale = sum_over_positions(dscale, TILE)
        if is_folded(h_ptr):
            dscale += k1 * sum_dz_x
        tl.store(scale_sums_ptr + n.to(tl.int64) * C + c, dscale, mask=exists & in_skip)
