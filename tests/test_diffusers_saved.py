"""Patched networks of diffusers that are saved, loaded, resumed and converted keep their scaled skips, or say so."""

import copy
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from samples import each_value_once
from torch import nn

pytest.importorskip("diffusers")
from diffusers import UNet2DConditionModel, UNet2DModel
from diffusers.training_utils import EMAModel
from test_diffusers_patch import KAPPA, make_inputs, make_network, patched_copy

from scalelong.model.diffusers_loading import PatchedUNet
from scalelong.model.diffusers_patch import patch_diffusers, unpatch_diffusers
from scalelong.model.skip_scale import ConstantScale, LearnedScale, SkipScale

POLICIES = [
    {"skip_scale": "none"},
    {"skip_scale": "inv-sqrt2", "position": "after-norm"},
    {"skip_scale": "cs", "kappa": 0.1},
    {"skip_scale": "ls"},
    {"skip_scale": LearnedScale(reduction=4, shared=False), "position": "after-norm"},
]
each_policy = pytest.mark.parametrize("options", POLICIES, ids=str)


def moved(network: Any) -> Any:
    """Gates included: as after training."""
    with torch.no_grad():
        for p in network.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return network


def assert_the_same(network: Any, other: Any) -> None:
    inputs = make_inputs(network)
    assert torch.equal(network(**inputs).sample, other(**inputs).sample)


@each_value_once("options,name,sharded", POLICIES, ["ddpm", "sd15"], [False, True])
def test_one_call_loads_the_function_that_was_saved(tmp_path, name, options, sharded):
    network = moved(patched_copy(make_network(name), **options))
    network.save_pretrained(tmp_path / "unet", max_shard_size="300KB" if sharded else "10GB")
    loaded = PatchedUNet.from_pretrained(tmp_path / "unet")
    assert type(loaded) is type(network)
    assert list(loaded.state_dict()) == list(network.state_dict())
    assert not loaded.training
    assert_the_same(loaded, network)
    again = PatchedUNet.from_pretrained(tmp_path, subfolder="unet", torch_dtype=torch.bfloat16)
    assert {p.dtype for p in again.parameters()} == {torch.bfloat16}


@each_policy
def test_the_one_line_puts_back_what_was_saved(tmp_path, options):
    network = moved(patched_copy(make_network(), **options))
    network.save_pretrained(tmp_path)
    loaded = UNet2DModel.from_pretrained(tmp_path)
    report = patch_diffusers(loaded, gates_from=tmp_path if "gate" in str(network.state_dict().keys()) else None)
    assert report.policy == network.up_blocks[0].skips.network.policy
    assert_the_same(loaded, network)


def test_loading_without_the_policy_warns(tmp_path, caplog):
    from diffusers.utils import logging

    patched_copy(make_network(), skip_scale="cs", kappa=0.1).save_pretrained(tmp_path)
    logger = logging.get_logger("diffusers.configuration_utils")
    logger.addHandler(caplog.handler)
    try:
        UNet2DModel.from_pretrained(tmp_path)
    finally:
        logger.removeHandler(caplog.handler)
    assert "{'scalelong': {" in caplog.text
    assert "'kappa': 0.1" in caplog.text


def test_gates_that_are_not_read_are_an_error_or_a_warning(tmp_path):
    patched_copy(make_network(), skip_scale="ls").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"gates of LearnedScale.* not read: give gates_from=FOLDER"):
        patch_diffusers(UNet2DModel.from_pretrained(tmp_path))
    with pytest.warns(UserWarning, match="it gets new ones. To keep those, give gates_from=FOLDER"):
        patch_diffusers(UNet2DModel.from_pretrained(tmp_path), skip_scale="ls")


def test_another_policy_than_the_saved_one_warns(tmp_path):
    patched_copy(make_network(), skip_scale="cs", kappa=0.1).save_pretrained(tmp_path)
    loaded = UNet2DModel.from_pretrained(tmp_path)
    with pytest.warns(UserWarning, match=r"was saved with ConstantScale.*kappa=0.1.*patched with ConstantScale.*0.7"):
        patch_diffusers(loaded, skip_scale="cs", kappa=KAPPA)
    assert patch_diffusers(loaded).policy == ConstantScale(KAPPA)


def test_without_a_saved_policy_the_default_is_cs():
    network = make_network()
    assert patch_diffusers(network).policy == ConstantScale(0.5)
    assert patch_diffusers(make_network(), kappa=0.3).policy == ConstantScale(0.3)
    report = patch_diffusers(make_network(), position="after-norm")
    assert (report.policy, report.position) == (ConstantScale(0.5), "after-norm")


@pytest.mark.parametrize("skip_scale", ["cs", "ls"])
def test_unpatching_leaves_nothing_in_the_configuration(tmp_path, skip_scale):
    network = make_network()
    before = dict(network.config)
    patch_diffusers(network, skip_scale=skip_scale)
    unpatch_diffusers(network)
    assert dict(network.config) == before
    network.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="configuration says nothing of scaled skips"):
        PatchedUNet.from_pretrained(tmp_path)


def test_a_policy_that_cannot_be_saved_is_warned_of(tmp_path):
    class Mine(SkipScale):
        def __init__(self, factor: float):
            object.__setattr__(self, "factor", factor)
            super().__init__()

        def scale(self, i, num_skips, skip, gates):
            return self.__dict__["factor"]

    network = make_network()
    with pytest.warns(UserWarning, match=r"will not say how its skips are scaled: .*Mine"):
        patch_diffusers(network, skip_scale=Mine(0.5))
    assert "scalelong" not in network.config


def test_what_is_saved_is_damaged(tmp_path):
    patched_copy(make_network(), skip_scale="ls").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "scalelong": {"skip_scale": {"policy": "Magic"}}}))
    with pytest.raises(ValueError, match="unknown skip-scale policy 'Magic'"):
        PatchedUNet.from_pretrained(tmp_path)
    for entry, message in (
        (7, "describes no skip scale: 7"),
        ({**config["scalelong"], "network": "X"}, "is of a X, which"),
    ):
        (tmp_path / "config.json").write_text(json.dumps({**config, "scalelong": entry}))
        with pytest.raises(ValueError, match=message):
            PatchedUNet.from_pretrained(tmp_path)
    make_network().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"skip_gates"):
        PatchedUNet.from_pretrained(tmp_path)


def test_a_pipeline_loads_the_weights_everywhere_and_the_policy_by_the_one_line(tmp_path):
    from diffusers import DDPMPipeline, DDPMScheduler

    network = moved(patched_copy(make_network(), skip_scale="ls"))
    DDPMPipeline(network, DDPMScheduler()).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "model_index.json").read_text())["unet"] == ["diffusers", "UNet2DModel"]
    pipeline = DDPMPipeline.from_pretrained(tmp_path)
    patch_diffusers(pipeline.unet, gates_from=tmp_path / "unet")
    assert_the_same(pipeline.unet, network)


class Script:
    """How diffusers' train_unconditional.py saves and resumes, with ``network_class`` where it has UNet2DModel."""

    def __init__(self, network_class: Any, skip_scale: str = "ls"):
        self.network_class = network_class
        self.unet: Any = make_network()
        patch_diffusers(self.unet, skip_scale=skip_scale)  # the one line
        self.ema = EMAModel(self.unet.parameters(), decay=0.5, model_cls=network_class, model_config=self.unet.config)
        self.optimizer = torch.optim.Adam(self.unet.parameters(), lr=1e-2)

    def step(self) -> None:
        self.unet(**make_inputs(self.unet)).sample.square().mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.ema.step(self.unet.parameters())

    def save(self, folder: Path) -> None:
        self.ema.save_pretrained(os.path.join(folder, "unet_ema"))  # noqa: PTH118
        self.unet.save_pretrained(os.path.join(folder, "unet"))  # noqa: PTH118

    def load(self, folder: Path) -> None:
        loaded = EMAModel.from_pretrained(os.path.join(folder, "unet_ema"), self.network_class)  # noqa: PTH118
        self.ema.load_state_dict(loaded.state_dict())
        network = self.network_class.from_pretrained(folder, subfolder="unet")
        self.unet.register_to_config(**network.config)
        self.unet.load_state_dict(network.state_dict())


@pytest.mark.parametrize("skip_scale", ["none", "cs", "ls", "ls-separate"])
def test_diffusers_own_script_resumes_with_averages_of_all_parameters(tmp_path, skip_scale):
    script = Script(PatchedUNet, skip_scale)
    for _ in range(3):
        script.step()
    script.save(tmp_path)
    torch.manual_seed(7)
    resumed = Script(PatchedUNet, skip_scale)
    resumed.load(tmp_path)
    num_parameters = len(list(script.unet.parameters()))
    assert len(script.ema.shadow_params) == len(resumed.ema.shadow_params) == num_parameters
    assert all(torch.equal(a, b) for a, b in zip(resumed.ema.shadow_params, script.ema.shadow_params, strict=True))
    assert resumed.ema.optimization_step == 3
    assert_the_same(resumed.unet, script.unet)
    resumed.optimizer.load_state_dict(copy.deepcopy(script.optimizer.state_dict()))
    for each in (script, resumed):
        torch.manual_seed(11)
        each.step()
    assert all(torch.equal(a, b) for a, b in zip(resumed.ema.shadow_params, script.ema.shadow_params, strict=True))
    moved_on = [not torch.equal(a, b) for a, b in zip(script.ema.shadow_params, script.unet.parameters(), strict=True)]
    assert all(moved_on)


def test_with_the_plain_class_the_script_ends_in_advice(tmp_path):
    script = Script(UNet2DModel)
    script.step()
    script.save(tmp_path)
    with pytest.raises(
        RuntimeError, match=r"no learned gates for the skips.* use scalelong.PatchedUNet.from_pretrained"
    ):
        Script(UNet2DModel).load(tmp_path)


def test_averages_whose_configuration_was_taken_before_the_patch_are_not_saved_without_gates(tmp_path):
    network = make_network()
    config = network.config
    patch_diffusers(network, skip_scale="ls")
    average = EMAModel(network.parameters(), model_cls=PatchedUNet, model_config=config)
    with pytest.raises(ValueError, match=r"says nothing of scaled skips.* taken before"):
        average.save_pretrained(tmp_path)


def test_accelerate_saves_and_loads_a_patched_network_and_its_averages(tmp_path):
    accelerate = pytest.importorskip("accelerate")
    states = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        accelerator = accelerate.Accelerator(cpu=True)
        network: Any = moved(patched_copy(make_network(), skip_scale="ls"))
        average = EMAModel(network.parameters(), decay=0.5)
        network = accelerator.prepare(network)
        accelerator.register_for_checkpointing(average)
        if seed == 1:
            average.step([p + 1 for p in network.parameters()])
            accelerator.save_state(tmp_path)
        else:
            accelerator.load_state(tmp_path)
        states.append([*network.state_dict().values(), *average.shadow_params])
    assert len(states[0]) == 2 * len(list(network.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(*states, strict=True))


TEXT = ("sd15", "sdxl")


def motion_of(unet: Any) -> Any:
    from diffusers import MotionAdapter, UNetMotionModel

    adapter = MotionAdapter(
        block_out_channels=unet.config.block_out_channels, motion_layers_per_block=2, motion_norm_num_groups=8
    )
    return UNetMotionModel.from_unet2d(unet, adapter)


def control_of(unet: Any) -> Any:
    from diffusers import ControlNetXSAdapter, UNetControlNetXSModel

    adapter = ControlNetXSAdapter.from_unet(unet, size_ratio=1.0)
    return UNetControlNetXSModel.from_unet(unet=unet, controlnet=adapter)


@pytest.mark.parametrize("convert", [motion_of, control_of])
@pytest.mark.parametrize("options", [{"skip_scale": "cs", "kappa": 0.1}, {"skip_scale": "ls"}], ids=str)
def test_conversions_that_would_lose_the_policy_are_refused(convert, options):
    down, up = ("CrossAttnDownBlock2D", "DownBlock2D"), ("UpBlock2D", "CrossAttnUpBlock2D")
    plain: Any = UNet2DConditionModel(
        sample_size=8, block_out_channels=(32, 64), down_block_types=down, up_block_types=up, norm_num_groups=8,
        cross_attention_dim=16, attention_head_dim=8,
    )  # fmt: skip
    unet = patched_copy(plain, **options)
    with pytest.raises(ValueError, match=r"not that its skips are scaled by .*unpatch_diffusers"):
        convert(unet)
    unpatch_diffusers(unet)
    for same in (unet, plain, patched_copy(plain, skip_scale="none")):
        assert isinstance(convert(same), nn.Module)
