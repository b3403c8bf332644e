"""The projection of a scaled long skip at the shapes of U-ViT: B batch, T tokens, D width of x, s and output.

scale=float is a constant factor, as in ScaleLong's CS; scale=token one learned factor for each token, as in its LS.
Provider ours-triton, on a GPU, takes the Triton products for backward as well.
"""

from itertools import product

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
    Provider,
    as_leaves,
    compare,
    is_warm,
    kept_note,
    make_case,
)
from scalelong.bench.timing import IS_DRY_RUN
from scalelong.kernels.backend import use_backend
from scalelong.kernels.skip_linear import Scale, skip_linear, skip_linear_ref

SHAPES = ((5, 16), (6, 24), (6, 32)) if IS_DRY_RUN else ((257, 512), (258, 768), (258, 1024))  # T, D
CONSTANT = 0.5


def ref(x: Tensor, s: Tensor, weight: Tensor, bias: Tensor, scale: Scale = CONSTANT) -> Tensor:
    return skip_linear_ref(x, s, scale, weight, bias)


def ours(x: Tensor, s: Tensor, weight: Tensor, bias: Tensor, scale: Scale = CONSTANT) -> Tensor:
    return skip_linear(x, s, scale, weight, bias)


class InTriton(torch.autograd.Function):
    """``ours`` with Triton forced in backward too, which runs after a ``with`` around forward has ended."""

    @staticmethod
    def forward(ctx, *inputs: Tensor) -> Tensor:
        leaves = as_leaves(inputs)
        with torch.enable_grad(), use_backend("triton"):
            ctx.output = ours(*leaves)
        ctx.leaves = leaves
        return ctx.output.detach()

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor, ...]:
        with use_backend("triton"):
            return torch.autograd.grad(ctx.output, ctx.leaves, dy)


@pytest.fixture(
    scope="module", params=list(product(SHAPES, ("token", "float"))), ids=lambda p: "{}x{}-{}".format(*p[0], p[1])
)
def case(request, note) -> Case:
    (T, D), scale = request.param
    torch.manual_seed(0)
    x, s = torch.randn(2, BATCH, T, D)
    weight, bias = torch.randn(D, 2 * D) / (2 * D) ** 0.5, torch.randn(D)
    scales = (torch.rand(BATCH, T, 1),) if scale == "token" else ()
    inputs = tuple(tensor.to(DEVICE, DTYPE) for tensor in (x, s, weight, bias, *scales))
    others = {"ours-triton": Provider(InTriton.apply, as_leaves(inputs))} if DEVICE.type == "cuda" else None
    shape = f"B={BATCH} T={T} D={D} scale={scale}"
    case = make_case(
        "skip_linear",
        shape,
        ref=ref,
        ours=ours,
        inputs=inputs,
        others=others,
        compilers=COMPILE if is_warm(f"skip_linear-{shape}") else {},
        checked=("ours", "ours-triton"),
    )
    for line in (*case.notes, kept_note(case)):
        note(line)
    return case


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_skip_linear(benchmark, report, case, direction):
    benchmark.group = f"{case.op} {case.shape}"
    report(compare(benchmark, case, direction))
