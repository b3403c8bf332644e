"""The projection of a scaled long skip at the shapes of U-ViT: B batch, T tokens, D width of x, s and output."""

import pytest
import torch
from torch import Tensor

from scalelong.bench.compare import BATCH, DEVICE, DIRECTIONS, DTYPE, Case, compare, make_case
from scalelong.kernels.skip_linear import skip_linear, skip_linear_ref

SHAPES = ((257, 512), (258, 768), (258, 1024))  # T, D
SCALE = 0.5  # a constant factor, as in ScaleLong's CS


def ref(x: Tensor, s: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return skip_linear_ref(x, s, SCALE, weight, bias)


def ours(x: Tensor, s: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return skip_linear(x, s, SCALE, weight, bias)


@pytest.fixture(scope="module", params=SHAPES, ids=lambda shape: "{}x{}".format(*shape))
def case(request, note) -> Case:
    T, D = request.param
    torch.manual_seed(0)
    x, s = torch.randn(2, BATCH, T, D)
    weight, bias = torch.randn(D, 2 * D) / (2 * D) ** 0.5, torch.randn(D)
    inputs = tuple(tensor.to(DEVICE, DTYPE) for tensor in (x, s, weight, bias))
    case = make_case("skip_linear", f"B={BATCH} T={T} D={D} scale=float", ref=ref, ours=ours, inputs=inputs)
    for line in case.notes:
        note(line)
    return case


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_skip_linear(benchmark, report, case, direction):
    benchmark.group = f"{case.op} {case.shape}"
    report(compare(benchmark, case, direction))
