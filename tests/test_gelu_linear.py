import re

import pytest
import torch
from parity import assert_within_budget

from scalelong.kernels.gelu_linear import gelu_linear, gelu_linear_ref

each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)


def make_inputs(dtype: torch.dtype, rows=(3, 7)) -> dict[str, torch.Tensor]:
    inputs = {"x": torch.randn(*rows, 24), "weight": torch.randn(16, 24), "bias": torch.randn(16)}
    return {name: x.to(dtype) for name, x in inputs.items()}


@each_dtype
@pytest.mark.parametrize("rows", [(), (5,), (3, 7), (2, 257)], ids=str)
def test_as_exact_as_the_reference(dtype, rows):
    assert_within_budget(gelu_linear, gelu_linear_ref, make_inputs(dtype, rows))


def test_gradients_and_their_gradients_in_fp64():
    leaves = [x.requires_grad_() for x in make_inputs(torch.float64).values()]
    assert torch.autograd.gradcheck(gelu_linear, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(gelu_linear, leaves, fast_mode=True)


def test_backward_keeps_only_its_inputs():
    inputs = [x.requires_grad_() for x in make_inputs(torch.float32).values()]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: (kept.append(x), x)[1], lambda x: x):
        gelu_linear(*inputs)
    assert {x.data_ptr() for x in kept} <= {x.data_ptr() for x in inputs}


def test_frozen_weights_get_no_gradient():
    x, weight, bias = make_inputs(torch.float32).values()
    gelu_linear(x.requires_grad_(), weight, bias).sum().backward()
    assert x.grad is not None
    assert weight.grad is None
    assert bias.grad is None


def test_compiles_to_one_graph():
    inputs = make_inputs(torch.float32).values()
    torch.testing.assert_close(
        torch.compile(gelu_linear, fullgraph=True, backend="aot_eager")(*inputs), gelu_linear(*inputs)
    )


def test_autocast_computes_in_its_dtype():
    inputs = [x.requires_grad_() for x in make_inputs(torch.float32).values()]
    with torch.autocast("cpu", torch.bfloat16):
        y, expected = gelu_linear(*inputs), gelu_linear_ref(*inputs)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, expected, rtol=0.02, atol=0.1)
    y.sum().backward()
    assert all(x.grad is not None and x.grad.dtype == torch.float32 for x in inputs)


@pytest.mark.parametrize(
    ("x", "weight", "bias"), [((2, 3), (4, 5), (4,)), ((2, 5), (5,), (5,)), ((2, 5), (4, 5), (3,))]
)
def test_widths_that_do_not_fit_are_named(x, weight, bias):
    with pytest.raises(ValueError, match=re.escape(str(weight))):
        gelu_linear(torch.randn(x), torch.randn(weight), torch.randn(bias))
