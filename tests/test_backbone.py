"""What the backbones have in common: their inputs, and the folder that they are saved in."""

import os
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from scalelong.model.backbone import Backbone
from scalelong.model.backbone_config import BackboneConfig
from scalelong.model.dit import DiT, DiTConfig
from scalelong.model.unet import UNet, UNetConfig
from scalelong.model.uvit import UViT, UViTConfig

UVIT = UViTConfig(img_size=8, patch_size=2, width=32, depth=4, num_heads=4, num_classes=7)
TEXT = replace(UVIT, num_classes=0, context_tokens=5, context_dim=12)
UNET = UNetConfig(img_size=8, model_channels=32, channel_mult=(1, 2), num_res_blocks=1, num_classes=7)
DIT = DiTConfig(img_size=8, patch_size=2, width=32, depth=4, num_heads=4, num_classes=7, skip="layer-norm")
each_network = pytest.mark.parametrize(
    ("network", "config"), [(UViT, UVIT), (UNet, UNET), (DiT, DIT)], ids=["uvit", "unet", "dit"]
)


def make(network: type[Backbone], config: Any) -> Any:
    """Without zeros, so that the output tells the inputs apart."""
    model = network(config)  # type: ignore[call-arg]
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return model


X, Y = torch.randn(2, 3, 8, 8), torch.tensor([2, 6])


@pytest.mark.parametrize(
    ("config", "change"),
    [
        (UVIT, {"img_size": (8, 16)}),
        (UVIT, {"img_size": [8, 16]}),
        (UVIT, {"depth": "4"}),
        (UVIT, {"width": 32.0}),
        (UVIT, {"num_classes": None}),
        (UNET, {"img_size": (8, 16)}),
        (UNET, {"num_res_blocks": 1.5}),
    ],
    ids=str,
)
def test_sizes_that_are_no_whole_numbers_are_named(config, change):
    name, value = next(iter(change.items()))
    with pytest.raises(ValueError, match=rf"{name} is a whole number.*, got {re.escape(repr(value))}"):
        replace(config, **change)


@pytest.mark.parametrize("change", [{"channel_mult": 2}, {"attention_resolutions": "2"}, {"channel_mult": (1, "2")}])
def test_levels_that_are_no_tuples_of_numbers_are_named(change):
    with pytest.raises(ValueError, match=rf"{next(iter(change))} is a tuple of numbers, got"):
        replace(UNET, **change)


@each_network
@pytest.mark.parametrize("t", [torch.tensor(500.0), torch.tensor([500.0]), torch.tensor(500)], ids=str)
def test_one_time_is_that_of_all_images(network, config, t):
    model = make(network, config)
    expected = model(X, torch.full((2,), 500.0), Y)
    assert torch.equal(model(X, t, Y), expected)
    assert not torch.equal(model(X, t / 2, Y), expected)


@each_network
@pytest.mark.parametrize("t", [torch.ones(3), torch.ones(2, 1), torch.ones(1, 1), torch.ones(0)], ids=str)
def test_another_number_of_times_is_refused(network, config, t):
    with pytest.raises(ValueError, match=r"a time for each of 2 images or one for all, got times of \("):
        make(network, config)(X, t, Y)


@each_network
@pytest.mark.parametrize("shape", [(), (1,), (3,), (2, 1)], ids=str)
def test_another_number_of_labels_is_refused(network, config, shape):
    with pytest.raises(ValueError, match=r"a label for each of 2 images, got labels of \("):
        make(network, config)(X, torch.ones(2), torch.zeros(shape, dtype=torch.long))


@pytest.mark.parametrize("shape", [(2, 4, 12), (2, 6, 12), (2, 5, 11), (1, 5, 12), (5, 12)], ids=str)
def test_text_of_another_shape_is_refused(shape):
    with pytest.raises(ValueError, match=r"expected text of shape \(2, 5, 12\), got \("):
        UViT(TEXT)(X, torch.ones(2), torch.randn(shape))


def test_the_name_of_an_architecture_is_taken_once():
    assert {name: config.architecture for name, config in BackboneConfig.known.items()}.items() >= {
        ("UViT", "UViT"),
        ("UNet", "UNet"),
    }
    with pytest.raises(
        ValueError, match=r"architecture 'UViT' is that of a configuration in scalelong\.model\.uvit_config"
    ):

        class Another(UViTConfig, architecture="UViT"):
            pass

    assert BackboneConfig.known["UViT"] is UViTConfig


@each_network
def test_parameter_groups_name_every_parameter_once_in_its_order(network, config):
    model = make(network, config)
    groups = model.parameter_groups()
    assert [name for group in groups for name in group.names] == [name for name, _ in model.named_parameters()]
    assert {(group.learning_rate_factor, group.weight_decay_factor) for group in groups} == {(1.0, 1.0)}
    assert len(groups) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda _: b"", "config.json is no JSON"),
        (lambda data: data[:-20], "config.json is no JSON"),
        (lambda _: b"\xff\xfe\x00", "config.json is no JSON"),
        (lambda _: b"[1, 2]", r"config.json describes no model: it holds '\[1, 2\]'"),
        (lambda _: b'{"architectures": ["T5"]}', "describes no model: it holds .*T5"),
        (lambda data: data.replace(b'"config"', b'"sizes"'), "describes no {name} .* has no 'config'"),
        (lambda data: data.replace(b'"in_channels"', b'"channels_in"'), "describes no {name} .*channels_in"),
        (lambda data: data.replace(b'"img_size": 8', b'"img_size": null'), "img_size is a whole number"),
        (lambda data: data.replace(b'"none"', b'"Magic"'), "unknown skip-scale policy 'Magic'"),
        (lambda data: data.replace(b'"num_classes": 7', b'"num_classes": 8'), r"(label_emb|table)\.weight has shape"),
        (lambda data: data.replace(b'"num_classes": 7', b'"num_classes": 0'), r"has the unknown \w+\..*weight"),
    ],
)
@each_network
def test_a_damaged_description_is_refused_in_one_error(tmp_path, network, config, change, message):
    make(network, config).save_pretrained(tmp_path)
    spoil(tmp_path / "config.json", change)
    assert_refused(network, tmp_path, message.format(name=network.__name__))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda _: b"", "cannot read .*model.safetensors: it is empty"),
        (lambda data: data[: len(data) // 2], "model.safetensors: it is damaged"),
        (lambda data: data[:100], "model.safetensors: it is damaged"),
        (lambda data: data[:5], "model.safetensors: it is damaged"),
        (lambda data: b"\xff" * 8 + data[8:], "model.safetensors: it is damaged"),
        (lambda _: b"<html>429 Too Many Requests</html>", "model.safetensors: it is a web page"),
    ],
)
@each_network
def test_damaged_weights_are_refused_in_one_error(tmp_path, network, config, change, message):
    make(network, config).save_pretrained(tmp_path)
    spoil(tmp_path / "model.safetensors", change)
    assert_refused(network, tmp_path, message)


def spoil(path: Any, change: Callable[[bytes], bytes]) -> None:
    changed = change(path.read_bytes())
    assert changed != path.read_bytes()
    path.write_bytes(changed)


def assert_refused(network: type[Backbone], folder: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        network.from_pretrained(folder)
    assert type(caught.value) is ValueError


@each_network
def test_an_export_half_in_fp16_becomes_fp32(tmp_path, network, config):
    model = make(network, config)
    model.save_pretrained(tmp_path)
    state = {name: p.half() if i % 2 == 0 else p for i, (name, p) in enumerate(model.state_dict().items())}
    save_file(state, tmp_path / "model.safetensors")
    assert {p.dtype for p in network.from_pretrained(tmp_path).parameters()} == {torch.float32}


@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077], ids=oct)
def test_weights_have_the_permissions_of_any_new_file(tmp_path, umask):
    before = os.umask(umask)
    try:
        UViT(UVIT).save_pretrained(tmp_path / "export")
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "export").iterdir()} == {0o666 & ~umask}
