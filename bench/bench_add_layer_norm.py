"""The residual sum of a transformer with the LayerNorm after it, at the shapes of U-ViT: B batch, T tokens, D width.

add_layer_norm hands on what a block hands on: y to the next product and the stream to the next sum, so that both have a
gradient. layer_norm_of_sum hands on y alone, which eager PyTorch is best at: no gradient of a residual is added.
"""

from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from scalelong.bench.compare import (
    DEVICE,
    DIRECTIONS,
    DTYPE,
    ON_GPU,
    Case,
    compare,
    kept_note,
    make_case,
)
from scalelong.kernels.add_layer_norm import add_layer_norm

# B, T, D
SHAPES = ((128, 257, 512), (128, 258, 768), (64, 258, 1024)) if ON_GPU else ((4, 257, 512), (8, 257, 1024))


class Outputs(torch.autograd.Function):
    """Two outputs as one for the benchmark, which sends back one gradient: it reaches both, and costs nothing."""

    @staticmethod
    def forward(ctx, stream: Tensor, y: Tensor) -> Tensor:
        return y.view_as(y)

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return dy, dy


def sum_and_norm(x: Tensor, branch: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    stream = x + branch
    return stream, F.layer_norm(stream, stream.shape[-1:], weight, bias)


OPERATORS = {
    "add_layer_norm": (
        lambda *inputs: Outputs.apply(*sum_and_norm(*inputs)),
        lambda *inputs: Outputs.apply(*add_layer_norm(*inputs)),
    ),
    "layer_norm_of_sum": (lambda *inputs: sum_and_norm(*inputs)[1], lambda *inputs: add_layer_norm(*inputs)[1]),
}


@pytest.fixture(
    scope="module", params=list(product(OPERATORS, SHAPES)), ids=lambda p: "{}-{}x{}x{}".format(p[0], *p[1])
)
def case(request, note) -> Case:
    op, (B, T, D) = request.param
    ref, ours = OPERATORS[op]
    torch.manual_seed(0)
    tensors = (*torch.randn(2, B, T, D), 1 + torch.randn(D) / 10, torch.randn(D))
    inputs = tuple(x.to(DEVICE, DTYPE, copy=True) for x in tensors)
    case = make_case(op, f"B={B} T={T} D={D}", ref=ref, ours=ours, inputs=inputs)
    for line in (*case.notes, kept_note(case)):
        note(line)
    return case


@pytest.mark.parametrize("direction", DIRECTIONS if ON_GPU else ("both",))
def test_add_layer_norm(benchmark, report, case, direction):
    benchmark.group = f"{case.op} {case.shape}"
    report(compare(benchmark, case, direction))
