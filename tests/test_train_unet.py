"""A UNet through the same trainer: what differs from a U-ViT is dropout, the layout and gates of several sizes."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("deepspeed")

from running import log_rows, losses, train_on_ranks

from scalelong.model.architectures import load_backbone
from scalelong.model.unet import UNet
from scalelong.train.command_line import parse_train_arguments
from scalelong.train.commands.export import main as export
from scalelong.train.config import TrainConfig
from scalelong.train.config_json import config_differences, config_from_dict, config_to_dict
from scalelong.train.errors import UserError
from scalelong.train.loop import train
from scalelong.train.recipes import RECIPES

STEP = 16
FLAGS = [
    *("--model.model-channels", "8", "--model.num-groups", "4", "--model.num-res-blocks", "1"),
    *("--images-per-step", str(STEP), "--optimizer.warmup-images", "32"),
    *("--sample.num-images", "10", "--sample.steps", "2", "--images-per-log", "0", "--skip-scale", "ls"),
]


def unet_config(run: Path, **changes) -> TrainConfig:
    """What FLAGS make of the preset."""
    base = RECIPES["digits-unet"]
    model = replace(base.model, model_channels=8, num_groups=4, num_res_blocks=1)
    small = replace(
        base,
        run=run,
        images_per_step=STEP,
        images_per_log=0,
        model=model,
        skip_scale="ls",
        optimizer=replace(base.optimizer, warmup_images=32),
        sample=replace(base.sample, num_images=10, steps=2),
    )
    return replace(small, **changes)


def test_a_configuration_survives_json(tmp_path):
    for config in (RECIPES["digits-unet"], RECIPES["imagenet64-adm"], RECIPES["digits-uvit"]):
        assert config_from_dict(config_to_dict(config)) == config


def test_another_architecture_is_another_configuration():
    difference = config_differences(RECIPES["digits-uvit"], replace(RECIPES["digits-unet"], run=Path("x")))
    assert "--model UViT -> UNet" in difference


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"recompute": 0.5}, "'none' or 'blocks'"),
        ({"model": replace(RECIPES["digits-unet"].model, out_channels=2)}, "learned variance"),
    ],
    ids=str,
)
def test_what_a_unet_cannot_do_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(RECIPES["digits-unet"], **changes)


def test_a_uvit_has_no_norm_to_scale_after():
    with pytest.raises(UserError, match="no norm follows the skips of a UViT: no skip scale can stand after"):
        parse_train_arguments(["digits-uvit", "--skip-position", "after-norm"])


@pytest.mark.slow
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_resuming_is_exact(tmp_path, dropout):
    model = replace(unet_config(tmp_path).model, dropout=dropout)
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    assert train(unet_config(straight, model=model, total_images=8 * STEP)) == 0
    for total in (3 * STEP, 8 * STEP):
        assert train(unet_config(resumed, model=model, total_images=total)) == 0
    assert losses(resumed) == losses(straight)
    for name in ("model", "ema", "optimizer"):
        left, right = (load_file(run / "checkpoints" / "128" / f"{name}.safetensors") for run in (straight, resumed))
        assert all(torch.equal(left[key], right[key]) for key in left)
    assert log_rows(straight)[-1].keys() >= {f"skip/{i}/scale" for i in range(1, 5)}


@pytest.mark.slow
def test_a_run_is_exported_and_another_architecture_refused(tmp_path):
    run = tmp_path / "run"
    model = replace(unet_config(run).model, skip_position="after-norm")
    assert train(unet_config(run, total_images=2 * STEP, model=model)) == 0
    export([str(run), "--out", str(tmp_path / "exported")])
    model = load_backbone(tmp_path / "exported")
    assert isinstance(model, UNet)
    assert model.config.skip_position == "after-norm"
    assert model(torch.randn(1, 1, 8, 8), torch.ones(1), torch.tensor([3])).isfinite().all()
    with pytest.raises(UserError, match="--model UNet -> UViT"):
        train(replace(RECIPES["digits-uvit"], run=run))


@pytest.mark.slow
def test_two_processes_under_zero_3_give_the_losses_of_one(tmp_path):
    assert train(unet_config(tmp_path / "one", total_images=5 * STEP)) == 0
    flags = [*FLAGS, "--run", tmp_path / "two", "--zero-stage", 3, "--recompute", "blocks"]
    train_on_ranks(2, "digits-unet", *flags, "--total-images", 5 * STEP)
    np.testing.assert_allclose(losses(tmp_path / "two"), losses(tmp_path / "one"), rtol=0, atol=1e-4)
