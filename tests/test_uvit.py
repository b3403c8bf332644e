import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from scalelong.model.presets import UVIT_PRESETS
from scalelong.model.skip_scale import SKIP_SCALE_NAMES, make_skip_scale
from scalelong.model.time_embedding import time_embedding
from scalelong.model.transformer_layers import unpatchify
from scalelong.model.uvit import UViT, UViTConfig
from scalelong.model.uvit_checkpoint import load_uvit_checkpoint

# fmt: off
PUBLISHED = {  # width, depth, heads, tokens, last convolution, parameters / 1e6, multiply-adds of a forward pass / 1e9
    "cifar10-uvit-s2":     ( 512, 12,  8, 257, True,   "44.26",  12.20),
    "celeba64-uvit-s4":    ( 512, 12,  8, 257, True,   "44.29",  12.21),
    "imagenet64-uvit-m4":  ( 768, 16, 12, 258, True,  "130.94",  35.24),
    "imagenet64-uvit-l4":  (1024, 20, 16, 258, True,  "286.83",  76.47),
    "imagenet256-uvit-l2": (1024, 20, 16, 258, True,  "286.76",  76.46),
    "imagenet256-uvit-h2": (1152, 28, 16, 258, False, "500.83", 133.20),
    "imagenet512-uvit-l4": (1024, 20, 16, 258, True,  "286.86",  76.48),
    "imagenet512-uvit-h4": (1152, 28, 16, 258, False, "500.94", 133.23),
    "mscoco-uvit-s2":      ( 512, 12,  8, 334, True,   "44.69",  16.20),
    "mscoco-uvit-s2-deep": ( 512, 16,  8, 334, True,   "58.35",  21.21),
}
# fmt: on

PLAIN = UViTConfig(img_size=16, patch_size=2, width=32, depth=4, num_heads=4)
LABELS = replace(PLAIN, num_classes=7)
TEXT = replace(PLAIN, context_tokens=5, context_dim=12)
each_config = pytest.mark.parametrize("config", [PLAIN, LABELS, TEXT], ids=["plain", "labels", "text"])
each_skip_scale = pytest.mark.parametrize(
    "skip_scale", [make_skip_scale(name, 0.7) for name in SKIP_SCALE_NAMES], ids=SKIP_SCALE_NAMES
)


def make_inputs(config: UViTConfig, B: int = 2) -> tuple[Tensor, Tensor, Tensor | None]:
    x = torch.randn(B, config.in_channels, config.img_size, config.img_size)
    t = torch.linspace(1, 999, B)
    if config.num_classes:
        return x, t, torch.arange(B) % config.num_classes
    if config.context_tokens:
        return x, t, torch.randn(B, config.context_tokens, config.context_dim)
    return x, t, None


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name):
    *shape, millions, gmacs = PUBLISHED[name]
    config = UVIT_PRESETS[name]
    with torch.device("meta"):
        model = UViT(config)
    assert [config.width, config.depth, config.num_heads, config.num_tokens, config.final_conv] == shape
    assert f"{model.num_params() / 1e6:.2f}" == millions
    assert model.flops() / 2e9 == pytest.approx(gmacs, rel=0.003)


@pytest.mark.parametrize(
    "config",
    [
        *UVIT_PRESETS.values(),
        replace(LABELS, time_mlp=True, qkv_bias=True, mlp_ratio=2.5),
        replace(LABELS, out_channels=6),
    ],
    ids=[*UVIT_PRESETS, "unpublished-options", "other-channels"],
)
def test_flops_are_those_that_torch_counts(config):
    with torch.device("meta"):
        model, inputs = UViT(config), make_inputs(config, B=3)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(*inputs)
    assert model.flops(batch_size=3) == counter.get_total_flops()


def test_every_preset_but_the_embedded_default_is_published():
    assert UVIT_PRESETS.keys() - PUBLISHED.keys() == {"digits-uvit", "photos32-uvit", "images32-uvit", "images64-uvit"}


def tokens_before_the_blocks(model: UViT, inputs: tuple) -> Tensor:
    """What enters the first block, its position embedding taken off."""
    seen = []
    handle = model.in_blocks[0].register_forward_pre_hook(lambda block, args: seen.append(args[0]))
    model(*inputs)
    handle.remove()
    return seen[0] - model.pos_embed


@torch.no_grad()
def test_tokens_are_time_then_patches():
    model = UViT(PLAIN).double()
    x, t, _ = make_inputs(PLAIN)
    tokens = tokens_before_the_blocks(model, (x.double(), t.double()))
    assert tokens.shape[1] == PLAIN.num_tokens == 1 + 64
    torch.testing.assert_close(tokens[:, 0], time_embedding(t, 32, torch.float64))
    torch.testing.assert_close(tokens[:, 1:], model.patch_embed(x.double()))


@torch.no_grad()
def test_tokens_are_class_then_time_then_patches():
    model = UViT(LABELS).double()
    x, t, y = make_inputs(LABELS)
    tokens = tokens_before_the_blocks(model, (x.double(), t.double(), y))
    assert tokens.shape[1] == LABELS.num_tokens == 2 + 64
    assert isinstance(model.label_emb, nn.Embedding)
    torch.testing.assert_close(tokens[:, 0], model.label_emb.weight[y])
    torch.testing.assert_close(tokens[:, 1], time_embedding(t, 32, torch.float64))
    torch.testing.assert_close(tokens[:, 2:], model.patch_embed(x.double()))


@torch.no_grad()
def test_tokens_are_time_then_text_then_patches():
    model = UViT(TEXT).double()
    x, t, y = make_inputs(TEXT)
    assert y is not None
    tokens = tokens_before_the_blocks(model, (x.double(), t.double(), y.double()))
    assert tokens.shape[1] == TEXT.num_tokens == 1 + 5 + 64
    torch.testing.assert_close(tokens[:, 0], time_embedding(t, 32, torch.float64))
    torch.testing.assert_close(tokens[:, 1:6], model.context_embed(y.double()))
    torch.testing.assert_close(tokens[:, 6:], model.patch_embed(x.double()))


@torch.no_grad()
def test_patches_are_taken_row_by_row():
    model = UViT(PLAIN)
    x, _, _ = make_inputs(PLAIN)
    tokens = model.patch_embed(x)
    kernel, bias = model.patch_embed.parameters()
    for row, column in [(0, 0), (0, 7), (3, 5), (7, 0)]:
        patch = x[:, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2].flatten(1)
        torch.testing.assert_close(tokens[:, 8 * row + column], patch @ kernel.flatten(1).T + bias)


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float64, 1e-12), (torch.float32, 2e-4)])
def test_time_embedding_is_the_published_formula(dtype, atol):
    t = np.array([0.0, 0.5, 1.0, 37.25, 999.0])
    frequencies = np.exp(-np.log(10000) * np.arange(8) / 8)
    angles = np.outer(t, frequencies)
    expected = np.concatenate([np.cos(angles), np.sin(angles)], axis=1)
    ours = time_embedding(torch.tensor(t, dtype=dtype), 16, dtype)
    assert ours.dtype == dtype
    np.testing.assert_allclose(ours.numpy(), expected, atol=atol)


def test_time_embedding_is_rounded_to_low_precision_only_at_the_end():
    t = torch.tensor([1.0, 998.5])
    assert torch.equal(time_embedding(t, 16, torch.bfloat16), time_embedding(t, 16, torch.float32).bfloat16())


def test_time_embedding_takes_integer_steps():
    n = torch.tensor([1, 500, 1000])
    assert torch.equal(time_embedding(n, 16, torch.float32), time_embedding(n.float(), 16, torch.float32))


def test_unpatchify_undoes_the_published_flattening():
    config = replace(PLAIN, img_size=12, patch_size=3)
    x = torch.randn(2, 3, 12, 12)
    patches = [x[:, :, r : r + 3, c : c + 3] for r in range(0, 12, 3) for c in range(0, 12, 3)]
    flattened = torch.stack([patch.permute(0, 2, 3, 1).flatten(1) for patch in patches], dim=1)  # (p1, p2, C)
    assert torch.equal(unpatchify(flattened, 4, config.patch_size, config.channels_out), x)


@pytest.mark.parametrize("final_conv", [True, False])
@each_config
def test_output_is_shaped_as_the_image(config, final_conv):
    x, t, y = make_inputs(config)
    assert UViT(replace(config, final_conv=final_conv))(x, t, y).shape == x.shape


@each_skip_scale
@each_config
def test_gradients_reach_every_parameter(config, skip_scale):
    model = UViT(replace(config, time_mlp=True, qkv_bias=True), skip_scale=skip_scale)
    output = model(*make_inputs(config))
    output.backward(torch.randn_like(output))
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


@each_skip_scale
@torch.no_grad()
def test_skips_are_what_the_policy_scales(skip_scale):
    """With the skip half of each skip_linear emptied, a policy matters by its factor of both halves alone."""
    model, plain = UViT(PLAIN, skip_scale=skip_scale), UViT(PLAIN)
    plain.load_state_dict(model.state_dict(), strict=False)
    inputs = make_inputs(PLAIN)
    assert torch.equal(model(*inputs), plain(*inputs)) == (skip_scale == plain.skip_scale)
    for block in [*model.out_blocks, *plain.out_blocks]:
        block.get_parameter("skip_linear.weight")[:, PLAIN.width :] = 0
    of_both = getattr(skip_scale, "renorm", False)
    assert torch.allclose(model(*inputs), plain(*inputs), rtol=1e-5, atol=1e-5) != of_both


@each_skip_scale
@torch.no_grad()
def test_saved_models_come_back_the_same(tmp_path, skip_scale):
    model = UViT(LABELS, skip_scale=skip_scale)
    model.save_pretrained(tmp_path / "new" / "folder")
    loaded = UViT.from_pretrained(tmp_path / "new" / "folder")
    assert (loaded.config, loaded.skip_scale, loaded.training) == (LABELS, skip_scale, False)
    inputs = make_inputs(LABELS)
    assert torch.equal(loaded(*inputs), model(*inputs))


@torch.no_grad()
def test_a_network_may_predict_other_channels_than_it_takes(tmp_path):
    model = UViT(replace(LABELS, out_channels=6))
    for p in model.parameters():
        p.add_(0.05 * torch.randn_like(p))
    inputs = make_inputs(LABELS)
    assert model(*inputs).shape == (2, 6, 16, 16)
    model.save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    published = load_uvit_checkpoint(weights, img_size=16, patch_size=2, num_heads=4)
    for loaded in (UViT.from_pretrained(tmp_path), published):
        assert loaded.config == model.config
        assert torch.equal(loaded(*inputs), model(*inputs))


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_an_incomplete_folder_is_refused(tmp_path, name):
    UViT(PLAIN).save_pretrained(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"has no {name}"):
        UViT.from_pretrained(tmp_path)


def test_another_architecture_is_refused(tmp_path):
    UViT(PLAIN).save_pretrained(tmp_path)
    description = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**description, "architecture": "UNet"}))
    with pytest.raises(ValueError, match="describes 'UNet', not 'UViT'"):
        UViT.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"img_size": 0}, "img_size must be at least 1, got 0"),
        ({"patch_size": 0}, "patch_size must be at least 1, got 0"),
        ({"in_channels": 0}, "in_channels must be at least 1, got 0"),
        ({"width": 0}, "width must be at least 1, got 0"),
        ({"num_heads": 0}, "num_heads must be at least 1, got 0"),
        ({"num_classes": -1}, "num_classes must not be negative, got -1"),
        ({"context_tokens": -1}, "context_tokens must not be negative, got -1"),
        ({"patch_size": 3}, "img_size 16 is no multiple of patch_size 3"),
        ({"num_heads": 5}, "width 32 is no multiple of num_heads 5"),
        ({"width": 33, "num_heads": 3}, "width must be even .* got 33"),
        ({"depth": 5}, "depth must be even and at least 2, got 5"),
        ({"depth": 0}, "depth must be even and at least 2, got 0"),
        ({"num_classes": 10, "context_tokens": 77}, "class labels or text, not both"),
    ],
    ids=str,
)
def test_a_config_that_cannot_be_is_refused_with_its_numbers(change, message):
    with pytest.raises(ValueError, match=message):
        replace(PLAIN, **change)


@pytest.mark.parametrize("shape", [(2, 1, 16, 16), (2, 3, 16, 8), (2, 3, 32, 32), (3, 16, 16)], ids=str)
def test_an_image_of_another_shape_is_refused(shape):
    with pytest.raises(ValueError, match=r"expected images of shape \(3, 16, 16\), got"):
        UViT(PLAIN)(torch.randn(shape), torch.ones(2))


@pytest.mark.parametrize("config", [LABELS, TEXT], ids=["labels", "text"])
def test_missing_labels_are_refused(config):
    x, t, _ = make_inputs(config)
    with pytest.raises(ValueError, match="labels or text are missing"):
        UViT(config)(x, t)


def test_unwanted_labels_are_refused():
    x, t, _ = make_inputs(PLAIN)
    with pytest.raises(ValueError, match="takes no labels"):
        UViT(PLAIN)(x, t, torch.zeros(2, dtype=torch.long))
