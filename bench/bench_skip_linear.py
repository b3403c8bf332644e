"""The projection of a scaled long skip at the shapes of U-ViT: B batch, T tokens, D width of x, s and output.

scale=float is a constant factor, as in ScaleLong's CS; scale=token one learned factor for each token, as in its LS.
Under autocast (autocast=bf16) the stream, the skip and the parameters are fp32.
Providers ours-triton and ours-blas, on a GPU, take one form for every product: what IN_TRITON in skip_linear.py chooses
from is decided by their rows.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from itertools import product
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from scalelong.bench.compare import (
    BATCH,
    COMPILE,
    DEVICE,
    DIRECTIONS,
    DTYPE,
    Case,
    Op,
    Provider,
    as_leaves,
    compare,
    is_warm,
    kept_note,
    make_case,
)
from scalelong.bench.timing import IS_DRY_RUN
from scalelong.kernels.arguments import Scale
from scalelong.kernels.backend import use_backend
from scalelong.kernels.skip_linear import IN_TRITON, skip_linear, skip_linear_ref

SHAPES = ((5, 16), (6, 24), (6, 32)) if IS_DRY_RUN else ((257, 512), (258, 768), (258, 1024))  # T, D
CONSTANT = 0.5


def ref(x: Tensor, s: Tensor, weight: Tensor, bias: Tensor, scale: Scale = CONSTANT) -> Tensor:
    return skip_linear_ref(x, s, scale, weight, bias)


def ours(x: Tensor, s: Tensor, weight: Tensor, bias: Tensor, scale: Scale = CONSTANT) -> Tensor:
    return skip_linear(x, s, scale, weight, bias)


def under_autocast(op: Op) -> Op:
    def run(*inputs: Tensor) -> Tensor:
        with torch.autocast(DEVICE.type, torch.bfloat16):
            return op(*inputs)

    return run


class Within(torch.autograd.Function):
    """``op`` with a context held in backward too, which runs after a ``with`` around forward has ended."""

    @staticmethod
    def forward(ctx, context: Callable[[], AbstractContextManager], op: Op, *inputs: Tensor) -> Tensor:
        leaves = as_leaves(inputs)
        with torch.enable_grad(), context():
            ctx.output = op(*leaves)
        ctx.context, ctx.leaves = context, leaves
        return ctx.output.detach()

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
        with ctx.context():
            return None, None, *torch.autograd.grad(ctx.output, ctx.leaves, dy)


FORMS = {
    "ours-triton": partial(use_backend, "triton"),
    "ours-blas": lambda: patch.dict(IN_TRITON, dict.fromkeys(IN_TRITON, ())),
}


@pytest.fixture(
    scope="module",
    params=list(product(SHAPES, ("token", "float"), (False, True))),
    ids=lambda p: "{}x{}-{}".format(*p[0], p[1]) + ("-autocast" if p[2] else ""),
)
def case(request, note) -> Case:
    (T, D), scale, autocast = request.param
    torch.manual_seed(0)
    x, s = torch.randn(2, BATCH, T, D)
    weight, bias = torch.randn(D, 2 * D) / (2 * D) ** 0.5, torch.randn(D)
    scales = (torch.rand(BATCH, T, 1),) if scale == "token" else ()
    inputs = tuple(tensor.to(DEVICE, torch.float32 if autocast else DTYPE) for tensor in (x, s, weight, bias, *scales))
    ops = (under_autocast(ref), under_autocast(ours)) if autocast else (ref, ours)
    others = {}
    if DEVICE.type == "cuda":
        others = {
            name: Provider(partial(Within.apply, form, ops[1]), as_leaves(inputs)) for name, form in FORMS.items()
        }
    shape = f"B={BATCH} T={T} D={D} scale={scale}{' autocast=bf16' if autocast else ''}"
    case = make_case(
        "skip_linear",
        shape,
        ref=ops[0],
        ours=ops[1],
        inputs=inputs,
        others=others,
        compilers=COMPILE if is_warm(f"skip_linear-{shape}") else {},
        checked=("ours", *others),
    )
    for line in (*case.notes, kept_note(case)):
        note(line)
    return case


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_skip_linear(benchmark, report, case, direction):
    benchmark.group = f"{case.op} {case.shape}"
    report(compare(benchmark, case, direction))
