"""The Triton kernels of ``skip_group_norm`` (group_norm.py says what it computes) and what launches them.

Resident: a program holds whole groups in registers, so that each input is read once. Looped: it walks twice through
them. Split: partial sums of tiles, a small kernel that combines them in a fixed order, and a second read that mostly
hits L2, because the batch is walked a few images at a time. What a shape takes: group_norm_tilings.py.

A tile has the axis that is contiguous in memory last: (channels, positions), or (positions, channels) with
CHANNELS_LAST. Vectors over its channels are (BLOCK_C,). N images, C = Ch + Cs channels, P positions, G groups of D.
"""
# pyright: reportGeneralTypeIssues=false
# (to a type checker, a call of one jitted function by another never returns)

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from scalelong.kernels.group_norm_tilings import Tiling, choose_tiling, next_power_of_two
from scalelong.kernels.triton_device import current_device, multiprocessors

# Neither divisibility by 16 (VEC carries what matters) nor the value 1 is worth a compilation of its own.
_SIZES = ("first_image", "block_channels", "P", "Ch", "Cs", "G")
_STRIDES = tuple(f"{name}_stride_{axis}" for name in ("scale", "gain", "shift") for axis in "nc")


@triton.jit
def _place(
    first_image, block_channels, P, C,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, CHANNELS_LAST: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Of this program: image, chunk of positions, first position, channels, and which of the channels exist."""
    num_blocks = tl.cdiv(C, block_channels)
    num_chunks = tl.cdiv(P, BLOCK_P) if SPLIT else 1
    program = tl.program_id(0)
    if CHANNELS_LAST:  # neighbouring programs take neighbouring memory
        block = program % num_blocks
        chunk = program // num_blocks % num_chunks
    else:
        chunk = program % num_chunks
        block = program // num_chunks % num_blocks
    n = (first_image + program // (num_blocks * num_chunks)).to(tl.int64)
    local = tl.arange(0, BLOCK_C)
    c = block * block_channels + local
    return n, chunk.to(tl.int64), chunk.to(tl.int64) * BLOCK_P, c, (local < block_channels) & (c < C)


@triton.jit
def _over_channels(v, CHANNELS_LAST: tl.constexpr):
    return v[None, :] if CHANNELS_LAST else v[:, None]


@triton.jit
def _sum_over_positions(x, CHANNELS_LAST: tl.constexpr):
    return tl.sum(x, 0) if CHANNELS_LAST else tl.sum(x, 1)


@triton.jit
def _tile_mask(exists, first, P, BLOCK_P: tl.constexpr, CHANNELS_LAST: tl.constexpr, VEC: tl.constexpr):
    inside = tl.arange(0, BLOCK_P) < P - first
    mask = _over_channels(exists, CHANNELS_LAST) & _over_channels(inside, not CHANNELS_LAST)
    return tl.max_constancy(mask, [1, VEC])


@triton.jit
def _tile_pointers(
    h_ptr, s_ptr, n, first, c, P, Ch, Cs, BLOCK_P: tl.constexpr, CHANNELS_LAST: tl.constexpr, VEC: tl.constexpr
):
    """Into h for channels below Ch and into s from there on; into h alone where s_ptr is None."""
    i = tl.arange(0, BLOCK_P)
    if CHANNELS_LAST:
        row = n * P + first + i
        pointers = (h_ptr + row * Ch)[:, None]
        if s_ptr is not None:
            pointers = tl.where((c >= Ch)[None, :], (s_ptr + row * Cs - Ch)[:, None], pointers)
        pointers += c[None, :]
    else:
        pointers = h_ptr + (n * Ch + c) * P + first
        if s_ptr is not None:
            pointers = tl.where(c >= Ch, s_ptr + (n * Cs + c - Ch) * P + first, pointers)
        pointers = pointers[:, None] + i[None, :]
    # The select hides from the compiler that VEC neighbours lie side by side, aligned; without it, loads are scalar.
    VEC_BYTES: tl.constexpr = VEC * h_ptr.dtype.element_ty.primitive_bitwidth // 8
    return tl.max_contiguous(tl.multiple_of(pointers, [1, VEC_BYTES]), [1, VEC])


@triton.jit
def _backwards(start, P, BLOCK_P: tl.constexpr):
    """For the second of two walks, so that it begins with what the first one left in L1."""
    return (tl.cdiv(P, BLOCK_P) - 1) * BLOCK_P - start


@triton.jit
def _load_tile(
    h_ptr, s_ptr, n, first, c, mask, P, Ch, Cs, BLOCK_P: tl.constexpr, CHANNELS_LAST: tl.constexpr, VEC: tl.constexpr
):
    pointers = _tile_pointers(h_ptr, s_ptr, n, first, c, P, Ch, Cs, BLOCK_P, CHANNELS_LAST, VEC)
    return tl.load(pointers, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _store_tile(
    h_ptr, s_ptr, x, n, first, c, mask, P, Ch, Cs, BLOCK_P: tl.constexpr, CHANNELS_LAST: tl.constexpr, VEC: tl.constexpr
):
    pointers = _tile_pointers(h_ptr, s_ptr, n, first, c, P, Ch, Cs, BLOCK_P, CHANNELS_LAST, VEC)
    tl.store(pointers, x.to(h_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _channel_scale(s_ptr, scale_ptr, float_scale, n, c, exists, Ch, scale_stride_n, scale_stride_c):
    """(BLOCK_C,) factors that turn cat([h, s]) into x."""
    if s_ptr is None:
        return tl.full(c.shape, 1.0, tl.float32)
    if scale_ptr is None:
        factor = float_scale
    else:
        pointers = scale_ptr + n * scale_stride_n + (c - Ch).to(tl.int64) * scale_stride_c
        factor = tl.load(pointers, mask=exists & (c >= Ch), other=0.0).to(tl.float32)
    return tl.where(c >= Ch, factor, 1.0)


@triton.jit
def _channel_gain(gain_ptr, n, c, exists, gain_stride_n, gain_stride_c):
    gain = tl.load(gain_ptr + n * gain_stride_n + c.to(tl.int64) * gain_stride_c, mask=exists, other=0.0)
    return 1 + gain.to(tl.float32)


@triton.jit
def _channel_affine(
    weight_ptr,
    bias_ptr,
    gain_ptr,
    shift_ptr,
    n,
    c,
    exists,
    gain_stride_n,
    gain_stride_c,
    shift_stride_n,
    shift_stride_c,
):
    """(BLOCK_C,) a and b of z = xhat * a + b."""
    a = tl.full(c.shape, 1.0, tl.float32)
    b = tl.full(c.shape, 0.0, tl.float32)
    if weight_ptr is not None:
        a = tl.load(weight_ptr + c, mask=exists, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        b = tl.load(bias_ptr + c, mask=exists, other=0.0).to(tl.float32)
    if gain_ptr is not None:
        gain = _channel_gain(gain_ptr, n, c, exists, gain_stride_n, gain_stride_c)
        a *= gain
        b *= gain
    if shift_ptr is not None:
        pointers = shift_ptr + n * shift_stride_n + c.to(tl.int64) * shift_stride_c
        b += tl.load(pointers, mask=exists, other=0.0).to(tl.float32)
    return a, b


@triton.jit
def _sum_over_group(v, D, NUM_GROUPS: tl.constexpr):
    """At each of the channels v (BLOCK_C,), the sum over its group; the block starts with a group."""
    if NUM_GROUPS == 1:
        return tl.zeros_like(v) + tl.sum(v, 0)
    group = tl.arange(0, v.shape[0]) // D
    member = tl.arange(0, NUM_GROUPS)[:, None] == group[None, :]
    total = tl.sum(tl.where(member, v[None, :], 0.0), 1)
    return tl.sum(tl.where(member, total[:, None], 0.0), 0)


@triton.jit
def _tile_moments(x, mask, count, CHANNELS_LAST: tl.constexpr):
    """(BLOCK_C,) mean over ``count`` positions, and sum of squared distances from it."""
    mean = _sum_over_positions(x, CHANNELS_LAST) / count
    x = tl.where(mask, x - _over_channels(mean, CHANNELS_LAST), 0.0)
    return mean, _sum_over_positions(x * x, CHANNELS_LAST)


@triton.jit
def _activate(z, ACT: tl.constexpr):
    if ACT == "silu":
        return z * tl.sigmoid(z)
    elif ACT == "gelu":
        return 0.5 * z * (1 + tl.math.erf(z * 0.7071067811865476))
    else:
        return z


@triton.jit
def _activation_slope(z, ACT: tl.constexpr):
    if ACT == "silu":
        sigma = tl.sigmoid(z)
        return sigma * (1 + z * (1 - sigma))
    elif ACT == "gelu":
        return 0.5 * (1 + tl.math.erf(z * 0.7071067811865476)) + z * 0.3989422804014327 * tl.exp(-0.5 * z * z)
    else:
        return tl.full(z.shape, 1.0, tl.float32)


@triton.jit(do_not_specialize=(*_SIZES, *_STRIDES))
def _skip_group_norm_fwd_kernel(
    first_image,
    h_ptr,  # (N, Ch, P)
    s_ptr,  # (N, Cs, P) or None
    scale_ptr,  # (N, Cs) by its strides, or None
    weight_ptr,  # (C,) or None
    bias_ptr,  # (C,) or None
    gain_ptr,  # (N, C) by its strides, or None
    shift_ptr,  # (N, C) by its strides, or None
    partial_ptr,  # (images, chunks, 2, C), written by "sums": mean, and sum of squared distances from it
    mean_ptr,  # (N, G), written by "resident" and "looped", read by "apply"
    rstd_ptr,  # (N, G), likewise
    y_ptr,  # (N, C, P)
    float_scale,
    eps,
    block_channels,
    P,
    Ch,
    Cs,
    G,
    scale_stride_n,
    scale_stride_c,
    gain_stride_n,
    gain_stride_c,
    shift_stride_n,
    shift_stride_c,
    STAGE: tl.constexpr,  # "resident", "looped", or "sums" and then, after the combine kernel, "apply"
    NUM_GROUPS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    VEC: tl.constexpr,
    ACT: tl.constexpr,
):
    C = Ch + Cs
    D = C // G
    size = D.to(tl.float32) * P.to(tl.float32)
    SPLIT: tl.constexpr = STAGE == "sums" or STAGE == "apply"
    n, chunk, first, c, exists = _place(first_image, block_channels, P, C, BLOCK_C, BLOCK_P, CHANNELS_LAST, SPLIT)
    scale = _channel_scale(s_ptr, scale_ptr, float_scale, n, c, exists, Ch, scale_stride_n, scale_stride_c)
    scale = _over_channels(scale, CHANNELS_LAST)
    a, b = _channel_affine(
        weight_ptr, bias_ptr, gain_ptr, shift_ptr, n, c, exists,
        gain_stride_n, gain_stride_c, shift_stride_n, shift_stride_c,
    )  # fmt: skip
    statistic = n * G + c // D
    last = P.to(tl.int64) if STAGE == "looped" else first + 1
    if STAGE == "resident" or STAGE == "sums":
        mask = _tile_mask(exists, first, P, BLOCK_P, CHANNELS_LAST, VEC)
        x = scale * _load_tile(h_ptr, s_ptr, n, first, c, mask, P, Ch, Cs, BLOCK_P, CHANNELS_LAST, VEC)

    if STAGE == "sums":
        mean, squares = _tile_moments(x, mask, tl.minimum(P - first, BLOCK_P).to(tl.float32), CHANNELS_LAST)
        pointers = partial_ptr + ((n - first_image) * tl.cdiv(P, BLOCK_P) + chunk) * 2 * C + c
        tl.store(pointers, mean, mask=exists)
        tl.store(pointers + C, squares, mask=exists)
    elif STAGE == "resident":
        mean = _sum_over_group(_sum_over_positions(x, CHANNELS_LAST), D, NUM_GROUPS) / size
        x = tl.where(mask, x - _over_channels(mean, CHANNELS_LAST), 0.0)
        var = _sum_over_group(_sum_over_positions(x * x, CHANNELS_LAST), D, NUM_GROUPS) / size
        rstd = tl.rsqrt(var + eps)
        y = _activate(x * _over_channels(rstd * a, CHANNELS_LAST) + _over_channels(b, CHANNELS_LAST), ACT)
        _store_tile(y_ptr, None, y, n, first, c, mask, P, C, 0, BLOCK_P, CHANNELS_LAST, VEC)
    else:
        if STAGE == "looped":
            mean = tl.zeros((BLOCK_C,), tl.float32)
            squares = tl.zeros((BLOCK_C,), tl.float32)
            seen = 0.0
            for start in range(first, last, BLOCK_P):
                mask = _tile_mask(exists, start, P, BLOCK_P, CHANNELS_LAST, VEC)
                x = scale * _load_tile(h_ptr, s_ptr, n, start, c, mask, P, Ch, Cs, BLOCK_P, CHANNELS_LAST, VEC)
                count = tl.minimum(P - start, BLOCK_P).to(tl.float32)
                tile_mean, tile_squares = _tile_moments(x, mask, count, CHANNELS_LAST)
                delta = tile_mean - mean
                part = count / (seen + count)
                mean += delta * part
                squares += tile_squares + delta * delta * part * seen
                seen += count
            channel_mean = mean
            mean = _sum_over_group(channel_mean, D, NUM_GROUPS) / D.to(tl.float32)
            delta = tl.where(exists, channel_mean - mean, 0.0)
            var = _sum_over_group(squares + delta * delta * P.to(tl.float32), D, NUM_GROUPS) / size
            rstd = tl.rsqrt(var + eps)
        else:
            mean = tl.load(mean_ptr + statistic, mask=exists, other=0.0)
            rstd = tl.load(rstd_ptr + statistic, mask=exists, other=0.0)
        for start in range(first, last, BLOCK_P):
            start = _backwards(start, P, BLOCK_P) if STAGE == "looped" else start
            mask = _tile_mask(exists, start, P, BLOCK_P, CHANNELS_LAST, VEC)
            x = scale * _load_tile(h_ptr, s_ptr, n, start, c, mask, P, Ch, Cs, BLOCK_P, CHANNELS_LAST, VEC)
            x -= _over_channels(mean, CHANNELS_LAST)
            y = _activate(x * _over_channels(rstd * a, CHANNELS_LAST) + _over_channels(b, CHANNELS_LAST), ACT)
            _store_tile(y_ptr, None, y, n, start, c, mask, P, C, 0, BLOCK_P, CHANNELS_LAST, VEC)

    if not SPLIT:
        starts_group = exists & (c % D == 0)
        tl.store(mean_ptr + statistic, mean, mask=starts_group)
        tl.store(rstd_ptr + statistic, rstd, mask=starts_group)


@triton.jit(do_not_specialize=_SIZES)
def _skip_group_norm_fwd_combine_kernel(
    first_image,
    partial_ptr,  # (images, chunks, 2, C)
    mean_ptr,  # (N, G)
    rstd_ptr,  # (N, G)
    eps,
    P,
    Ch,
    Cs,
    G,
    BLOCK_P: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The update formula of Chan, Golub and LeVeque (1979), over all parts of a group at once."""
    C = Ch + Cs
    D = C // G
    image, g = tl.program_id(0) // G, tl.program_id(0) % G
    num_chunks = tl.cdiv(P, BLOCK_P)
    partial_ptr += image.to(tl.int64) * num_chunks * 2 * C + g * D
    size = D.to(tl.float32) * P.to(tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, num_chunks * D, BLOCK):
        i = start + tl.arange(0, BLOCK)
        chunk = (i // D).to(tl.int64)
        part_size = tl.minimum(P - chunk * BLOCK_P, BLOCK_P).to(tl.float32)
        total += part_size * tl.load(partial_ptr + chunk * 2 * C + i % D, mask=i < num_chunks * D, other=0.0)
    mean = tl.sum(total, 0) / size
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, num_chunks * D, BLOCK):
        i = start + tl.arange(0, BLOCK)
        chunk = (i // D).to(tl.int64)
        part_size = tl.minimum(P - chunk * BLOCK_P, BLOCK_P).to(tl.float32)
        part_mean = tl.load(partial_ptr + chunk * 2 * C + i % D, mask=i < num_chunks * D, other=mean)
        squares = tl.load(partial_ptr + chunk * 2 * C + C + i % D, mask=i < num_chunks * D, other=0.0)
        total += squares + part_size * (part_mean - mean) * (part_mean - mean)
    statistic = (first_image + image).to(tl.int64) * G + g
    tl.store(mean_ptr + statistic, mean)
    tl.store(rstd_ptr + statistic, tl.rsqrt(tl.sum(total, 0) / size + eps))


@triton.jit
def _load_dz(
    dy_ptr, h_ptr, s_ptr, n, first, c, exists, scale, mean, rstd, a, b, P, Ch, Cs,
    BLOCK_P: tl.constexpr, CHANNELS_LAST: tl.constexpr, VEC: tl.constexpr, ACT: tl.constexpr,
):  # fmt: skip
    """The mask, cat([h, s]), xhat and, zero where the mask is, dz."""
    mask = _tile_mask(exists, first, P, BLOCK_P, CHANNELS_LAST, VEC)
    cat = _load_tile(h_ptr, s_ptr, n, first, c, mask, P, Ch, Cs, BLOCK_P, CHANNELS_LAST, VEC)
    dy = _load_tile(dy_ptr, None, n, first, c, mask, P, Ch + Cs, 0, BLOCK_P, CHANNELS_LAST, VEC)
    xhat = cat * _over_channels(scale, CHANNELS_LAST) - _over_channels(mean, CHANNELS_LAST)
    xhat *= _over_channels(rstd, CHANNELS_LAST)
    z = xhat * _over_channels(a, CHANNELS_LAST) + _over_channels(b, CHANNELS_LAST)
    return mask, cat, xhat, dy * _activation_slope(z, ACT)


@triton.jit
def _store_dx(
    dh_ptr, ds_ptr, cat, xhat, dz, mean_dz, mean_dz_xhat, scale, rstd, a, n, first, c, mask, P, Ch, Cs,
    BLOCK_P: tl.constexpr, CHANNELS_LAST: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """Stores dh and ds; returns the part of dscale (BLOCK_C,)."""
    dx = dz * _over_channels(a, CHANNELS_LAST) - _over_channels(mean_dz, CHANNELS_LAST)
    dx = (dx - xhat * _over_channels(mean_dz_xhat, CHANNELS_LAST)) * _over_channels(rstd, CHANNELS_LAST)
    d_cat = dx * _over_channels(scale, CHANNELS_LAST)
    _store_tile(dh_ptr, ds_ptr, d_cat, n, first, c, mask, P, Ch, Cs, BLOCK_P, CHANNELS_LAST, VEC)
    return _sum_over_positions(dx * cat, CHANNELS_LAST)


@triton.jit(do_not_specialize=(*_SIZES, *_STRIDES))
def _skip_group_norm_bwd_kernel(
    first_image,
    dy_ptr,  # (N, C, P)
    h_ptr,  # (N, Ch, P)
    s_ptr,  # (N, Cs, P) or None
    scale_ptr,  # (N, Cs) by its strides, or None
    weight_ptr,  # (C,) or None
    bias_ptr,  # (C,) or None
    gain_ptr,  # (N, C) by its strides, or None
    shift_ptr,  # (N, C) by its strides, or None
    mean_ptr,  # (N, G)
    rstd_ptr,  # (N, G)
    partial_ptr,  # (images, chunks, 2, C), written by "sums": over dz and over dz * xhat
    sum_dz_ptr,  # (N, C), written by "resident" and "looped"
    sum_dz_xhat_ptr,  # (N, C), likewise
    mean_dz_ptr,  # (N, G), read by "apply": the mean of a * dz over the group
    mean_dz_xhat_ptr,  # (N, G), likewise
    dh_ptr,  # (N, Ch, P)
    ds_ptr,  # (N, Cs, P) or None
    dscale_ptr,  # (N, chunks, Cs) or None
    float_scale,
    block_channels,
    P,
    Ch,
    Cs,
    G,
    scale_stride_n,
    scale_stride_c,
    gain_stride_n,
    gain_stride_c,
    shift_stride_n,
    shift_stride_c,
    STAGE: tl.constexpr,  # "resident", "looped", or "sums" and then, after the combine kernel, "apply"
    NUM_GROUPS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    VEC: tl.constexpr,
    ACT: tl.constexpr,
):
    C = Ch + Cs
    D = C // G
    size = D.to(tl.float32) * P.to(tl.float32)
    SPLIT: tl.constexpr = STAGE == "sums" or STAGE == "apply"
    n, chunk, first, c, exists = _place(first_image, block_channels, P, C, BLOCK_C, BLOCK_P, CHANNELS_LAST, SPLIT)
    scale = _channel_scale(s_ptr, scale_ptr, float_scale, n, c, exists, Ch, scale_stride_n, scale_stride_c)
    a, b = _channel_affine(
        weight_ptr, bias_ptr, gain_ptr, shift_ptr, n, c, exists,
        gain_stride_n, gain_stride_c, shift_stride_n, shift_stride_c,
    )  # fmt: skip
    statistic = n * G + c // D
    mean = tl.load(mean_ptr + statistic, mask=exists, other=0.0)
    rstd = tl.load(rstd_ptr + statistic, mask=exists, other=0.0)
    last = P.to(tl.int64) if STAGE == "looped" else first + 1
    if STAGE == "resident" or STAGE == "sums":
        mask, cat, xhat, dz = _load_dz(
            dy_ptr, h_ptr, s_ptr, n, first, c, exists, scale, mean, rstd, a, b, P, Ch, Cs,
            BLOCK_P, CHANNELS_LAST, VEC, ACT,
        )  # fmt: skip
        sum_dz = _sum_over_positions(dz, CHANNELS_LAST)
        sum_dz_xhat = _sum_over_positions(dz * xhat, CHANNELS_LAST)
    elif STAGE == "looped":
        sum_dz = tl.zeros((BLOCK_C,), tl.float32)
        sum_dz_xhat = tl.zeros((BLOCK_C,), tl.float32)
        for start in range(first, last, BLOCK_P):
            mask, cat, xhat, dz = _load_dz(
                dy_ptr, h_ptr, s_ptr, n, start, c, exists, scale, mean, rstd, a, b, P, Ch, Cs,
                BLOCK_P, CHANNELS_LAST, VEC, ACT,
            )  # fmt: skip
            sum_dz += _sum_over_positions(dz, CHANNELS_LAST)
            sum_dz_xhat += _sum_over_positions(dz * xhat, CHANNELS_LAST)

    if STAGE == "sums":
        pointers = partial_ptr + ((n - first_image) * tl.cdiv(P, BLOCK_P) + chunk) * 2 * C + c
        tl.store(pointers, sum_dz, mask=exists)
        tl.store(pointers + C, sum_dz_xhat, mask=exists)
    else:
        if STAGE == "apply":
            mean_dz = tl.load(mean_dz_ptr + statistic, mask=exists, other=0.0)
            mean_dz_xhat = tl.load(mean_dz_xhat_ptr + statistic, mask=exists, other=0.0)
        else:
            tl.store(sum_dz_ptr + n * C + c, sum_dz, mask=exists)
            tl.store(sum_dz_xhat_ptr + n * C + c, sum_dz_xhat, mask=exists)
            mean_dz = _sum_over_group(a * sum_dz, D, NUM_GROUPS) / size
            mean_dz_xhat = _sum_over_group(a * sum_dz_xhat, D, NUM_GROUPS) / size
        if STAGE == "resident":
            dscale = _store_dx(
                dh_ptr, ds_ptr, cat, xhat, dz, mean_dz, mean_dz_xhat, scale, rstd, a, n, first, c, mask, P, Ch, Cs,
                BLOCK_P, CHANNELS_LAST, VEC,
            )  # fmt: skip
        else:
            dscale = tl.zeros((BLOCK_C,), tl.float32)
            for start in range(first, last, BLOCK_P):
                start = _backwards(start, P, BLOCK_P) if STAGE == "looped" else start
                mask, cat, xhat, dz = _load_dz(
                    dy_ptr, h_ptr, s_ptr, n, start, c, exists, scale, mean, rstd, a, b, P, Ch, Cs,
                    BLOCK_P, CHANNELS_LAST, VEC, ACT,
                )  # fmt: skip
                dscale += _store_dx(
                    dh_ptr, ds_ptr, cat, xhat, dz, mean_dz, mean_dz_xhat, scale, rstd, a, n, start, c, mask, P, Ch, Cs,
                    BLOCK_P, CHANNELS_LAST, VEC,
                )  # fmt: skip
        if dscale_ptr is not None:
            num_chunks = tl.cdiv(P, BLOCK_P) if SPLIT else 1
            tl.store(dscale_ptr + (n * num_chunks + chunk) * Cs + c - Ch, dscale, mask=exists & (c >= Ch))


@triton.jit(do_not_specialize=(*_SIZES, *_STRIDES))
def _skip_group_norm_bwd_combine_kernel(
    first_image,
    partial_ptr,  # (images, chunks, 2, C)
    weight_ptr,  # (C,) or None
    gain_ptr,  # (N, C) by its strides, or None
    sum_dz_ptr,  # (N, C)
    sum_dz_xhat_ptr,  # (N, C)
    mean_dz_ptr,  # (N, G)
    mean_dz_xhat_ptr,  # (N, G)
    P,
    Ch,
    Cs,
    G,
    gain_stride_n,
    gain_stride_c,
    BLOCK_P: tl.constexpr,
    BLOCK_CHUNKS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    C = Ch + Cs
    D = C // G
    image, g = tl.program_id(0) // G, tl.program_id(0) % G
    n = (first_image + image).to(tl.int64)
    num_chunks = tl.cdiv(P, BLOCK_P)
    partial_ptr += image.to(tl.int64) * num_chunks * 2 * C
    mean_dz = tl.zeros((BLOCK_D,), tl.float32)
    mean_dz_xhat = tl.zeros((BLOCK_D,), tl.float32)
    for first in range(0, D, BLOCK_D):
        c = g * D + first + tl.arange(0, BLOCK_D)
        exists = first + tl.arange(0, BLOCK_D) < D
        dz = tl.zeros((BLOCK_CHUNKS, BLOCK_D), tl.float32)
        dz_xhat = tl.zeros((BLOCK_CHUNKS, BLOCK_D), tl.float32)
        for start in range(0, num_chunks, BLOCK_CHUNKS):
            chunk = start + tl.arange(0, BLOCK_CHUNKS)
            pointers = partial_ptr + (chunk.to(tl.int64) * 2 * C)[:, None] + c[None, :]
            mask = (chunk < num_chunks)[:, None] & exists[None, :]
            dz += tl.load(pointers, mask=mask, other=0.0)
            dz_xhat += tl.load(pointers + C, mask=mask, other=0.0)
        sum_dz, sum_dz_xhat = tl.sum(dz, 0), tl.sum(dz_xhat, 0)
        tl.store(sum_dz_ptr + n * C + c, sum_dz, mask=exists)
        tl.store(sum_dz_xhat_ptr + n * C + c, sum_dz_xhat, mask=exists)
        a, _ = _channel_affine(weight_ptr, None, gain_ptr, None, n, c, exists, gain_stride_n, gain_stride_c, 0, 0)
        mean_dz += a * sum_dz
        mean_dz_xhat += a * sum_dz_xhat
    size = D.to(tl.float32) * P.to(tl.float32)
    tl.store(mean_dz_ptr + n * G + g, tl.sum(mean_dz, 0) / size)
    tl.store(mean_dz_xhat_ptr + n * G + g, tl.sum(mean_dz_xhat, 0) / size)


@triton.jit(do_not_specialize=("first_image", "N", "C", *_STRIDES))
def _skip_group_norm_bwd_params_kernel(
    first_image,  # 0
    sum_dz_ptr,  # (N, C)
    sum_dz_xhat_ptr,  # (N, C)
    weight_ptr,  # (C,)
    bias_ptr,  # (C,)
    gain_ptr,  # (N, C) by its strides, or None
    dweight_ptr,  # (C,)
    dbias_ptr,  # (C,)
    dgain_ptr,  # (N, C) or None
    N,
    C,
    gain_stride_n,
    gain_stride_c,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    exists = c < C
    weight = tl.load(weight_ptr + c, mask=exists, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + c, mask=exists, other=0.0).to(tl.float32)
    dweight = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    dbias = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    for start in range(0, N, BLOCK_N):
        n = (start + tl.arange(0, BLOCK_N)).to(tl.int64)[:, None]
        mask = (n < N) & exists[None, :]
        sum_dz = tl.load(sum_dz_ptr + n * C + c[None, :], mask=mask, other=0.0)
        sum_dz_xhat = tl.load(sum_dz_xhat_ptr + n * C + c[None, :], mask=mask, other=0.0)
        if gain_ptr is not None:
            dgain = weight[None, :] * sum_dz_xhat + bias[None, :] * sum_dz
            tl.store(dgain_ptr + n * C + c[None, :], dgain, mask=mask)
            gain = _channel_gain(gain_ptr, n, c[None, :], mask, gain_stride_n, gain_stride_c)
            sum_dz *= gain
            sum_dz_xhat *= gain
        dweight += sum_dz_xhat
        dbias += sum_dz
    tl.store(dweight_ptr + c, tl.sum(dweight, 0), mask=exists)
    tl.store(dbias_ptr + c, tl.sum(dbias, 0), mask=exists)


def forward(
    h: Tensor,
    s: Tensor | None,
    scale: Tensor | None,
    float_scale: float,
    weight: Tensor | None,
    bias: Tensor | None,
    gain: Tensor | None,
    shift: Tensor | None,
    groups: int,
    eps: float,
    act: str | None,
    channels_last: bool,
    y: Tensor,
    mean: Tensor,
    rstd: Tensor,
) -> None:
    """Fills y, mean and rstd."""
    shape = _Shape.of(h, s)
    tiling = _tiling_of("forward", h, shape, groups, channels_last)
    weight, bias = (None if x is None else x.contiguous() for x in (weight, bias))
    sizes, strides = (shape.P, shape.Ch, shape.Cs, groups), _strides(shape, scale, gain, shift)
    partial = None
    if tiling.form == "split":
        partial = h.new_empty((tiling.images, tiling.num_chunks, 2, shape.C), dtype=torch.float32)

    tensors = (h, s, scale, weight, bias, gain, shift, partial, mean, rstd, y)
    numbers = (float_scale, eps, tiling.block_channels, *sizes, *strides)
    vec = _vector_length(tiling, shape, channels_last, h, s, y)
    tiles = _tile_launchers(_skip_group_norm_fwd_kernel, tiling, channels_last, vec, act, *tensors, *numbers)
    combine = _launcher(_skip_group_norm_fwd_combine_kernel, partial, mean, rstd, eps, *sizes, tiling.block_p, 1024)
    with current_device(h):
        _launch_stages(tiles, combine, tiling, shape.N, groups)


def backward(
    dy: Tensor,
    h: Tensor,
    s: Tensor | None,
    scale: Tensor | None,
    float_scale: float,
    weight: Tensor | None,
    bias: Tensor | None,
    gain: Tensor | None,
    shift: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    groups: int,
    act: str | None,
    channels_last: bool,
    dh: Tensor,
    ds: Tensor | None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Fills dh and ds; returns dscale (N, Cs), dweight and dbias (C,), dgain and dshift (N, C), in fp32."""
    shape = _Shape.of(h, s)
    N, C = shape.N, shape.C
    tiling = _tiling_of("backward", h, shape, groups, channels_last)
    weight, bias = (None if x is None else x.contiguous() for x in (weight, bias))
    sizes, strides = (shape.P, shape.Ch, shape.Cs, groups), _strides(shape, scale, gain, shift)

    def empty(*size: int) -> Tensor:
        return h.new_empty(size, dtype=torch.float32)

    sums = (empty(N, C), empty(N, C))  # over positions, of dz and of dz * xhat
    partial, means = None, (None, None)
    if tiling.form == "split":
        partial, means = empty(tiling.images, tiling.num_chunks, 2, C), (empty(N, groups), empty(N, groups))
    dscale = None
    if scale is not None:
        dscale = empty(N, shape.Cs) if tiling.num_chunks == 1 else empty(N, tiling.num_chunks, shape.Cs)

    tensors = (dy, h, s, scale, weight, bias, gain, shift, mean, rstd, partial, *sums, *means, dh, ds, dscale)
    numbers = (float_scale, tiling.block_channels, *sizes, *strides)
    vec = _vector_length(tiling, shape, channels_last, dy, h, s, dh, ds)
    tiles = _tile_launchers(_skip_group_norm_bwd_kernel, tiling, channels_last, vec, act, *tensors, *numbers)
    tensors = (partial, weight, gain, *sums, *means)
    blocks = (tiling.block_p, 32, min(64, next_power_of_two(C // groups)))
    combine = _launcher(_skip_group_norm_bwd_combine_kernel, *tensors, *sizes, *strides[2:4], *blocks)
    dshift, dgain = sums
    dweight = dbias = None
    with current_device(h):
        _launch_stages(tiles, combine, tiling, N, groups)
        if weight is not None:
            dweight, dbias, dgain = empty(C), empty(C), None if gain is None else empty(N, C)
            tensors = (*sums, weight, bias, gain, dweight, dbias, dgain)
            params = _launcher(_skip_group_norm_bwd_params_kernel, *tensors, N, C, *strides[2:4], 64, 16)
            params(triton.cdiv(C, 16))
        if dscale is not None and tiling.num_chunks > 1:
            dscale = dscale.sum(1)
    return dscale, dweight, dbias, None if gain is None else dgain, None if shift is None else dshift


class _Shape(NamedTuple):
    N: int
    Ch: int
    Cs: int
    C: int
    P: int

    @staticmethod
    def of(h: Tensor, s: Tensor | None) -> "_Shape":
        N, Ch, *spatial = h.shape
        Cs = 0 if s is None else s.shape[1]
        return _Shape(N, Ch, Cs, Ch + Cs, math.prod(spatial))


def _tiling_of(direction: str, h: Tensor, shape: _Shape, groups: int, channels_last: bool) -> Tiling:
    N, _, _, C, P = shape
    return choose_tiling(direction, channels_last, h.element_size(), N, C, groups, P, multiprocessors(h.get_device()))


def _strides(shape: _Shape, scale: Tensor | None, gain: Tensor | None, shift: Tensor | None) -> tuple[int, ...]:
    """Two of each; zero along what is broadcast."""
    scale = None if scale is None else scale.expand(shape.N, shape.Cs)
    return tuple(stride for x in (scale, gain, shift) for stride in ((0, 0) if x is None else x.stride()))


def _vector_length(tiling: Tiling, shape: _Shape, channels_last: bool, *tensors: Tensor | None) -> int:
    """How many elements, of 16 bytes at most, lie side by side and aligned wherever a tile's row starts."""
    itemsize = next(x.element_size() for x in tensors if x is not None)
    runs = (shape.Ch, shape.Cs, tiling.block_channels, tiling.block_c) if channels_last else (shape.P, tiling.block_p)
    addresses = (x.data_ptr() for x in tensors if x is not None)
    return math.gcd(16, *(run * itemsize for run in runs), *addresses) // itemsize


def _launcher(kernel: Any, *arguments: Any, **options: int) -> Callable[..., None]:
    """A function that launches so many programs. After the first time, Triton does not look at the arguments again."""
    compiled = None

    def launch(num_programs: int, first_image: int = 0) -> None:
        nonlocal compiled
        if compiled is None:
            compiled = kernel[(num_programs,)](first_image, *arguments, **options)  # None when interpreted
        else:
            compiled[(num_programs, 1, 1)](first_image, *arguments)

    return launch


def _tile_launchers(
    kernel: Any, tiling: Tiling, channels_last: bool, vec: int, act: str | None, *arguments: Any
) -> list[Callable[..., None]]:
    """One per stage."""
    constants = (tiling.num_groups, tiling.block_c, tiling.block_p, channels_last, vec, act)
    stages = ("sums", "apply") if tiling.form == "split" else (tiling.form,)
    return [_launcher(kernel, *arguments, stage, *constants, num_warps=tiling.num_warps) for stage in stages]


def _launch_stages(
    tiles: list[Callable[..., None]], combine: Callable[..., None], tiling: Tiling, N: int, groups: int
) -> None:
    if tiling.form != "split":
        tiles[0](N * tiling.num_programs)
        return
    sums, apply = tiles
    for first_image in range(0, N, tiling.images):
        images = min(tiling.images, N - first_image)
        sums(images * tiling.num_programs, first_image)
        combine(images * groups, first_image)
        apply(images * tiling.num_programs, first_image)
