"""What the Triton kernels of ``skip_group_norm`` share: parameters of channels, walks over tiles.

A walk goes over the positions of a block of channels, tile by tile. The block lies in h or in s, never in both, so that
one scalar choice of the tensor serves all of it. A tile has the axis that is contiguous in memory last:
(channels, positions), or (positions, channels) where channels_last. Vectors over its channels are (channels,).

N images, C = Ch + Cs channels, P positions, G groups of D channels.
"""
# pyright: reportGeneralTypeIssues=false, reportAttributeAccessIssue=false
# (to a type checker, a call of one jitted function by another never returns)

from typing import Any, NamedTuple

import triton
import triton.language as tl

from scalelong.kernels.triton_activations import INTERPRETED


class Parameters(NamedTuple):
    """Whatever scales and shifts a channel; a stride is 0 along what is broadcast."""

    scale: Any  # (N, Cs), or None
    weight: Any  # (C,), or None
    bias: Any  # (C,), or None
    gain: Any  # (N, C), or None
    shift: Any  # (N, C), or None
    float_scale: float  # where scale is None
    scale_stride_n: int = 0
    scale_stride_c: int = 0
    gain_stride_n: int = 0
    gain_stride_c: int = 0
    shift_stride_n: int = 0
    shift_stride_c: int = 0


class Tile(NamedTuple):
    """What a kernel is compiled for."""

    channels: int  # powers of two
    positions: int
    channels_last: bool
    vec: int  # elements that lie side by side, aligned, wherever a row of a tile starts
    masked: bool  # whether a tile may reach beyond the channels of its tensor or the positions

    @property
    def shape(self) -> tuple[int, int]:
        return (self.positions, self.channels) if self.channels_last else (self.channels, self.positions)


@triton.jit
def widened(x):
    """x in fp32.

    Of a pair of bf16 the compiler takes out the upper one by two instructions, where a mask does. Not pure, so that it
    does it again where x is read again, instead of keeping it twice as wide.
    """
    if INTERPRETED or x.dtype != tl.bfloat16 or x.numel == 1:
        return x.to(tl.float32)
    else:
        return tl.inline_asm_elementwise(
            "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;", "=f,=f,r", [x], tl.float32, is_pure=False, pack=2
        )


@triton.jit
def narrowed(x, dtype: tl.constexpr):
    """x, of fp32, in ``dtype``, pairs in one register: the compiler keeps what is read again in one for each."""
    if dtype == tl.float32:
        return x
    elif INTERPRETED:
        return _rounded_to_bf16(x).to(dtype) if dtype == tl.bfloat16 else x.to(dtype)
    elif x.numel == 1:
        return x.to(dtype)
    elif dtype == tl.bfloat16:
        return tl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,f,f", [x], tl.bfloat16, is_pure=True, pack=2
        )
    else:
        return tl.inline_asm_elementwise(
            "cvt.rn.f16x2.f32 $0, $2, $1;", "=r,f,f", [x], tl.float16, is_pure=True, pack=2
        )


@triton.jit
def _rounded_to_bf16(x):
    """To the nearest, for the interpreter, which cuts off what bf16 does not hold."""
    bits = x.to(tl.int32, bitcast=True)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000).to(tl.float32, bitcast=True)
    return tl.where(x == x, rounded, x)


@triton.jit
def channel_scale(parameters, n, c, Ch, mask):
    """The factors that turn cat([h, s]) into x at channels ``c``."""
    if parameters.scale is None:
        factor = parameters.float_scale
    else:
        offsets = n.to(tl.int64) * parameters.scale_stride_n + (c - Ch) * parameters.scale_stride_c
        factor = tl.load(parameters.scale + offsets, mask=mask & (c >= Ch), other=0.0).to(tl.float32)
    return tl.where(c >= Ch, factor, 1.0)


@triton.jit
def channel_affine(parameters, n, c, mask):
    """a and b of z = xhat * a + b at channels ``c``."""
    a = tl.full(c.shape, 1.0, tl.float32)
    b = tl.full(c.shape, 0.0, tl.float32)
    if parameters.weight is not None:
        a = tl.load(parameters.weight + c, mask=mask, other=0.0).to(tl.float32)
        b = tl.load(parameters.bias + c, mask=mask, other=0.0).to(tl.float32)
    if parameters.gain is not None:
        offsets = n.to(tl.int64) * parameters.gain_stride_n + c * parameters.gain_stride_c
        gain = 1 + tl.load(parameters.gain + offsets, mask=mask, other=0.0).to(tl.float32)
        a *= gain
        b *= gain
    if parameters.shift is not None:
        offsets = n.to(tl.int64) * parameters.shift_stride_n + c * parameters.shift_stride_c
        b += tl.load(parameters.shift + offsets, mask=mask, other=0.0).to(tl.float32)
    return a, b


@triton.constexpr_function
def is_folded(x_ptr):
    """Whether scale and mean may be folded into coefficients of cat([h, s]) itself.

    That spares an instruction, and rounds off what a mean far from zero leaves over: nothing that 16 bits would hold.
    """
    return x_ptr.dtype.element_ty.primitive_bitwidth == 16


@triton.jit
def over_channels(v, TILE: tl.constexpr):
    return v[None, :] if TILE.channels_last else v[:, None]


@triton.jit
def sum_over_positions(x, TILE: tl.constexpr):
    return tl.sum(x, 0) if TILE.channels_last else tl.sum(x, 1)


@triton.jit
def quotient(i, n):
    """``i // n`` for 0 <= i < 2**20, in four instructions instead of twenty."""
    return ((i.to(tl.float32) + 0.5) * (1.0 / n)).to(tl.int32)


@triton.jit
def locate(program, Ch, Cs, num_chunks, TILE: tl.constexpr):
    """Of a program: its image, its chunk of positions, whether it is in the skip, and its first channel there."""
    blocks_of_h = tl.cdiv(Ch, TILE.channels)
    num_blocks = blocks_of_h + tl.cdiv(Cs, TILE.channels)
    fast = num_blocks if TILE.channels_last else num_chunks  # neighbouring programs take neighbouring memory
    slow = num_chunks if TILE.channels_last else num_blocks
    row = program // fast
    column = program - row * fast
    n = row // slow
    row -= n * slow
    block = column if TILE.channels_last else row
    chunk = row if TILE.channels_last else column
    in_skip = block >= blocks_of_h
    return n, chunk, in_skip, tl.where(in_skip, block - blocks_of_h, block) * TILE.channels


@triton.jit
def source_of(h_ptr, s_ptr, in_skip, Ch, Cs):
    """The tensor that a block of channels lies in, and how many channels that has."""
    if s_ptr is None:
        return h_ptr, Ch
    else:
        return tl.where(in_skip, s_ptr, h_ptr), tl.where(in_skip, Cs, Ch)


@triton.jit
def channels_of(first, num_channels, TILE: tl.constexpr):
    """The channels of a block, and which exist."""
    VEC: tl.constexpr = TILE.vec
    c = first + tl.arange(0, TILE.channels)
    exists = c < num_channels
    return c, tl.max_constancy(exists, VEC) if TILE.channels_last else exists


@triton.jit
def aligned(c, TILE: tl.constexpr):
    """Says of the channels of a block, which start at a multiple of vec, that what they index is read as vectors."""
    VEC: tl.constexpr = TILE.vec
    return tl.max_contiguous(tl.multiple_of(c, VEC), VEC) if TILE.channels_last else c


@triton.jit
def load_coefficient(coefficients_ptr, c, exists, TILE: tl.constexpr):
    """An fp32 number for each channel of a tile."""
    pointers = coefficients_ptr + c
    if TILE.channels_last:
        VEC: tl.constexpr = TILE.vec
        VEC_BYTES: tl.constexpr = TILE.vec * 4
        pointers = tl.max_contiguous(tl.multiple_of(pointers, VEC_BYTES), VEC)
    return over_channels(tl.load(pointers, mask=exists, other=0.0), TILE)


@triton.jit
def tile_pointers(x_ptr, n, position, first, P, num_channels, TILE: tl.constexpr):
    """In a tensor (N, num_channels, P), from a position and a channel on."""
    i, c = tl.arange(0, TILE.positions), tl.arange(0, TILE.channels)
    if TILE.channels_last:
        x_ptr += (n.to(tl.int64) * P + position) * num_channels + first
        offsets = i[:, None] * num_channels + c[None, :]
    else:
        x_ptr += (n.to(tl.int64) * num_channels + first) * P + position
        offsets = c[:, None] * P + i[None, :]
    # The choice between h and s hides from the compiler that vec neighbours are aligned: it is told.
    VEC: tl.constexpr = TILE.vec
    VEC_BYTES: tl.constexpr = VEC * x_ptr.dtype.element_ty.primitive_bitwidth // 8
    return tl.max_contiguous(tl.multiple_of(x_ptr + offsets, [1, VEC_BYTES]), [1, VEC])


@triton.jit
def tile_mask(exists, position, P, TILE: tl.constexpr):
    VEC: tl.constexpr = TILE.vec
    inside = tl.arange(0, TILE.positions) < P - position
    mask = exists[None, :] & inside[:, None] if TILE.channels_last else exists[:, None] & inside[None, :]
    return tl.max_constancy(mask, [1, VEC])


@triton.jit
def load_tile(x_ptr, n, position, first, exists, P, num_channels, filling, TILE: tl.constexpr, EVICT: tl.constexpr):
    pointers = tile_pointers(x_ptr, n, position, first, P, num_channels, TILE)
    if TILE.masked:
        return tl.load(pointers, mask=tile_mask(exists, position, P, TILE), other=filling, eviction_policy=EVICT)
    return tl.load(pointers, eviction_policy=EVICT)


@triton.jit
def store_tile(x_ptr, x, n, position, first, exists, P, num_channels, TILE: tl.constexpr):
    """Nobody reads it soon."""
    pointers = tile_pointers(x_ptr, n, position, first, P, num_channels, TILE)
    x = narrowed(x, x_ptr.dtype.element_ty)
    if TILE.masked:
        tl.store(pointers, x, mask=tile_mask(exists, position, P, TILE), eviction_policy="evict_first")
    else:
        tl.store(pointers, x, eviction_policy="evict_first")
