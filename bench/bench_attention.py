"""Attention at the shapes of U-ViT: B batch, T tokens, D width, H heads."""

from functools import partial

import pytest
import torch

from scalelong.bench.compare import BATCH, DEVICE, DIRECTIONS, DTYPE, Case, compare, make_case
from scalelong.kernels.attention import attention, attention_ref

SHAPES = {"cifar10-S/2": (257, 512, 8), "imagenet64-M/4": (258, 768, 12)}  # T, D, H


@pytest.fixture(scope="module", params=SHAPES.values(), ids=tuple(SHAPES))
def case(request, note) -> Case:
    T, D, H = request.param
    torch.manual_seed(0)
    qkv = torch.randn(BATCH, T, 3 * D).to(DEVICE, DTYPE)
    ref, ours = (partial(op, num_heads=H) for op in (attention_ref, attention))
    case = make_case("attention", f"B={BATCH} T={T} D={D} H={H}", ref=ref, ours=ours, inputs=(qkv,))
    for line in case.notes:
        note(line)
    return case


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_attention(benchmark, report, case, direction):
    benchmark.group = f"{case.op} {case.shape}"
    report(compare(benchmark, case, direction))
