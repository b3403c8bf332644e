"""The projection of a normalised long skip at the shapes of Skip-DiT: B batch, T tokens, D width of x, s and output.

scale=float is a constant factor, as in ScaleLong's CS; scale=token one learned factor for each token, as in its LS.
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
    compare,
    is_warm,
    kept_note,
    make_case,
)
from scalelong.bench.timing import IS_DRY_RUN
from scalelong.kernels.arguments import Scale
from scalelong.kernels.skip_norm_linear import skip_norm_linear, skip_norm_linear_ref

SHAPES = ((5, 16), (6, 24)) if IS_DRY_RUN else ((64, 384), (256, 768), (256, 1152))  # T, D
CONSTANT = 0.5


def ref(x: Tensor, s: Tensor, a: Tensor, b: Tensor, weight: Tensor, bias: Tensor, scale: Scale = CONSTANT) -> Tensor:
    return skip_norm_linear_ref(x, s, scale, a, b, weight, bias, eps=1e-6)


def ours(x: Tensor, s: Tensor, a: Tensor, b: Tensor, weight: Tensor, bias: Tensor, scale: Scale = CONSTANT) -> Tensor:
    return skip_norm_linear(x, s, scale, a, b, weight, bias, eps=1e-6)


@pytest.fixture(
    scope="module", params=list(product(SHAPES, ("token", "float"))), ids=lambda p: "{}x{}-{}".format(*p[0], p[1])
)
def case(request, note) -> Case:
    (T, D), scale = request.param
    torch.manual_seed(0)
    x, s = torch.randn(2, BATCH, T, D)
    norm = 1 + 0.1 * torch.randn(2 * D), 0.1 * torch.randn(2 * D)
    weight, bias = torch.randn(D, 2 * D) / (2 * D) ** 0.5, torch.randn(D)
    scales = (torch.rand(BATCH, T, 1),) if scale == "token" else ()
    inputs = tuple(tensor.to(DEVICE, DTYPE) for tensor in (x, s, *norm, weight, bias, *scales))
    shape = f"B={BATCH} T={T} D={D} scale={scale}"
    case = make_case(
        "skip_norm_linear",
        shape,
        ref=ref,
        ours=ours,
        inputs=inputs,
        compilers=COMPILE if is_warm(f"skip_norm_linear-{shape}") else {},
    )
    for line in (*case.notes, kept_note(case)):
        note(line)
    return case


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_skip_norm_linear(benchmark, report, case, direction):
    benchmark.group = f"{case.op} {case.shape}"
    report(compare(benchmark, case, direction))
