"""The Triton kernels of ``add_layer_norm`` (add_layer_norm.py says what it computes) and what launches them.

A program walks through rows of one sample, a few rows at a time, each held by one warp or a few: (ROWS, D) numbers, as
NUM_PIECES tiles of (ROWS, PIECE), so that widths that are no power of two are padded by one piece at most. Where angles
turn the features, whose pairs lie half a row apart, each half of a row is cut into tiles by itself: SPAN is D / 2 then,
and D elsewhere. What belongs to the features (weight, bias, gain, shift, gate, angle) is loaded once a program, and the
sums over its rows of backward are written once a program; small kernels put them together in a fixed order.

B samples of T rows of D features, M = B * T rows in all.
"""
# ruff: noqa: RUF005 - Triton adds tuples and does not unpack them
# pyright: reportGeneralTypeIssues=false
# (to a type checker, a call of one jitted function by another never returns)

import math
from collections.abc import Hashable
from functools import cache
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from scalelong.kernels.add_layer_norm_tensors import Gradients, Inputs, Outputs
from scalelong.kernels.launches import Kept, Launch, Plan, Slot, places, signature
from scalelong.kernels.triton_device import multiprocessors

# What fills an H100 and keeps the walks of backward so long that their sums are a small share: not timed yet.
FORWARD_PROGRAMS, BACKWARD_PROGRAMS = 8, 4  # on a multiprocessor
FORWARD_NUMBERS, BACKWARD_NUMBERS = 36, 24  # of a row, that a thread holds at most
# The same where angles turn the features, which takes registers for the other half of each pair.
FORWARD_NUMBERS_TURNED, BACKWARD_NUMBERS_TURNED = 24, 12
MAX_WARPS = 16
PARAMS_ROWS, PARAMS_COLS = 64, 32
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
def _first(k, SPAN, PIECE):
    """The feature that piece k begins with."""
    pieces = -(-SPAN // PIECE)
    return k // pieces * SPAN + k % pieces * PIECE


@triton.constexpr_function
def _size(k, SPAN, PIECE):
    """How many features piece k has."""
    return min(PIECE, SPAN - k % -(-SPAN // PIECE) * PIECE)


@triton.jit
def _mask(inside, k: tl.constexpr, SPAN: tl.constexpr, PIECE: tl.constexpr):
    """Of piece k, given which rows exist."""
    if _size(k, SPAN, PIECE) == PIECE:
        return inside[:, None]
    else:
        return inside[:, None] & (tl.arange(0, PIECE) < _size(k, SPAN, PIECE))[None, :]


@triton.jit
def _offsets(k: tl.constexpr, D: tl.constexpr, SPAN: tl.constexpr, ROWS: tl.constexpr, PIECE: tl.constexpr):
    return (tl.arange(0, ROWS) * D)[:, None] + (_first(k, SPAN, PIECE) + tl.arange(0, PIECE))[None, :]


@triton.jit
def _vector(ptr, begin, k: tl.constexpr, SPAN: tl.constexpr, PIECE: tl.constexpr, MISSING: tl.constexpr):
    """Piece k of the vector over the features that begins there, (1, PIECE) in fp32."""
    if ptr is None:
        return tl.full((1, PIECE), MISSING, tl.float32)
    else:
        d = tl.arange(0, PIECE)[None, :]
        if _size(k, SPAN, PIECE) == PIECE:
            return tl.load(ptr + begin + _first(k, SPAN, PIECE) + d).to(tl.float32)
        else:
            mask = d < _size(k, SPAN, PIECE)
            return tl.load(ptr + begin + _first(k, SPAN, PIECE) + d, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _gate(vectors, b, k: tl.constexpr, SPAN: tl.constexpr, PIECE: tl.constexpr):
    return _vector(vectors.gate, b * vectors.gate_stride, k, SPAN, PIECE, 1.0)


@triton.jit
def _factor_and_constant(vectors, b, k: tl.constexpr, SPAN: tl.constexpr, PIECE: tl.constexpr):
    """Of the normalised numbers of one sample: weight * (1 + gain), and bias * (1 + gain) + shift."""
    gain = 1.0 + _vector(vectors.gain, b * vectors.gain_stride, k, SPAN, PIECE, 0.0)
    shift = _vector(vectors.shift, b * vectors.shift_stride, k, SPAN, PIECE, 0.0)
    weight, bias = _vector(vectors.weight, 0, k, SPAN, PIECE, 1.0), _vector(vectors.bias, 0, k, SPAN, PIECE, 0.0)
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
def _turns(vectors, b, SPAN: tl.constexpr, PIECE: tl.constexpr, NUM_PIECES: tl.constexpr):
    """Cosines and sines of the angles of one sample, in pieces of half a row; none without angles."""
    cosines, sines = (), ()
    if vectors.angle is not None:
        for k in tl.static_range(NUM_PIECES // 2):
            angle = _vector(vectors.angle, b * vectors.angle_stride, k, SPAN, PIECE, 0.0)
            cosine, sine = _cosine_and_sine(angle)
            cosines, sines = cosines + (cosine,), sines + (sine,)
    return cosines, sines


@triton.jit
def _turned(tiles, k: tl.constexpr, turns, NUM_PIECES: tl.constexpr, BACK: tl.constexpr):
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
def _place(T, rows_per_program):
    """Sample, its first row and the row behind its last one of this program."""
    num_chunks = tl.cdiv(T, rows_per_program)
    first = tl.program_id(0) % num_chunks * rows_per_program
    return (tl.program_id(0) // num_chunks).to(tl.int64), first, tl.minimum(first + rows_per_program, T)


@triton.jit(do_not_specialize=("T", "rows_per_program"))
def _add_layer_norm_fwd_kernel(
    x_ptr,  # (M, D)
    branch_ptr,  # (M, D) or None
    vectors,
    stream_ptr,  # (M, D); None without a branch
    y_ptr,  # (M, D)
    mean_ptr,  # (M,)
    rstd_ptr,  # (M,)
    T,
    rows_per_program,
    eps,
    D: tl.constexpr,
    SPAN: tl.constexpr,
    ROWS: tl.constexpr,
    PIECE: tl.constexpr,
    NUM_PIECES: tl.constexpr,
):
    b, first, last = _place(T, rows_per_program)
    factors, constants, gates = (), (), ()
    for k in tl.static_range(NUM_PIECES):
        factor, constant = _factor_and_constant(vectors, b, k, SPAN, PIECE)
        factors, constants = factors + (factor,), constants + (constant,)
        gates = gates + (_gate(vectors, b, k, SPAN, PIECE),)
    turns = _turns(vectors, b, SPAN, PIECE, NUM_PIECES)
    for t in range(first, last, ROWS):
        row = b * T + t
        inside = tl.arange(0, ROWS) < last - t
        stream = ()
        total = tl.zeros((ROWS, PIECE), tl.float32)
        for k in tl.static_range(NUM_PIECES):
            mask, offsets = _mask(inside, k, SPAN, PIECE), _offsets(k, D, SPAN, ROWS, PIECE)
            s = tl.load(x_ptr + row * D + offsets, mask=mask, other=0.0).to(tl.float32)
            if branch_ptr is not None:
                added = tl.load(branch_ptr + row * D + offsets, mask=mask, other=0.0).to(tl.float32)
                rounded = (s + (added if vectors.gate is None else gates[k] * added)).to(stream_ptr.dtype.element_ty)
                tl.store(stream_ptr + row * D + offsets, rounded, mask=mask)
                s = rounded.to(tl.float32)
            stream = stream + (s,)
            total += s
        near = tl.sum(total, 1) / D
        distances, squares = tl.zeros((ROWS, PIECE), tl.float32), tl.zeros((ROWS, PIECE), tl.float32)
        for k in tl.static_range(NUM_PIECES):
            distance = stream[k] - near[:, None]
            if _size(k, SPAN, PIECE) < PIECE:
                distance = tl.where(_mask(inside, k, SPAN, PIECE), distance, 0.0)
            distances += distance
            squares += distance * distance
        left = tl.sum(distances, 1) / D  # the error of a mean far from zero
        rstd = 1.0 / tl.sqrt_rn(tl.maximum(tl.sum(squares, 1) / D - left * left, 0.0) + eps)
        modulated = ()
        for k in tl.static_range(NUM_PIECES):
            xhat = ((stream[k] - near[:, None]) - left[:, None]) * rstd[:, None]
            modulated = modulated + (xhat * factors[k] + constants[k],)
        for k in tl.static_range(NUM_PIECES):
            y = _turned(modulated, k, turns, NUM_PIECES, False).to(y_ptr.dtype.element_ty)
            tl.store(y_ptr + row * D + _offsets(k, D, SPAN, ROWS, PIECE), y, mask=_mask(inside, k, SPAN, PIECE))
        tl.store(mean_ptr + row + tl.arange(0, ROWS), near + left, mask=inside)
        tl.store(rstd_ptr + row + tl.arange(0, ROWS), rstd, mask=inside)


@triton.jit(do_not_specialize=("T", "rows_per_program"))
def _add_layer_norm_bwd_kernel(
    dstream_ptr,  # (M, D) or None
    dy_ptr,  # (M, D)
    stream_ptr,  # (M, D)
    branch_ptr,  # (M, D), or None where the gate needs no gradient
    vectors,
    mean_ptr,  # (M,)
    rstd_ptr,  # (M,)
    dx_ptr,  # (M, D) or None
    dbranch_ptr,  # (M, D) or None
    sums_ptr,  # (programs, NUM_SUMS, D), of dz, dz * xhat, with branch of branch * dx, and for the angles; or None
    T,
    rows_per_program,
    D: tl.constexpr,
    SPAN: tl.constexpr,
    SUMS_ANGLES: tl.constexpr,
    ROWS: tl.constexpr,
    PIECE: tl.constexpr,
    NUM_PIECES: tl.constexpr,
):
    b, first, last = _place(T, rows_per_program)
    factors, constants, dz_sums, dz_xhat_sums, dgate_sums, dangle_sums = (), (), (), (), (), ()
    for k in tl.static_range(NUM_PIECES):
        factor, constant = _factor_and_constant(vectors, b, k, SPAN, PIECE)
        factors = factors + (factor,)
        dz_sums = dz_sums + (tl.zeros((ROWS, PIECE), tl.float32),)
        dz_xhat_sums = dz_xhat_sums + (tl.zeros((ROWS, PIECE), tl.float32),)
        dgate_sums = dgate_sums + (tl.zeros((ROWS, PIECE), tl.float32),)
        if SUMS_ANGLES:
            constants = constants + (constant,)
            dangle_sums = dangle_sums + (tl.zeros((ROWS, PIECE), tl.float32),)
    turns = _turns(vectors, b, SPAN, PIECE, NUM_PIECES)
    for t in range(first, last, ROWS):
        row = b * T + t
        inside = tl.arange(0, ROWS) < last - t
        mean = tl.load(mean_ptr + row + tl.arange(0, ROWS), mask=inside, other=0.0)[:, None]
        rstd = tl.load(rstd_ptr + row + tl.arange(0, ROWS), mask=inside, other=0.0)[:, None]
        streams, dys = (), ()
        for k in tl.static_range(NUM_PIECES):
            mask, offsets = _mask(inside, k, SPAN, PIECE), _offsets(k, D, SPAN, ROWS, PIECE)
            stream = tl.load(stream_ptr + row * D + offsets, mask=mask, other=0.0)
            dy = tl.load(dy_ptr + row * D + offsets, mask=mask, other=0.0)
            streams, dys = streams + (stream,), dys + (dy,)  # 16 bits wide until they are needed again
        dnorm_sum, dnorm_xhat_sum = tl.zeros((ROWS, PIECE), tl.float32), tl.zeros((ROWS, PIECE), tl.float32)
        new_dz_sums, new_dz_xhat_sums, new_dangle_sums = (), (), ()
        for k in tl.static_range(NUM_PIECES):
            xhat, dz = (streams[k].to(tl.float32) - mean) * rstd, _turned(dys, k, turns, NUM_PIECES, True)
            dz_xhat = dz * xhat
            dnorm_sum += dz * factors[k]
            dnorm_xhat_sum += dz_xhat * factors[k]
            new_dz_sums = new_dz_sums + (dz_sums[k] + dz,)
            new_dz_xhat_sums = new_dz_xhat_sums + (dz_xhat_sums[k] + dz_xhat,)
            if SUMS_ANGLES:  # dz of the other half times z of this one
                other = _turned(dys, (k + NUM_PIECES // 2) % NUM_PIECES, turns, NUM_PIECES, True)
                new_dangle_sums = new_dangle_sums + (dangle_sums[k] + other * (xhat * factors[k] + constants[k]),)
        dz_sums, dz_xhat_sums, dangle_sums = new_dz_sums, new_dz_xhat_sums, new_dangle_sums
        if dx_ptr is not None or dbranch_ptr is not None or branch_ptr is not None:
            dnorm_mean, dnorm_xhat_mean = (tl.sum(dnorm_sum, 1) / D)[:, None], (tl.sum(dnorm_xhat_sum, 1) / D)[:, None]
            new_dgate_sums = ()
            for k in tl.static_range(NUM_PIECES):
                mask, offsets = _mask(inside, k, SPAN, PIECE), _offsets(k, D, SPAN, ROWS, PIECE)
                xhat = (streams[k].to(tl.float32) - mean) * rstd
                dnorm = _turned(dys, k, turns, NUM_PIECES, True) * factors[k]
                gradient = (dnorm - dnorm_mean - xhat * dnorm_xhat_mean) * rstd
                if dstream_ptr is not None:
                    gradient += tl.load(dstream_ptr + row * D + offsets, mask=mask, other=0.0).to(tl.float32)
                if dx_ptr is not None:
                    tl.store(dx_ptr + row * D + offsets, gradient.to(dx_ptr.dtype.element_ty), mask=mask)
                if dbranch_ptr is not None:
                    dbranch = gradient * _gate(vectors, b, k, SPAN, PIECE)
                    tl.store(dbranch_ptr + row * D + offsets, dbranch.to(dbranch_ptr.dtype.element_ty), mask=mask)
                if branch_ptr is not None:
                    branch = tl.load(branch_ptr + row * D + offsets, mask=mask, other=0.0).to(tl.float32)
                    new_dgate_sums = new_dgate_sums + (dgate_sums[k] + branch * gradient,)
            if branch_ptr is not None:
                dgate_sums = new_dgate_sums
    if sums_ptr is not None:
        NUM_SUMS: tl.constexpr = (2 if branch_ptr is None else 3) + SUMS_ANGLES
        sums_ptr += tl.program_id(0).to(tl.int64) * NUM_SUMS * D
        for k in tl.static_range(NUM_PIECES):
            d, exists = _first(k, SPAN, PIECE) + tl.arange(0, PIECE), tl.arange(0, PIECE) < _size(k, SPAN, PIECE)
            tl.store(sums_ptr + d, tl.sum(dz_sums[k], 0), mask=exists)
            tl.store(sums_ptr + D + d, tl.sum(dz_xhat_sums[k], 0), mask=exists)
            if branch_ptr is not None:
                tl.store(sums_ptr + 2 * D + d, tl.sum(dgate_sums[k], 0), mask=exists)
            if SUMS_ANGLES:
                tl.store(sums_ptr + (NUM_SUMS - 1) * D + d, tl.sum(dangle_sums[k], 0), mask=exists)


@triton.jit(do_not_specialize=("num_programs", "num_chunks"))
def _add_layer_norm_bwd_params_kernel(
    sums_ptr,  # (programs, NUM_SUMS, D)
    vectors,
    dweight_ptr,  # (D,) or None
    dbias_ptr,  # (D,) or None
    num_programs,
    num_chunks,
    D: tl.constexpr,
    NUM_SUMS: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    d = (tl.program_id(0) * COLS + tl.arange(0, COLS))[None, :]
    dweight, dbias = tl.zeros((ROWS, COLS), tl.float32), tl.zeros((ROWS, COLS), tl.float32)
    for first in range(0, num_programs, ROWS):
        program = first + tl.arange(0, ROWS)[:, None].to(tl.int64)
        mask = (program < num_programs) & (d < D)
        pointers = sums_ptr + program * NUM_SUMS * D + d
        dy, dy_xhat = tl.load(pointers, mask=mask, other=0.0), tl.load(pointers + D, mask=mask, other=0.0)
        if vectors.gain is not None:
            gain_pointers = vectors.gain + program // num_chunks * vectors.gain_stride + d
            gain = 1.0 + tl.load(gain_pointers, mask=mask, other=0.0).to(tl.float32)
            dy, dy_xhat = dy * gain, dy_xhat * gain
        dweight += dy_xhat
        dbias += dy
    d = tl.program_id(0) * COLS + tl.arange(0, COLS)
    if dweight_ptr is not None:
        tl.store(dweight_ptr + d, tl.sum(dweight, 0), mask=d < D)
    if dbias_ptr is not None:
        tl.store(dbias_ptr + d, tl.sum(dbias, 0), mask=d < D)


@triton.jit(do_not_specialize=("num_chunks",))
def _add_layer_norm_bwd_samples_kernel(
    sums_ptr,  # (B, num_chunks, NUM_SUMS, D)
    vectors,
    dgain_ptr,  # (B, D) or None
    dshift_ptr,  # (B, D) or None
    dgate_ptr,  # (B, D) or None
    dangle_ptr,  # (B, D / 2) or None
    num_chunks,
    D: tl.constexpr,
    NUM_SUMS: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    b, d = tl.program_id(1).to(tl.int64), tl.program_id(0) * COLS + tl.arange(0, COLS)
    sums_ptr += b * num_chunks * NUM_SUMS * D
    dy, dy_xhat, dgate = tl.zeros((COLS,), tl.float32), tl.zeros((COLS,), tl.float32), tl.zeros((COLS,), tl.float32)
    for first in range(0, num_chunks, ROWS):
        chunk = first + tl.arange(0, ROWS)[:, None].to(tl.int64)
        mask = (chunk < num_chunks) & (d < D)[None, :]
        pointers = sums_ptr + chunk * NUM_SUMS * D + d[None, :]
        dy += tl.sum(tl.load(pointers, mask=mask, other=0.0), 0)
        dy_xhat += tl.sum(tl.load(pointers + D, mask=mask, other=0.0), 0)
        if dgate_ptr is not None:
            dgate += tl.sum(tl.load(pointers + 2 * D, mask=mask, other=0.0), 0)
    exists = d < D
    if dangle_ptr is not None:  # the first half of its sums less the second
        dangle, HALF = tl.zeros((COLS,), tl.float32), D // 2
        for first in range(0, num_chunks, ROWS):
            chunk = first + tl.arange(0, ROWS)[:, None].to(tl.int64)
            mask = (chunk < num_chunks) & (d < HALF)[None, :]
            pointers = sums_ptr + chunk * NUM_SUMS * D + (NUM_SUMS - 1) * D + d[None, :]
            dangle += tl.sum(tl.load(pointers, mask=mask, other=0.0), 0)
            dangle -= tl.sum(tl.load(pointers + HALF, mask=mask, other=0.0), 0)
        tl.store(dangle_ptr + b * HALF + d, dangle, mask=d < HALF)
    if dgain_ptr is not None:
        dgain = dy_xhat
        if vectors.weight is not None:
            dgain *= tl.load(vectors.weight + d, mask=exists, other=0.0).to(tl.float32)
        if vectors.bias is not None:
            dgain += tl.load(vectors.bias + d, mask=exists, other=0.0).to(tl.float32) * dy
        tl.store(dgain_ptr + b * D + d, dgain, mask=exists)
    if dshift_ptr is not None:
        tl.store(dshift_ptr + b * D + d, dy, mask=exists)
    if dgate_ptr is not None:
        tl.store(dgate_ptr + b * D + d, dgate, mask=exists)


class Tiling(NamedTuple):
    """How rows of D features are held, and how many of them a program walks through."""

    rows: int
    piece: int
    num_pieces: int
    num_warps: int
    rows_per_program: int
    num_chunks: int  # programs of a sample
    span: int  # features that are cut into tiles by themselves

    @property
    def constants(self) -> dict[str, int]:
        return {"SPAN": self.span, "ROWS": self.rows, "PIECE": self.piece, "NUM_PIECES": self.num_pieces}


@cache
def choose_tiling(
    direction: str, itemsize: int, B: int, T: int, D: int, num_multiprocessors: int, *, turns: bool = False
) -> Tiling:
    """``itemsize``: bytes of the narrowest large tensor, of which a thread loads up to 16 at once."""
    if turns:
        numbers = FORWARD_NUMBERS_TURNED if direction == "forward" else BACKWARD_NUMBERS_TURNED
    else:
        numbers = FORWARD_NUMBERS if direction == "forward" else BACKWARD_NUMBERS
    programs = num_multiprocessors * (FORWARD_PROGRAMS if direction == "forward" else BACKWARD_PROGRAMS)
    span = D // 2 if turns else D
    vector = math.gcd(16 // itemsize, span)
    warps_per_row = 1
    # No more than there are whole vectors in a half row: the others would wait for them.
    while warps_per_row < MAX_WARPS and numbers * 32 * warps_per_row < D and 32 * warps_per_row * vector < span:
        warps_per_row *= 2
    num_warps = max(4, warps_per_row)
    rows, piece = num_warps // warps_per_row, 32 * warps_per_row * vector
    rows_per_program = min(_ceil_div(B * T, programs * rows), _ceil_div(T, rows)) * rows
    num_chunks = _ceil_div(T, rows_per_program)
    num_pieces = D // span * _ceil_div(span, piece)
    return Tiling(rows, piece, num_pieces, num_warps, rows_per_program, num_chunks, span)


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)


_plans: Kept[Plan] = Kept()


class _Slots:
    """Where plans find the tensors of a call: first ``Inputs``, then these."""

    X, BRANCH, WEIGHT, BIAS, GAIN, SHIFT, GATE, ANGLE = map(Slot, range(8))
    MEAN, RSTD = Slot(8), Slot(9)
    # Of a forward pass.
    STREAM, Y = Slot(10), Slot(11)
    # Of a backward pass.
    DSTREAM, DY, DX, DBRANCH, DWEIGHT, DBIAS, DGAIN, DSHIFT, DGATE, DANGLE, SUMS = map(Slot, range(10, 21))


def forward(inputs: Inputs, eps: float, outputs: Outputs, kind: Hashable = None) -> None:
    """Fills the outputs.

    ``kind`` stands for eps and the signature of each input, where somebody has looked at these already. The outputs
    need none: they are new, and torch's allocator aligns them by more than 16 bytes.
    """
    inputs = _with_dense_vectors(inputs)
    stream, y, mean, rstd = outputs
    key = kind or (*map(signature, (*inputs, stream, y)), eps)
    plan = _plans.get(key)
    if plan is None:
        plan = _plans.keep(key, _plan_forward(inputs, eps, y))
    plan.run((*inputs, mean, rstd, stream, y))


def backward(
    dstream: Tensor | None,
    dy: Tensor,
    inputs: Inputs,
    mean: Tensor,
    rstd: Tensor,
    gradients: Gradients,
    kind: Hashable = None,
) -> None:
    """Fills the gradients; those of the parameters are in fp32.

    ``kind`` stands for the same as in forward; where the tensors lie may have changed since, by hooks on what is saved.
    """
    inputs = _with_dense_vectors(inputs)
    wanted = tuple([grad is not None for grad in gradients])
    if kind is None:
        key = (*map(signature, (*inputs, mean, rstd, dstream, dy, *gradients[:2])), wanted)
    else:
        given = places((*inputs, dstream, dy))
        key = (kind, given, dy.dtype, None if gradients.dbranch is None else gradients.dbranch.dtype, wanted)
    plan = _plans.get(key)
    if plan is None:
        plan = _plans.keep(key, _plan_backward(dstream, dy, inputs, gradients))
    sums = mean.new_empty_strided((plan.workspace,), (1,)) if plan.workspace else None
    plan.run((*inputs, mean, rstd, dstream, dy, *gradients, sums))


def _with_dense_vectors(inputs: Inputs) -> Inputs:
    """With the features of what belongs to them side by side."""
    vectors = inputs[2:]
    if all([p is None or p.stride(-1) == 1 for p in vectors]):  # noqa: C419 - a generator takes half a microsecond
        return inputs
    return Inputs(*inputs[:2], *(p if p is None or p.stride(-1) == 1 else p.contiguous() for p in vectors))


def _plan_forward(inputs: Inputs, eps: float, y: Tensor) -> Plan:
    x, branch, *_ = inputs
    B, T, D = _sizes(inputs)
    itemsize = min(p.element_size() for p in (x, branch, y) if p is not None)
    turns = inputs.angle is not None
    tiling = choose_tiling("forward", itemsize, B, T, D, multiprocessors(x.get_device()), turns=turns)
    statistics = (_Slots.MEAN, _Slots.RSTD)
    large = (_Slots.X, _Slots.BRANCH, _vectors(inputs), _Slots.STREAM, _Slots.Y)
    arguments = (*large, *statistics, T, tiling.rows_per_program, eps)
    constants = {"D": D, **tiling.constants}
    return Plan([Launch(_add_layer_norm_fwd_kernel, B * tiling.num_chunks, arguments, constants, tiling.num_warps)])


def _plan_backward(dstream: Tensor | None, dy: Tensor, inputs: Inputs, gradients: Gradients) -> Plan:
    stream, branch, *_ = inputs
    _, dbranch, dweight, dbias, *of_samples = gradients
    B, T, D = _sizes(inputs)
    itemsize = min(p.element_size() for p in (dy, stream, dbranch, branch) if p is not None)
    turns, sums_angles = inputs.angle is not None, gradients.dangle is not None
    tiling = choose_tiling("backward", itemsize, B, T, D, multiprocessors(stream.get_device()), turns=turns)
    num_programs, num_columns = B * tiling.num_chunks, _ceil_div(D, PARAMS_COLS)
    num_sums = (2 if branch is None else 3) + sums_angles
    wants_all = dweight is not None or dbias is not None
    wants_samples = any(p is not None for p in of_samples)
    vectors, sums = _vectors(inputs), _Slots.SUMS if wants_all or wants_samples else None
    arguments = (
        *(_Slots.DSTREAM, _Slots.DY, _Slots.X, _Slots.BRANCH, vectors, _Slots.MEAN, _Slots.RSTD),
        *(_Slots.DX, _Slots.DBRANCH, sums, T, tiling.rows_per_program),
    )
    constants = {"D": D, "SUMS_ANGLES": sums_angles, **tiling.constants}
    launches = [Launch(_add_layer_norm_bwd_kernel, num_programs, arguments, constants, tiling.num_warps)]
    constants = {"D": D, "NUM_SUMS": num_sums, "ROWS": PARAMS_ROWS, "COLS": PARAMS_COLS}
    if wants_all:
        arguments = (sums, vectors, _Slots.DWEIGHT, _Slots.DBIAS, num_programs, tiling.num_chunks)
        launches.append(Launch(_add_layer_norm_bwd_params_kernel, num_columns, arguments, constants, 4))
    if wants_samples:
        of_samples = (_Slots.DGAIN, _Slots.DSHIFT, _Slots.DGATE, _Slots.DANGLE)
        arguments = (sums, vectors, *of_samples, tiling.num_chunks)
        launches.append(Launch(_add_layer_norm_bwd_samples_kernel, (num_columns, B), arguments, constants, 4))
    return Plan(launches, workspace=num_programs * num_sums * D if sums else 0)


def _sizes(inputs: Inputs) -> tuple[int, int, int]:
    """B, T and D."""
    D, B = inputs.x.shape[-1], inputs.num_samples
    return B, inputs.x.numel() // (B * D), D


def _vectors(inputs: Inputs) -> Vectors:
    strides = (0 if p is None else p.stride(0) for p in inputs[4:])
    of_samples = (_Slots.GAIN, _Slots.SHIFT, _Slots.GATE, _Slots.ANGLE)
    return Vectors(*(_Slots.WEIGHT, _Slots.BIAS), *of_samples, *strides)
