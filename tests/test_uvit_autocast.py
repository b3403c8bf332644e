"""What a block of U-ViT launches under autocast, as on a GPU: the launches of Triton are recorded instead of run."""

import os

import pytest
import torch
from operators_seen import OperatorsSeen

from scalelong.bench.ahead_of_time import recorded_launches
from scalelong.kernels import backend
from scalelong.model.skip_scale import LongSkip
from scalelong.model.uvit import Block, UViTConfig

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter launches nothing")

CONFIG = UViTConfig(img_size=16, patch_size=2, width=32, depth=4, num_heads=4, num_classes=7)
B, T = 8, 66  # so many tokens that an activation is larger than any weight


@pytest.fixture(autouse=True)
def _triton_on_cpu_tensors(monkeypatch):
    monkeypatch.setattr(backend, "_interprets", True)


@pytest.mark.parametrize("scale", ["float", "token"])
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16], ids=["first-block", "later-block"])
def test_no_cast_runs_over_activations(x_dtype, scale):
    """The stream is fp32 up to the first block of the decoder, the skips are in all of them."""
    block = Block(CONFIG, takes_skip=True)
    x = torch.randn(B, T, CONFIG.width).to(x_dtype).requires_grad_()
    skip = torch.randn(B, T, CONFIG.width, requires_grad=True)
    factor = 0.7 if scale == "float" else torch.rand(B, T, 1, requires_grad=True)
    assert max(p.numel() for p in block.parameters()) < x.numel()
    with recorded_launches() as launches:
        with torch.autocast("cpu", torch.bfloat16), OperatorsSeen() as forward:
            y = block(x, LongSkip(skip, factor, i=1))
        with OperatorsSeen() as backward:
            y.backward(torch.zeros_like(y))
    assert forward.casts(x.numel()) == []
    assert backward.casts(x.numel()) == []
    assert x.grad is not None
    assert skip.grad is not None
    assert (x.grad.dtype, skip.grad.dtype) == (x_dtype, torch.float32)
    names = [launch.kernel.__name__.strip("_") for launch in launches]
    assert [name for name in names if not name.startswith("add_layer_norm")] == [
        "skip_linear_fwd_kernel",
        "gelu_fwd_kernel",
        "gelu_bwd_kernel",
        "skip_linear_bwd_inputs_kernel",
        "skip_linear_bwd_weight_kernel",
    ]
    # Two norms, of which each launches once in forward and twice in backward: its rows, then the sums over them.
    assert [names.count(f"add_layer_norm_{kernel}_kernel") for kernel in ("fwd", "bwd", "bwd_params")] == [2, 2, 2]
    fwd, bwd_inputs, bwd_weight = (
        launches[names.index(f"skip_linear_{kernel}_kernel")] for kernel in ("fwd", "bwd_inputs", "bwd_weight")
    )
    # Of the stream, the skip and their gradients, each as it lies.
    read, written = fwd.arguments[:2], bwd_inputs.arguments[5:7]
    assert [t.dtype for t in (*read, *written)] == [x_dtype, torch.float32] * 2
    assert [t.data_ptr() for t in read] == [x.data_ptr(), skip.data_ptr()]
    assert bwd_weight.arguments[4].dtype == torch.float32


def test_a_cast_is_seen():
    x = torch.randn(B, T)
    with OperatorsSeen() as seen:
        x.bfloat16()
        torch.empty(B, T, dtype=torch.bfloat16).copy_(x)
        torch.empty(B, T).copy_(x)
    assert seen.casts(x.numel()) == ["_to_copy", "copy_"]
