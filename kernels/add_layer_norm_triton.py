"""The Triton kernels of ``add_layer_norm`` (add_layer_norm.py says what it computes) and what launches them.

A program walks through rows of one sample, a few rows at a time, each held by one warp or a few: (ROWS, D) numbers, as
NUM_PIECES tiles of (ROWS, PIECE), so that widths that are no power of two are padded by one piece at most. What belongs
to the features (weight, bias, gain, shift, gate) is loaded once a program, and the sums over its rows of backward are
written once a program; small kernels put them together in a fixed order.

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
MAX_WARPS = 16
PARAMS_ROWS, PARAMS_COLS = 64, 32


class Vectors(NamedTuple):
    """What belongs to the features."""

    weight: Any  # (D,) or None
    bias: Any  # (D,) or None
    gain: Any  # (B, D) or None
    shift: Any  # (B, D) or None
    gate: Any  # (B, D) or None
    gain_stride: Any  # from sample to sample
    shift_stride: Any
    gate_stride: Any


@triton.jit
def _mask(inside, k: tl.constexpr, D: tl.constexpr, PIECE: tl.constexpr):
    """Of piece k, given which rows exist."""
    if (k + 1) * PIECE <= D:
        return inside[:, None]
    else:
        return inside[:, None] & (k * PIECE + tl.arange(0, PIECE) < D)[None, :]


@triton.jit
def _offsets(k: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, PIECE: tl.constexpr):
    return (tl.arange(0, ROWS) * D)[:, None] + (k * PIECE + tl.arange(0, PIECE))[None, :]


@triton.jit
def _vector(ptr, k: tl.constexpr, D: tl.constexpr, PIECE: tl.constexpr, MISSING: tl.constexpr):
    """Piece k of a vector over the features, (1, PIECE) in fp32."""
    if ptr is None:
        return tl.full((1, PIECE), MISSING, tl.float32)
    else:
        d = k * PIECE + tl.arange(0, PIECE)[None, :]
        if (k + 1) * PIECE <= D:
            return tl.load(ptr + d).to(tl.float32)
        else:
            return tl.load(ptr + d, mask=d < D, other=0.0).to(tl.float32)


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
    ROWS: tl.constexpr,
    PIECE: tl.constexpr,
    NUM_PIECES: tl.constexpr,
):
    b, first, last = _place(T, rows_per_program)
    gain_ptr, shift_ptr, gate_ptr = vectors.gain, vectors.shift, vectors.gate
    if gain_ptr is not None:
        gain_ptr += b * vectors.gain_stride
    if shift_ptr is not None:
        shift_ptr += b * vectors.shift_stride
    if gate_ptr is not None:
        gate_ptr += b * vectors.gate_stride
    factors, constants, gates = (), (), ()
    for k in tl.static_range(NUM_PIECES):
        gain = 1.0 + _vector(gain_ptr, k, D, PIECE, 0.0)
        factors = factors + (_vector(vectors.weight, k, D, PIECE, 1.0) * gain,)
        constants = constants + (_vector(vectors.bias, k, D, PIECE, 0.0) * gain + _vector(shift_ptr, k, D, PIECE, 0.0),)
        gates = gates + (_vector(gate_ptr, k, D, PIECE, 1.0),)
    for t in range(first, last, ROWS):
        row = b * T + t
        inside = tl.arange(0, ROWS) < last - t
        stream = ()
        total = tl.zeros((ROWS, PIECE), tl.float32)
        for k in tl.static_range(NUM_PIECES):
            mask, offsets = _mask(inside, k, D, PIECE), _offsets(k, D, ROWS, PIECE)
            s = tl.load(x_ptr + row * D + offsets, mask=mask, other=0.0).to(tl.float32)
            if branch_ptr is not None:
                added = tl.load(branch_ptr + row * D + offsets, mask=mask, other=0.0).to(tl.float32)
                rounded = (s + (added if gate_ptr is None else gates[k] * added)).to(stream_ptr.dtype.element_ty)
                tl.store(stream_ptr + row * D + offsets, rounded, mask=mask)
                s = rounded.to(tl.float32)
            stream = stream + (s,)
            total += s
        near = tl.sum(total, 1) / D
        distances, squares = tl.zeros((ROWS, PIECE), tl.float32), tl.zeros((ROWS, PIECE), tl.float32)
        for k in tl.static_range(NUM_PIECES):
            distance = stream[k] - near[:, None]
            if (k + 1) * PIECE > D:
                distance = tl.where(_mask(inside, k, D, PIECE), distance, 0.0)
            distances += distance
            squares += distance * distance
        left = tl.sum(distances, 1) / D  # the error of a mean far from zero
        rstd = 1.0 / tl.sqrt_rn(tl.maximum(tl.sum(squares, 1) / D - left * left, 0.0) + eps)
        for k in tl.static_range(NUM_PIECES):
            xhat = ((stream[k] - near[:, None]) - left[:, None]) * rstd[:, None]
            y = (xhat * factors[k] + constants[k]).to(y_ptr.dtype.element_ty)
            tl.store(y_ptr + row * D + _offsets(k, D, ROWS, PIECE), y, mask=_mask(inside, k, D, PIECE))
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
    sums_ptr,  # (programs, NUM_SUMS, D), of dy, dy * xhat and, with branch, branch * dx; or None
    T,
    rows_per_program,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    PIECE: tl.constexpr,
    NUM_PIECES: tl.constexpr,
):
    b, first, last = _place(T, rows_per_program)
    gain_ptr, gate_ptr = vectors.gain, vectors.gate
    if gain_ptr is not None:
        gain_ptr += b * vectors.gain_stride
    if gate_ptr is not None:
        gate_ptr += b * vectors.gate_stride
    factors, dy_sums, dy_xhat_sums, dgate_sums = (), (), (), ()
    for k in tl.static_range(NUM_PIECES):
        gain = 1.0 + _vector(gain_ptr, k, D, PIECE, 0.0)
        factors = factors + (_vector(vectors.weight, k, D, PIECE, 1.0) * gain,)
        dy_sums = dy_sums + (tl.zeros((ROWS, PIECE), tl.float32),)
        dy_xhat_sums = dy_xhat_sums + (tl.zeros((ROWS, PIECE), tl.float32),)
        dgate_sums = dgate_sums + (tl.zeros((ROWS, PIECE), tl.float32),)
    for t in range(first, last, ROWS):
        row = b * T + t
        inside = tl.arange(0, ROWS) < last - t
        mean = tl.load(mean_ptr + row + tl.arange(0, ROWS), mask=inside, other=0.0)[:, None]
        rstd = tl.load(rstd_ptr + row + tl.arange(0, ROWS), mask=inside, other=0.0)[:, None]
        streams, dys = (), ()
        dz_sum, dz_xhat_sum = tl.zeros((ROWS, PIECE), tl.float32), tl.zeros((ROWS, PIECE), tl.float32)
        new_dy_sums, new_dy_xhat_sums = (), ()
        for k in tl.static_range(NUM_PIECES):
            mask, offsets = _mask(inside, k, D, PIECE), _offsets(k, D, ROWS, PIECE)
            stream = tl.load(stream_ptr + row * D + offsets, mask=mask, other=0.0)
            dy = tl.load(dy_ptr + row * D + offsets, mask=mask, other=0.0)
            streams, dys = streams + (stream,), dys + (dy,)  # 16 bits wide until they are needed again
            xhat, dy = (stream.to(tl.float32) - mean) * rstd, dy.to(tl.float32)
            dy_xhat = dy * xhat
            dz_sum += dy * factors[k]
            dz_xhat_sum += dy_xhat * factors[k]
            new_dy_sums = new_dy_sums + (dy_sums[k] + dy,)
            new_dy_xhat_sums = new_dy_xhat_sums + (dy_xhat_sums[k] + dy_xhat,)
        dy_sums, dy_xhat_sums = new_dy_sums, new_dy_xhat_sums
        if dx_ptr is not None or dbranch_ptr is not None or branch_ptr is not None:
            dz_mean, dz_xhat_mean = (tl.sum(dz_sum, 1) / D)[:, None], (tl.sum(dz_xhat_sum, 1) / D)[:, None]
            new_dgate_sums = ()
            for k in tl.static_range(NUM_PIECES):
                mask, offsets = _mask(inside, k, D, PIECE), _offsets(k, D, ROWS, PIECE)
                xhat = (streams[k].to(tl.float32) - mean) * rstd
                gradient = (dys[k].to(tl.float32) * factors[k] - dz_mean - xhat * dz_xhat_mean) * rstd
                if dstream_ptr is not None:
                    gradient += tl.load(dstream_ptr + row * D + offsets, mask=mask, other=0.0).to(tl.float32)
                if dx_ptr is not None:
                    tl.store(dx_ptr + row * D + offsets, gradient.to(dx_ptr.dtype.element_ty), mask=mask)
                if dbranch_ptr is not None:
                    dbranch = gradient * _vector(gate_ptr, k, D, PIECE, 1.0)
                    tl.store(dbranch_ptr + row * D + offsets, dbranch.to(dbranch_ptr.dtype.element_ty), mask=mask)
                if branch_ptr is not None:
                    branch = tl.load(branch_ptr + row * D + offsets, mask=mask, other=0.0).to(tl.float32)
                    new_dgate_sums = new_dgate_sums + (dgate_sums[k] + branch * gradient,)
            if branch_ptr is not None:
                dgate_sums = new_dgate_sums
    if sums_ptr is not None:
        NUM_SUMS: tl.constexpr = 2 if branch_ptr is None else 3
        sums_ptr += tl.program_id(0).to(tl.int64) * NUM_SUMS * D
        for k in tl.static_range(NUM_PIECES):
            d = k * PIECE + tl.arange(0, PIECE)
            tl.store(sums_ptr + d, tl.sum(dy_sums[k], 0), mask=d < D)
            tl.store(sums_ptr + D + d, tl.sum(dy_xhat_sums[k], 0), mask=d < D)
            if branch_ptr is not None:
                tl.store(sums_ptr + 2 * D + d, tl.sum(dgate_sums[k], 0), mask=d < D)


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

    @property
    def constants(self) -> dict[str, int]:
        return {"ROWS": self.rows, "PIECE": self.piece, "NUM_PIECES": self.num_pieces}


@cache
def choose_tiling(direction: str, itemsize: int, B: int, T: int, D: int, num_multiprocessors: int) -> Tiling:
    """``itemsize``: bytes of the narrowest large tensor, of which a thread loads up to 16 at once."""
    numbers = FORWARD_NUMBERS if direction == "forward" else BACKWARD_NUMBERS
    programs = num_multiprocessors * (FORWARD_PROGRAMS if direction == "forward" else BACKWARD_PROGRAMS)
    vector = math.gcd(16 // itemsize, D)
    warps_per_row = 1
    while warps_per_row < MAX_WARPS and numbers * 32 * warps_per_row < D:
        warps_per_row *= 2
    num_warps = max(4, warps_per_row)
    rows, piece = num_warps // warps_per_row, 32 * warps_per_row * vector
    rows_per_program = min(_ceil_div(B * T, programs * rows), _ceil_div(T, rows)) * rows
    num_chunks = _ceil_div(T, rows_per_program)
    return Tiling(rows, piece, _ceil_div(D, piece), num_warps, rows_per_program, num_chunks)


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)


_plans: Kept[Plan] = Kept()


class _Slots:
    """Where plans find the tensors of a call: first ``Inputs``, then these."""

    X, BRANCH, WEIGHT, BIAS, GAIN, SHIFT, GATE = map(Slot, range(7))
    MEAN, RSTD = Slot(7), Slot(8)
    # Of a forward pass.
    STREAM, Y = Slot(9), Slot(10)
    # Of a backward pass.
    DSTREAM, DY, DX, DBRANCH, DWEIGHT, DBIAS, DGAIN, DSHIFT, DGATE, SUMS = map(Slot, range(9, 19))


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
    tiling = choose_tiling("forward", itemsize, B, T, D, multiprocessors(x.get_device()))
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
    tiling = choose_tiling("backward", itemsize, B, T, D, multiprocessors(stream.get_device()))
    num_programs, num_sums, num_columns = B * tiling.num_chunks, 2 if branch is None else 3, _ceil_div(D, PARAMS_COLS)
    wants_all = dweight is not None or dbias is not None
    wants_samples = any(p is not None for p in of_samples)
    vectors, sums = _vectors(inputs), _Slots.SUMS if wants_all or wants_samples else None
    arguments = (
        *(_Slots.DSTREAM, _Slots.DY, _Slots.X, _Slots.BRANCH, vectors, _Slots.MEAN, _Slots.RSTD),
        *(_Slots.DX, _Slots.DBRANCH, sums, T, tiling.rows_per_program),
    )
    constants = {"D": D, **tiling.constants}
    launches = [Launch(_add_layer_norm_bwd_kernel, num_programs, arguments, constants, tiling.num_warps)]
    constants = {"D": D, "NUM_SUMS": num_sums, "ROWS": PARAMS_ROWS, "COLS": PARAMS_COLS}
    if wants_all:
        arguments = (sums, vectors, _Slots.DWEIGHT, _Slots.DBIAS, num_programs, tiling.num_chunks)
        launches.append(Launch(_add_layer_norm_bwd_params_kernel, num_columns, arguments, constants, 4))
    if wants_samples:
        arguments = (sums, vectors, _Slots.DGAIN, _Slots.DSHIFT, _Slots.DGATE, tiling.num_chunks)
        launches.append(Launch(_add_layer_norm_bwd_samples_kernel, (num_columns, B), arguments, constants, 4))
    return Plan(launches, workspace=num_programs * num_sums * D if sums else 0)


def _sizes(inputs: Inputs) -> tuple[int, int, int]:
    """B, T and D."""
    D, B = inputs.x.shape[-1], inputs.num_samples
    return B, inputs.x.numel() // (B * D), D


def _vectors(inputs: Inputs) -> Vectors:
    strides = (0 if p is None else p.stride(0) for p in inputs[4:])
    return Vectors(*(_Slots.WEIGHT, _Slots.BIAS, _Slots.GAIN, _Slots.SHIFT, _Slots.GATE), *strides)
