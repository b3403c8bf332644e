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

# 16 bytes a thread and load, four times, as elementwise kernels usually have it; not yet timed.
BLOCK, NUM_WARPS = 4096, 4

_ROOT_HALF = tl.constexpr(math.sqrt(0.5))
_DENSITY_AT_0 = tl.constexpr(1 / math.sqrt(2 * math.pi))


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
def _cdf(x):
    """Of the normal distribution."""
    return 0.5 + 0.5 * tl.erf(x * _ROOT_HALF)


@triton.jit
def _gelu_fwd_kernel(x_ptr, y_ptr, num, BLOCK: tl.constexpr):
    x, i = _load(x_ptr, num, BLOCK)
    _store(y_ptr, x * _cdf(x), i, num)


@triton.jit
def _gelu_bwd_kernel(dy_ptr, x_ptr, dx_ptr, y_ptr, num, BLOCK: tl.constexpr):
    x, i = _load(x_ptr, num, BLOCK)
    dy, _ = _load(dy_ptr, num, BLOCK)
    cdf = _cdf(x)
    _store(dx_ptr, dy * (cdf + x * _DENSITY_AT_0 * tl.exp(-0.5 * x * x)), i, num)
    _store(y_ptr, x * cdf, i, num)


def forward(x: Tensor, y: Tensor) -> None:
    """y = gelu(x), in dtypes of their own; dense, of one layout."""
    _launch(_gelu_fwd_kernel, (x, y))


def backward(dy: Tensor, x: Tensor, dx: Tensor, y: Tensor) -> None:
    """dx = dy * gelu'(x) and y = gelu(x), in dtypes of their own; dense, of one layout."""
    _launch(_gelu_bwd_kernel, (dy, x, dx, y))


_plans: Kept[Plan] = Kept()


def _launch(kernel: Any, tensors: tuple[Tensor, ...]) -> None:
    num = tensors[0].numel()
    if num == 0:
        return
    key = (kernel, *map(signature, tensors))
    plan = _plans.get(key)
    if plan is None:
        arguments = (*map(Slot, range(len(tensors))), num)
        plan = _plans.keep(key, Plan([Launch(kernel, math.ceil(num / BLOCK), arguments, {"BLOCK": BLOCK}, NUM_WARPS)]))
    plan.run(tensors)
