"""Numerics of the Triton kernels of gelu_linear under Triton's interpreter; test_gelu_linear.py runs it."""

from functools import partial

import pytest
import torch
from interpreter_fixtures import (  # noqa: F401 (fixtures)
    interpreted_faster,
    rounding_to_bf16_as_on_a_gpu,
    uninitialised_memory_full_of_nan,
)
from parity import assert_within_budget

from scalelong.kernels import gelu_linear_triton
from scalelong.kernels.gelu_linear import gelu_linear, gelu_linear_ref

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def _several_programs(monkeypatch):
    monkeypatch.setattr(gelu_linear_triton, "BLOCK", 64)


def make_inputs(dtype: torch.dtype, rows=(3, 7)) -> dict[str, torch.Tensor]:
    inputs = {"x": 2 * torch.randn(*rows, 24), "weight": torch.randn(16, 24), "bias": torch.randn(16)}
    return {name: x.to(dtype) for name, x in inputs.items()}


each_act = pytest.mark.parametrize("act", ["gelu", "gelu-tanh"])


@each_act
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("rows", [(), (1,), (3, 7), (2, 129)], ids=str)
def test_as_exact_as_the_reference(dtype, rows, act):
    assert_within_budget(partial(gelu_linear, act=act), partial(gelu_linear_ref, act=act), make_inputs(dtype, rows))


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.float16], ids=str)
def test_x_is_read_as_it_is_under_autocast(x_dtype):
    inputs = make_inputs(torch.float32)
    inputs["x"] = inputs["x"].to(x_dtype)

    def under_autocast(op):
        def run(*args):
            with torch.autocast("cpu", torch.float16):
                return op(*args)

        return run

    assert_within_budget(under_autocast(gelu_linear), under_autocast(gelu_linear_ref), inputs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("out_dtype", DTYPES, ids=str)
@each_act
def test_every_pair_of_dtypes(dtype, out_dtype, act):
    x, dy = (torch.randn(1000).to(d) for d in (dtype, out_dtype))
    x[:200] = torch.linspace(-20, 20, 200).to(dtype)
    y, again, dx = torch.empty_like(x, dtype=out_dtype), torch.empty_like(x, dtype=out_dtype), torch.empty_like(x)
    gelu_linear_triton.forward(x, y, act)
    gelu_linear_triton.backward(dy, x, dx, again, act)
    truth = x.double().requires_grad_()
    expected = torch.nn.functional.gelu(truth, approximate="tanh" if act == "gelu-tanh" else "none")
    (d_truth,) = torch.autograd.grad(expected, truth, dy.double())
    assert torch.equal(y, again)
    for found, true in ((y, expected), (dx, d_truth)):
        bound = 2 * torch.finfo(found.dtype).eps * true.abs() + 1e-6
        assert ((found.double() - true).abs() <= bound).all()


def test_non_dense_x_and_none_at_all():
    x = torch.randn(10, 48)[:, ::2].requires_grad_()
    weight = torch.randn(16, 24)
    torch.testing.assert_close(gelu_linear(x, weight, None), gelu_linear_ref(x, weight, None))
    assert gelu_linear(x[:0], weight, None).shape == (0, 16)
