"""The Triton kernels of ``gelu_linear`` (gelu_linear.py says what it computes) and what launches them.

gelu is read in one dtype and written in that of the product that follows, so that no cast runs alone; backward makes
the gradient and gelu once more in one pass over what is read.
"""
# pyright: reportGeneralTypeIssues=false
# (to a type checker, a call of one jitted function by another never returns)

import math
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from scalelong.kernels.launches import Kept, Launch, Plan, Slot, signature
from scalelong.kernels.triton_activations import activate, activation_slope

# 16 bytes a thread and load, four times, as elementwise kernels usually have it; not yet timed.
BLOCK, NUM_WARPS = 4096, 4


@triton.jit
def _load(x_ptr, num, BLOCK: tl.constexpr):
    """This program's elements in fp32, and where they are."""
    first = tl.program_id(0).to(tl.int64) * BLOCK
    i = first + tl.arange(0, BLOCK)
    return tl.load(x_ptr + i, mask=i < num, other=0.0).to(tl.float32), i


@triton.jit
def _store(y_ptr, y, i, num):
    tl.store(y_ptr + i, y.to(y_ptr.dtype.element_ty), mask=i < num)


@triton.jit
def _gelu_fwd_kernel(x_ptr, y_ptr, num, BLOCK: tl.constexpr, ACT: tl.constexpr):
    x, i = _load(x_ptr, num, BLOCK)
    _store(y_ptr, activate(x, ACT), i, num)


@triton.jit
def _gelu_bwd_kernel(dy_ptr, x_ptr, dx_ptr, y_ptr, num, BLOCK: tl.constexpr, ACT: tl.constexpr):
    x, i = _load(x_ptr, num, BLOCK)
    dy, _ = _load(dy_ptr, num, BLOCK)
    _store(dx_ptr, dy * activation_slope(x, ACT), i, num)
    _store(y_ptr, activate(x, ACT), i, num)


def forward(x: Tensor, y: Tensor, act: str) -> None:
    """y = act(x), in dtypes of their own; dense, of one layout."""
    _launch(_gelu_fwd_kernel, (x, y), act)


def backward(dy: Tensor, x: Tensor, dx: Tensor, y: Tensor, act: str) -> None:
    """dx = dy * act'(x) and y = act(x), in dtypes of their own; dense, of one layout."""
    _launch(_gelu_bwd_kernel, (dy, x, dx, y), act)


_plans: Kept[Plan] = Kept()


def _launch(kernel: Any, tensors: tuple[Tensor, ...], act: str) -> None:
    num = tensors[0].numel()
    if num == 0:
        return
    key = (kernel, act, *map(signature, tensors))
    plan = _plans.get(key)
    if plan is None:
        arguments, constants = (*map(Slot, range(len(tensors))), num), {"BLOCK": BLOCK, "ACT": act}
        plan = _plans.keep(key, Plan([Launch(kernel, math.ceil(num / BLOCK), arguments, constants, NUM_WARPS)]))
    plan.run(tensors)
