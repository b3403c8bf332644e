"""Launches the Triton kernels of ``add_layer_norm`` (add_layer_norm.py says what it computes)."""

import math
from collections.abc import Hashable
from functools import cache
from typing import NamedTuple

from torch import Tensor

from scalelong.kernels.add_layer_norm_backward import (
    _add_layer_norm_bwd_kernel,
    _add_layer_norm_bwd_params_kernel,
    _add_layer_norm_bwd_samples_kernel,
)
from scalelong.kernels.add_layer_norm_forward import _add_layer_norm_fwd_kernel
from scalelong.kernels.add_layer_norm_rows import Vectors
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
