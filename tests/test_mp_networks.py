"""The magnitude-preserving DiT, U-ViT and UNet of EDM2: magnitudes, sizes, and what else every network can do."""

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from samples import each_value_once
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from scalelong.model.architectures import load_backbone, make_backbone
from scalelong.model.dit import DiTConfig
from scalelong.model.edm2_unet import EDM2UNetConfig
from scalelong.model.magnitude import MPConv2d
from scalelong.model.plain_layers import use_plain_layers
from scalelong.model.presets import DIT_PRESETS, MODEL_PRESETS, UVIT_PRESETS
from scalelong.model.skip_scale import make_skip_scale
from scalelong.model.uvit import UViTConfig

DIT = DiTConfig(
    img_size=8, patch_size=2, width=32, depth=4, num_heads=4, num_classes=7, skip="plain", magnitude_preserving=True
)
UVIT = UViTConfig(
    img_size=8, patch_size=2, width=32, depth=4, num_heads=4, num_classes=7, time_mlp=True, magnitude_preserving=True
)
TEXT = replace(UVIT, num_classes=0, context_tokens=5, context_dim=12, time_mlp=False)
UNET = EDM2UNetConfig(
    img_size=8, model_channels=16, channel_mult=(1, 2), num_res_blocks=1, attention_resolutions=(2,),
    num_head_channels=8, num_classes=7,
)  # fmt: skip
ROTATED = replace(DIT, modulation="scale-rot")
CONFIGS = {"dit": DIT, "rotated": ROTATED, "uvit": UVIT, "text": TEXT, "unet": UNET}
MODES = ("cs", "none", "geometric", "ls", "inv-sqrt2")


def batch_of(config: Any, B: int = 2) -> tuple[Tensor, ...]:
    x, t = torch.randn(B, config.in_channels, config.img_size, config.img_size), torch.linspace(3, 900, B)
    if config.num_classes:
        return x, t, torch.arange(B) % config.num_classes
    return (x, t, torch.randn(B, config.context_tokens, config.context_dim)) if config.context_tokens else (x, t)


def drawn(config: Any, mode: str = "none", **options: Any) -> Any:
    """With gains that are not zero."""
    model = make_backbone(config, skip_scale=make_skip_scale(mode, 0.7), **options)
    for name, p in model.named_parameters():
        if name.endswith("gain"):
            nn.init.normal_(p)
    return model


def magnitudes(config: Any, seed: int, *, circular: bool = False) -> list[float]:
    torch.manual_seed(seed)
    model, found = make_backbone(config), []
    for layer in model.modules():
        if circular and isinstance(layer, MPConv2d):
            layer.padding_mode = "circular"

    def look(_number: int, output: Tensor) -> None:
        found.append(float(output.square().mean().sqrt()))

    model.watch_blocks(look)
    with torch.no_grad():
        assert not model(*batch_of(config)).any()  # the last gain is zero
    return found


@pytest.mark.parametrize("name", ["dit", "uvit"])
def test_blocks_begin_with_unit_magnitude(name):
    """Of published widths, over three seeds: it holds in expectation, and the narrower, the more a network scatters.

    A U-ViT scatters most: attention adds the same vector to all tokens, and no stream goes past its merges.
    """
    dit = replace(DIT_PRESETS["imagenet256-dit-s4"], img_size=16, magnitude_preserving=True)
    uvit = replace(UVIT_PRESETS["cifar10-uvit-s2"], img_size=16, depth=8, magnitude_preserving=True)
    found = torch.tensor([magnitudes({"dit": dit, "uvit": uvit}[name], seed) for seed in range(3)])
    assert (found.square().mean(0).sqrt() - 1).abs().max() < 0.05, found
    assert (found - 1).abs().max() < (0.05 if name == "dit" else 0.08), found


@pytest.mark.parametrize("seed", range(3))
def test_blocks_of_the_unet_begin_with_unit_magnitude_but_for_the_edges(seed):
    config = EDM2UNetConfig(
        img_size=8, model_channels=128, channel_mult=(1, 2), num_res_blocks=1, attention_resolutions=(2,), num_classes=7
    )
    found = magnitudes(config, seed, circular=True)
    assert 0.9 < min(found) <= max(found) < 1.1, found


@pytest.mark.parametrize(
    ("name", "millions"), [("imagenet64-edm2-s", "280.2"), ("imagenet256-mpdit-xl2", "674.3")], ids=str
)
def test_published_sizes(name, millions):
    with torch.device("meta"):
        model = make_backbone(MODEL_PRESETS[name])
    assert f"{model.num_params() / 1e6:.1f}" == millions


@pytest.mark.parametrize(
    ("modulation", "millions"), [("adaln", "32.850"), ("scale-rot", "31.007"), ("rot", "27.320"), ("scale", "29.163")]
)
def test_the_size_of_a_dit_on_latents_is_that_of_the_paper(modulation, millions):
    config = replace(DIT_PRESETS["imagenet256-dit-s4"], img_size=16, magnitude_preserving=True, modulation=modulation)
    with torch.device("meta"):
        assert f"{make_backbone(config).num_params() / 1e6:.3f}" == millions


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_there_are_no_norms_and_no_biases(config):
    names = [name for name, _ in make_backbone(config).named_parameters()]
    assert [name for name in names if "norm" in name or name.endswith("bias")] == []


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_flops_are_those_that_torch_counts(config):
    model = drawn(config)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(*batch_of(config))
    assert counter.get_total_flops() == model.flops(batch_size=2)


@each_value_once("name, mode", tuple(CONFIGS), MODES)
def test_gradients_reach_every_parameter_at_right_angles_to_rows(name, mode):
    model = drawn(CONFIGS[name], mode)
    model(*batch_of(CONFIGS[name], B=7)).pow(3).sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []
    parameters = dict(model.named_parameters())
    for name in model.after_step():
        rows, gradients = (x.flatten(0, -2) if name == "pos_embed" else x.flatten(1) for x in
                           (parameters[name].detach(), parameters[name].grad))  # fmt: skip
        cosines = torch.cosine_similarity(rows.double(), gradients.double(), dim=1)  # type: ignore[union-attr]
        assert cosines.abs().max() < 1e-4, name


@each_value_once("name, mode", tuple(CONFIGS), MODES)
@torch.no_grad()
def test_plain_layers_exports_and_halves_compute_the_same(tmp_path, name, mode):
    config, model = CONFIGS[name], drawn(CONFIGS[name], mode).eval()
    batch = batch_of(config)
    expected = model(*batch)
    torch.testing.assert_close(use_plain_layers(copy.deepcopy(model))(*batch), expected, rtol=1e-4, atol=1e-4)
    model.save_pretrained(tmp_path)
    assert torch.equal(load_backbone(tmp_path)(*batch), expected)
    with torch.device("meta"):
        loaded = make_backbone(config, skip_scale=model.skip_scale)
    loaded.load_state_dict({n: p.detach() for n, p in model.named_parameters()}, assign=True)
    assert torch.equal(loaded.eval()(*batch), expected)  # buffers are those of the configuration
    with torch.autocast("cpu", torch.bfloat16):
        error = (model(*batch).float() - expected).square().mean().sqrt() / expected.square().mean().sqrt()
    assert error < 0.05


@pytest.mark.parametrize(("name", "recompute"), [("dit", 0.5), ("uvit", 0.5), ("unet", "blocks")])
def test_recomputing_changes_nothing(name, recompute):
    config, gradients = CONFIGS[name], []
    batch = batch_of(config)
    model = drawn(config, "cs")
    for way in ("none", recompute):
        model.zero_grad()
        model.recompute = way
        model(*batch).square().mean().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    assert all(map(torch.equal, *gradients))


def test_the_skip_of_the_unet_joins_by_mp_cat():
    """Each half with an equal share, whatever their channels: a policy finds them so."""
    model = make_backbone(UNET)
    assert all(skip.width == skip.stream_width for skip in model.skips)
    assert len(model.skips) == UNET.num_skips == len(model.skip_blocks())
    assert [i for i, _ in model.skip_blocks()] == list(range(UNET.num_skips, 0, -1))


@pytest.mark.parametrize(
    ("config", "changes", "message"),
    [
        (DIT, {"qk_norm": True}, "qk_norm and magnitude_preserving exclude each other"),
        (DIT, {"skip": "layer-norm"}, "skip layer-norm and magnitude_preserving exclude each other"),
        (UVIT, {"qkv_bias": True}, "qkv_bias and magnitude_preserving exclude each other"),
        (UNET, {"num_head_channels": 5}, "32 channels are no heads of num_head_channels 5"),
        (UNET, {"img_size": 9}, "img_size 9 cannot be halved 1 times"),
        (UNET, {"attention_resolutions": (3,)}, "attention_resolutions are downsampling factors, here of 1, 2; got 3"),
        (UNET, {"context_tokens": 3}, "takes no text"),
        (UNET, {"parametrization": "mup", "base_width": 8}, "a EDM2UNet has no parametrization mup"),
    ],
)
def test_what_does_not_fit_is_refused(config, changes, message):
    with pytest.raises(ValueError, match=message):
        replace(config, **changes)


def test_mup_gives_layers_of_a_growing_fan_in_a_lower_rate():
    model = make_backbone(replace(UVIT, width=128, num_heads=16, parametrization="mup", base_width=32))
    factors = {name: group.learning_rate_factor for group in model.parameter_groups() for name in group.names}
    assert set(factors.values()) == {0.5, 1.0}
    slow = {name for name, factor in factors.items() if factor == 0.5}
    assert {"mid_block.attn.qkv.weight", "out_blocks.0.skip_linear.weight", "decoder_pred.weight"} <= slow
    assert not {"patch_embed.linear.weight", "label_emb.weight", "pos_embed", "decoder_pred.gain"} & slow
