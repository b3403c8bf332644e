"""Launches the Triton kernels of ``skip_linear`` (skip_linear.py says what it computes).

Shapes: M tokens of all images, D1 width of x, D2 width of the skip s, O (OUT in kernels) width of y. The tiles:
skip_linear_tilings.py.
"""

import math
from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor

from scalelong.kernels.launches import Kept, Launch, Plan, Slot, signature
from scalelong.kernels.skip_linear_kernels import (
    _skip_linear_bwd_inputs_kernel,
    _skip_linear_bwd_weight_kernel,
    _skip_linear_fwd_kernel,
)
from scalelong.kernels.skip_linear_tilings import (
    GROUP_ROWS,
    MAX_SPLITS,
    Tile,
    choose_num_splits,
    choose_tile,
    num_tiles,
)
from scalelong.kernels.triton_device import multiprocessors

_plans: Kept[Plan] = Kept()
_X, _S, _ROW_SCALE, _WEIGHT_X, _WEIGHT_S, _DY = map(Slot, range(6))  # of each call, and behind them:
_BIAS, _Y = Slot(6), Slot(7)
_DX, _DS, _DROW = Slot(6), Slot(7), Slot(8)
_DWEIGHT = Slot(6)


def forward(
    x: Tensor,
    s: Tensor,
    row_scale: Tensor | None,
    weight_x: Tensor,
    weight_s: Tensor | None,
    bias: Tensor | None,
    y: Tensor,
    float_scale: float = 1.0,
    kind: Hashable = None,
) -> None:
    """Fills y with x @ weight_x.T + scale * (s @ weight_s.T) + bias, rounded once.

    The scale is that of the row or, where there is none, ``float_scale``. In the dtype of the weights; x and s may be
    wider.

    Args:
        x, s, y: (..., D1), (..., D2) and (..., O), whose rows ``row_stride`` knows.
        row_scale: one factor a row.
        weight_x, weight_s: (O, D1), of which rows may be longer, and (O, D2); or (O, D1 + D2) and None.
        bias: (O,).
        kind: stands for float_scale and the signature of each tensor, where somebody has looked at these already.
    """
    tensors = (x, s, _dense(row_scale), weight_x, weight_s, None, _dense(bias), y)
    key = ("forward", kind or (*map(signature, tensors), float_scale))
    plan = _plans.get(key)
    if plan is None:
        plan = _plans.keep(key, Plan([_forward_launch(x, s, weight_x, weight_s, y, float_scale)]))
    plan.run(tensors)


def backward_inputs(
    dy: Tensor,
    weight_x: Tensor,
    weight_s: Tensor | None,
    s: Tensor,
    row_scale: Tensor | None,
    dx: Tensor | None,
    ds: Tensor | None,
    drow_M: Tensor | None,
    float_scale: float = 1.0,
    kind: Hashable = None,
) -> None:
    """Fills those of dx, ds and the fp32 gradient of the row scale that are given; dx and ds in dtypes of their own."""
    tensors = (None, s, _dense(row_scale), weight_x, weight_s, dy, dx, ds)
    key = ("inputs", kind or (*map(signature, tensors), float_scale), drow_M is not None)
    plan = _plans.get(key)
    if plan is None:
        plan = _plans.keep(key, _inputs_plan(dy, weight_x, weight_s, s, dx, ds, drow_M, float_scale))
    (partial_size,) = plan.outputs
    if drow_M is None or partial_size is None:
        return plan.run((*tensors, None))
    partial_drow = drow_M.new_empty_strided(partial_size, (partial_size[1], 1))
    plan.run((*tensors, partial_drow))
    torch.sum(partial_drow, 0, out=drow_M)


def backward_weight(
    dy: Tensor,
    x: Tensor,
    s: Tensor,
    row_scale: Tensor | None,
    dweight_OD: Tensor,
    float_scale: float = 1.0,
    kind: Hashable = None,
) -> None:
    """Fills dweight with dy.T @ x and, beside it, dy.T @ (scale * s), a skip scaled by row rounded as eager does.

    In the dtype of dy; x and s may be wider, dweight is of any dtype.
    """
    row_scale = None if row_scale is None else row_scale.float().contiguous()
    tensors = (x, s, row_scale, None, None, dy)
    key = ("weight", kind or (*map(signature, (*tensors, dweight_OD)), float_scale))
    plan = _plans.get(key)
    if plan is None:
        plan = _plans.keep(key, _weight_plan(dy, x, s, dweight_OD, float_scale))
    (partial_size,) = plan.outputs
    if partial_size is None:
        return plan.run((*tensors, dweight_OD))
    dweight = torch.empty(partial_size, dtype=torch.float32, device=dweight_OD.device)
    plan.run((*tensors, dweight))
    torch.sum(dweight, 0, out=dweight_OD) if dweight_OD.dtype == torch.float32 else dweight_OD.copy_(dweight.sum(0))


def row_stride(x: Tensor) -> int | None:
    """Numbers from a row of (..., D) to the next; None where rows do not lie evenly, or are not dense."""
    step, num_rows = None, 1
    for size, stride in zip(reversed(x.shape[:-1]), reversed(x.stride()[:-1]), strict=True):
        if size == 1:
            continue
        if step is not None and stride != step * num_rows:
            return None
        step = stride if step is None else step
        num_rows *= size
    if x.stride(-1) != 1 and x.shape[-1] > 1:
        return None
    return x.shape[-1] if step is None else step


def _forward_launch(
    x: Tensor, s: Tensor, weight_x: Tensor, weight_s: Tensor | None, y: Tensor, float_scale: float
) -> Launch:
    M, D1, D2, OUT = math.prod(x.shape[:-1]), x.shape[-1], s.shape[-1], y.shape[-1]
    rows, cols = (M,), (OUT,)
    tile = choose_tile("forward", *_itemsizes(weight_x, x, s), rows, cols, _multiprocessors(x))
    strides = (row_stride(x), row_stride(s), *_weight_strides(weight_x, weight_s), row_stride(y))
    pointers = (_X, _S, _ROW_SCALE, _WEIGHT_X, _weight_s(weight_s, D1), _BIAS, _Y)
    arguments = (*pointers, M, OUT, D1, D2, *strides, float_scale)
    return _launch(_skip_linear_fwd_kernel, tile, num_tiles(tile, rows, cols), arguments)


def _inputs_plan(
    dy: Tensor,
    weight_x: Tensor,
    weight_s: Tensor | None,
    s: Tensor,
    dx: Tensor | None,
    ds: Tensor | None,
    drow_M: Tensor | None,
    float_scale: float,
) -> Plan:
    M, OUT, D2 = math.prod(dy.shape[:-1]), dy.shape[-1], s.shape[-1]
    D1 = weight_x.shape[1] - D2 if weight_s is None else 0 if dx is None else dx.shape[-1]
    rows, cols = (M,), (0 if dx is None else D1, 0 if ds is None and drow_M is None else D2)
    tile = choose_tile("inputs", *_itemsizes(dy, s, s), rows, cols, _multiprocessors(dy))
    strides = (row_stride(dy), *_weight_strides(weight_x, weight_s), row_stride(s))
    strides += tuple(0 if gradient is None else row_stride(gradient) for gradient in (dx, ds))
    pointers = (_DY, _WEIGHT_X, _weight_s(weight_s, D1), _S, _ROW_SCALE, _DX, _DS, _DROW)
    arguments = (*pointers, M, OUT, D1, D2, *strides, float_scale)
    launch = _launch(_skip_linear_bwd_inputs_kernel, tile, num_tiles(tile, rows, cols), arguments)
    return Plan([launch], [None if drow_M is None else (math.ceil(D2 / tile.block_cols), M)])


def _weight_plan(dy: Tensor, x: Tensor, s: Tensor, dweight_OD: Tensor, float_scale: float) -> Plan:
    M, OUT, D1, D2 = math.prod(dy.shape[:-1]), dy.shape[-1], x.shape[-1], s.shape[-1]
    rows, cols, num_multiprocessors = (D1, D2), (OUT,), _multiprocessors(dy)
    tile = choose_tile("weight", *_itemsizes(dy, x, s), rows, cols, num_multiprocessors // MAX_SPLITS)
    tiles = num_tiles(tile, rows, cols)
    num_splits = choose_num_splits(tiles, M, num_multiprocessors)
    of_splits = None if num_splits == 1 else (num_splits, OUT, D1 + D2)
    of_weight = (dweight_OD.numel(), dweight_OD.stride(0)) if of_splits is None else (OUT * (D1 + D2), D1 + D2)
    strides = (row_stride(dy), row_stride(x), row_stride(s), *of_weight)
    arguments = (
        *(_DY, _X, _S, _ROW_SCALE, _DWEIGHT, M, math.ceil(M / num_splits), OUT, D1, D2),
        *(*strides, float_scale),
    )
    return Plan([_launch(_skip_linear_bwd_weight_kernel, tile, (tiles, num_splits), arguments)], [of_splits])


def _weight_s(weight_s: Tensor | None, D1: int) -> Slot:
    return Slot(_WEIGHT_X.tensor, D1) if weight_s is None else _WEIGHT_S


def _weight_strides(weight_x: Tensor, weight_s: Tensor | None) -> tuple[int, int]:
    return weight_x.stride(0), (weight_x if weight_s is None else weight_s).stride(0)


def _launch(kernel: Any, tile: Tile, num_programs: int | tuple[int, ...], arguments: tuple[Any, ...]) -> Launch:
    constants = {
        "BLOCK_ROWS": tile.block_rows,
        "BLOCK_COLS": tile.block_cols,
        "BLOCK_K": tile.block_k,
        "GROUP_ROWS": GROUP_ROWS,
    }
    return Launch(kernel, num_programs, arguments, constants, tile.num_warps, {"num_stages": tile.num_stages})


def _itemsizes(product: Tensor, x: Tensor, s: Tensor) -> tuple[int, int]:
    """Of the product, and of the wider of its first operands."""
    return product.element_size(), max(x.element_size(), s.element_size())


def _multiprocessors(x: Tensor) -> int:
    return multiprocessors(x.get_device())


def _dense(vector: Tensor | None) -> Tensor | None:
    return None if vector is None else vector.contiguous()
