"""What earlier versions saved is read: runs, exports, patched networks."""

import json
from dataclasses import asdict, replace
from typing import Any

import pytest
import torch
from plain_networks import ADM, DDPM, UVIT, _drawn

from scalelong.model.architectures import load_backbone, make_backbone, model_from_dict, model_to_dict
from scalelong.model.renamed import RENAMED, with_new_names
from scalelong.model.skip_scale import ConstantScale, InverseSqrt2, LearnedScale, SkipScale, Unscaled
from scalelong.model.unet import UNet
from scalelong.model.uvit import UViT

# By class and with a position, as policies were described.
OLD_POLICIES: dict[str, tuple[dict[str, Any], SkipScale]] = {
    "none": ({"policy": "Unscaled"}, Unscaled()),
    "inv-sqrt2": ({"policy": "InverseSqrt2"}, InverseSqrt2()),
    "cs": ({"policy": "ConstantScale", "kappa": 0.7}, ConstantScale(0.7)),
    "ls": ({"policy": "LearnedScale", "reduction": 8, "shared": True}, LearnedScale(8)),
    "ls-separate": ({"policy": "LearnedScale", "reduction": 16, "shared": False}, LearnedScale(shared=False)),
}
each_policy = pytest.mark.parametrize("name", OLD_POLICIES)
each_position = pytest.mark.parametrize("position", ["before-norm", "after-norm"])
NEW_FIELDS = {"UViT": ("out_channels", "skip_position"), "UNet": ("context_tokens", "context_dim", "skip_position")}


def old_sizes(config: Any) -> dict[str, Any]:
    return {name: value for name, value in asdict(config).items() if name not in NEW_FIELDS[config.architecture]}


@each_policy
@pytest.mark.parametrize(
    ("config", "position"),
    [(UVIT, "before-norm"), (DDPM, "before-norm"), (ADM, "after-norm")],
    ids=["uvit", "ddpm", "adm"],
)
def test_an_export_of_before_is_the_same_network(tmp_path, name, config, position):
    old, policy = OLD_POLICIES[name]
    if position == "after-norm":
        config = replace(config, skip_position=position)
    model: Any = _drawn(make_backbone(config, skip_scale=policy))
    model.save_pretrained(tmp_path)
    description = {
        "architecture": config.architecture,
        "config": old_sizes(config),
        "skip_scale": {**old, "position": position},
    }
    (tmp_path / "config.json").write_text(json.dumps(description))
    loaded: Any = load_backbone(tmp_path)
    assert type(loaded) is type(model)
    assert (loaded.config, loaded.skip_scale) == (config, policy)
    batch = (torch.randn(2, 3, 8, 8), torch.tensor([3.0, 700.0]))
    batch += (torch.tensor([1, 5]),) if config.num_classes else ()
    assert torch.equal(loaded(*batch), model.eval()(*batch))


@each_policy
@each_position
def test_a_run_of_before_has_the_same_configuration(name, position):
    pytest.importorskip("tyro")
    from scalelong.train.config_json import config_from_dict, config_to_dict
    from scalelong.train.recipes import RECIPES

    old, policy = OLD_POLICIES[name]
    if name == "ls":
        policy = LearnedScale()
    for recipe in ("digits-uvit", "digits-unet"):
        config = replace(RECIPES[recipe], skip_scale=policy, recompute="blocks")
        if recipe == "digits-unet":
            config = replace(config, model=replace(config.model, skip_position=position))
        elif position == "after-norm":
            continue
        sizes = {"architecture": config.model.architecture, **old_sizes(config.model)}
        flat = {"skip_scale": name, "kappa": old.get("kappa", 0.5), "skip_position": position}
        described = config_to_dict(config)
        flat["checkpointing"] = described.pop("recompute")
        assert config_from_dict({**described, "model": sizes, **flat}) == config
        if recipe == "digits-uvit":  # the oldest runs name no architecture, and no position
            del sizes["architecture"], flat["skip_position"]
            assert config_from_dict({**described, "model": sizes, **flat}) == config


@each_policy
@each_position
def test_a_patched_network_of_before_is_the_same(tmp_path, name, position):
    pytest.importorskip("diffusers")
    from test_diffusers_patch import make_network, patched_copy
    from test_diffusers_saved import assert_the_same, moved

    from scalelong.model.diffusers_loading import PatchedUNet

    old, policy = OLD_POLICIES[name]
    network = moved(patched_copy(make_network(), skip_scale=policy, position=position))
    network.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["scalelong"] = {"network": "UNet2DModel", "skip_scale": {**old, "position": position}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    loaded = PatchedUNet.from_pretrained(tmp_path)
    skips = loaded.up_blocks[0].skips.network
    assert (skips.policy, skips.position) == (policy, position)
    assert_the_same(loaded, network)


def test_what_is_read_is_not_changed():
    values = {"model": {"config": {}}, "skip_scale": "cs", "kappa": 0.7}
    before = json.dumps(values)
    assert with_new_names("run", values) == {"model": {"config": {}, "skip_scale": {"kind": "cs", "kappa": 0.7}}}
    assert json.dumps(values) == before


@pytest.mark.parametrize("kind", RENAMED)
def test_what_is_written_today_needs_no_renaming(kind):
    description = model_to_dict(ADM, ConstantScale(0.7))
    values = {"run": {"model": description}, "model": description}.get(
        kind, {"network": "UNet2DModel", "skip_scale": description["skip_scale"], "position": "after-norm"}
    )
    assert with_new_names(kind, values) == values


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architecture": "MMDiT"}, "unknown architecture 'MMDiT'; there are .*U.*, U.* must be defined before"),
        ({"from_the_future": 1}, "has the unknown from_the_future"),
        ({"config": {**asdict(UVIT), "depht": 4}}, "UViT of this version cannot be made of .*depht"),
        ({"config": {**asdict(UVIT), "depth": 3}}, "depth must be even"),
        ({"skip_scale": {"kind": "magic"}}, "unknown skip-scale policy 'magic'"),
        ({"skip_scale": {"kind": "ls", "kappa": 0.5}}, "ls of this version cannot be made of"),
        ({"skip_scale": {"kind": "none", "position": "after-norm"}}, "UViT of this version cannot be made of"),
        ({"skip_scale": {"kind": "ls-separate", "shared": True}}, "'ls-separate' has shared False, not True"),
    ],
    ids=str,
)
def test_a_description_that_does_not_fit_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        model_from_dict({**model_to_dict(UVIT, Unscaled()), **change})


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has no config\.json: not an exported model"):
        load_backbone(tmp_path)
    UViT(UVIT).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no model\.safetensors: not an exported model"):
        load_backbone(tmp_path)
    with pytest.raises(ValueError, match="describes 'UViT', not 'UNet'"):
        UNet.from_pretrained(tmp_path)
