"""A policy that renormalises: every network multiplies the whole concatenation by the common factor that it gives."""

import copy
import math
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pytest
import torch
from plain_networks import ADM, DDPM, DIT, UVIT, _drawn
from torch import nn
from torch._dynamo.testing import CompileCounter

from scalelong.bench import published_dit, published_unet, published_uvit
from scalelong.model.dit import DiT
from scalelong.model.linear_layers import SkipLinear, project_skip
from scalelong.model.plain_layers import use_plain_layers
from scalelong.model.skip_layers import SkipConv1x1, shortcut
from scalelong.model.skip_scale import ConstantScale, Geometric, SkipScale, SkipShape
from scalelong.model.unet import UNet
from scalelong.model.unet_config import SKIP_POSITIONS
from scalelong.model.uvit import UViT
from scalelong.train.monitor import Monitor


@dataclass(frozen=True)
class Renormalised(ConstantScale):
    """kappa^(i-1), and what keeps the mean square of the concatenation of two halves of unit variance."""

    as_tensor: bool = False

    def common_scale(self, i: int, num_skips: int, shape: SkipShape, scale: Any) -> Any:
        common = math.sqrt((shape.stream_width + shape.width) / (shape.stream_width + scale**2 * shape.width))
        return torch.full((1,), common) if self.as_tensor else common


@dataclass(frozen=True)
class Asked(SkipScale):
    """Notes down what it is asked for."""

    def __post_init__(self):
        object.__setattr__(self, "asked", [])

    def common_scale(self, i: int, num_skips: int, shape: SkipShape, scale: Any) -> Any:
        self.__dict__["asked"].append((i, num_skips, shape))


each_form = pytest.mark.parametrize("as_tensor", [False, True], ids=["number", "tensor"])
each_position = pytest.mark.parametrize("position", SKIP_POSITIONS)
BATCH = torch.randn(2, 3, 8, 8), torch.tensor([3.0, 700.0])
LABELS = torch.tensor([1, 5])


def outputs_and_gradients(model: nn.Module, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    model, (x, t) = copy.deepcopy(model).to(dtype), BATCH
    y = model(x.to(dtype), t, LABELS if model.config.num_classes else None)  # type: ignore[union-attr]
    y.square().sum().backward()
    return [y.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


def assert_same(ours: nn.Module, plain: nn.Module) -> None:
    for found, expected in zip(outputs_and_gradients(ours), outputs_and_gradients(plain), strict=True):
        torch.testing.assert_close(found, expected)


@each_form
def test_a_uvit_multiplies_the_concatenation(as_tensor):
    model = _drawn(UViT(UVIT, skip_scale=Renormalised(0.5, as_tensor)))
    assert_same(model, published_uvit.as_published(model))
    assert_same(model, use_plain_layers(copy.deepcopy(model)))
    unscaled = outputs_and_gradients(_with_policy(model, ConstantScale(0.5)))[0]
    assert (outputs_and_gradients(model)[0] - unscaled).norm() > 1e-3 * unscaled.norm()


@each_form
@pytest.mark.parametrize("skip", ["layer-norm", "plain"])
def test_a_dit_multiplies_the_concatenation(skip, as_tensor):
    """Of which its LayerNorm leaves, of a small one, what eps is to the variance."""
    model = _drawn(DiT(replace(DIT, skip=skip), skip_scale=Renormalised(0.5, as_tensor)))
    for block in model.blocks:
        if block.skip_norm is not None:
            block.skip_norm.eps = 0.1
    assert_same(model, published_dit.as_published(model))
    assert_same(model, use_plain_layers(copy.deepcopy(model)))
    unscaled = outputs_and_gradients(_with_policy(model, ConstantScale(0.5)))[0]
    assert (outputs_and_gradients(model)[0] - unscaled).norm() > 1e-3 * unscaled.norm()
    for found, truth in zip(outputs_and_gradients(model, torch.float32), outputs_and_gradients(model), strict=True):
        torch.testing.assert_close(found.double(), truth, rtol=1e-3, atol=4e-5 * truth.abs().max().item() + 1e-9)


@each_form
@each_position
@pytest.mark.parametrize("config", [DDPM, ADM], ids=["ddpm", "adm"])
def test_a_unet_multiplies_the_concatenation(config, position, as_tensor):
    config = replace(config, skip_position=position)
    model = _drawn(UNet(config, skip_scale=Renormalised(0.5, as_tensor)))
    assert_same(model, published_unet.as_published(model))
    assert_same(model, use_plain_layers(copy.deepcopy(model)))
    unscaled = outputs_and_gradients(_with_policy(model, ConstantScale(0.5)))[0]
    assert (outputs_and_gradients(model)[0] - unscaled).norm() > 1e-3 * unscaled.norm()


@pytest.mark.parametrize(
    "make", [lambda policy: UViT(UVIT, skip_scale=policy), lambda policy: UNet(DDPM, skip_scale=policy)]
)
def test_the_common_factor_is_folded_within_rounding(make):
    """In fp32, where it goes into weights and eps, as in fp64, where all is written out."""
    model = _drawn(make(Renormalised(0.5)))
    for found, truth in zip(outputs_and_gradients(model, torch.float32), outputs_and_gradients(model), strict=True):
        torch.testing.assert_close(found.double(), truth, rtol=1e-3, atol=1e-5 * truth.abs().max().item() + 1e-9)


@pytest.mark.parametrize("position", [None, *SKIP_POSITIONS], ids=str)
def test_decoder_blocks_that_are_compiled_one_by_one(position):
    """Each skip has two factors of its own, and no block a graph of its own for them."""
    torch.compiler.reset()
    if position is None:
        model: Any = UViT(replace(UVIT, depth=12), skip_scale=Renormalised(0.9))
    else:
        config = replace(DDPM, channel_mult=(1,), num_res_blocks=5, attention_resolutions=(), skip_position=position)
        model = UNet(config, skip_scale=Renormalised(0.9))
    count, batch = CompileCounter(), (*BATCH, LABELS if model.config.num_classes else None)
    expected = _drawn(model)(*batch)
    for _, block in model.skip_blocks():
        block.compile(fullgraph=True, backend=count)
    torch.testing.assert_close(model(*batch), expected, rtol=1e-4, atol=1e-5)
    assert len(model.skips) == 6
    assert count.frame_count <= 3


@pytest.mark.parametrize("recompute", ["none", "blocks"])
@pytest.mark.parametrize("make", [partial(UViT, UVIT), partial(UNet, ADM)], ids=["uvit", "unet"])
def test_the_monitor_takes_what_the_network_reports(make, recompute):
    model: Any = _drawn(make(skip_scale=Renormalised(0.5), recompute=recompute))
    outputs = []
    for _, block in model.skip_blocks():
        block.register_forward_hook(lambda _, inputs, output: outputs.append((inputs, output)))
    monitor = Monitor(model)
    model(*BATCH, LABELS)
    assert monitor.take() == {}
    monitor.active = True
    outputs.clear()
    model(*BATCH, LABELS).sum().backward()
    found = monitor.take()
    names = ("scale", "kappa_eff", "feature_norm", "hidden_norm", "common_scale")
    assert list(found)[:5] == [f"skip/1/{name}" for name in names]
    assert len([name for name in found if name.startswith("skip/")]) == 5 * len(model.skips)
    assert len([name for name in found if name.startswith("block/")]) == 2 * len(model.named_blocks())
    for n, shape in enumerate(model.skips):
        i, (inputs, output) = len(model.skips) - n, outputs[n]
        skip = inputs[-1]
        assert (skip.i, found[f"skip/{i}/scale"], found[f"skip/{i}/kappa_eff"]) == (i, *2 * (0.5 ** (i - 1),))
        assert found[f"skip/{i}/common_scale"] == Renormalised(0.5).common_scale(i, 0, shape, 0.5 ** (i - 1))
        for name, x in (("feature", skip.features), ("hidden", output)):
            norm = x.detach().flatten(1).norm(dim=1).mean().item()
            assert found[f"skip/{i}/{name}_norm"] == pytest.approx(norm)
    monitor.active = False
    model(*BATCH, LABELS)
    assert monitor.take() == {}


def _with_policy(model: Any, policy: SkipScale) -> Any:
    model = copy.deepcopy(model)
    model.skip_scale = policy
    return model


@each_form
@each_position
def test_a_patched_network_multiplies_the_concatenation(position, as_tensor):
    pytest.importorskip("diffusers")
    from test_diffusers_patch import make_inputs, make_network, patched_copy, scaled_by_hooks

    network, kappa = make_network("ddpm").double(), 0.5
    inputs = {name: x.double() if isinstance(x, torch.Tensor) else x for name, x in make_inputs(network).items()}
    patched = patched_copy(network, skip_scale=Renormalised(kappa, as_tensor), position=position)
    shapes = patched.up_blocks[0].skips.network.shapes
    hooked = scaled_by_hooks(network, lambda i, skip: kappa ** (i - 1), position)
    decoder = [resnet for block in hooked.up_blocks for resnet in block.resnets]
    for i, resnet, shape in zip(range(len(decoder), 0, -1), decoder, shapes, strict=True):
        _multiply(resnet, Renormalised(kappa).common_scale(i, len(decoder), shape, kappa ** (i - 1)), position)
    expected = hooked(**inputs).sample
    torch.testing.assert_close(patched(**inputs).sample, expected)
    # A block that somebody watches is given the concatenation, and one that is wrapped takes it.
    for block in patched.up_blocks:
        block.resnets[0].register_forward_hook(lambda *_: None)
        block.resnets[1].forward = partial(block.resnets[1].forward)
    torch.testing.assert_close(patched(**inputs).sample, expected)


def _multiply(resnet: Any, common: Any, position: str) -> None:
    if position == "before-norm":
        resnet.register_forward_pre_hook(lambda _, arguments: (common * arguments[0], *arguments[1:]))
    else:
        resnet.norm1.register_forward_hook(lambda _, arguments, y: common * y)
        resnet.conv_shortcut.register_forward_pre_hook(lambda _, arguments: (common * arguments[0],))


@pytest.mark.parametrize(
    "make", [lambda policy: UViT(UVIT, skip_scale=policy), lambda policy: UNet(ADM, skip_scale=policy)]
)
def test_a_policy_is_told_of_each_skip_what_the_network_describes(make):
    policy: Any = Asked()
    model = make(policy)
    model(*BATCH, LABELS)
    assert policy.asked == [
        (n, len(model.skips), shape) for n, shape in zip(range(len(model.skips), 0, -1), model.skips, strict=True)
    ]
    shape = model.skips[0]
    if isinstance(model, UViT):
        assert model.skips == (SkipShape("tokens", 32, 32, UVIT.num_tokens),) * 2
    else:
        assert [(shape.stream_width, shape.width) for shape in model.skips] == [(32, 32), (32, 16), (32, 16), (16, 16)]
        assert shape.kind == "channels"


def mp_cat(a: torch.Tensor, b: torch.Tensor, t: float) -> torch.Tensor:
    """EDM2's concatenation of features that preserves magnitudes (arXiv:2312.02696, equation 103)."""
    num_a, num_b = a.shape[-1], b.shape[-1]
    both = math.sqrt((num_a + num_b) / ((1 - t) ** 2 + t**2))
    return both * torch.cat([(1 - t) / math.sqrt(num_a) * a, t / math.sqrt(num_b) * b], dim=-1)


WIDTHS = ((64, 64), (96, 32), (32, 96))
KAPPAS = (0.05, 0.25, 0.5, 0.7071, 0.9, 1.0)


@pytest.mark.parametrize(("num_a", "num_b"), WIDTHS)
@pytest.mark.parametrize("kappa", KAPPAS)
def test_the_renormalised_geometric_policy_is_mp_cat(num_a, num_b, kappa):
    """With t / (1 - t) = kappa_i sqrt(N_b / N_a), for every skip."""
    shapes = (SkipShape("tokens", num_b, num_a, 9),) * 4
    x, s = torch.randn(2, 9, num_a).double(), torch.randn(2, 9, num_b).double()
    for i in range(1, 5):
        skip = Geometric(kappa).long_skip(i, shapes, s, None)
        ratio = kappa ** (i - 1) * math.sqrt(num_b / num_a)
        merged = skip.common * torch.cat([x, skip.scale * s], dim=-1)  # type: ignore[operator]
        torch.testing.assert_close(merged, mp_cat(x, s, ratio / (1 + ratio)), rtol=0, atol=1e-6)
        plain = Geometric(kappa, renorm=False).long_skip(i, shapes, s, None)
        assert (plain.scale, plain.common) == (ConstantScale(kappa).long_skip(i, shapes, s, None).scale, None)


def test_at_kappa_1_and_equal_widths_it_is_the_plain_concatenation():
    for num_a, num_b in WIDTHS:
        skip = Geometric(1.0).long_skip(3, (SkipShape("channels", num_b, num_a),) * 4, torch.ones(1), None)
        assert (skip.scale, skip.common) == (1.0, 1.0)


@pytest.mark.parametrize(("num_a", "num_b"), WIDTHS)
@pytest.mark.parametrize("kappa", KAPPAS)
def test_each_merge_keeps_the_magnitude(num_a, num_b, kappa):
    """Of halves of magnitude 1, by layers whose outputs have that of their inputs; CS loses up to the half of it."""
    x, s = torch.randn(8, 64, num_a), torch.randn(8, 64, num_b)
    linear, conv = SkipLinear(num_a + num_b, 128, bias=False), SkipConv1x1(num_a + num_b, 128, 1, bias=False)
    for layer in (linear, conv):
        nn.init.normal_(layer.weight, std=(num_a + num_b) ** -0.5)
    for i in (1, 2, 4):
        tokens = Geometric(kappa).long_skip(i, (SkipShape("tokens", num_b, num_a, 64),) * 4, s, None)
        merges = [project_skip(linear, x, s, tokens.scale, tokens.common)]
        h, features = (p.mT.unflatten(2, (8, 8)).contiguous() for p in (x, s))
        channels = Geometric(kappa).long_skip(i, (SkipShape("channels", num_b, num_a),) * 4, features, None)
        merges.append(shortcut(conv, h, features, channels.scale, channels.common))
        for merge in merges:
            assert merge.square().mean().sqrt().item() == pytest.approx(1, abs=0.05)
        plain = project_skip(linear, x, s, tokens.scale).square().mean().sqrt().item()
        expected = math.sqrt((num_a + kappa ** (2 * i - 2) * num_b) / (num_a + num_b))
        assert plain == pytest.approx(expected, rel=0.06)
