"""Attention at the shapes of U-ViT: B batch, T tokens, D width, H heads.

Every backend that this machine has runs by its name; "ours" is what "auto" takes of them, "eager" the plain formula,
and "published" the form of U-ViT's code: a copy of the projection in fp32, and three selects of it.
"""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from scalelong.bench.compare import (
    BATCH,
    COMPILE,
    DEVICE,
    DIRECTIONS,
    DTYPE,
    ON_GPU,
    Case,
    Provider,
    as_leaves,
    compare,
    is_warm,
    make_case,
)
from scalelong.bench.timing import IS_DRY_RUN
from scalelong.kernels.attention import BACKENDS, attention, attention_ref

SHAPES = {  # T, D, H
    "cifar10-S/2": (257, 512, 8),
    "imagenet64-M/4": (258, 768, 12),
    "imagenet256-H/2": (258, 1152, 16),
    "mscoco-S/2": (334, 512, 8),
}
if IS_DRY_RUN:
    SHAPES = {name: (5, 2 * H, H) for name, (_, _, H) in SHAPES.items()}
elif not ON_GPU:  # half a minute a shape
    SHAPES = {"cifar10-S/2": SHAPES["cifar10-S/2"]}


def published(qkv: Tensor, num_heads: int) -> Tensor:
    """Its output is fp32, as under the published code's autocast."""
    q_k_v = qkv.unflatten(-1, (3, num_heads, -1)).permute(2, 0, 3, 1, 4).float()
    x_BHTE = F.scaled_dot_product_attention(q_k_v[0], q_k_v[1], q_k_v[2])
    return x_BHTE.transpose(1, 2).flatten(2)


@pytest.fixture(scope="module", params=SHAPES.values(), ids=tuple(SHAPES))
def case(request, note) -> Case:
    T, D, H = request.param
    torch.manual_seed(0)
    qkv = torch.randn(BATCH, T, 3 * D).to(DEVICE, DTYPE)
    ref, ours = (partial(op, num_heads=H) for op in (attention_ref, attention))
    shape, inputs = f"B={BATCH} T={T} D={D} H={H}", (qkv,)
    others = {"published": Provider(partial(published, num_heads=H), as_leaves(inputs))}
    absent = {name: backend.why_not(qkv, H) for name, backend in BACKENDS.items()}
    present = [name for name, reason in absent.items() if reason is None and name != "reference"]
    others |= {name: Provider(partial(attention, num_heads=H, backend=name), as_leaves(inputs)) for name in present}
    case = make_case(
        "attention",
        shape,
        ref=ref,
        ours=ours,
        inputs=inputs,
        others=others,
        compilers=COMPILE if is_warm(f"attention-{shape}") else {},
        checked=("ours", *present),
    )
    for name, reason in absent.items():
        if reason is not None:
            note(f"attention E={D // H}: no {name!r}, {reason}")
    for line in case.notes:
        note(line)
    return case


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_attention(benchmark, report, case, direction):
    benchmark.group = f"{case.op} {case.shape}"
    report(compare(benchmark, case, direction))
