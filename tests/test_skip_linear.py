import re
from collections.abc import Callable, Iterator

import pytest
import torch
from operators_seen import OperatorsSeen
from parity import assert_within_budget, sent_back
from second_order import assert_ordinary, assert_transforms, assert_twice_differentiable, gradients_twice
from torch import Tensor

from scalelong.kernels import skip_linear as module
from scalelong.kernels.arguments import Scale
from scalelong.kernels.backend import use_backend
from scalelong.kernels.skip_linear import skip_linear, skip_linear_ref

B, D1, D2, OUT = 2, 12, 20, 16
SCALES = {
    "none": lambda T: None,
    "float": lambda T: 0.7,
    "scalar": lambda T: torch.tensor(0.7),
    "per-token": lambda T: torch.rand(B, T),
    "per-token-1": lambda T: torch.rand(B, T, 1),
    "per-channel": lambda T: torch.rand(D2),
}
each_scale = pytest.mark.parametrize("make_scale", SCALES.values(), ids=SCALES.keys())


def make_inputs(T: int, scale: Scale, dtype: torch.dtype) -> dict[str, Tensor]:
    """Everything that has a gradient; a scale that is a tensor comes last."""
    inputs = {
        "x": torch.randn(B, T, D1),
        "s": torch.randn(B, T, D2),
        "weight": torch.randn(OUT, D1 + D2),
        "bias": torch.randn(OUT),
    }
    if isinstance(scale, Tensor):
        inputs["scale"] = scale
    return {name: tensor.to(dtype) for name, tensor in inputs.items()}


def of_inputs(op: Callable[..., Tensor], scale: Scale) -> Callable[..., Tensor]:
    """``op`` as a function of ``make_inputs``."""
    return lambda x, s, weight, bias, scale=scale: op(x, s, scale, weight, bias)


def assert_parity(inputs: dict[str, Tensor], scale: Scale) -> None:
    floors = {"dscale": rounding_of_dscale(inputs)} if inputs.get("scale", torch.ones(1)).dim() == 0 else None
    assert_within_budget(of_inputs(skip_linear, scale), of_inputs(skip_linear_ref, scale), inputs, floors=floors)


def rounding_of_dscale(inputs: dict[str, Tensor]) -> float:
    """One number, the sum of thousands of either sign: each is rounded once, and ours and the reference by chance."""
    s, weight_s = inputs["s"].double(), inputs["weight"][:, D1:].double()
    terms = s * (sent_back(torch.empty(*s.shape[:2], OUT)).double() @ weight_s)
    return float(torch.finfo(inputs["s"].dtype).eps / 2 * terms.norm())


@each_scale
@pytest.mark.parametrize("T", [1, 16, 257])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_as_exact_as_the_reference(dtype, T, make_scale):
    scale = make_scale(T)
    assert_parity(make_inputs(T, scale, dtype), scale)


@each_scale
def test_products_of_16_bits_are_within_budget(make_scale, monkeypatch):
    """As a GPU computes them, and a CPU that has such products."""
    monkeypatch.setattr(module, "product_dtype", lambda x, dtype: dtype)
    scale = make_scale(257)
    assert_parity(make_inputs(257, scale, torch.bfloat16), scale)


@each_scale
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_the_operator_is_sound(dtype, make_scale):
    scale = make_scale(3)
    x, s, weight, bias, *scales = (t.requires_grad_() for t in make_inputs(3, scale, dtype).values())
    float_scale = scale if isinstance(scale, float) else 1.0
    arguments = (x, s, scales[0] if scales else None, weight, bias, float_scale)
    torch.library.opcheck(torch.ops.scalelong.skip_linear.default, arguments)


@each_scale
def test_compiles_to_one_graph(make_scale):
    torch._dynamo.reset()
    scale = make_scale(3)
    inputs = [t.requires_grad_() for t in make_inputs(3, scale, torch.float32).values()]
    op = of_inputs(skip_linear, scale)
    y = torch.compile(op, fullgraph=True, backend="aot_eager")(*inputs)
    expected = op(*inputs)
    torch.testing.assert_close(y, expected)
    dy = torch.randn_like(y)
    for found, grad in zip(torch.autograd.grad(y, inputs, dy), torch.autograd.grad(expected, inputs, dy), strict=True):
        torch.testing.assert_close(found, grad)


@each_scale
def test_gradients_of_gradients(make_scale):
    leaves = [t.requires_grad_() for t in make_inputs(2, make_scale(2), torch.float32).values()]
    op = of_inputs(skip_linear, make_scale(2))
    grads = torch.autograd.grad(op(*leaves).square().sum(), leaves, create_graph=True)
    total = torch.stack([g.square().sum() for g in grads]).sum()
    assert all(g.isfinite().all() for g in torch.autograd.grad(total, leaves))


@each_scale
def test_frozen_tensors_get_no_gradient(make_scale):
    scale = make_scale(3)
    inputs = make_inputs(3, scale, torch.float32)
    expected = dict(zip(inputs, gradients(inputs, scale, set(inputs)), strict=True))
    for name in inputs:
        (found,) = gradients(inputs, scale, {name})
        torch.testing.assert_close(found, expected[name])


def gradients(inputs: dict[str, Tensor], scale: Scale, wanted: set[str]) -> tuple[Tensor, ...]:
    leaves = {name: t.detach().requires_grad_(name in wanted) for name, t in inputs.items()}
    y = of_inputs(skip_linear, scale)(*leaves.values())
    return torch.autograd.grad(y, [leaf for name, leaf in leaves.items() if name in wanted], torch.ones_like(y))


@each_scale
def test_autocast_computes_as_torch_linear(make_scale):
    scale = make_scale(3)
    inputs = make_inputs(3, scale, torch.float32)
    op, ref = of_inputs(skip_linear, scale), of_inputs(skip_linear_ref, scale)
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = op(*inputs.values()), ref(*inputs.values())
    assert found.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0.1)


@each_scale
def test_two_runs_give_the_same_bits(make_scale):
    scale = make_scale(257)
    inputs = make_inputs(257, scale, torch.float32)
    first = gradients(inputs, scale, set(inputs))
    for _ in range(10):
        assert all(torch.equal(a, b) for a, b in zip(first, gradients(inputs, scale, set(inputs)), strict=True))


@each_scale
def test_backward_keeps_only_what_is_there(make_scale):
    scale = make_scale(5)
    inputs = [t.requires_grad_() for t in make_inputs(5, scale, torch.float32).values()]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        of_inputs(skip_linear, scale)(*inputs)
    there = {t.data_ptr() for t in inputs}
    assert {t.data_ptr() for t in kept} <= there


def test_an_empty_batch():
    x, s = torch.empty(0, 3, D1, requires_grad=True), torch.empty(0, 3, D2, requires_grad=True)
    weight = torch.randn(OUT, D1 + D2, requires_grad=True)
    y = skip_linear(x, s, 0.5, weight, None)
    assert y.shape == (0, 3, OUT)
    y.sum().backward()
    assert weight.grad is not None
    assert not weight.grad.any()


def test_parity_holds_for_permuted_inputs():
    inputs = make_inputs(5, None, torch.float32)
    inputs["x"], inputs["s"] = (inputs[name].transpose(0, 1).contiguous() for name in ("x", "s"))

    def transposed(op):
        return lambda x, s, weight, bias: op(x.transpose(0, 1), s.transpose(0, 1), 0.5, weight, bias)

    assert_within_budget(transposed(skip_linear), transposed(skip_linear_ref), inputs)


@each_scale
def test_is_the_sum_of_two_products(make_scale):
    T = 5
    scale = make_scale(T)
    inputs = make_inputs(T, scale, torch.float64)
    x, s, weight, bias = (inputs[name] for name in ("x", "s", "weight", "bias"))
    scaled_BTD2 = s.clone()
    for b, t, d in torch.cartesian_prod(torch.arange(B), torch.arange(T), torch.arange(D2)):
        k = inputs.get("scale", scale)
        if isinstance(k, Tensor) and k.dim() > 0:
            k = k[d] if k.dim() == 1 else k[b, t].squeeze()
        scaled_BTD2[b, t, d] *= 1.0 if k is None else k
    expected = x @ weight[:, :D1].T + scaled_BTD2 @ weight[:, D1:].T + bias
    torch.testing.assert_close(of_inputs(skip_linear, scale)(*inputs.values()), expected)


def test_without_a_bias():
    x, s, weight, bias = make_inputs(5, None, torch.float64).values()
    without = skip_linear(x, s, 0.5, weight, None)
    torch.testing.assert_close(without + bias, skip_linear(x, s, 0.5, weight, bias))


@each_scale
def test_reference_gradients(make_scale):
    scale = make_scale(2)
    leaves = [tensor.requires_grad_() for tensor in make_inputs(2, scale, torch.float64).values()]
    assert torch.autograd.gradcheck(of_inputs(skip_linear_ref, scale), leaves, fast_mode=True)


@pytest.mark.parametrize(
    ("x", "s", "weight", "message"),
    [
        ((2, 3, 4), (2, 5), (6, 9), r"got \(2, 3, 4\) and \(2, 5\)"),
        ((3, 4), (2, 5), (6, 9), r"got \(3, 4\) and \(2, 5\)"),
        ((2, 3, 4), (2, 7, 5), (6, 9), r"got \(2, 3, 4\) and \(2, 7, 5\)"),
        ((2, 3, 4), (1, 3, 5), (6, 9), r"got \(2, 3, 4\) and \(1, 3, 5\)"),
        ((2, 3, 4), (2, 3, 5), (6, 10), r"weight \(6, 10\) does not fit x \(2, 3, 4\) beside s \(2, 3, 5\)"),
        ((2, 3, 4), (2, 3, 5), (9,), r"weight \(9,\) does not fit"),
    ],
)
def test_shapes_that_do_not_fit_are_named(x, s, weight, message):
    with pytest.raises(ValueError, match=message):
        skip_linear(torch.randn(x), torch.randn(s), None, torch.randn(weight), None)


def test_dtypes_that_do_not_fit_are_named():
    x, s, weight = torch.randn(2, 3, 4), torch.randn(2, 3, 5, dtype=torch.bfloat16), torch.randn(6, 9)
    with pytest.raises(ValueError, match=r"x is \(2, 3, 4\) float32 on cpu but s is \(2, 3, 5\) bfloat16 on cpu"):
        skip_linear(x, s, None, weight, None)


@pytest.mark.parametrize("shape", [(3,), (4,), (3, 2), (2, 1), (2, 3, 5), (1, 3, 1), (2, 3, 1, 1)], ids=str)
def test_a_scale_of_another_form_is_refused(shape):
    x, s, weight = torch.randn(2, 3, 4), torch.randn(2, 3, 5), torch.randn(6, 9)
    message = f"scale {shape} is none of scalar, (2, 3), (2, 3, 1), (5,)"
    with pytest.raises(ValueError, match=re.escape(message)):
        skip_linear(x, s, torch.rand(shape), weight, None)


# Derivatives of every kind, and whose they are


def dependent(s: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
    """Inputs of which all but the parameters come from s, the scale of each token too."""
    return s.tanh()[..., :D1] + s.mean(), s, s.mean(dim=-1, keepdim=True).sigmoid(), weight, bias


def leaves() -> list[Tensor]:
    return [torch.randn(B, 5, D2), torch.randn(OUT, D1 + D2) / D2**0.5, torch.randn(OUT)]


def test_create_graph_counts_each_path_once():
    assert_twice_differentiable(skip_linear, skip_linear_ref, dependent, leaves())


def test_create_graph_under_autocast():
    def under_autocast(op):
        def run(*inputs):
            with torch.autocast("cpu", torch.bfloat16):
                return op(*inputs).float()

        return run

    found, expected = (gradients_twice(under_autocast(op), dependent, leaves_) for op, leaves_ in both())
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype
        assert (a - b).norm() < 0.03 * b.norm()


def both() -> Iterator[tuple[Callable[..., Tensor], list[Tensor]]]:
    inputs = leaves()
    yield from ((skip_linear, inputs), (skip_linear_ref, inputs))


@pytest.mark.parametrize("how", ["compile", "export"])
def test_the_registered_operator_is_differentiable_twice(how):
    torch._dynamo.reset()
    if how == "compile":
        op = torch.compile(skip_linear, backend="eager", fullgraph=True)
    else:

        class Module(torch.nn.Module):
            def forward(self, *inputs):
                return skip_linear(*inputs)

        op = torch.export.export(Module(), dependent(*leaves()), strict=False).module()
    assert_twice_differentiable(op, skip_linear_ref, dependent, leaves())


def test_the_backward_operator_is_sound():
    x, s, scale, weight, bias = (t.detach().requires_grad_() for t in dependent(*leaves()))
    dy = torch.randn(B, 5, OUT, requires_grad=True)
    arguments = (dy, x, s, scale, weight, bias, 1.0, torch.float32, [True, True, True, False, True])
    torch.library.opcheck(torch.ops.scalelong.skip_linear_backward.default, arguments)


def test_transforms_take_the_reference():
    x, s, scale, weight, bias = dependent(*leaves())
    args = (x, s, scale, weight, bias)
    assert_transforms(skip_linear, skip_linear_ref, args)
    with use_backend("native"), pytest.raises(RuntimeError, match=r"torch\.func"):
        torch.func.grad(lambda x: skip_linear(x, s, scale, weight, bias).sum())(x)


@each_scale
def test_the_output_is_an_ordinary_tensor(make_scale):
    scale = make_scale(5)
    assert_ordinary(of_inputs(skip_linear, scale), list(make_inputs(5, scale, torch.float32).values()))


@pytest.mark.parametrize(("wanted", "num_products"), [("x", 1), ("s", 1), ("weight", 2), ("bias", 0), ("scale", 1)])
def test_products_that_nobody_needs_are_not_computed(wanted, num_products):
    inputs = make_inputs(5, torch.rand(B, 5), torch.float32)
    inputs = {name: x.requires_grad_(name == wanted) for name, x in inputs.items()}
    y = skip_linear(*(inputs[name] for name in ("x", "s", "scale", "weight", "bias")))
    with OperatorsSeen() as seen:
        y.sum().backward()
    assert len([name for name, _ in seen.all if name in ("mm", "addmm")]) == num_products


# Under autocast


def test_activations_of_any_dtype_under_autocast():
    x, s, weight, bias = make_inputs(3, None, torch.float32).values()
    with torch.autocast("cpu", torch.bfloat16):
        for a, b in ((x, s), (x.bfloat16(), s), (x, s.half())):
            leaves = [t.detach().requires_grad_() for t in (a, b, weight, bias)]
            y = skip_linear(leaves[0], leaves[1], 0.5, *leaves[2:])
            assert y.dtype == torch.bfloat16
            grads = torch.autograd.grad(y, leaves, torch.ones_like(y))
            assert [g.dtype for g in grads] == [t.dtype for t in leaves]
        with pytest.raises(ValueError, match=r"x is .* float32 on cpu but s is .* float64 on cpu"):
            skip_linear(x, s.double(), 0.5, weight, bias)


@each_scale
def test_under_autocast_backward_keeps_what_was_given(make_scale):
    scale = make_scale(5)
    inputs = [t.requires_grad_() for t in make_inputs(5, scale, torch.float32).values()]
    kept = []
    with (
        torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t),
        torch.autocast("cpu", torch.bfloat16),
    ):
        of_inputs(skip_linear, scale)(*inputs)
    assert {t.data_ptr() for t in kept} <= {t.data_ptr() for t in inputs}
