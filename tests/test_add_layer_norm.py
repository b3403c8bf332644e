"""The residual sum with its LayerNorm on a CPU: numbers, gradients, registration, and what it says to bad input."""

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import pytest
import torch
from add_layer_norm_cases import ADAPTIVE, DTYPES, Case, joined
from hypothesis import given, settings
from hypothesis import strategies as st
from instruction_sets import run_on
from samples import each_value_once
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from scalelong.kernels.add_layer_norm import add_layer_norm, add_layer_norm_ref, rotated_ref
from scalelong.kernels.add_layer_norm_tensors import Inputs
from scalelong.kernels.backend import backend_of, use_backend

ROOT = Path(__file__).resolve().parents[1]
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
Gradients = tuple[Tensor, ...]


@st.composite
def cases(draw) -> Case:
    is_adaptive = draw(st.booleans())
    has_branch = draw(st.booleans())
    width = draw(st.integers(4, 90))
    return Case(
        shape=(*draw(st.lists(st.integers(1, 9), min_size=1 if is_adaptive else 0, max_size=3)), width),
        dtype=draw(st.sampled_from(DTYPES)),
        has_branch=has_branch,
        has_weight=draw(st.booleans()),
        has_bias=draw(st.booleans()),
        adaptive=tuple(
            name
            for name in ADAPTIVE
            if is_adaptive
            and (has_branch or name != "gate")
            and (width % 2 == 0 or name != "angle")
            and draw(st.booleans())
        ),
        mean=draw(st.sampled_from([0.0, 3.0, -100.0])),
    )


@pytest.mark.slow
@settings(max_examples=300, deadline=None, derandomize=True)
@given(case=cases(), seed=st.integers(0, 2**31))
def test_parity_over_drawn_cases(case, seed):
    torch.manual_seed(seed)
    case.assert_parity()


@each_dtype
@pytest.mark.parametrize(
    "shape", [(4, 257, 512), (2, 65, 1152), (1, 5, 8192), (2, 3, 8191), (1, 1, 5), (3, 33, 7), (70, 31, 64)], ids=str
)
@pytest.mark.parametrize("adaptive", [(), ADAPTIVE], ids=["plain", "adaptive"])
def test_parity_at_widths_of_networks_and_odd_ones(shape, dtype, adaptive):
    if shape[-1] % 2:
        adaptive = adaptive[:3]  # no pairs to turn
    Case(shape=shape, dtype=dtype, adaptive=adaptive, has_weight=not adaptive, has_bias=not adaptive).assert_parity()


def test_a_row_of_one_number_is_its_own_mean():
    """Eager and ours both multiply rounding errors by rstd here."""
    x, branch, weight, bias = torch.randn(4, 3, 1).requires_grad_().unbind()
    stream, y = add_layer_norm(x, branch, weight[0], bias[0])
    assert torch.equal(y, bias[0].expand(3, 1))
    torch.testing.assert_close(torch.autograd.grad((stream + y).sum(), x)[0], torch.ones(3, 1), rtol=1e-4, atol=0)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("adaptive", [(), ADAPTIVE], ids=["plain", "adaptive"])
def test_a_stream_in_fp32_with_branches_and_outputs_in_16_bits(half, adaptive):
    Case(shape=(3, 33, 72), branch_dtype=half, autocast=half, adaptive=adaptive).assert_parity()


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_parity_on_each_instruction_set(isa):
    code = """
import itertools, torch
from add_layer_norm_cases import ADAPTIVE, DTYPES, Case
torch.set_num_threads(1)
means = {(3, 19, 77): 0.0, (2, 5, 96): 100.0, (2, 520, 1024): 0.0}
for dtype, (shape, mean) in itertools.product(DTYPES, means.items()):
    torch.manual_seed(0)
    Case(shape=shape, dtype=dtype, mean=mean, adaptive=ADAPTIVE[: 3 if shape[-1] % 2 else 4]).assert_parity()
    Case(shape=shape, dtype=dtype, mean=mean).assert_parity()
for half in (torch.bfloat16, torch.float16):
    Case(shape=(3, 19, 78), branch_dtype=half, autocast=half, adaptive=("gain", "gate", "angle")).assert_parity()
"""
    run_on(isa, code)


@each_dtype
def test_turning_keeps_norms_and_turns_back(dtype):
    """In radians, from the first half of the features to the second."""
    turn = partial(add_layer_norm, branch=None, weight=None, bias=None)
    x, angle = torch.randn(3, 9, 84).to(dtype), 3 * torch.randn(3, 42)
    (_, y), (_, turned), (_, twice) = turn(x), turn(x, angle=angle), turn(x, angle=2 * angle)
    tolerance = 1e-5 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps
    norms, before = (z.float().unflatten(-1, (2, 42)).norm(dim=-2) for z in (turned, y))
    torch.testing.assert_close(norms, before, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(rotated_ref(turned.float(), -angle), y.float(), rtol=0, atol=4 * tolerance)
    torch.testing.assert_close(rotated_ref(turned.float(), angle), twice.float(), rtol=0, atol=4 * tolerance)
    quarter = turn(x, angle=torch.full((3, 42), math.pi / 2))[1]
    first, second = y.chunk(2, dim=-1)
    torch.testing.assert_close(quarter, torch.cat([-second, first], dim=-1), rtol=0, atol=tolerance)


@each_dtype
@pytest.mark.parametrize("shape", [(3, 9, 84), (2, 520, 1024)], ids=str)
def test_angles_of_zero_change_no_bit(shape, dtype):
    """Also of what is written past the caches."""
    case = Case(shape=shape, dtype=dtype, adaptive=ADAPTIVE)
    inputs = case.inputs() | {"angle": torch.zeros(shape[0], shape[-1] // 2)}
    turned, plain = case.call(inputs), case.call({name: p for name, p in inputs.items() if name != "angle"})
    assert all(map(torch.equal, turned, plain))


@each_dtype
def test_the_stream_is_what_a_plain_sum_gives(dtype):
    x, branch = torch.randn(2, 5, 33, 77).to(dtype)
    stream, _ = add_layer_norm(x, branch, None, None)
    assert torch.equal(stream, x + branch)
    if dtype == torch.float32:
        assert torch.equal(add_layer_norm(x, branch.bfloat16(), None, None)[0], x + branch.bfloat16())


def test_without_a_branch_the_stream_is_x():
    x = torch.randn(2, 3, 8)
    stream, y = add_layer_norm(x, None, None, None)
    assert stream.data_ptr() == x.data_ptr()
    torch.testing.assert_close(y, torch.nn.functional.layer_norm(x, (8,)))


def test_a_mean_far_from_zero_costs_no_accuracy():
    x, branch = 1000 + torch.randn(4, 7, 512), torch.randn(4, 7, 512)
    stream, y = add_layer_norm(x, branch, None, None)
    _, truth = add_layer_norm_ref(stream.double(), None, None, None)
    assert (y - truth).abs().max() < 5e-6


def test_outputs_are_ordinary_tensors():
    x, branch = (torch.randn(2, 5, 8, requires_grad=True).transpose(0, 1) for _ in range(2))
    stream, y = add_layer_norm(x, branch, None, None)
    assert all(z.is_contiguous() for z in (stream, y))
    y += 1
    stream += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_inputs_that_are_not_dense():
    whole = torch.randn(3, 5, 9, 16)
    chunks = torch.randn(3, 56).split([16, 16, 16, 8], dim=1)  # come out of one projection
    case = Case(shape=(3, 9, 8), adaptive=ADAPTIVE)
    inputs = case.inputs() | {"x": whole[:, 1, :, ::2], "branch": whole[:, 2, :, 8:]}
    inputs |= {name: chunk[:, 1::2] for name, chunk in zip(case.adaptive, chunks, strict=True)}
    case.assert_parity(inputs)


@pytest.mark.parametrize("name", ["branch", "weight", "gate"])
def test_other_dtypes_beside_x_are_taken(name):
    for dtype, other in (
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.bfloat16),
        (torch.float32, torch.float64),
    ):
        case = Case(shape=(2, 5, 24), dtype=dtype, adaptive=("gate",))
        inputs = case.inputs()
        inputs[name] = inputs[name].to(other)
        stream, y = case.call(leaves := {key: p.requires_grad_() for key, p in inputs.items()})
        assert (stream.dtype, y.dtype) == (dtype, dtype)
        grads = torch.autograd.grad((stream.float() * y.float()).sum(), list(leaves.values()))
        assert [grad.dtype for grad in grads] == [p.dtype for p in leaves.values()]


@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize("adaptive", [(), ADAPTIVE], ids=["plain", "adaptive"])
def test_repetitions_give_the_same_bits(adaptive, num_threads):
    case = Case(shape=(3, 129, 80), adaptive=adaptive)
    inputs = {name: p.requires_grad_() for name, p in case.inputs().items()}

    def run() -> Gradients:
        stream, y = case.call(inputs)
        return (stream.detach(), y.detach(), *torch.autograd.grad((stream.sin() * y).sum(), list(inputs.values())))

    before, expected = torch.get_num_threads(), run()
    try:
        torch.set_num_threads(num_threads)
        for _ in range(100):
            assert all(map(torch.equal, run(), expected))
    finally:
        torch.set_num_threads(before)


@each_dtype
def test_uninitialised_memory_reaches_nothing(dtype):
    torch.use_deterministic_algorithms(True)  # fills fresh memory with NaN
    try:
        case = Case(shape=(3, 9, 38), dtype=dtype, adaptive=ADAPTIVE)
        inputs = {name: p.requires_grad_() for name, p in case.inputs().items()}
        stream, y = case.call(inputs)
        grads = torch.autograd.grad((stream * y).sum(), list(inputs.values()))
        assert all(p.isfinite().all() for p in (stream, y, *grads))
    finally:
        torch.use_deterministic_algorithms(False)


@each_dtype
def test_nan_and_infinity_stay_in_their_row(dtype):
    x = torch.randn(3, 40).to(dtype)
    x[0, 3], x[1, 0] = torch.nan, torch.inf
    if dtype == torch.bfloat16:
        x.view(torch.int16)[0, 3] = 0x7FFF  # the NaN that CUDA makes
    stream, y = add_layer_norm(x, torch.zeros_like(x), None, None)
    assert stream[0, 3].isnan()
    assert y[0].isnan().all()
    assert y[1].isnan().any()
    assert y[2].isfinite().all()


def test_empty_batches_give_empty_outputs_and_zero_gradients():
    for shape, dtype in (((0, 5, 8), torch.float32), ((3, 0, 8), torch.bfloat16), ((0, 8), torch.float64)):
        case = Case(shape=shape, dtype=dtype, adaptive=ADAPTIVE)
        inputs = {name: p.requires_grad_() for name, p in case.inputs().items()}
        stream, y = case.call(inputs)
        assert stream.shape == y.shape == shape
        grads = torch.autograd.grad((stream + y).sum(), list(inputs.values()))
        assert all(grad.shape == p.shape and not grad.any() for grad, p in zip(grads, inputs.values(), strict=True))


def kept_bytes(inputs: dict[str, Tensor], f: Callable[[], object]) -> int:
    kept = {}
    with saved_tensors_hooks(lambda p: kept.setdefault(p.untyped_storage().data_ptr(), p), lambda p: p):
        result = f()  # alive, so that no memory is given out twice
    own = {p.untyped_storage().data_ptr() for p in inputs.values()}
    assert result is not None
    return sum(p.untyped_storage().nbytes() for pointer, p in kept.items() if pointer not in own)


@pytest.mark.parametrize("adaptive", [(), ADAPTIVE], ids=["plain", "adaptive"])
def test_backward_keeps_the_stream_and_next_to_nothing_else(adaptive):
    case = Case(shape=(2, 40, 512), adaptive=adaptive)
    inputs = {name: p.requires_grad_() for name, p in case.inputs().items()}
    size = inputs["x"].nbytes
    assert size < kept_bytes(inputs, lambda: case.call(inputs)) < 1.01 * size
    case = Case(shape=(2, 40, 512), has_branch=False, adaptive=adaptive[:2])
    inputs = {name: p.requires_grad_() for name, p in case.inputs().items()}
    assert kept_bytes(inputs, lambda: case.call(inputs)) < 0.01 * size


def test_branch_is_kept_only_where_the_gate_wants_a_gradient():
    case = Case(shape=(2, 40, 512), adaptive=("gate",))
    for wants in (False, True):
        inputs = {name: p.requires_grad_(wants or name != "gate") for name, p in case.inputs().items()}
        others = {name: p for name, p in inputs.items() if name != "branch"}
        assert (kept_bytes(others, lambda inputs=inputs: case.call(inputs)) > 1.5 * inputs["x"].nbytes) == wants


@pytest.mark.parametrize("wanted", ["x", "branch", "weight", "bias", *ADAPTIVE])
def test_a_single_gradient_is_that_of_all(wanted):
    case = Case(shape=(2, 19, 40), adaptive=ADAPTIVE, branch_dtype=torch.bfloat16)
    inputs = case.inputs()

    def gradient(names: Sequence[str]) -> Tensor:
        leaves = {name: p.detach().requires_grad_(name in names) for name, p in inputs.items()}
        stream, y = case.call(leaves)
        return torch.autograd.grad((stream * y).sum(), leaves[wanted])[0]

    assert torch.equal(gradient([wanted]), gradient(list(inputs)))


def test_frozen_parameters_cost_nothing(monkeypatch):
    from scalelong.kernels import add_layer_norm_native

    seen = []
    real = add_layer_norm_native.backward
    monkeypatch.setattr(add_layer_norm_native, "backward", lambda *given: (seen.append(given[5]), real(*given)))
    case = Case(shape=(2, 19, 40), adaptive=("gain",))
    inputs = {name: p.requires_grad_(name == "x") for name, p in case.inputs().items()}
    stream, y = case.call(inputs)
    (stream + y).sum().backward()
    assert [grad is not None for grad in seen[0]] == [True, *[False] * 7]
    assert all(p.grad is None for name, p in inputs.items() if name != "x")


@pytest.mark.parametrize("used", ["stream", "y"])
def test_one_output_may_go_unused(used):
    case = Case(shape=(2, 9, 24), adaptive=ADAPTIVE)

    def gradients(ref: bool) -> Gradients:
        leaves = {name: p.detach().requires_grad_() for name, p in inputs.items()}
        outputs = dict(zip(("stream", "y"), case.call(leaves, ref=ref), strict=True))
        return torch.autograd.grad(outputs[used].sin().sum(), list(leaves.values()), allow_unused=True)

    inputs = case.inputs()
    for ours, expected in zip(gradients(False), gradients(True), strict=True):
        torch.testing.assert_close(
            torch.zeros(()) if ours is None else ours.sum(),
            torch.zeros(()) if expected is None else expected.sum(),
            rtol=1e-4,
            atol=1e-4,
        )


def test_the_reference_and_its_gradients_of_every_argument():
    case = Case(shape=(2, 3, 6), dtype=torch.float64, adaptive=ADAPTIVE)
    inputs = {name: p.requires_grad_() for name, p in case.inputs().items()}

    def f(*values):
        return case.call(dict(zip(inputs, values, strict=True)))

    assert torch.autograd.gradcheck(f, tuple(inputs.values()))
    assert torch.autograd.gradgradcheck(f, tuple(inputs.values()), fast_mode=True)


def penalty(op: Callable[..., tuple[Tensor, Tensor]], leaves: Sequence[Tensor], has_branch: bool) -> Gradients:
    """Gradients of the squared gradient of a loss; what the operator takes depends on one another outside it."""
    stream, y = op(**joined(leaves, has_branch))
    first = torch.autograd.grad((stream.sin() * y).sum(), list(leaves), create_graph=True)
    second = torch.autograd.grad(torch.stack([(grad**2).sum() for grad in first]).sum(), list(leaves))
    return *(grad.detach() for grad in first), *second


@pytest.mark.parametrize("has_branch", [False, True])
@pytest.mark.parametrize("how", ["eager", "compiled"])
def test_gradients_of_gradients_where_inputs_depend_on_one_another(has_branch, how):
    leaves = [torch.randn(2, 5, 12, requires_grad=True), torch.randn(12, 12, requires_grad=True)]
    op = torch.compile(add_layer_norm, fullgraph=True, backend="eager") if how == "compiled" else add_layer_norm
    truth = penalty(add_layer_norm_ref, [p.detach().double().requires_grad_() for p in leaves], has_branch)
    with use_backend("native"):
        found = penalty(op, leaves, has_branch)
    for ours, expected in zip(found, truth, strict=True):
        torch.testing.assert_close(ours.double(), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("has_branch", [False, True])
def test_transforms_of_torch_func(has_branch):
    leaves = (torch.randn(2, 5, 12), torch.randn(12, 12))

    def loss(op, *leaves: Tensor) -> Tensor:
        stream, y = op(**joined(leaves, has_branch))
        return (stream.sin() * y).sum()

    ours, plain = (partial(loss, op) for op in (add_layer_norm, add_layer_norm_ref))
    tangents = tuple(torch.randn_like(p) for p in leaves)
    for transform in (
        lambda f: torch.func.grad(f, argnums=(0, 1))(*leaves),
        lambda f: torch.func.jvp(f, leaves, tangents),
        lambda f: torch.func.vjp(f, *leaves)[1](torch.ones(())),
        lambda f: torch.func.vmap(torch.func.grad(f), (0, None))(leaves[0][:, None], leaves[1]),
    ):
        torch.testing.assert_close(transform(ours), transform(plain), rtol=1e-4, atol=1e-4)


def test_the_reference_can_be_forced():
    case = Case(dtype=torch.bfloat16)
    inputs = case.inputs()
    with use_backend("reference"):
        assert all(map(torch.equal, case.call(inputs), case.call(inputs, ref=True)))
    assert backend_of(inputs["x"]) == "native"
    with use_backend("native"), pytest.raises(RuntimeError, match="not float64"):
        case.call({name: p.double() for name, p in inputs.items()})


@each_value_once(
    "adaptive, has_branch, branch_dtype",
    ((), ADAPTIVE),
    (False, True),
    (torch.float32, torch.bfloat16),
)
def test_opcheck(adaptive, has_branch, branch_dtype):
    adaptive = tuple(name for name in adaptive if has_branch or name != "gate")
    case = Case(shape=(2, 7, 12), adaptive=adaptive, has_branch=has_branch, branch_dtype=branch_dtype)
    inputs = {name: p.requires_grad_() for name, p in case.inputs().items()}
    tensors = [inputs.get(name) for name in Inputs._fields]
    torch.library.opcheck(torch.ops.scalelong.add_layer_norm.default, (*tensors, 1e-5, branch_dtype))
    stream, y, mean, rstd = torch.ops.scalelong.add_layer_norm(*tensors, 1e-5, branch_dtype)
    kept = [None if p is None else p.detach().requires_grad_() for p in tensors]
    kept[0] = (stream if has_branch else inputs["x"]).detach().requires_grad_()
    dstream, dy = (torch.randn_like(p).requires_grad_() for p in (kept[0], y))
    options = (mean, rstd, branch_dtype if has_branch else None, 1e-5, [p is not None for p in tensors])
    torch.library.opcheck(torch.ops.scalelong.add_layer_norm_backward.default, (dstream, dy, *kept, *options))


def test_statistics_are_not_differentiable():
    x = torch.randn(3, 8, requires_grad=True)
    _, y, mean, rstd = torch.ops.scalelong.add_layer_norm(x, *[None] * 7, 1e-5, x.dtype)
    assert (y.requires_grad, mean.requires_grad, rstd.requires_grad) == (True, False, False)


@pytest.mark.slow
@each_value_once("adaptive, has_branch, as_operator", ((), ADAPTIVE), (False, True), (False, True))
def test_a_compiled_model_gives_the_same_numbers(adaptive, has_branch, as_operator):
    """As the operator, by which a GPU's graphs call it, and as the formula, which a CPU's have instead."""
    case = Case(shape=(2, 9, 24), adaptive=adaptive if has_branch else adaptive[:2], has_branch=has_branch)
    inputs = {name: p.requires_grad_() for name, p in case.inputs().items()}
    weight = torch.randn(24, 24, requires_grad=True)

    def model(*values):
        stream, y = case.call(dict(zip(inputs, (2 * value for value in values), strict=True)))
        return stream + y @ weight

    leaves = (*inputs.values(), weight)
    eager = model(*inputs.values())
    with use_backend("native") if as_operator else nullcontext():
        compiled = torch.compile(model, fullgraph=True)(*inputs.values())
    d_output = torch.randn_like(eager)
    torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-4)
    for ours, expected in zip(*(torch.autograd.grad(z, leaves, d_output) for z in (compiled, eager)), strict=True):
        assert (ours - expected).norm() <= 1e-4 * expected.norm() + 1e-6


def test_one_graph_serves_every_size():
    torch.compiler.reset()
    graphs = []

    def count(graph, _):
        graphs.append(graph)
        return graph

    compiled = torch.compile(
        partial(add_layer_norm, weight=None, bias=None), fullgraph=True, dynamic=True, backend=count
    )
    with use_backend("native"):
        for shape in ((2, 5, 8), (3, 7, 8), (4, 9, 16)):
            x, branch = torch.randn(shape), torch.randn(shape)
            torch.testing.assert_close(compiled(x, branch), add_layer_norm(x, branch, None, None))
        assert len(graphs) == 1
        torch.testing.assert_close(compiled(x, branch, eps=0.1), add_layer_norm(x, branch, None, None, eps=0.1))


def test_exported_graphs_keep_the_operator():
    class Model(torch.nn.Module):
        def forward(self, x, branch):
            return add_layer_norm(x, branch, None, None)

    x, branch = torch.randn(2, 2, 5, 8)
    batch = torch.export.Dim("batch", min=2)
    shapes = ({0: batch}, {0: batch})
    exported = torch.export.export(Model(), (x, branch), dynamic_shapes=shapes)
    assert any("scalelong.add_layer_norm" in str(node.target) for node in exported.graph.nodes)
    x, branch = torch.randn(2, 4, 5, 8)
    torch.testing.assert_close(exported.module()(x, branch), add_layer_norm(x, branch, None, None))


def test_autocast_gives_the_dtype_of_the_next_product():
    x, branch = torch.randn(2, 3, 5, 8)
    weight, bias = torch.randn(2, 8, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        for added in (None, branch, branch.bfloat16()):
            stream, y = add_layer_norm(x, added, weight, bias)
            assert (stream.dtype, y.dtype) == (torch.float32, torch.bfloat16)
            expected = add_layer_norm_ref(x, added, weight, bias)
            assert torch.equal(stream, expected[0])
            torch.testing.assert_close(y, expected[1], rtol=2**-7, atol=1e-6)
        assert add_layer_norm(x.half(), None, weight, bias)[1].dtype == torch.bfloat16
        assert add_layer_norm(x.double(), None, weight, bias)[1].dtype == torch.float64
        y = add_layer_norm(x, branch.bfloat16(), weight, bias)[1]
    assert torch.autograd.grad(y.sum(), weight)[0].dtype == torch.float32


def test_a_module_trains_under_activation_recomputing():
    x, branch = (torch.randn(2, 9, 24, requires_grad=True) for _ in range(2))

    def f(x, branch):
        stream, y = add_layer_norm(x, branch, None, None)
        return stream * y.sin()

    expected = torch.autograd.grad(f(x, branch).sum(), (x, branch))
    found = torch.autograd.grad(checkpoint(f, x, branch, use_reentrant=False).sum(), (x, branch))
    assert all(map(torch.equal, found, expected))


X, W = torch.zeros(2, 5, 8), torch.ones(8)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((X, X[:1], None, None), {}, r"branch has shape \(1, 5, 8\), but x \(2, 5, 8\)"),
        ((X, X[..., :4], None, None), {}, r"branch has shape \(2, 5, 4\), but x \(2, 5, 8\)"),
        ((X, X.to("meta"), None, None), {}, r"branch is \(2, 5, 8\) float32 on meta, but x is .* on cpu"),
        ((X, X.long(), None, None), {}, "branch is .* int64"),
        ((X, X, W[:4], None), {}, r"weight has shape \(4,\), but x \(2, 5, 8\) needs \(8,\)"),
        ((X, X, None, X), {}, r"bias has shape \(2, 5, 8\)"),
        ((X, X, None, None), {"gain": W}, r"gain has shape \(8,\), but x \(2, 5, 8\) needs \(2, 8\)"),
        ((X, X, None, None), {"shift": torch.ones(3, 8)}, r"shift has shape \(3, 8\)"),
        ((X, X, None, None), {"gate": torch.ones(2, 1, 8)}, r"gate has shape \(2, 1, 8\)"),
        ((X, X, None, None), {"angle": torch.ones(2, 8)}, r"angle has shape \(2, 8\), but x .* needs \(2, 4\)"),
        ((X[..., 1:], X[..., 1:], None, None), {"angle": torch.ones(2, 3)}, r"pairs .* \(2, 5, 7\) has an odd number"),
        ((X, None, None, None), {"gate": torch.ones(2, 8)}, r"gate \(2, 8\) without a branch"),
        ((W, W, None, None), {"gain": torch.ones(1, 8)}, r"gain has shape \(1, 8\), but x \(8,\)"),
        ((X.long(), None, None, None), {}, r"needs a floating x of \(..., D\), got \(2, 5, 8\) int64"),
        ((torch.tensor(1.0), None, None, None), {}, r"got \(\) float32"),
        ((X, X, None, None), {"eps": -1.0}, "eps must be a finite number from 0 up, got -1.0"),
        ((X, X, None, None), {"eps": float("nan")}, "eps must be"),
        ((X, X, None, None), {"eps": float("inf")}, "eps must be"),
    ],
)
def test_arguments_that_do_not_fit_are_named(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        add_layer_norm(*arguments, **options)


def test_the_native_entry_points_check_what_they_are_given():
    op = torch.ops.scalelong_native.add_layer_norm_forward.default
    x, y, statistics = torch.randn(3, 8), torch.empty(3, 8), [torch.empty(3), torch.empty(3)]
    nothing = [None] * 6
    for wrong, message in (
        ((None, y[:2], *statistics, x, None, *nothing, 1, 1e-5), "y has 16 elements instead of 24"),
        ((None, y, *statistics, x, None, torch.ones(7), *nothing[1:], 1, 1e-5), "weight has 7 elements"),
        ((None, y, *statistics, x, None, torch.ones(8).half(), *nothing[1:], 1, 1e-5), "weight is no float32"),
        ((None, y, *statistics, x, None, torch.ones(8).double(), *nothing[1:], 1, 1e-5), "weight is none of"),
        ((None, y, *statistics, x, x, *nothing, 1, 1e-5), "a branch makes a stream"),
        ((None, y.half(), *statistics, x.bfloat16(), None, *nothing, 1, 1e-5), "no kernel for these dtypes"),
        ((None, y.T.contiguous().T, *statistics, x, None, *nothing, 1, 1e-5), "y is no contiguous"),
        ((None, y, *statistics, x, None, *nothing, 2, 1e-5), "3 rows do not divide"),
        ((None, y[:, 1:].clone(), *statistics, x[:, 1:].clone(), None, *nothing[:5], y[0], 1, 1e-5), "turn pairs"),
        ((None, y, *statistics, x, None, *nothing[:5], torch.ones(3), 1, 1e-5), "angle has 3 elements instead of 4"),
    ):
        with pytest.raises(RuntimeError, match=message):
            op(*wrong)
