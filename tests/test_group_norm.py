"""The fused GroupNorm on a CPU: numbers, gradients, layouts, registration, and what it says to bad input."""

import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from group_norm_cases import SCALES, Case, in_channels_last
from instruction_sets import FLAGS, run_on
from samples import each_value_once
from second_order import assert_ordinary, assert_transforms, assert_twice_differentiable
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from scalelong.kernels import backend, native_library
from scalelong.kernels.backend import backend_of, use_backend
from scalelong.kernels.group_norm import group_norm, group_norm_ref, skip_group_norm, skip_group_norm_ref

ROOT = Path(__file__).resolve().parents[1]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
both_layouts = pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])


def test_the_native_library_runs():
    assert native_library.ERROR is None
    assert backend_of(torch.zeros(1)) == "native"


@both_layouts
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("hidden", "skip", "spatial", "groups"),
    [
        (256, 256, (4, 4), 32),
        (256, 128, (16, 16), 32),  # the boundary lies inside a group
        (576, 384, (8, 8), 32),
        (6, 6, (70, 70), 2),  # rows of several pieces
        (40, 24, (2, 3, 5), 8),
        (7, 5, (13,), 3),
        (1, 300, (5, 5), 7),
    ],
)
def test_parity_at_shapes_of_networks_and_odd_ones(hidden, skip, spatial, groups, dtype, channels_last):
    Case(
        num_hidden=hidden, num_skip=skip, spatial=spatial, groups=groups, dtype=dtype, channels_last=channels_last
    ).assert_parity()


@both_layouts
@pytest.mark.parametrize("isa", FLAGS)
def test_parity_on_each_instruction_set(isa, channels_last):
    code = f"""
import itertools, torch
from group_norm_cases import Case
torch.set_num_threads(1)
for dtype, act, spatial, mean in itertools.product(
    [torch.float32, torch.bfloat16, torch.float16], ["silu", "gelu", "gelu-tanh"], [(9, 9), (64, 33)], [0.0, 100.0]
):
    torch.manual_seed(0)
    Case(num_hidden=20, num_skip=13, spatial=spatial, groups=3, dtype=dtype, act=act, mean=mean,
         channels_last={channels_last}).assert_parity()
for dtype in (torch.bfloat16, torch.float16):  # each small number, subnormal ones included, is read and written right
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    x = x[x.abs() < 2].reshape(1, 1, -1).expand(1, 2, -1)
    case = Case(num_hidden=2, num_skip=0, groups=1, is_affine=False, act=None, channels_last={channels_last})
    y, truth = case.call({{"h": x}}), case.call({{"h": x.double()}}, ref=True)
    tiny, eps = 3e-7, torch.finfo(dtype).eps
    assert ((y - truth).abs() <= 0.51 * eps * truth.abs() + tiny).all()
"""
    run_on(isa, code)


@both_layouts
def test_a_mean_far_from_zero_costs_no_accuracy(channels_last):
    h, s = (1000 + torch.randn(2, 8, 40, 40) for _ in range(2))
    if channels_last:
        h, s = in_channels_last(h), in_channels_last(s)
    y = skip_group_norm(h, s, 0.5, 4, None, None, act=None)
    truth = skip_group_norm_ref(h.double(), s.double(), 0.5, 4, None, None, act=None)
    # The fp32 numbers themselves are 6e-5 apart here; a variance as E[x^2] - E[x]^2 would be off by 0.1 and more.
    assert (y - truth).abs().max() < 5e-6


@both_layouts
def test_one_outlier_among_equals_costs_no_accuracy(channels_last):
    x = torch.zeros(1, 4, 64, 64)
    x[0, 0, 0, 0] = 1e6  # the element that the shifted sums start from
    x = in_channels_last(x) if channels_last else x
    truth = group_norm_ref(x.double(), 2, None, None, act=None)
    assert torch.allclose(group_norm(x, 2, None, None, act=None).double(), truth, rtol=1e-5, atol=1e-7)


@both_layouts
@pytest.mark.parametrize("seed", range(12))
def test_one_outlier_among_many_numbers_stays_within_budget(channels_last, seed):
    torch.manual_seed(seed)
    case = Case(spatial=(64, 64), channels_last=channels_last)
    inputs = case.inputs()
    position = 0 if seed % 2 else int(torch.randint(64 * 64, ()))  # the first, and any
    inputs["h"][0, seed % 8, position // 64, position % 64] = 1e5
    case.assert_parity(inputs)


@both_layouts
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("power", [11, 14, 24])
@pytest.mark.parametrize("act", ["silu", "gelu-tanh", None])
def test_tiny_factors_stay_within_budget(channels_last, dtype, power, act):
    case = Case(num_hidden=5, num_skip=7, groups=3, spatial=(12, 12), dtype=dtype, act=act, channels_last=channels_last)
    inputs = case.inputs() | {"scale": torch.tensor(0.5**power, dtype=dtype)}
    case.assert_parity({**inputs, "weight": inputs["weight"].half(), "bias": inputs["bias"].half()})


@both_layouts
def test_a_hidden_stream_without_channels_leaves_the_skip(channels_last):
    h, s = torch.randn(2, 0, 5, 5), torch.randn(2, 8, 5, 5)
    if channels_last:
        s = in_channels_last(s)
        h = torch.randn(2, 5, 5, 0).movedim(-1, 1)
    y = skip_group_norm(h, s, 0.5, 4, None, None)
    torch.testing.assert_close(y, group_norm_ref(0.5 * s, 4, None, None))


@both_layouts
@pytest.mark.parametrize("num_threads", [1, 2])
def test_repetitions_give_the_same_bits(channels_last, num_threads):
    case = Case(batch=3, num_hidden=20, num_skip=12, spatial=(24, 24), scale="(N,Cs)", channels_last=channels_last)
    inputs = {name: x.requires_grad_() for name, x in case.inputs().items()}

    def run():
        y = case.call(inputs)
        return (y.detach(), *torch.autograd.grad(y.sin().sum(), list(inputs.values())))

    before = torch.get_num_threads()
    expected = run()
    try:
        torch.set_num_threads(num_threads)
        for _ in range(100):
            assert all(torch.equal(a, b) for a, b in zip(run(), expected, strict=True))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("scale", SCALES)
def test_the_reference_and_its_gradients_of_every_argument(scale):
    case = Case(num_hidden=3, num_skip=3, spatial=(2, 2), groups=2, scale=scale, is_adaptive=True, dtype=torch.float64)
    inputs = {name: x.requires_grad_() for name, x in case.inputs().items()}
    assert torch.autograd.gradcheck(
        lambda *values: case.call(dict(zip(inputs, values, strict=True))), tuple(inputs.values())
    )


def test_gradients_of_gradients_come_from_the_reference():
    case = Case(scale="(Cs,)")
    inputs = {name: x.requires_grad_() for name, x in case.inputs().items()}

    def penalty(ref):
        y = case.call(inputs, ref=ref)
        (dh,) = torch.autograd.grad(y.square().sum(), inputs["h"], create_graph=True)
        return torch.autograd.grad(dh.square().sum(), list(inputs.values()))

    for ours, expected in zip(penalty(ref=False), penalty(ref=True), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


def dependent_inputs(h, kernel, projection, weight, bias):
    """The skip is computed from h, the scale from the skip, gain and shift from both."""
    s = F.conv2d(h, kernel, padding=1)
    pooled = torch.cat([h.mean((2, 3)), s.mean((2, 3))], 1) @ projection
    gain, shift = pooled.chunk(2, dim=1)
    return h, s, s.mean((2, 3)).sigmoid(), weight, bias, gain, shift


def of_dependent(op):
    def call(h, s, scale, weight, bias, gain, shift):
        return op(h, s, scale, 3, weight, bias, gain=gain, shift=shift)

    return call


def leaves_of_dependent(dtype=torch.float32):
    shapes = ((2, 8, 5, 4), (4, 8, 3, 3), (12, 24), (12,), (12,))
    return [0.5 * torch.randn(shape, dtype=dtype) for shape in shapes]


@both_layouts
def test_create_graph_counts_each_path_between_the_inputs_once(channels_last):
    h, *others = leaves_of_dependent()
    h = in_channels_last(h) if channels_last else h
    assert_twice_differentiable(
        of_dependent(skip_group_norm), of_dependent(skip_group_norm_ref), dependent_inputs, [h, *others]
    )


@both_layouts
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_registered_operator_differentiates_twice(channels_last, dtype):
    h, *others = leaves_of_dependent(dtype)
    h = in_channels_last(h) if channels_last else h

    def operator(h, s, scale, weight, bias, gain, shift):
        tensors = (h, s, scale, weight, bias, gain, shift)
        return torch.ops.scalelong.skip_group_norm(*tensors, 1.0, 3, 1e-5, "silu")[0]

    assert_twice_differentiable(operator, of_dependent(skip_group_norm_ref), dependent_inputs, [h, *others])
    compiled = torch.compile(of_dependent(skip_group_norm), backend="eager", fullgraph=True)
    assert_twice_differentiable(compiled, of_dependent(skip_group_norm_ref), dependent_inputs, [h, *others])


def test_the_registered_operator_computes_what_is_wanted():
    inputs = dependent_inputs(*leaves_of_dependent())
    leaves = [x.detach().requires_grad_(i in (1, 3)) for i, x in enumerate(inputs)]
    y, mean, rstd = torch.ops.scalelong.skip_group_norm(*leaves, 1.0, 3, 1e-5, "silu")
    assert not mean.requires_grad
    assert not rstd.requires_grad
    wanted = [False, True, False, True, False, False, False]
    grads = torch.ops.scalelong.skip_group_norm_backward(
        torch.ones_like(y), *leaves, mean, rstd, 1.0, 3, 1e-5, "silu", wanted
    )
    assert [grad.numel() > 0 for grad in grads] == wanted
    for ours, expected in zip((grads[1], grads[3]), torch.autograd.grad(y.sum(), (leaves[1], leaves[3])), strict=True):
        assert torch.equal(ours, expected)


def test_transforms_of_torch_func_see_through_it():
    inputs = [x.detach() for x in dependent_inputs(*leaves_of_dependent())]
    assert_transforms(of_dependent(skip_group_norm), of_dependent(skip_group_norm_ref), inputs)
    h, weight, bias = torch.randn(2, 6, 5), torch.randn(6), torch.randn(6)
    assert_transforms(
        lambda *x: group_norm(x[0], 3, x[1], x[2], act="gelu"),
        lambda *x: group_norm_ref(x[0], 3, x[1], x[2], act="gelu"),
        [h, weight, bias],
    )
    y, gradients_for, *_ = torch.func.vjp(lambda h: group_norm(h, 3, weight, bias), h)
    leaf = h.clone().requires_grad_()
    expected = torch.autograd.grad(group_norm_ref(leaf, 3, weight, bias), leaf, torch.ones_like(y))
    torch.testing.assert_close(gradients_for(torch.ones_like(y)), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("spatial", [(), (5,), (5, 4), (2, 3, 4)])
@both_layouts
def test_the_output_is_no_view_and_may_be_changed_in_place(channels_last, spatial):
    case = Case(spatial=spatial, channels_last=channels_last and bool(spatial), scale="(Cs,)")
    inputs = case.inputs()
    y = case.call(inputs)
    assert (y.movedim(1, -1) if case.channels_last else y).is_contiguous()
    assert_ordinary(lambda *values: case.call(dict(zip(inputs, values, strict=True))), list(inputs.values()))


@both_layouts
@pytest.mark.parametrize("scale", ["none", "(N,Cs)"])
def test_streams_and_skips_without_channels(channels_last, scale):
    inputs = Case(num_hidden=12, num_skip=12, spatial=(5, 7), channels_last=channels_last, scale=scale).inputs()
    case = Case(num_hidden=12, num_skip=12, scale=scale)
    for empty in ("h", "s"):
        kept = {**inputs, "weight": inputs["weight"][:12], "bias": inputs["bias"][:12], empty: inputs[empty][:, :0]}
        if empty == "s" and scale != "none":
            kept["scale"] = inputs["scale"][:, :0]
        case.assert_parity(kept)
    y = group_norm(torch.zeros(2, 0, 5, 7), 4, torch.zeros(0), torch.zeros(0))
    assert y.shape == (2, 0, 5, 7)


def test_the_reference_is_what_the_formula_says():
    h, s, scale = torch.randn(2, 4, 3, 3), torch.randn(2, 2, 3, 3), torch.rand(2)
    weight, bias, gain, shift = torch.randn(6), torch.randn(6), torch.randn(2, 6), torch.randn(2, 6)
    x = torch.cat([h, s * scale[None, :, None, None]], 1).reshape(2, 3, -1)
    xhat = (x - x.mean(2, keepdim=True)) / (x.var(2, keepdim=True, correction=0) + 1e-3).sqrt()
    z = xhat.reshape(2, 6, 3, 3) * weight[:, None, None] + bias[:, None, None]
    z = z * (1 + gain[..., None, None]) + shift[..., None, None]
    y = skip_group_norm_ref(h, s, scale, 3, weight, bias, gain=gain, shift=shift, eps=1e-3)
    torch.testing.assert_close(y, z * z.sigmoid())


def test_a_scalar_scale_changes_only_groups_that_hold_both():
    h, s = torch.randn(2, 8, 6, 6), torch.randn(2, 8, 6, 6)
    one, half = (skip_group_norm(h, s, scale, 4, None, None) for scale in (1.0, 0.5))
    assert torch.equal(one[:, :8], half[:, :8])
    assert (one[:, 8:] - half[:, 8:]).abs().max() < 1e-4
    one, half = (skip_group_norm(h, s, scale, 1, None, None) for scale in (1.0, 0.5))
    assert (one - half).abs().max() > 0.1


def test_a_scale_of_zero_hides_the_skip():
    h, s = torch.randn(2, 8, 6, 6), torch.randn(2, 4, 6, 6, requires_grad=True)
    y = skip_group_norm(h, s, 0.0, 3, None, None)
    torch.testing.assert_close(y[:, :8], group_norm(h, 2, None, None))
    (ds,) = torch.autograd.grad(y.sum(), s)
    assert not ds.any()


@pytest.mark.parametrize("spatial", [(6,), (4, 6), (2, 4, 6)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_output_has_the_layout_of_h(spatial, dtype):
    case = Case(spatial=spatial, dtype=dtype, channels_last=True)
    inputs = case.inputs()
    y = case.call(inputs)
    assert y.movedim(1, -1).is_contiguous()
    assert y.dtype == dtype
    inputs["s"] = inputs["s"].contiguous()
    assert torch.equal(case.call(inputs), y)
    inputs["h"] = inputs["h"].contiguous()
    assert case.call(inputs).is_contiguous()
    torch.testing.assert_close(case.call(inputs), y, rtol=2e-2, atol=2e-2)


def test_views_that_are_not_dense_or_not_aligned():
    whole = torch.randn(2, 9, 12, 12)
    case = Case(num_hidden=4, num_skip=4, spatial=(6, 6), groups=2)
    inputs = {**case.inputs(), "h": whole[:, 1:5, ::2, 1::2], "s": whole[:, 5:9, 3:9, :6].mT}
    case.assert_parity(inputs)
    flat = torch.randn(2 * 2 * 4 * 36 + 1)[1:]
    case.assert_parity({**case.inputs(), "h": flat[:288].view(2, 4, 6, 6), "s": flat[288:].view(2, 4, 6, 6)})
    chunks = torch.randn(2, 16).chunk(2, 1)  # gain and shift come out of one projection
    case.assert_parity({**case.inputs(), "gain": chunks[0], "shift": chunks[1]})


def test_parameters_may_keep_their_own_dtype():
    h, s, scale = torch.randn(2, 8, 4, 4).bfloat16(), torch.randn(2, 8, 4, 4).bfloat16(), torch.rand(8)
    weight, bias = torch.randn(16), torch.randn(16)
    leaves = [x.requires_grad_() for x in (h, s, scale, weight, bias)]
    y = skip_group_norm(h, s, scale, 4, weight, bias)
    assert y.dtype == torch.bfloat16
    grads = torch.autograd.grad(y.float().square().sum(), leaves)
    assert [grad.dtype for grad in grads] == [x.dtype for x in leaves]


@both_layouts
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_uninitialised_memory_reaches_nothing(channels_last, dtype):
    torch.use_deterministic_algorithms(True)  # fills fresh memory with NaN
    try:
        case = Case(num_hidden=11, num_skip=7, spatial=(9, 7), groups=3, dtype=dtype, channels_last=channels_last)
        inputs = {name: x.requires_grad_() for name, x in case.inputs().items()}
        y = case.call(inputs)
        assert y.isfinite().all()
        assert all(grad.isfinite().all() for grad in torch.autograd.grad(y.sum(), list(inputs.values())))
    finally:
        torch.use_deterministic_algorithms(False)


@both_layouts
def test_nan_and_infinity_show_in_their_group(channels_last):
    x = torch.randn(2, 4, 8, 8)
    x[0, 0, 3, 3], x[1, 2, 0, 0] = torch.nan, torch.inf
    y = group_norm(in_channels_last(x) if channels_last else x, 2, None, None)
    assert y[0, :2].isnan().all()
    assert y[1, 2:].isnan().any()
    assert y[0, 2:].isfinite().all()
    assert y[1, :2].isfinite().all()


@pytest.mark.parametrize("spatial", [(), (4, 4)])
def test_empty_batches_give_empty_outputs_and_zero_gradients(spatial):
    for case in (Case(batch=0, spatial=spatial), Case(spatial=(4, 0)), Case(batch=0, num_skip=0, dtype=torch.float64)):
        inputs = {name: x.requires_grad_() for name, x in case.inputs().items()}
        y = case.call(inputs)
        assert y.numel() == 0
        grads = torch.autograd.grad(y.sum(), list(inputs.values()))
        assert all(grad.shape == x.shape and not grad.any() for grad, x in zip(grads, inputs.values(), strict=True))


@both_layouts
def test_backward_keeps_the_inputs_and_next_to_nothing_else(channels_last):
    case = Case(batch=1, num_hidden=64, num_skip=64, spatial=(32, 32), groups=32, channels_last=channels_last)
    inputs = {name: x.requires_grad_() for name, x in case.inputs().items()}
    kept = {}
    with saved_tensors_hooks(lambda x: kept.setdefault(x.untyped_storage().data_ptr(), x), lambda x: x):
        y = case.call(inputs)
    own = {x.untyped_storage().data_ptr() for x in inputs.values()}
    num_bytes = sum(x.untyped_storage().nbytes() for pointer, x in kept.items() if pointer not in own)
    assert 0 < num_bytes < 0.01 * y.nbytes


@each_value_once("scale, channels_last", ("none", "(N,Cs)"), (False, True))
def test_opcheck(channels_last, scale):
    case = Case(channels_last=channels_last, scale=scale, is_adaptive=scale != "none", is_affine=scale != "none")
    x = {name: x.requires_grad_() for name, x in case.inputs().items()}
    names = ("h", "s", "scale", "weight", "bias", "gain", "shift")
    tensors, options = [x.get(name) for name in names], (0.5, case.groups, 1e-5, "silu")
    torch.library.opcheck(torch.ops.scalelong.skip_group_norm.default, (*tensors, *options))
    y, mean, rstd = torch.ops.scalelong.skip_group_norm(*tensors, *options)
    tensors = [None if x is None else x.detach() for x in (torch.randn_like(y), *tensors, mean, rstd)]
    backward = torch.ops.scalelong.skip_group_norm_backward.default
    torch.library.opcheck(backward, (*tensors, *options, [True] * 7))
    torch.library.opcheck(backward, (*tensors, *options, [False, *[True] * 6]))
    differentiable = [None if x is None else x.requires_grad_() for x in tensors[:8]]
    torch.library.opcheck(backward, (*differentiable, *tensors[8:], *options, [True] * 7))


@pytest.mark.slow
@each_value_once("channels_last, dtype", (False, True), (torch.float32, torch.bfloat16))
def test_a_compiled_model_gives_the_same_numbers(channels_last, dtype):
    case = Case(num_hidden=16, num_skip=8, spatial=(8, 8), is_adaptive=True, dtype=dtype, channels_last=channels_last)
    inputs = {name: x.requires_grad_() for name, x in case.inputs().items()}
    weight = torch.randn(4, 24, 3, 3, dtype=dtype, requires_grad=True)

    def model(*values):
        y = case.call(dict(zip(inputs, (2 * value for value in values), strict=True)))
        return F.conv2d(y, weight, padding=1)

    eager, compiled = model(*inputs.values()), torch.compile(model, fullgraph=True)(*list(inputs.values()))
    leaves, d_output = (*inputs.values(), weight), torch.randn_like(eager)
    close = {torch.float32: 1e-4, torch.bfloat16: 5e-2}[dtype]
    torch.testing.assert_close(compiled, eager, rtol=close, atol=close)
    for ours, expected in zip(
        torch.autograd.grad(compiled, leaves, d_output), torch.autograd.grad(eager, leaves, d_output), strict=True
    ):
        assert (ours - expected).norm() <= close * expected.norm() + 1e-6


def test_compiled_with_a_float_scale_and_changing_batches():
    compiled = torch.compile(
        lambda h, s, scale: skip_group_norm(h, s, scale, 4, None, None), fullgraph=True, backend="aot_eager"
    )
    for batch, scale in ((2, 0.5), (3, 0.5), (5, 0.7)):
        h, s = torch.randn(batch, 8, 4, 4), torch.randn(batch, 4, 4, 4)
        torch.testing.assert_close(compiled(h, s, scale), skip_group_norm(h, s, scale, 4, None, None))


@both_layouts
def test_compiled_with_dynamic_shapes_and_floats(channels_last):
    def f(h, s, scale, eps):
        return skip_group_norm(h, s, scale, 4, None, None, eps=eps)

    compiled = torch.compile(f, fullgraph=True, dynamic=True, backend="aot_eager")
    for batch, channels, size, scale, eps in ((2, 8, 4, 0.5, 1e-5), (3, 12, 5, 0.25, 1e-3), (1, 4, 7, 2.0, 1e-2)):
        inputs = [torch.randn(batch, channels, size, size + 1) for _ in range(2)]
        inputs = [in_channels_last(x) if channels_last else x for x in inputs]
        leaves = [x.requires_grad_() for x in inputs]
        ours, expected = compiled(*leaves, scale, eps), f(*leaves, scale, eps)
        torch.testing.assert_close(ours, expected)
        assert ours.stride() == expected.stride()
        for grad, of_eager in zip(
            torch.autograd.grad(ours.sin().sum(), leaves),
            torch.autograd.grad(expected.sin().sum(), leaves),
            strict=True,
        ):
            torch.testing.assert_close(grad, of_eager)


def test_autocast_promotes_as_a_concatenation_does():
    h, s = torch.randn(2, 8, 4, 4).bfloat16(), torch.randn(2, 8, 4, 4)
    weight, bias = torch.randn(16, requires_grad=True), torch.randn(16, requires_grad=True)
    with pytest.raises(ValueError, match=r"bfloat16 on cpu but s is .* float32"):
        skip_group_norm(h, s, 0.5, 4, weight, bias)
    with torch.autocast("cpu", torch.bfloat16):
        y = skip_group_norm(h, s, 0.5, 4, weight, bias)
        assert y.dtype == torch.float32
        assert skip_group_norm(h, s.bfloat16(), 0.5, 4, weight, bias).dtype == torch.bfloat16
        assert group_norm(s, 4, None, None).dtype == torch.float32
    truth = skip_group_norm_ref(h.double(), s.double(), 0.5, 4, weight.double(), bias.double())
    assert (y - truth).abs().max() < 1e-5
    assert torch.autograd.grad(y.sum(), weight)[0].dtype == torch.float32


def test_a_module_trains_under_activation_recomputing():
    h, s = torch.randn(2, 8, 4, 4, requires_grad=True), torch.randn(2, 8, 4, 4, requires_grad=True)
    scale = torch.tensor(0.5, requires_grad=True)
    plain = torch.autograd.grad(skip_group_norm(h, s, scale, 4, None, None).sin().sum(), (h, s, scale))
    y = checkpoint(
        lambda h, s, scale: skip_group_norm(h, s, scale, 4, None, None).sin(), h, s, scale, use_reentrant=False
    )
    assert all(torch.equal(a, b) for a, b in zip(torch.autograd.grad(y.sum(), (h, s, scale)), plain, strict=True))


class TestBackends:
    def test_each_is_chosen_by_the_tensor(self):
        assert backend_of(torch.zeros(1, dtype=torch.float64)) == "reference"
        assert backend_of(torch.zeros(1, device="meta")) == "reference"
        with use_backend("reference"):
            assert backend_of(torch.zeros(1)) == "reference"
            with use_backend("native"):
                assert backend_of(torch.zeros(1)) == "native"
            assert backend_of(torch.zeros(1)) == "reference"
        assert backend_of(torch.zeros(1)) == "native"

    def test_a_forced_one_gives_its_own_numbers(self):
        case = Case(dtype=torch.bfloat16)
        inputs = case.inputs()
        with use_backend("reference"):
            assert torch.equal(case.call(inputs), case.call(inputs, ref=True))

    def test_one_that_cannot_run_says_why(self):
        with pytest.raises(ValueError, match="'cudnn' is none of triton, native, reference"), use_backend("cudnn"):
            pass
        with (
            use_backend("native"),
            pytest.raises(RuntimeError, match="takes float32, bfloat16 and float16, not float64"),
        ):
            group_norm(torch.zeros(1, 2, 3, 3, dtype=torch.float64), 2, None, None)
        if not torch.cuda.is_available():
            with pytest.raises(RuntimeError, match="torch sees no GPU"), use_backend("triton"):
                pass

    def test_a_missing_library_is_said_once_with_the_command_that_builds_it(self, monkeypatch):
        monkeypatch.setattr(native_library, "ERROR", "the native library is not built (nowhere.so is missing)")
        monkeypatch.setattr(backend, "_has_warned", False)
        x = torch.randn(1, 4, 3, 3)
        with pytest.warns(UserWarning, match=r"nowhere.so.*pip install -e \.") as caught:
            y = group_norm(x, 2, None, None)
        assert caught[0].filename == __file__
        torch.testing.assert_close(y, group_norm_ref(x, 2, None, None))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            group_norm(x, 2, None, None)
        with pytest.raises(RuntimeError, match="not built"), use_backend("native"):
            pass


X = torch.zeros(2, 8, 4, 4)
S = torch.zeros(2, 4, 4, 4)
W = torch.ones(12)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((X, torch.zeros(3, 4, 4, 4), None, 4, W, W), {}, r"\(2, 8, 4, 4\) and s \(3, 4, 4, 4\) may differ"),
        ((X, torch.zeros(2, 4, 4, 5), None, 4, W, W), {}, r"\(2, 8, 4, 4\) and s \(2, 4, 4, 5\) may differ"),
        ((X, torch.zeros(2, 4, 16), None, 4, W, W), {}, r"\(2, 4, 16\) may differ"),
        ((X, S.half(), None, 4, W, W), {}, r"h is .* float32 on cpu but s is \(2, 4, 4, 4\) float16"),
        ((X, S.to("meta"), None, 4, W, W), {}, r"float32 on cpu but s is .* on meta"),
        (
            (X, S, None, 5, W, W),
            {},
            r"12 channels of h \(2, 8, 4, 4\) and s \(2, 4, 4, 4\) do not divide into 5 groups",
        ),
        ((X, S, None, 0, W, W), {}, "0 groups"),
        ((X, S, torch.ones(5), 4, W, W), {}, r"scale has shape \(5,\), but s .* \(4,\), \(2, 4\), \(2, 1\)"),
        ((X, S, torch.ones(1, 4), 4, W, W), {}, r"scale has shape \(1, 4\)"),
        ((X, S, torch.ones(4, dtype=torch.int64), 4, W, W), {}, "scale is .* int64"),
        ((X, S, None, 4, W[:8], W), {}, r"weight has shape \(8,\), but 12 channels need \(12,\)"),
        ((X, S, None, 4, W, W[:8]), {}, r"bias has shape \(8,\)"),
        ((X, S, None, 4, W, None), {}, "weight without bias"),
        ((X, S, None, 4, None, W), {}, "bias without weight"),
        ((X, S, None, 4, W, W), {"gain": torch.ones(2, 8)}, r"gain has shape \(2, 8\), but 12 channels need \(2, 12\)"),
        ((X, S, None, 4, W, W), {"shift": torch.ones(12)}, r"shift has shape \(12,\)"),
        ((X, S, None, 4, W, W), {"act": "relu"}, "act 'relu' is none of 'silu', 'gelu', 'gelu-tanh', None"),
        ((X, S, None, 4, W, W), {"eps": -1.0}, "eps must be"),
        ((X, S, None, 4, W, W), {"eps": float("nan")}, "eps must be"),
        ((X, S, None, 4, W, W), {"eps": float("inf")}, "eps must be"),
        ((X.long(), S.long(), None, 4, W, W), {}, "needs a floating"),
        ((X[0, 0, 0], S[0, 0, 0], None, 4, W, W), {}, r"got \(4,\) float32"),
    ],
)
def test_arguments_that_do_not_fit_are_named(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        skip_group_norm(*arguments, **options)


def test_group_norm_names_what_does_not_fit_too():
    with pytest.raises(ValueError, match=r"group_norm: the 8 channels of \(2, 8, 4, 4\) do not divide into 3 groups"):
        group_norm(X, 3, None, None)


@pytest.mark.exhaustive
@both_layouts
def test_more_than_two_to_the_31_elements(channels_last):
    N, C, P = 2, 64, 2**24 + 2**10
    h = torch.zeros((N, P, C) if channels_last else (N, C, P), dtype=torch.bfloat16)
    h = h.movedim(-1, 1) if channels_last else h
    assert h.numel() > 2**31
    h[-1, -2:, -4096:] = torch.randn(2, 4096).bfloat16()
    y = group_norm(h, 32, None, None)
    last = h[-1:, -2:].double()
    expected = group_norm_ref(last, 1, None, None)[..., -4096:]
    assert (y[-1:, -2:, -4096:].double() - expected).abs().max() < 0.02 * expected.abs().max()
