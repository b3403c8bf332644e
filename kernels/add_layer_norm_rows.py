"""What the Triton kernels of ``add_layer_norm`` share: how rows are cut into tiles, and what belongs to their features.

A program walks through rows of one sample, a few rows at a time, each held by one warp or a few: (ROWS, D) numbers, as
NUM_PIECES tiles of (ROWS, PIECE), so that widths that are no power of two are padded by one piece at most. Where angles
turn the features, whose pairs lie half a row apart, each half of a row is cut into tiles by itself: SPAN is D / 2 then,
and D elsewhere. What belongs to the features (weight, bias, gain, shift, gate, angle) is loaded once a program.

B samples of T rows of D features, M = B * T rows in all.
"""
# ruff: noqa: RUF005 - Triton adds tuples and does not unpack them
# pyright: reportGeneralTypeIssues=false
# (to a type checker, a call of one jitted function by another never returns)

import math
from typing import Any, NamedTuple

import triton
import triton.language as tl

# A quarter of a turn in parts: the first two have so few bits that small multiples of them are exact.
QUARTERS_OF_RADIAN = tl.constexpr(2 / math.pi)
QUARTER_HIGH = tl.constexpr(201 / 2**7)
QUARTER_MIDDLE = tl.constexpr(2029 / 2**22)
QUARTER_LOW = tl.constexpr(math.pi / 2 - 201 / 2**7 - 2029 / 2**22)


class Vectors(NamedTuple):
    """What belongs to the features."""

    weight: Any  # (D,) or None
    bias: Any  # (D,) or None
    gain: Any  # (B, D) or None
    shift: Any  # (B, D) or None
    gate: Any  # (B, D) or None
    angle: Any  # (B, D / 2) or None
    gain_stride: Any  # from sample to sample
    shift_stride: Any
    gate_stride: Any
    angle_stride: Any


@triton.constexpr_function
def first_of_piece(k, SPAN, PIECE):
    """The feature that piece k begins with."""
    pieces = -(-SPAN // PIECE)
    return k // pieces * SPAN + k % pieces * PIECE


@triton.constexpr_function
def size_of_piece(k, SPAN, PIECE):
    """How many features piece k has."""
    return min(PIECE, SPAN - k % -(-SPAN // PIECE) * PIECE)


@triton.jit
def mask_of_piece(inside, k: tl.constexpr, SPAN: tl.constexpr, PIECE: tl.constexpr):
    """Of piece k, given which rows exist."""
    if size_of_piece(k, SPAN, PIECE) == PIECE:
        return inside[:, None]
    else:
        return inside[:, None] & (tl.arange(0, PIECE) < size_of_piece(k, SPAN, PIECE))[None, :]


@triton.jit
def offsets_of_piece(k: tl.constexpr, D: tl.constexpr, SPAN: tl.constexpr, ROWS: tl.constexpr, PIECE: tl.constexpr):
    return (tl.arange(0, ROWS) * D)[:, None] + (first_of_piece(k, SPAN, PIECE) + tl.arange(0, PIECE))[None, :]


@triton.jit
def piece_of_vector(ptr, begin, k: tl.constexpr, SPAN: tl.constexpr, PIECE: tl.constexpr, MISSING: tl.constexpr):
    """Piece k of the vector over the features that begins there, (1, PIECE) in fp32."""
    if ptr is None:
        return tl.full((1, PIECE), MISSING, tl.float32)
    else:
        d = tl.arange(0, PIECE)[None, :]
        if size_of_piece(k, SPAN, PIECE) == PIECE:
            return tl.load(ptr + begin + first_of_piece(k, SPAN, PIECE) + d).to(tl.float32)
        else:
            mask = d < size_of_piece(k, SPAN, PIECE)
            return tl.load(ptr + begin + first_of_piece(k, SPAN, PIECE) + d, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def piece_of_gate(vectors, b, k: tl.constexpr, SPAN: tl.constexpr, PIECE: tl.constexpr):
    return piece_of_vector(vectors.gate, b * vectors.gate_stride, k, SPAN, PIECE, 1.0)


@triton.jit
def factor_and_constant(vectors, b, k: tl.constexpr, SPAN: tl.constexpr, PIECE: tl.constexpr):
    """Of the normalised numbers of one sample: weight * (1 + gain), and bias * (1 + gain) + shift."""
    gain = 1.0 + piece_of_vector(vectors.gain, b * vectors.gain_stride, k, SPAN, PIECE, 0.0)
    shift = piece_of_vector(vectors.shift, b * vectors.shift_stride, k, SPAN, PIECE, 0.0)
    weight, bias = (
        piece_of_vector(vectors.weight, 0, k, SPAN, PIECE, 1.0),
        piece_of_vector(vectors.bias, 0, k, SPAN, PIECE, 0.0),
    )
    return weight * gain, bias * gain + shift


@triton.jit
def _cosine_and_sine(angle):
    """Of radians in fp32, up to some ten thousands; without CUDA's branch for larger ones, which takes a stack."""
    quarters = tl.floor(angle * QUARTERS_OF_RADIAN + 0.5)
    r = ((angle - quarters * QUARTER_HIGH) - quarters * QUARTER_MIDDLE) - quarters * QUARTER_LOW
    square = r * r
    # Taylor's, within 3e-8 over an eighth of a turn.
    cosine = 1.0 + square * (-1 / 2 + square * (1 / 24 + square * (-1 / 720 + square * (1 / 40320))))
    sine = r + r * square * (-1 / 6 + square * (1 / 120 + square * (-1 / 5040 + square * (1 / 362880))))
    quarter = quarters.to(tl.int32)
    is_odd = (quarter & 1) != 0
    first, second = tl.where(is_odd, sine, cosine), tl.where(is_odd, cosine, sine)
    return tl.where(((quarter + 1) & 2) != 0, -first, first), tl.where((quarter & 2) != 0, -second, second)


@triton.jit
def turns_of_sample(vectors, b, SPAN: tl.constexpr, PIECE: tl.constexpr, NUM_PIECES: tl.constexpr):
    """Cosines and sines of the angles of one sample, in pieces of half a row; none without angles."""
    cosines, sines = (), ()
    if vectors.angle is not None:
        for k in tl.static_range(NUM_PIECES // 2):
            angle = piece_of_vector(vectors.angle, b * vectors.angle_stride, k, SPAN, PIECE, 0.0)
            cosine, sine = _cosine_and_sine(angle)
            cosines, sines = cosines + (cosine,), sines + (sine,)
    return cosines, sines


@triton.jit
def turned_piece(tiles, k: tl.constexpr, turns, NUM_PIECES: tl.constexpr, BACK: tl.constexpr):
    """Piece k of a row, in fp32, turned by the angles or turned back; as it is without angles."""
    cosines, sines = turns
    x = tiles[k].to(tl.float32)
    if len(cosines) == 0:
        return x
    else:
        HALF: tl.constexpr = NUM_PIECES // 2
        other = tiles[(k + HALF) % NUM_PIECES].to(tl.float32)
        if (k < HALF) == BACK:
            return x * cosines[k % HALF] + other * sines[k % HALF]
        else:
            return x * cosines[k % HALF] - other * sines[k % HALF]


@triton.jit
def place_of_program(T, rows_per_program):
    """Sample, its first row and the row behind its last one of this program."""
    num_chunks = tl.cdiv(T, rows_per_program)
    first = tl.program_id(0) % num_chunks * rows_per_program
    return (tl.program_id(0) // num_chunks).to(tl.int64), first, tl.minimum(first + rows_per_program, T)
