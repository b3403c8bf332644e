from collections.abc import Callable

import pytest
import torch
from parity import assert_within_budget, sent_back
from torch import Tensor

from scalelong.bench.timing import peak_bytes
from scalelong.kernels import skip_linear as products
from scalelong.kernels.arguments import Scale
from scalelong.kernels.skip_norm_linear import skip_norm_linear, skip_norm_linear_ref

B, D1, D2, OUT = 2, 12, 20, 16
SCALES = {
    "none": lambda T: None,
    "float": lambda T: 0.7,
    "scalar": lambda T: torch.tensor(0.7),
    "one": lambda T: torch.tensor([0.7]),
    "per-token": lambda T: torch.rand(B, T),
    "per-token-1": lambda T: torch.rand(B, T, 1),
}
each_scale = pytest.mark.parametrize("make_scale", SCALES.values(), ids=SCALES.keys())
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)


def make_inputs(T: int, scale: Scale, dtype: torch.dtype, **sizes: int) -> dict[str, Tensor]:
    """Everything that has a gradient; a scale that is a tensor comes last."""
    d1, d2, out = sizes.get("d1", D1), sizes.get("d2", D2), sizes.get("out", OUT)
    inputs = {
        "x": torch.randn(B, T, d1) + 0.5,
        "s": 2 * torch.randn(B, T, d2) - 0.3,
        "norm_weight": 1 + 0.3 * torch.randn(d1 + d2),
        "norm_bias": 0.3 * torch.randn(d1 + d2),
        "weight": torch.randn(out, d1 + d2) / (d1 + d2) ** 0.5,
        "bias": torch.randn(out),
    }
    if isinstance(scale, Tensor):
        inputs["scale"] = scale
    return {name: tensor.to(dtype) for name, tensor in inputs.items()}


def of_inputs(op: Callable[..., Tensor], scale: Scale, eps: float = 1e-6) -> Callable[..., Tensor]:
    """``op`` as a function of ``make_inputs``."""
    return lambda x, s, a, b, weight, bias, scale=scale: op(x, s, scale, a, b, weight, bias, eps=eps)


def gradients(op: Callable[..., Tensor], inputs: dict[str, Tensor], wanted: set[str]) -> tuple[Tensor, ...]:
    leaves = {name: t.detach().requires_grad_(name in wanted) for name, t in inputs.items()}
    y = op(*leaves.values())
    return torch.autograd.grad(y, [leaf for name, leaf in leaves.items() if name in wanted], torch.ones_like(y))


def assert_parity(inputs: dict[str, Tensor], scale: Scale) -> None:
    is_one = "scale" in inputs and inputs["scale"].numel() == 1
    floors = {"dscale": rounding_of_dscale(inputs)} if is_one else None
    ours, ref = (of_inputs(op, scale) for op in (skip_norm_linear, skip_norm_linear_ref))
    assert_within_budget(ours, ref, inputs, floors=floors)


def rounding_of_dscale(inputs: dict[str, Tensor]) -> float:
    """One number, the sum of many of either sign: each is rounded once, and ours and the reference by chance."""
    exact = {name: t.double().requires_grad_() for name, t in inputs.items()}
    each = exact["scale"].detach().expand(exact["s"].shape).clone().requires_grad_()
    y = of_inputs(skip_norm_linear_ref, each)(*[t for name, t in exact.items() if name != "scale"])
    (terms,) = torch.autograd.grad(y, each, sent_back(y))
    return float(torch.finfo(inputs["s"].dtype).eps * terms.norm())


@each_scale
@pytest.mark.parametrize("T", [1, 16, 257])
@each_dtype
def test_as_exact_as_the_reference(dtype, T, make_scale):
    scale = make_scale(T)
    inputs = make_inputs(T, scale, dtype)
    is_one = "scale" in inputs and inputs["scale"].numel() == 1
    floors = {"dscale": rounding_of_dscale(inputs)} if is_one else None
    assert_within_budget(
        of_inputs(skip_norm_linear, scale), of_inputs(skip_norm_linear_ref, scale), inputs, floors=floors
    )


@each_scale
def test_products_of_16_bits_are_within_budget(make_scale, monkeypatch):
    """As a GPU computes them, and a CPU that has such products."""
    monkeypatch.setattr(products, "product_dtype", lambda x, dtype: dtype)
    scale = make_scale(33)
    inputs = make_inputs(33, scale, torch.bfloat16)
    is_one = "scale" in inputs and inputs["scale"].numel() == 1
    floors = {"dscale": rounding_of_dscale(inputs)} if is_one else None
    assert_within_budget(
        of_inputs(skip_norm_linear, scale), of_inputs(skip_norm_linear_ref, scale), inputs, floors=floors
    )


@pytest.mark.parametrize("offset", [10.0, 100.0])
def test_a_mean_far_larger_than_the_spread_costs_little(offset):
    """It drops out of the product by weights that sum to 0, up to their rounding."""
    inputs = make_inputs(16, None, torch.float32)
    inputs["x"], inputs["s"] = inputs["x"] + offset, inputs["s"] + offset
    ours, ref = of_inputs(skip_norm_linear, None), of_inputs(skip_norm_linear_ref, None)
    truth = ref(*(t.double() for t in inputs.values()))
    error, allowed = ((op(*inputs.values()).double() - truth).abs().max() for op in (ours, ref))
    assert error < 10 * allowed + 1e-6 * offset


@pytest.mark.parametrize("given", [(True, False), (False, True), (False, False)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_norms_and_layers_without_some_of_their_parameters(given, bias):
    has_weight, has_bias = given
    inputs = make_inputs(5, None, torch.float32)
    names = ["x", "s", *["norm_weight"] * has_weight, *["norm_bias"] * has_bias, "weight", *["bias"] * bias]

    def of_given(op: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(*tensors: Tensor) -> Tensor:
            by_name = dict(zip(names, tensors, strict=True))
            norm = by_name.get("norm_weight"), by_name.get("norm_bias")
            return op(by_name["x"], by_name["s"], 0.5, *norm, by_name["weight"], by_name.get("bias"))

        return call

    assert_within_budget(
        of_given(skip_norm_linear), of_given(skip_norm_linear_ref), {name: inputs[name] for name in names}
    )


def test_a_skip_that_is_the_stream_itself():
    """As the first skip of a network without a block between its halves."""
    inputs = make_inputs(7, None, torch.float32, d1=16, d2=16)
    del inputs["s"]

    def of_one(op: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda x, a, b, weight, bias: op(x, x, 0.5, a, b, weight, bias)

    assert_within_budget(of_one(skip_norm_linear), of_one(skip_norm_linear_ref), inputs)


@each_scale
def test_frozen_tensors_get_no_gradient(make_scale):
    scale = make_scale(3)
    inputs = make_inputs(3, scale, torch.float32)
    op = of_inputs(skip_norm_linear, scale)
    expected = dict(zip(inputs, gradients(op, inputs, set(inputs)), strict=True))
    for name in inputs:
        (found,) = gradients(op, inputs, {name})
        torch.testing.assert_close(found, expected[name])


@each_scale
def test_compiles_to_one_graph(make_scale):
    torch._dynamo.reset()
    scale = make_scale(3)
    inputs = [t.requires_grad_() for t in make_inputs(3, scale, torch.float32).values()]
    op = of_inputs(skip_norm_linear, scale)
    y, expected = torch.compile(op, fullgraph=True, backend="aot_eager")(*inputs), op(*inputs)
    torch.testing.assert_close(y, expected)
    dy = torch.randn_like(y)
    for found, grad in zip(torch.autograd.grad(y, inputs, dy), torch.autograd.grad(expected, inputs, dy), strict=True):
        torch.testing.assert_close(found, grad, rtol=1e-4, atol=1e-5)


@each_scale
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_autocast_computes_as_torchs_layers(make_scale, compiled):
    torch._dynamo.reset()
    scale = make_scale(3)
    inputs = make_inputs(3, scale, torch.float32)
    op, ref = of_inputs(skip_norm_linear, scale), of_inputs(skip_norm_linear_ref, scale)
    op = torch.compile(op, fullgraph=True, backend="eager") if compiled else op
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = op(*inputs.values()), ref(*inputs.values())
        grads = gradients(op, inputs, set(inputs))
    assert found.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0.05)
    assert all(grad.dtype == torch.float32 for grad in grads)
    for grad, exact in zip(grads, gradients(ref, inputs, set(inputs)), strict=True):
        torch.testing.assert_close(grad, exact, rtol=0.05, atol=0.05 * float(exact.abs().max()))


def test_two_runs_give_the_same_bits():
    scale = torch.rand(B, 257, 1)
    inputs = make_inputs(257, scale, torch.float32)
    op = of_inputs(skip_norm_linear, scale)
    first = gradients(op, inputs, set(inputs))
    for _ in range(5):
        assert all(torch.equal(a, b) for a, b in zip(first, gradients(op, inputs, set(inputs)), strict=True))


@each_scale
def test_backward_keeps_what_is_there_and_two_numbers_a_token(make_scale):
    scale = make_scale(5)
    inputs = [t.requires_grad_() for t in make_inputs(5, scale, torch.float32).values()]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        of_inputs(skip_norm_linear, scale)(*inputs)
    there = {t.data_ptr() for t in inputs}
    assert sum(t.numel() for t in kept if t.data_ptr() not in there) == 2 * B * 5


def test_neither_the_concatenation_nor_its_norm_is_written():
    inputs = [t.requires_grad_() for t in make_inputs(512, 0.7, torch.float32, d1=64, d2=64, out=64).values()]

    def peak(op: Callable[..., Tensor]) -> int:
        return peak_bytes(lambda: of_inputs(op, 0.7)(*inputs).sum().backward(), (), "cpu")

    written = 4 * inputs[0].numel() * inputs[0].element_size()  # both halves, before and behind the norm
    assert peak(skip_norm_linear) < peak(skip_norm_linear_ref) - 0.7 * written


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"s": torch.randn(B, 4, D2)}, r"x and s must be .* got \(2, 5, 12\) and \(2, 4, 20\)"),
        ({"weight": torch.randn(OUT, D1)}, r"weight \(16, 12\) does not fit x \(2, 5, 12\) beside s \(2, 5, 20\)"),
        ({"norm_weight": torch.randn(D1)}, r"norm_weight is \(12,\) .* need \(32,\)"),
        ({"norm_bias": torch.zeros(32, dtype=torch.int64)}, r"norm_bias is \(32,\) int64"),
        ({"scale": torch.rand(B, 3)}, r"scale \(2, 3\) is none of scalar, \(2, 5\), \(2, 5, 1\)"),
        ({"scale": torch.rand(D2)}, r"scale \(20,\) is none of"),
        ({"eps": -1.0}, "eps must be a finite number from 0 up, got -1.0"),
        ({"s": torch.zeros(B, 5, D2, dtype=torch.bfloat16)}, r"x is \(2, 5, 12\) float32 on cpu but s is .* bfloat16"),
        ({"bias": torch.randn(3)}, r"bias \(3,\) does not fit weight \(16, 32\)"),
    ],
    ids=range(9),
)
def test_arguments_that_do_not_fit_are_named(change, message):
    inputs = make_inputs(5, None, torch.float32)
    scale, eps = change.pop("scale", None), change.pop("eps", 1e-5)
    x, s, a, b, weight, bias = {**inputs, **change}.values()
    with pytest.raises(ValueError, match=message):
        skip_norm_linear(x, s, scale, a, b, weight, bias, eps=eps)
