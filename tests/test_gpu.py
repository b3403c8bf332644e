"""The same numbers on a GPU: what a machine with one has to show before it is measured."""

import copy
from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import add_layer_norm_cases
import pytest
import test_dit
import test_mp_networks
import test_skip_norm_linear
import torch
from group_norm_cases import SCALES, Case
from parity import assert_within_budget
from torch import Tensor

from scalelong.bench.compare import kept_bytes
from scalelong.bench.published_unet import as_published
from scalelong.kernels.attention import attention, attention_ref
from scalelong.kernels.backend import backend_of, use_backend
from scalelong.kernels.gelu_linear import gelu_linear, gelu_linear_ref
from scalelong.kernels.group_norm import skip_group_norm
from scalelong.kernels.skip_conv1x1 import skip_conv1x1, skip_conv1x1_ref
from scalelong.kernels.skip_linear import skip_linear, skip_linear_ref
from scalelong.model.dit_config import MODULATIONS
from scalelong.model.plain_layers import use_plain_layers
from scalelong.model.presets import UNET_PRESETS, UVIT_PRESETS
from scalelong.model.skip_scale import SKIP_SCALE_NAMES, make_skip_scale
from scalelong.model.unet import UNet
from scalelong.model.uvit import UViT

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]


DTYPES = (torch.float32, torch.bfloat16, torch.float16)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
each_layout = pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])

# batch, channels of h, channels of the skip, spatial sizes, groups
NORM_SHAPES = {
    "aligned": (2, 128, 128, (32, 32), 32),
    "straddling": (2, 256, 128, (32, 32), 32),
    "42-channels-a-group": (3, 768, 576, (16, 16), 32),
    "odd-positions": (3, 40, 56, (9, 7), 6),
    "odd-channels": (2, 7, 11, (5, 5), 3),
    "one-position": (4, 64, 32, (1, 1), 8),
    "one-image": (1, 12, 20, (8, 8), 4),
    "1-d": (2, 48, 16, (333,), 8),
    "3-d": (2, 24, 24, (5, 6, 7), 8),
    "few-channels-of-skip": (2, 63, 1, (16, 16), 4),
    "many-images": (300, 32, 32, (4, 4), 32),
    "small-groups-of-many-channels": (8, 768, 768, (8, 8), 32),
    "groups-of-several-blocks": (2, 1280, 640, (32, 32), 32),
    "groups-of-several-blocks-large-batch": (32, 576, 384, (32, 32), 32),
    "cut-groups": (1, 640, 320, (128, 128), 32),
    "cut-groups-large-batch": (16, 384, 192, (64, 64), 32),
    "one-group": (2, 96, 32, (64, 64), 1),
    "instance-norm": (2, 24, 8, (37, 41), 32),
}
each_norm_shape = pytest.mark.parametrize("shape", NORM_SHAPES.values(), ids=tuple(NORM_SHAPES))
REGIMES = ("straddling", "groups-of-several-blocks", "cut-groups")
each_regime = pytest.mark.parametrize("shape", [NORM_SHAPES[name] for name in REGIMES], ids=REGIMES)


def norm_case(shape: tuple[int, int, int, tuple[int, ...], int], **options) -> Case:
    batch, num_hidden, num_skip, spatial, groups = shape
    return Case(
        **{"batch": batch, "num_hidden": num_hidden, "num_skip": num_skip, "spatial": spatial, "groups": groups},
        **{"device": "cuda", **options},
    )


def output_and_grads(f, inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
    leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    y = f(leaves)
    dy = torch.randn(y.shape, generator=torch.Generator("cuda").manual_seed(1), device="cuda").to(y.dtype)
    return y.detach(), *torch.autograd.grad(y, list(leaves.values()), dy)


# Not all combinations: each compiles kernels of its own, and no dtype has a path of its own within its size.
@each_norm_shape
@pytest.mark.parametrize(
    ("dtype", "channels_last"),
    [(torch.bfloat16, False), (torch.float32, True)],
    ids=["bfloat16", "float32-channels_last"],
)
def test_group_norm_is_within_budget(shape, dtype, channels_last):
    case = norm_case(shape, channels_last=channels_last, dtype=dtype)
    inputs = case.inputs()
    assert backend_of(inputs["h"]) == "triton"
    case.assert_parity(inputs)


@each_regime
@pytest.mark.parametrize(
    ("dtype", "channels_last"),
    [(torch.float16, False), (torch.float16, True), (torch.bfloat16, True), (torch.float32, False)],
)
def test_each_regime_of_group_norm_takes_each_dtype_and_layout(shape, dtype, channels_last):
    norm_case(shape, dtype=dtype, channels_last=channels_last).assert_parity()


@each_regime
@each_layout
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("is_adaptive", [False, True], ids=["plain", "adaptive"])
def test_group_norm_takes_every_scale_and_the_adaptive_form(shape, channels_last, scale, is_adaptive):
    options = {"channels_last": channels_last, "scale": scale, "is_adaptive": is_adaptive}
    norm_case(shape, dtype=torch.bfloat16, **options).assert_parity()


@each_regime
@pytest.mark.parametrize(("act", "is_affine"), [("gelu", True), ("gelu-tanh", True), (None, False), (None, True)])
def test_group_norm_takes_every_activation(shape, act, is_affine):
    norm_case(shape, act=act, is_affine=is_affine).assert_parity()


@each_regime
@each_layout
def test_group_norm_without_a_skip(shape, channels_last):
    batch, num_hidden, num_skip, *rest = shape
    norm_case((batch, num_hidden + num_skip, 0, *rest), channels_last=channels_last).assert_parity()


@each_dtype
def test_group_norm_without_positions(dtype):
    norm_case((16, 96, 32, (), 16), dtype=dtype, scale="float").assert_parity()


@each_regime
@each_layout
def test_group_norm_of_a_mean_far_from_zero(shape, channels_last):
    norm_case(shape, channels_last=channels_last, mean=30.0).assert_parity()


@each_regime
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
def test_group_norm_of_misaligned_views(shape, dtype):
    case = norm_case(shape, dtype=dtype)
    inputs = case.inputs()
    for name in ("h", "s"):
        x = inputs[name]
        memory = x.new_empty(x.numel() + 1)
        inputs[name] = memory[1:].view(x.shape).copy_(x)
        assert inputs[name].data_ptr() % 16 != 0
    case.assert_parity(inputs)


@each_regime
def test_group_norm_of_views_that_are_not_dense(shape):
    case = norm_case(shape)
    inputs = case.inputs()
    inputs["h"] = torch.cat([inputs["h"], inputs["h"]], dim=1)[:, 1 : 1 + case.num_hidden]
    inputs["s"] = inputs["s"].transpose(2, 3)
    case.assert_parity(inputs)


@each_regime
def test_group_norm_of_two_layouts(shape):
    case = norm_case(shape, dtype=torch.bfloat16)
    inputs = case.inputs()
    case.assert_parity({**inputs, "s": inputs["s"].to(memory_format=torch.channels_last)})
    case.assert_parity({**inputs, "h": inputs["h"].to(memory_format=torch.channels_last)})


@each_regime
@each_layout
def test_group_norm_gives_the_same_bits_each_time(shape, channels_last):
    case = norm_case(shape, channels_last=channels_last, dtype=torch.bfloat16, scale="(N,Cs)", is_adaptive=True)
    inputs = case.inputs()
    first = output_and_grads(case.call, inputs)
    for _ in range(100):
        assert all(map(torch.equal, first, output_and_grads(case.call, inputs)))


@each_regime
@each_layout
def test_group_norm_compiles_to_the_same_bits(shape, channels_last):
    case = norm_case(shape, channels_last=channels_last, dtype=torch.bfloat16)
    inputs = case.inputs()
    torch.compiler.reset()
    compiled = output_and_grads(torch.compile(case.call, fullgraph=True), inputs)
    assert all(map(torch.equal, output_and_grads(case.call, inputs), compiled))


@each_regime
@each_layout
def test_group_norm_keeps_next_to_nothing_for_backward(shape, channels_last):
    case = norm_case(shape, channels_last=channels_last, dtype=torch.bfloat16)
    inputs = {name: x.requires_grad_() for name, x in case.inputs().items()}
    kept = kept_bytes(lambda *values: case.call(dict(zip(inputs, values, strict=True))), list(inputs.values()))
    assert kept < 0.01 * (inputs["h"].nbytes + inputs["s"].nbytes)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@each_regime
def test_group_norm_on_a_device_that_is_not_the_current_one(shape):
    assert torch.cuda.current_device() == 0
    norm_case(shape, device="cuda:1").assert_parity()
    assert torch.cuda.current_device() == 0


@pytest.mark.exhaustive
@each_layout
@pytest.mark.parametrize(("batch", "spatial"), [(1, (4096, 4160)), (130, (256, 512))], ids=["one-image", "130-images"])
def test_group_norm_of_more_than_two_to_the_31_elements(batch, spatial, channels_last):
    if torch.cuda.mem_get_info()[0] < 40e9:
        pytest.skip("needs 40 GB of free GPU memory")
    Ch, Cs, groups = 64, 64, 32

    def draw(channels: int) -> Tensor:
        shape = (batch, *spatial, channels) if channels_last else (batch, channels, *spatial)
        x = torch.randn(shape, dtype=torch.bfloat16, device="cuda")
        return x.movedim(-1, 1) if channels_last else x

    h, s, dy = draw(Ch).requires_grad_(), draw(Cs).requires_grad_(), draw(Ch + Cs)
    assert dy.numel() > 2**31
    parameters = [x.cuda().requires_grad_() for x in (torch.tensor(0.7), torch.randn(Ch + Cs), torch.randn(Ch + Cs))]
    scale, weight, bias = parameters
    y = skip_group_norm(h, s, scale, groups, weight, bias)
    dh, ds, *d_parameters = torch.autograd.grad(y, (h, s, *parameters), dy)
    assert all(grad.isfinite().all() for grad in d_parameters)
    D = (Ch + Cs) // groups
    for n in (0, batch - 1):
        for x, dx, factor, own, whole in (
            (h, dh, 1.0, slice(0, D), slice(0, D)),
            (s, ds, scale.item(), slice(Cs - D, Cs), slice(Ch + Cs - D, Ch + Cs)),
        ):
            # A group on its own, in fp32; what is left is the rounding to bf16.
            leaf = x[n : n + 1, own].detach().float().requires_grad_()
            normalised = torch.nn.functional.group_norm(factor * leaf, 1, weight[whole].detach(), bias[whole].detach())
            truth_y = torch.nn.functional.silu(normalised)
            (truth_dx,) = torch.autograd.grad(truth_y, leaf, dy[n : n + 1, whole].float())
            for truth, found in ((truth_y.detach(), y[n : n + 1, whole]), (truth_dx, dx[n : n + 1, own])):
                allowed = 2 * (truth.bfloat16().float() - truth).abs().max()
                assert (found.detach().float() - truth).abs().max() <= allowed


@each_dtype
@pytest.mark.parametrize(("heads", "head_dim", "length"), [(8, 64, 257), (16, 72, 258), (2, 64, 1)])
def test_attention_is_within_budget(dtype, heads, head_dim, length):
    qkv = torch.randn(2, length, 3 * heads * head_dim, dtype=dtype, device="cuda")
    assert_within_budget(lambda x: attention(x, heads), lambda x: attention_ref(x, heads), {"qkv": qkv})


@each_dtype
@pytest.mark.parametrize("scale", [(2, 257, 1), (512,)], ids=["tokens", "channels"])
@pytest.mark.parametrize("products", [nullcontext, partial(use_backend, "triton")], ids=["chosen", "triton"])
def test_skip_linear_is_within_budget(dtype, scale, products):
    shapes = {"x": (2, 257, 512), "s": (2, 257, 512), "scale": scale, "weight": (512, 1024), "bias": (512,)}
    inputs = {name: torch.randn(*shape, dtype=dtype, device="cuda") for name, shape in shapes.items()}
    with products():
        assert_within_budget(skip_linear, skip_linear_ref, inputs)


@each_dtype
@each_layout
def test_skip_conv1x1_is_within_budget(dtype, channels_last):
    shapes = {"h": (3, 96, 17, 16), "s": (3, 64, 17, 16), "scale": (3, 64), "weight": (48, 160, 1, 1), "bias": (48,)}
    inputs = {name: torch.randn(*shape, device="cuda") for name, shape in shapes.items()}
    inputs = {name: x.to(dtype) for name, x in inputs.items()}
    if channels_last:
        inputs |= {name: inputs[name].contiguous(memory_format=torch.channels_last) for name in ("h", "s")}
    assert_within_budget(skip_conv1x1, skip_conv1x1_ref, inputs)


@each_dtype
def test_gelu_linear_is_within_budget(dtype):
    shapes = {"x": (2, 257, 2048), "weight": (512, 2048), "bias": (512,)}
    inputs = {name: torch.randn(*shape, dtype=dtype, device="cuda") for name, shape in shapes.items()}
    assert_within_budget(gelu_linear, gelu_linear_ref, inputs)


ROWS = ((2, 257, 512), (64, 258, 1152), (2, 5, 8192), (9, 33), (3, 1, 77))


@each_dtype
@pytest.mark.parametrize("shape", ROWS, ids=str)
@pytest.mark.parametrize("adaptive", [(), add_layer_norm_cases.ADAPTIVE], ids=["plain", "adaptive"])
def test_add_layer_norm_is_within_budget(shape, dtype, adaptive):
    adaptive = adaptive[:3] if shape[-1] % 2 else adaptive  # no pairs to turn
    case = add_layer_norm_cases.Case(shape=shape, dtype=dtype, adaptive=adaptive, device="cuda")
    inputs = case.inputs()
    assert backend_of(inputs["x"]) == "triton"
    case.assert_parity(inputs)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("adaptive", [(), add_layer_norm_cases.ADAPTIVE], ids=["plain", "adaptive"])
def test_add_layer_norm_of_a_stream_in_fp32_under_autocast(half, adaptive):
    shape, more = (16, 257, 768), {"branch_dtype": half, "autocast": half}
    add_layer_norm_cases.Case(shape=shape, adaptive=adaptive, device="cuda", **more).assert_parity()


@pytest.mark.parametrize("adaptive", [(), add_layer_norm_cases.ADAPTIVE], ids=["plain", "adaptive"])
def test_add_layer_norm_gives_the_same_bits_each_time_and_compiled(adaptive):
    shape = (16, 257, 512)
    case = add_layer_norm_cases.Case(shape=shape, dtype=torch.bfloat16, adaptive=adaptive, device="cuda")
    inputs = case.inputs()

    def call(leaves: dict[str, Tensor]) -> Tensor:
        return torch.stack(case.call(leaves))

    first = output_and_grads(call, inputs)
    for _ in range(20):
        assert all(map(torch.equal, first, output_and_grads(call, inputs)))
    torch.compiler.reset()
    compiled = output_and_grads(torch.compile(call, fullgraph=True), inputs)
    assert all(map(torch.equal, first, compiled))


@each_dtype
@pytest.mark.parametrize("kind", ["none", "scalar", "per-token"])
def test_skip_norm_linear_is_within_budget(dtype, kind):
    scale = test_skip_norm_linear.SCALES[kind](257)
    inputs = test_skip_norm_linear.make_inputs(257, scale, dtype, d1=512, d2=512, out=512)
    test_skip_norm_linear.assert_parity({name: x.cuda() for name, x in inputs.items()}, scale)


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("name", ["cifar10-ddpm-unet", "imagenet64-adm"])
@pytest.mark.parametrize(("mode", "position"), [("ls", "before-norm"), ("cs", "after-norm")], ids=["ls", "cs"])
def test_a_unet_gives_the_outputs_of_the_plain_one_under_autocast(mode, position, name, channels_last):
    config = replace(UNET_PRESETS[name], dropout=0.0, skip_position=position)
    model = UNet(config, skip_scale=make_skip_scale(mode, 0.7), channels_last=channels_last).cuda()
    with torch.no_grad():  # residual branches begin at zero
        for p in model.parameters():
            p.add_(0.02 * torch.randn_like(p))
    plain = as_published(model, channels_last=channels_last)
    x, t = torch.randn(2, 3, config.img_size, config.img_size, device="cuda"), torch.tensor([10.0, 900.0]).cuda()
    y = torch.tensor([3, 5]).cuda() if config.num_classes else None
    with torch.no_grad():
        truth = copy.deepcopy(plain).double()(x.double(), t.double(), y)
    with torch.autocast("cuda", torch.bfloat16):
        expected, found = plain(x, t, y).double(), model(x, t, y)
    found.float().square().mean().backward()
    assert (found.double() - truth).norm() <= 2 * (expected - truth).norm()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("name", SKIP_SCALE_NAMES)
def test_a_uvit_gives_the_outputs_of_the_cpu_under_autocast(name):
    config = UVIT_PRESETS["cifar10-uvit-s2"]
    truth = UViT(config, skip_scale=make_skip_scale(name))
    x, t = torch.randn(2, 3, 32, 32), torch.tensor([10.0, 900.0])
    expected = truth.double()(x.double(), t.double())
    model = truth.float().cuda()
    with torch.autocast("cuda", torch.bfloat16):
        found = model(x.cuda(), t.cuda())
    found.float().square().mean().backward()
    error = (found.double().cpu() - expected).norm() / expected.norm()
    assert error < 0.03
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


NETWORKS = {
    **{f"mp-{name}": config for name, config in test_mp_networks.CONFIGS.items()},
    **{f"dit-{modulation}": replace(test_dit.PLAIN, modulation=modulation) for modulation in MODULATIONS},
    "dit-skips-of-layer-norm": test_dit.NORMED,
    "dit-plain-skips": test_dit.PROJECTED,
}


@pytest.mark.parametrize("config", NETWORKS.values(), ids=tuple(NETWORKS))
@pytest.mark.parametrize("compiles", [False, True], ids=["eager", "compiled"])
def test_every_network_is_as_exact_as_its_plain_layers_under_autocast(config, compiles):
    model = test_mp_networks.drawn(config, "none" if getattr(config, "skip", "") == "none" else "cs")
    with torch.no_grad():  # gates begin at zero
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    batch = test_mp_networks.batch_of(config, B=8)
    with torch.no_grad():
        truth = copy.deepcopy(model).double()(*(x.double() if x.is_floating_point() else x for x in batch)).cuda()
    model, batch = model.cuda(), [x.cuda() for x in batch]
    plain = use_plain_layers(copy.deepcopy(model))
    torch.compiler.reset()
    network = torch.compile(model) if compiles else model
    with torch.autocast("cuda", torch.bfloat16):
        expected, found = plain(*batch), network(*batch)
    for y in (expected, found):
        y.float().square().mean().backward()
    assert (found.double() - truth).norm() <= 2 * (expected.double() - truth).norm()
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None)
        if ours.grad is not None and theirs.grad is not None:
            assert (ours.grad - theirs.grad).norm() <= 0.1 * theirs.grad.norm() + 1e-6
