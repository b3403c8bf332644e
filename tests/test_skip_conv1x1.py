import re
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from operators_seen import OperatorsSeen
from parity import assert_within_budget, sent_back
from second_order import assert_ordinary, assert_transforms, assert_twice_differentiable
from torch import Tensor

from scalelong.kernels import skip_conv1x1 as module
from scalelong.kernels.arguments import Scale
from scalelong.kernels.backend import use_backend
from scalelong.kernels.skip_conv1x1 import skip_conv1x1, skip_conv1x1_ref

N, CH, CS, OUT = 3, 12, 20, 16
SCALES = {
    "none": lambda: None,
    "float": lambda: 0.7,
    "scalar": lambda: torch.tensor(0.7),
    "channels": lambda: torch.rand(CS),
    "samples-channels": lambda: torch.rand(N, CS),
    "samples": lambda: torch.rand(N, 1),
}
each_scale = pytest.mark.parametrize("make_scale", SCALES.values(), ids=SCALES.keys())
each_layout = pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])


def make_inputs(scale: Scale, dtype: torch.dtype, channels_last: bool = False, spatial=(5, 7)) -> dict[str, Tensor]:
    """Everything that has a gradient; a scale that is a tensor comes last."""
    inputs = {
        "h": torch.randn(N, *spatial, CH).movedim(-1, 1),
        "s": torch.randn(N, *spatial, CS).movedim(-1, 1),
        "weight": torch.randn(OUT, CH + CS, *[1] * len(spatial)),
        "bias": torch.randn(OUT),
    }
    if not channels_last:
        inputs["h"], inputs["s"] = inputs["h"].contiguous(), inputs["s"].contiguous()
    if isinstance(scale, Tensor):
        inputs["scale"] = scale
    return {name: tensor.to(dtype) for name, tensor in inputs.items()}


def of_inputs(op: Callable[..., Tensor], scale: Scale) -> Callable[..., Tensor]:
    """``op`` as a function of ``make_inputs``."""
    return lambda h, s, weight, bias, scale=scale: op(h, s, scale, weight, bias)


@each_scale
@each_layout
@pytest.mark.parametrize("spatial", [(1,), (33,), (5, 7), (2, 3, 4)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_as_exact_as_the_reference(dtype, spatial, channels_last, make_scale):
    scale = make_scale()
    inputs = make_inputs(scale, dtype, channels_last, spatial)
    floors = {"dscale": rounding_of_terms(inputs)} if isinstance(scale, Tensor) else None
    assert_within_budget(of_inputs(skip_conv1x1, scale), of_inputs(skip_conv1x1_ref, scale), inputs, floors=floors)


def rounding_of_terms(inputs: dict[str, Tensor]) -> float:
    """The error of a scale's gradient if each of its terms, weight times gradient of weight, is rounded."""
    s_NCP, weight_OC = inputs["s"].double().flatten(2), inputs["weight"].double().flatten(1)[:, CH:]
    dy_NOP = sent_back(s_NCP.new_empty(N, OUT, *inputs["s"].shape[2:])).flatten(2)
    terms_NOC = torch.einsum("nop,ncp->noc", dy_NOP, s_NCP) * weight_OC
    scale = inputs["scale"]
    terms_NOC = terms_NOC if scale.dim() == 2 else terms_NOC.sum(dim=0, keepdim=True)
    summed = 1 if scale.dim() > 0 and scale.shape[-1] == CS else (1, 2)
    return 4 * torch.finfo(scale.dtype).eps * terms_NOC.norm(dim=summed).max().item()


@each_layout
def test_the_reference_is_the_convolution(channels_last):
    h, s, weight, bias = make_inputs(None, torch.float64, channels_last).values()
    expected = F.conv2d(torch.cat([h, 0.7 * s], dim=1), weight, bias)
    torch.testing.assert_close(skip_conv1x1_ref(h, s, 0.7, weight, bias), expected)


@each_scale
@each_layout
def test_gradients_in_fp64(channels_last, make_scale):
    scale = make_scale()
    leaves = [t.requires_grad_() for t in make_inputs(scale, torch.float64, channels_last, (3,)).values()]
    for op in (skip_conv1x1, skip_conv1x1_ref):
        assert torch.autograd.gradcheck(of_inputs(op, scale), leaves, fast_mode=True)


@each_scale
@each_layout
def test_the_output_has_the_layout_of_h(channels_last, make_scale):
    scale = make_scale()
    h, s, weight, bias, *_ = make_inputs(scale, torch.float32, channels_last).values()
    expected = h.new_empty(N, OUT, 5, 7)
    if channels_last:
        expected = expected.contiguous(memory_format=torch.channels_last)
    assert skip_conv1x1(h, s, scale, weight, bias).stride() == expected.stride()
    assert skip_conv1x1(h, s.contiguous(), scale, weight, bias).stride() == expected.stride()


@each_scale
@each_layout
def test_compiles_to_one_graph(channels_last, make_scale):
    torch._dynamo.reset()
    scale = make_scale()
    inputs = [t.requires_grad_() for t in make_inputs(scale, torch.float32, channels_last).values()]
    op = of_inputs(skip_conv1x1, scale)
    y, expected = torch.compile(op, fullgraph=True, backend="aot_eager")(*inputs), op(*inputs)
    torch.testing.assert_close(y, expected)
    dy = torch.randn_like(y)
    for found, grad in zip(torch.autograd.grad(y, inputs, dy), torch.autograd.grad(expected, inputs, dy), strict=True):
        torch.testing.assert_close(found, grad)


@each_scale
@each_layout
def test_backward_keeps_no_activation_but_the_inputs(channels_last, make_scale):
    scale = make_scale()
    inputs = [t.requires_grad_() for t in make_inputs(scale, torch.float32, channels_last, (32, 32)).values()]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        of_inputs(skip_conv1x1, scale)(*inputs)
    there = {t.untyped_storage().data_ptr() for t in inputs}
    new = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept}
    weights = 4 * N * OUT * (CH + CS)
    assert sum(nbytes for pointer, nbytes in new.items() if pointer not in there) <= weights


@each_layout
def test_two_runs_give_the_same_bits(channels_last):
    scale = torch.rand(N, CS)
    inputs = [t.requires_grad_() for t in make_inputs(scale, torch.float32, channels_last).values()]

    def run():
        y = of_inputs(skip_conv1x1, scale)(*inputs)
        return (y, *torch.autograd.grad(y, inputs, torch.ones_like(y)))

    first = run()
    assert all(torch.equal(a, b) for _ in range(10) for a, b in zip(first, run(), strict=True))


def test_autocast_computes_in_its_dtype():
    h, s, weight, bias = make_inputs(None, torch.float32).values()
    with torch.autocast("cpu", torch.bfloat16):
        assert skip_conv1x1(h, s, torch.rand(N, CS), weight, bias).dtype == torch.bfloat16


@each_layout
def test_an_empty_batch(channels_last):
    h, s = (torch.empty(0, 4, 4, c).movedim(-1, 1).requires_grad_() for c in (CH, CS))
    weight = torch.randn(OUT, CH + CS, 1, 1, requires_grad=True)
    y = skip_conv1x1(h, s, 0.5, weight, None)
    assert y.shape == (0, OUT, 4, 4)
    y.sum().backward()
    assert weight.grad is not None
    assert not weight.grad.any()


@pytest.mark.parametrize(
    ("h", "s", "weight", "message"),
    [
        ((2, 3), (2, 5), (6, 8), "with spatial dimensions, got (2, 3) float32 on cpu"),
        ((2, 3, 4), (2, 5, 6), (6, 8), "h (2, 3, 4) and s (2, 5, 6) may differ in their channels only"),
        ((2, 3, 4), (1, 5, 4), (6, 8), "h (2, 3, 4) and s (1, 5, 4) may differ"),
        ((2, 3, 4), (2, 5, 4), (6, 9), "weight (6, 9) does not fit h (2, 3, 4) beside s (2, 5, 4); it needs (O, 8, 1)"),
        ((2, 3, 4), (2, 5, 4), (6, 8, 3), "weight (6, 8, 3) does not fit"),
        ((2, 3, 4, 4), (2, 5, 4, 4), (6, 8, 1), "weight (6, 8, 1) does not fit"),
    ],
)
def test_shapes_that_do_not_fit_are_named(h, s, weight, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        skip_conv1x1(torch.randn(h), torch.randn(s), None, torch.randn(weight), None)


def test_a_scale_or_a_bias_that_does_not_fit_is_named():
    h, s, weight, bias = make_inputs(None, torch.float32).values()
    message = "scale has shape (12,), but s (3, 20, 5, 7) takes a scalar, (1,), (20,)"
    with pytest.raises(ValueError, match=re.escape(message)):
        skip_conv1x1(h, s, torch.rand(CH), weight, bias)
    with pytest.raises(ValueError, match=re.escape("bias (15,) does not fit weight (16, 32, 1, 1)")):
        skip_conv1x1(h, s, None, weight, bias[1:])
    with pytest.raises(ValueError, match=r"h is .* float32 on cpu but weight is .* float64 on cpu"):
        skip_conv1x1(h, s, None, weight.double(), bias)


def dependent(s: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
    """h and the scale of each sample come from s."""
    h = F.conv2d(s, weight[:CH, :CS])
    return h, s, s.mean(dim=(1, 2, 3))[:, None].sigmoid(), weight, bias


def leaves(channels_last: bool) -> list[Tensor]:
    s = make_inputs(None, torch.float32, channels_last)["s"]
    return [s, torch.randn(OUT, CH + CS, 1, 1) / CS**0.5, torch.randn(OUT)]


@each_layout
def test_create_graph_counts_each_path_once(channels_last):
    assert_twice_differentiable(skip_conv1x1, skip_conv1x1_ref, dependent, leaves(channels_last))


@each_layout
def test_transforms_take_the_reference(channels_last):
    inputs = [x.detach() for x in dependent(*leaves(channels_last))]
    assert_transforms(skip_conv1x1, skip_conv1x1_ref, inputs)


@each_scale
@each_layout
@pytest.mark.parametrize("spatial", [(6,), (5, 7), (2, 3, 4)], ids=str)
def test_the_output_is_an_ordinary_tensor(spatial, channels_last, make_scale):
    scale = make_scale()
    inputs = make_inputs(scale, torch.float32, channels_last, spatial)
    assert_ordinary(of_inputs(skip_conv1x1, scale), list(inputs.values()))


@each_layout
def test_the_reference_runs_where_it_is_asked_for_and_in_fp64(channels_last, monkeypatch):
    called = []
    monkeypatch.setattr(module, "skip_conv1x1_ref", lambda *args: called.append(args) or skip_conv1x1_ref(*args))
    for dtype in (torch.float32, torch.float64):
        h, s, weight, bias = make_inputs(None, dtype, channels_last).values()
        skip_conv1x1(h, s, 0.7, weight, bias)
        assert len(called) == (dtype == torch.float64)
    with use_backend("reference"):
        y = skip_conv1x1(h.float(), s.float(), 0.7, weight.float(), bias.float())
    assert len(called) == 2
    assert y.is_contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


@each_layout
@pytest.mark.parametrize("wanted", ["h", "s", "weight", "bias"])
def test_what_nobody_needs_is_not_computed(wanted, channels_last):
    inputs = make_inputs(None, torch.float32, channels_last)
    inputs = {name: x.requires_grad_(name == wanted) for name, x in inputs.items()}
    y = skip_conv1x1(inputs["h"], inputs["s"], None, inputs["weight"], inputs["bias"])
    with OperatorsSeen() as seen:
        y.sum().backward()
    num_products = len([name for name, _ in seen.all if name in ("mm", "bmm", "addmm", "baddbmm")])
    assert num_products == {"h": 1, "s": 1, "weight": 2, "bias": 0}[wanted]
