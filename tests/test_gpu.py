"""The same numbers on a GPU: what a machine with one has to show before it is measured."""

import pytest
import torch
from parity import assert_within_budget

from scalelong.kernels.attention import attention, attention_ref
from scalelong.kernels.skip_linear import skip_linear, skip_linear_ref
from scalelong.model.presets import MODEL_PRESETS
from scalelong.model.skip_scale import SKIP_SCALE_NAMES, make_skip_scale
from scalelong.model.uvit import UViT

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("heads", "head_dim", "length"), [(8, 64, 257), (16, 72, 258), (2, 64, 1)])
def test_attention_is_within_budget(dtype, heads, head_dim, length):
    qkv = torch.randn(2, length, 3 * heads * head_dim, dtype=dtype, device="cuda")
    assert_within_budget(lambda x: attention(x, heads), lambda x: attention_ref(x, heads), {"qkv": qkv})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_skip_linear_is_within_budget(dtype):
    shapes = {"x": (2, 257, 512), "s": (2, 257, 512), "scale": (2, 257, 1), "weight": (512, 1024), "bias": (512,)}
    inputs = {name: torch.randn(*shape, dtype=dtype, device="cuda") for name, shape in shapes.items()}
    assert_within_budget(skip_linear, skip_linear_ref, inputs)


@pytest.mark.parametrize("name", SKIP_SCALE_NAMES)
def test_a_uvit_gives_the_outputs_of_the_cpu_under_autocast(name):
    config = MODEL_PRESETS["cifar10-uvit-s2"]
    truth = UViT(config, skip_scale=make_skip_scale(name))
    x, t = torch.randn(2, 3, 32, 32), torch.tensor([10.0, 900.0])
    expected = truth.double()(x.double(), t.double())
    model = truth.float().cuda()
    with torch.autocast("cuda", torch.bfloat16):
        found = model(x.cuda(), t.cuda())
    found.float().square().mean().backward()
    error = (found.double().cpu() - expected).norm() / expected.norm()
    assert error < 0.03
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
