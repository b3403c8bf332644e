from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from instruction_sets import run_on
from parity import assert_within_budget
from torch import Tensor

from scalelong.kernels import native_library
from scalelong.kernels.backend import use_backend
from scalelong.kernels.conv3x3 import conv3x3, conv3x3_ref

ROOT = Path(__file__).parents[1]
needs_native = pytest.mark.skipif(native_library.ERROR is not None, reason=str(native_library.ERROR))

# images, channels in and out, height, width; panels hold 6 or 12 channels in, 8, 16 or 32 out, blocks 256 pixels
SHAPES = {
    "whole-panels": (2, 12, 32, 8, 8),
    "parts-of-panels": (3, 19, 37, 9, 7),
    "one-channel": (2, 1, 1, 6, 5),
    "one-image": (1, 32, 16, 16, 16),
    "one-pixel": (5, 7, 9, 1, 1),
    "one-row": (2, 4, 33, 1, 30),
    "one-column": (2, 13, 4, 30, 1),
    "several-blocks": (4, 8, 24, 24, 20),
    "rows-longer-than-a-block": (1, 5, 6, 3, 300),
}
each_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=tuple(SHAPES))
LAYOUTS = {
    "contiguous": lambda x: x.contiguous(),
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "permuted": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
}
each_layout = pytest.mark.parametrize("layout", LAYOUTS)


def make_inputs(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    N, C, num_out, H, W = shape
    shapes = {"x": (N, C, H, W), "weight": (num_out, C, 3, 3), "bias": (num_out,)}
    return {name: torch.randn(*size, dtype=dtype) for name, size in shapes.items()}


@needs_native
@each_shape
@each_layout
def test_outputs_and_gradients_are_within_budget(layout, shape):
    inputs = make_inputs(shape)
    inputs["x"] = LAYOUTS[layout](inputs["x"])
    with use_backend("native"):
        assert_within_budget(conv3x3, conv3x3_ref, inputs, grad_budget=2.0)


@needs_native
@pytest.mark.parametrize("isa", ["baseline", "avx2"])
def test_lesser_instruction_sets_compute_the_same(isa):
    code = f"""
from parity import assert_within_budget
from test_conv3x3 import SHAPES, conv3x3, conv3x3_ref, make_inputs
for shape in {tuple(SHAPES.values())}:
    assert_within_budget(conv3x3, conv3x3_ref, make_inputs(shape), grad_budget=2.0)
"""
    run_on(isa, code)


@needs_native
@each_layout
def test_gradients_of_another_layout_than_the_input_are_taken(layout):
    inputs = make_inputs(SHAPES["parts-of-panels"])
    dy = torch.randn(3, 37, 9, 7)

    def gradients(op) -> tuple[Tensor, ...]:
        leaves = [x.detach().requires_grad_() for x in inputs.values()]
        return torch.autograd.grad(op(*leaves), leaves, LAYOUTS[layout](dy))

    for found, expected in zip(gradients(conv3x3), gradients(conv3x3_ref), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@needs_native
def test_the_native_library_is_what_computes_the_gradient():
    leaves = [x.requires_grad_() for x in make_inputs(SHAPES["one-image"]).values()]
    name = type(conv3x3(*leaves).grad_fn).__name__
    assert name == "_Conv3x3Backward"


@needs_native
def test_two_runs_give_the_same_bits_on_any_number_of_threads():
    inputs = make_inputs((4, 24, 70, 16, 16))

    def gradients() -> list[Tensor]:
        leaves = [x.detach().requires_grad_() for x in inputs.values()]
        return list(torch.autograd.grad(conv3x3(*leaves).square().sum(), leaves))[1:]

    before = torch.get_num_threads()
    results = []
    for num_threads in (1, 1, 2, 3):
        torch.set_num_threads(num_threads)
        results.append(gradients())
    torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


@needs_native
def test_only_the_gradients_asked_for_are_given():
    x, weight, bias = make_inputs(SHAPES["one-image"]).values()
    y = conv3x3(x, weight.requires_grad_(), None)
    assert [g.shape for g in torch.autograd.grad(y.sum(), [weight])] == [weight.shape]
    y = conv3x3(x.requires_grad_(), weight.detach(), bias)
    assert [g.shape for g in torch.autograd.grad(y.sum(), [x])] == [x.shape]


@needs_native
def test_nothing_uninitialised_reaches_a_gradient():
    leaves = [x.requires_grad_() for x in make_inputs(SHAPES["parts-of-panels"]).values()]
    torch.use_deterministic_algorithms(True)
    try:  # fills new memory with NaN
        grads = torch.autograd.grad(conv3x3(*leaves).sum(), leaves)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(grad.isfinite().all() for grad in grads)


def test_gradients_can_be_differentiated_again():
    inputs = [x.double().float().requires_grad_() for x in make_inputs((1, 2, 3, 4, 4)).values()]

    def penalty(op) -> tuple[Tensor, ...]:
        (dx,) = torch.autograd.grad(op(*inputs).square().sum(), inputs[:1], create_graph=True)
        return torch.autograd.grad(dx.square().sum(), inputs)

    for found, expected in zip(penalty(conv3x3), penalty(conv3x3_ref), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes_are_pytorchs_own(dtype):
    inputs = make_inputs((1, 4, 8, 6, 6), dtype)
    x, weight, bias = (x.requires_grad_() for x in inputs.values())
    assert torch.equal(conv3x3(x, weight, bias), F.conv2d(x, weight, bias, padding=1))
    conv3x3(x, weight, bias).sum().backward()


def test_autocast_casts_as_for_pytorchs_own():
    inputs = make_inputs((1, 4, 8, 6, 6))
    with torch.autocast("cpu", torch.bfloat16):
        y = conv3x3(inputs["x"], inputs["weight"].requires_grad_(), inputs["bias"])
    assert y.dtype == torch.bfloat16


def test_an_empty_batch_has_no_gradient():
    weight = torch.randn(4, 3, 3, 3, requires_grad=True)
    conv3x3(torch.randn(0, 3, 5, 5), weight, None).sum().backward()
    assert weight.grad is not None
    assert not weight.grad.any()


def test_compiles_to_one_graph():
    inputs = [x.requires_grad_() for x in make_inputs((1, 4, 8, 6, 6)).values()]
    compiled = torch.compile(conv3x3, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*inputs), conv3x3(*inputs))


@pytest.mark.parametrize("shape", [(8, 5, 3, 3), (8, 4, 1, 1), (8, 4)], ids=str)
def test_weights_that_do_not_fit_are_refused(shape):
    with pytest.raises(ValueError, match=r"conv3x3: weight .* does not fit x \(1, 4, 6, 6\)"):
        conv3x3(torch.randn(1, 4, 6, 6), torch.randn(shape), None)
