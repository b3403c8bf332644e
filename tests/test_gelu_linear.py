import re
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from interpreting import run_interpreted
from operators_seen import OperatorsSeen
from parity import assert_within_budget
from second_order import assert_ordinary, assert_transforms, assert_twice_differentiable

from scalelong.kernels import gelu_linear as module
from scalelong.kernels import native_library
from scalelong.kernels.backend import use_backend
from scalelong.kernels.gelu_linear import gelu_linear, gelu_linear_ref

each_act = pytest.mark.parametrize("act", ["gelu", "gelu-tanh"])
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)


def make_inputs(dtype: torch.dtype, rows=(3, 7)) -> dict[str, torch.Tensor]:
    inputs = {"x": torch.randn(*rows, 24), "weight": torch.randn(16, 24), "bias": torch.randn(16)}
    return {name: x.to(dtype) for name, x in inputs.items()}


@each_act
@each_dtype
@pytest.mark.parametrize("rows", [(), (5,), (3, 7), (2, 257)], ids=str)
def test_as_exact_as_the_reference(dtype, rows, act):
    assert_within_budget(partial(gelu_linear, act=act), partial(gelu_linear_ref, act=act), make_inputs(dtype, rows))


@each_act
def test_gradients_and_their_gradients_in_fp64(act):
    leaves, op = [x.requires_grad_() for x in make_inputs(torch.float64).values()], partial(gelu_linear, act=act)
    assert torch.autograd.gradcheck(op, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(op, leaves, fast_mode=True)


@pytest.mark.skipif(native_library.ERROR is not None, reason=str(native_library.ERROR))
@each_act
@each_dtype
def test_every_size_of_number_stays_within_budget(dtype, act):
    """Of gelu alone: numbers between 1e-8 and 1e4 of either sign, and what is not finite."""
    native = torch.ops.scalelong_native
    sizes = torch.logspace(-8, 4, 4001, dtype=torch.float64)
    x = torch.cat([sizes, -sizes, torch.linspace(-9, 9, 4001, dtype=torch.float64)]).to(dtype)
    dy, y, again, dx = torch.ones_like(x), torch.empty_like(x), torch.empty_like(x), torch.empty_like(x)
    native.gelu_forward(y, x, act == "gelu-tanh")
    native.gelu_backward(dx, again, dy, x, act == "gelu-tanh")
    truth = x.double().requires_grad_()
    approximate = "tanh" if act == "gelu-tanh" else "none"
    expected = F.gelu(truth, approximate=approximate)
    (d_truth,) = torch.autograd.grad(expected.sum(), truth)
    for found, true in ((y, expected), (again, expected), (dx, d_truth)):
        bound = torch.finfo(dtype).eps * true.abs() + (1e-6 if dtype == torch.float32 else 1e-3)
        assert ((found.double() - true).abs() <= bound).all()
    nan = torch.full((5,), torch.nan).to(dtype)
    native.gelu_backward(out := torch.empty_like(nan), same := torch.empty_like(nan), nan, nan, act == "gelu-tanh")
    assert out.isnan().all()
    assert same.isnan().all()


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


@each_act
def test_compiles_to_one_graph(act):
    inputs, op = make_inputs(torch.float32).values(), partial(gelu_linear, act=act)
    torch.testing.assert_close(torch.compile(op, fullgraph=True, backend="aot_eager")(*inputs), op(*inputs))


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


def dependent(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The weights come from x, too."""
    return x, x.reshape(-1, 24)[:16].tanh() / 5, x.reshape(-1, 24)[:16].mean(dim=1)


@each_act
def test_create_graph_counts_each_path_once(act):
    op, ref = partial(gelu_linear, act=act), partial(gelu_linear_ref, act=act)
    assert_twice_differentiable(op, ref, dependent, [torch.randn(3, 7, 24)])


@each_act
def test_transforms_take_the_reference(act):
    op, ref = partial(gelu_linear, act=act), partial(gelu_linear_ref, act=act)
    assert_transforms(op, ref, list(make_inputs(torch.float32).values()))


def test_an_unknown_activation_is_named():
    with pytest.raises(ValueError, match="act 'tanh' is none of 'gelu', 'gelu-tanh'"):
        gelu_linear(*make_inputs(torch.float32).values(), act="tanh")


def test_the_output_is_an_ordinary_tensor():
    assert_ordinary(gelu_linear, list(make_inputs(torch.float32).values()))


def test_the_reference_runs_where_it_is_asked_for_and_in_fp64():
    def name_of_node(dtype):
        return type(gelu_linear(*(x.requires_grad_() for x in make_inputs(dtype).values())).grad_fn).__name__

    assert name_of_node(torch.float32) == "_GeluLinearBackward"
    assert name_of_node(torch.float64) != "_GeluLinearBackward"
    with use_backend("reference"):
        assert name_of_node(torch.float32) != "_GeluLinearBackward"


@pytest.mark.parametrize("wanted", ["x", "weight", "bias"])
def test_what_nobody_needs_is_not_computed(wanted):
    inputs = {name: x.requires_grad_(name == wanted) for name, x in make_inputs(torch.float32).items()}
    y = gelu_linear(*inputs.values())
    with OperatorsSeen() as seen:
        y.sum().backward()
    names = [name for name, _ in seen.all]
    assert names.count("mm") == (wanted != "bias")
    assert any(name.startswith("gelu") for name in names) == (wanted != "bias")


def test_autocast_casts_back_nothing_on_a_cpu_without_16_bit_products(monkeypatch):
    """Such products take a hundred times as long there: those in fp32 must stay in fp32, inside autocast."""
    monkeypatch.setattr(module, "product_dtype", lambda x, dtype: torch.float32)
    inputs = [x.requires_grad_() for x in make_inputs(torch.float32).values()]
    with OperatorsSeen() as seen, torch.autocast("cpu", torch.bfloat16):
        y = gelu_linear(*inputs)
        y.sum().backward()
    assert y.dtype == torch.bfloat16
    products = [tensors for name, tensors in seen.all if name in ("mm", "addmm")]
    assert len(products) == 3
    assert all(x.dtype == torch.float32 for tensors in products for x in tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_autocast_takes_x_as_it_is_and_gives_its_gradient_in_that_dtype(dtype):
    x, weight, bias = (x.requires_grad_() for x in make_inputs(torch.float32).values())
    x = x.detach().to(dtype).requires_grad_()
    kept = []
    with (
        torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t),
        torch.autocast("cpu", torch.bfloat16),
    ):
        y = gelu_linear(x, weight, bias)
    assert y.dtype == torch.bfloat16
    assert {t.data_ptr() for t in kept} <= {t.data_ptr() for t in (x, weight, bias)}
    y.sum().backward()
    assert [t.grad.dtype for t in (x, weight, bias) if t.grad is not None] == [dtype, torch.float32, torch.float32]


@pytest.mark.slow
def test_the_triton_kernels_are_right_in_the_interpreter():
    run_interpreted("interpreted_gelu_linear.py")
