import json
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from scalelong.model.presets import UNET_PRESETS
from scalelong.model.skip_gates import ChannelGate, SharedChannelGates
from scalelong.model.skip_layers import GroupNorm
from scalelong.model.skip_scale import (
    SKIP_SCALE_NAMES,
    ConstantScale,
    LearnedScale,
    make_skip_scale,
)
from scalelong.model.unet import UNet, UNetConfig

PLAIN = UNetConfig(img_size=16, model_channels=16, channel_mult=(1, 2, 3), num_res_blocks=1, num_groups=8)
LABELS = replace(PLAIN, num_classes=7, use_scale_shift_norm=True, resblock_updown=True, num_head_channels=8)
each_config = pytest.mark.parametrize("config", [PLAIN, LABELS], ids=["plain", "labels"])
POLICIES: list[Any] = [(make_skip_scale(name, 0.7), "before-norm") for name in SKIP_SCALE_NAMES]
POLICIES.append((make_skip_scale("cs", 0.7), "after-norm"))
each_policy = pytest.mark.parametrize(("policy", "position"), POLICIES, ids=[*SKIP_SCALE_NAMES, "cs-after-norm"])


def make_inputs(config: UNetConfig, B: int = 2) -> tuple[Tensor, ...]:
    x, t = torch.randn(B, config.in_channels, config.img_size, config.img_size), torch.linspace(0, 999, B)
    return (x, t, torch.arange(B) % config.num_classes) if config.num_classes else (x, t)


def make_model(config: UNetConfig, policy=None) -> UNet:
    """With nothing at zero, where a new network has its last convolutions."""
    model = UNet(config, skip_scale=policy)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return model


# Millions of parameters as published, and the concatenations (hidden, skip) of the decoder with their sides.
PUBLISHED = {
    "cifar10-ddpm-unet": (
        "35.746",
        [(256, 256, 4)] * 3 + [(256, 256, 8)] * 3 + [(256, 256, 16)] * 2 + [(256, 128, 16), (256, 128, 32)]
        + [(128, 128, 32)] * 2,
    ),
    "imagenet64-adm": (
        "295.904",
        [(768, 768, 8)] * 3 + [(768, 576, 8), (768, 576, 16)] + [(576, 576, 16)] * 2 + [(576, 384, 16), (576, 384, 32)]
        + [(384, 384, 32)] * 2 + [(384, 192, 32), (384, 192, 64)] + [(192, 192, 64)] * 3,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name):
    millions, concatenations = PUBLISHED[name]
    with torch.device("meta"):
        model = UNet(UNET_PRESETS[name])
        inputs = make_inputs(model.config)
    assert f"{model.num_params() / 1e6:.3f}" == millions
    found = []
    for _, block in model.skip_blocks():
        block.register_forward_pre_hook(lambda _, args: found.append((args[0].shape[1], *args[2].features.shape[1:3])))
    with torch.no_grad():
        model(*inputs)
    assert found == concatenations


@pytest.mark.parametrize(
    ("name", "straddling"), [("cifar10-ddpm-unet", [3, 4]), ("imagenet64-adm", [4, 5, 8, 9, 12, 13])]
)
def test_skips_whose_norm_has_a_group_over_both_parts(name, straddling):
    """The table in docs/unet.md."""
    with torch.device("meta"):
        model = UNet(UNET_PRESETS[name])
    skip_channels = [hidden_and_skip[1] for hidden_and_skip in PUBLISHED[name][1]]
    found = []
    for (i, block), channels in zip(model.skip_blocks(), skip_channels, strict=True):
        norm = block.get_submodule("in_layers.0")
        assert isinstance(norm, GroupNorm)
        if (norm.num_channels - channels) % (norm.num_channels // norm.num_groups):
            found.append(i)
    assert sorted(found) == straddling


@pytest.mark.parametrize("name", UNET_PRESETS)
def test_flops_are_those_that_torch_counts(name):
    with torch.device("meta"):
        model = UNet(UNET_PRESETS[name])
        inputs = make_inputs(model.config, B=3)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(*inputs)
    assert model.flops(batch_size=3) == counter.get_total_flops()


def calls_of_the_decoder(model: UNet) -> list[tuple]:
    calls = []
    for _, block in model.skip_blocks():
        block.register_forward_pre_hook(lambda block, args: calls.append((block, args[2].features, args[2].scale)))
    with torch.no_grad():
        model(*make_inputs(model.config))
    return calls


@each_config
def test_factors_in_execution_order(config):
    calls = calls_of_the_decoder(UNet(config, skip_scale=ConstantScale(0.7)))
    assert [scale for _, _, scale in calls] == pytest.approx([0.7**i for i in range(config.num_skips - 1, -1, -1)])


def test_skip_blocks_count_from_the_outermost_and_skips_are_consumed_last_in_first_out():
    model = UNet(PLAIN)
    outputs = []
    for stage in model.input_blocks:
        stage.register_forward_hook(lambda stage, args, output: outputs.append(output))
    calls = calls_of_the_decoder(model)
    assert model.skip_blocks() == list(zip(range(PLAIN.num_skips, 0, -1), [block for block, *_ in calls], strict=True))
    assert len(outputs) == PLAIN.num_skips
    for (_, skip, _), output in zip(calls, reversed(outputs), strict=True):
        assert torch.equal(skip, output)


def test_one_gate_serves_all_skips_of_equal_channels():
    model = UNet(PLAIN, skip_scale=LearnedScale())
    assert isinstance(model.skip_gates, SharedChannelGates)
    assert sorted(map(int, model.skip_gates)) == [16, 32, 48]
    for _, skip, scale in calls_of_the_decoder(model):
        assert torch.equal(scale, model.skip_gates[str(skip.shape[1])](skip))


def test_separate_gates_are_stored_in_execution_order():
    model = UNet(PLAIN, skip_scale=LearnedScale(shared=False))
    for executed, (_, skip, scale) in enumerate(calls_of_the_decoder(model)):
        assert torch.equal(scale, model.get_submodule(f"skip_gates.{executed}")(skip))


def test_a_channel_gate_is_squeeze_and_excitation():
    gate = ChannelGate(48, 16).double()
    s = torch.randn(3, 48, 5, 7, dtype=torch.float64)
    pooled = s.sum((2, 3)) / 35
    hidden = (pooled @ gate.layer1.weight.T + gate.layer1.bias).clamp(min=0)
    expected = 1 / (1 + torch.exp(-(hidden @ gate.layer2.weight.T + gate.layer2.bias)))
    assert (hidden.shape, expected.shape) == ((3, 3), (3, 48))
    torch.testing.assert_close(gate(s), expected)


def test_gates_keep_the_default_initialisation():
    model = UNet(PLAIN, skip_scale=LearnedScale())
    assert isinstance(model.skip_gates, SharedChannelGates)
    layers = [layer for layer in model.skip_gates.modules() if isinstance(layer, nn.Linear)]
    assert len(layers) == 2 * 3
    for layer in layers:
        bound = layer.in_features**-0.5
        assert 0.5 * bound < layer.weight.abs().max() <= bound


@torch.no_grad()
def test_a_factor_before_the_norm_changes_only_groups_that_straddle():
    """Why after-norm exists: GroupNorm takes a factor out again where a group lies inside the skip."""
    config = replace(PLAIN, channel_mult=(1, 1), norm_eps=0.0)  # 16 + 16 channels: no group straddles
    model = make_model(config, ConstantScale(0.5)).double()
    plain = make_model(config).double()
    plain.load_state_dict(model.state_dict())
    for _, block in [*model.skip_blocks(), *plain.skip_blocks()]:  # and without the shortcut ...
        block.get_parameter("skip_connection.weight")[:, 16:] = 0
    x, t = make_inputs(config)
    torch.testing.assert_close(model(x.double(), t), plain(x.double(), t))  # ... nothing is left of the scale,
    scaled = UNet(replace(config, skip_position="after-norm"), skip_scale=ConstantScale(0.5)).double()
    scaled.load_state_dict(model.state_dict())
    assert (scaled(x.double(), t) - plain(x.double(), t)).abs().max() > 1e-2  # unless it stands behind.


@torch.no_grad()
def test_a_factor_after_the_norm_multiplies_the_skips_share():
    norm = GroupNorm(8, 24).double()
    h, s = torch.randn(2, 2, 12, 4, 4, dtype=torch.float64)
    plain = norm(h, s, None, act=None)
    for scale in (0.3, torch.rand(2, s.shape[1], dtype=torch.float64)):
        scaled = norm(h, s, scale, "after-norm", act=None)
        factor = scale[:, :, None, None] if isinstance(scale, Tensor) else scale
        torch.testing.assert_close(scaled[:, :12], plain[:, :12])
        torch.testing.assert_close(scaled[:, 12:], plain[:, 12:] * factor)


@each_config
def test_output_is_shaped_as_the_image_or_as_asked(config):
    x, *more = make_inputs(config)
    assert UNet(config)(x, *more).shape == x.shape
    assert UNet(replace(config, out_channels=6))(x, *more).shape == (2, 6, 16, 16)


@each_config
@each_policy
def test_gradients_reach_every_parameter(policy, position, config):
    model = make_model(replace(config, skip_position=position), policy)
    output = model(*make_inputs(config))
    output.backward(torch.randn_like(output))
    # Every channel of the gates' hidden layer may be off; their last bias is not.
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert [name for name in without if "skip_gates" not in name] == []
    assert not any(name.endswith("layer2.bias") for name in without)


def test_a_level_may_have_a_fraction_of_the_channels():
    config = replace(PLAIN, channel_mult=(0.5, 1, 1.5))
    assert config.channels == (8, 16, 24)
    assert UNet(config)(*make_inputs(config)).shape == (2, 3, 16, 16)


def test_residual_branches_begin_at_zero():
    model = UNet(LABELS)
    assert not model(*make_inputs(LABELS)).any()
    zero = {name for name, p in model.named_parameters() if not p.any() and "weight" in name}
    expected = {f"{name}.weight" for name, _ in model.named_modules() if name.endswith(("out_layers.3", "proj_out"))}
    assert zero == expected | {"out.2.weight"}


@each_policy
@torch.no_grad()
def test_saved_models_come_back_the_same(tmp_path, policy, position):
    config = replace(LABELS, skip_position=position)
    model = make_model(config, policy)
    model.save_pretrained(tmp_path)
    loaded = UNet.from_pretrained(tmp_path)
    assert (loaded.config, loaded.skip_scale, loaded.training) == (config, policy, False)
    inputs = make_inputs(LABELS)
    assert torch.equal(loaded(*inputs), model(*inputs))


def test_another_architecture_is_refused(tmp_path):
    UNet(PLAIN).save_pretrained(tmp_path)
    description = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**description, "architecture": "UViT"}))
    with pytest.raises(ValueError, match="describes 'UViT', not 'UNet'"):
        UNet.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"img_size": 0}, "img_size must be at least 1, got 0"),
        ({"num_res_blocks": 0}, "num_res_blocks must be at least 1, got 0"),
        ({"num_classes": -1}, "num_classes must not be negative, got -1"),
        ({"channel_mult": ()}, "channel_mult"),
        ({"channel_mult": (1, 0)}, "channel_mult"),
        ({"img_size": 18}, "img_size 18 cannot be halved 2 times"),
        ({"model_channels": 17}, "model_channels must be even .* got 17"),
        ({"model_channels": 12}, "12 channels .* 8 groups"),
        ({"attention_resolutions": (16,)}, "downsampling factors, here of 1, 2, 4; got 16"),
        ({"num_head_channels": 5}, "16 channels .* num_head_channels 5"),
        ({"num_heads": 5}, "16 channels .* num_heads 5"),
        ({"dropout": 1.0}, "dropout .* got 1.0"),
    ],
    ids=str,
)
def test_a_config_that_cannot_be_is_refused_with_its_numbers(change, message):
    with pytest.raises(ValueError, match=message):
        replace(PLAIN, **change)


@pytest.mark.parametrize("shape", [(2, 1, 16, 16), (2, 3, 16, 8), (3, 16, 16)], ids=str)
def test_an_image_of_another_shape_is_refused(shape):
    with pytest.raises(ValueError, match=r"expected images of shape \(3, 16, 16\), got"):
        UNet(PLAIN)(torch.randn(shape), torch.ones(2))


def test_labels_missing_or_unwanted_are_refused():
    with pytest.raises(ValueError, match="labels are missing"):
        UNet(LABELS)(*make_inputs(PLAIN))
    with pytest.raises(ValueError, match="takes no labels"):
        UNet(PLAIN)(*make_inputs(LABELS))


@pytest.mark.parametrize("recompute", [0.5, "some"])
def test_recomputing_by_shares_is_refused(recompute):
    with pytest.raises(ValueError, match="'none' or 'blocks', got"):
        UNet(PLAIN, recompute=recompute)


@pytest.mark.parametrize("kappa", [0.0, 1.5, math.nan])
def test_kappa_outside_0_1_is_refused(kappa):
    with pytest.raises(ValueError, match=r"\(0, 1\]"):
        UNet(PLAIN, skip_scale=make_skip_scale("cs", kappa))


def test_an_unknown_position_is_refused():
    with pytest.raises(ValueError, match="before-norm or after-norm, got 'inside'"):
        replace(PLAIN, skip_position="inside")
