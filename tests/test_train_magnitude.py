"""Magnitude-preserving networks through the same trainer: rows of unit RMS after every step, under every ZeRO stage."""

import json
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("deepspeed")

from running import losses, run_on_ranks, train_on_ranks

from scalelong.model.architectures import make_backbone
from scalelong.model.edm2_unet import EDM2UNetConfig
from scalelong.train.command_line import parse_train_arguments
from scalelong.train.config import TrainConfig
from scalelong.train.config_json import config_from_dict, config_to_dict
from scalelong.train.errors import UserError
from scalelong.train.loop import train
from scalelong.train.recipes import RECIPES

STEP, STAGES = 16, (0, 1, 2, 3)
NAMES = ("digits-mpdit", "digits-mpuvit", "edm2")
UNET = EDM2UNetConfig(
    img_size=8, in_channels=1, model_channels=16, channel_mult=(1, 2), num_res_blocks=1, attention_resolutions=(2,),
    num_head_channels=16, num_classes=11,
)  # fmt: skip


def small(name: str, run: Path, **changes) -> TrainConfig:
    base = RECIPES["digits-mpdit" if name == "edm2" else name]
    config = replace(
        base,
        run=run,
        images_per_step=STEP,
        images_per_log=0,
        images_per_average=2 * STEP,
        model=UNET if name == "edm2" else replace(base.model, width=32, depth=2),
        optimizer=replace(base.optimizer, warmup_images=2 * STEP, stable_images=2 * STEP),
        sample=replace(base.sample, num_images=10, steps=2),
    )
    return replace(config, **changes)


def assert_unit_rows(run: Path, images: int, config: TrainConfig) -> None:
    weights = load_file(run / "checkpoints" / str(images) / "model.safetensors")
    names = make_backbone(config.model).after_step()
    assert names
    for name in names:
        rows_RF = weights[name].flatten(0, -2) if name == "pos_embed" else weights[name].flatten(1)
        torch.testing.assert_close(rows_RF.square().mean(1).sqrt(), torch.ones(len(rows_RF)), rtol=0, atol=1e-3)


def assert_same_run(left: Path, right: Path, images: int) -> None:
    assert losses(left) == losses(right)
    for name in ("model", "ema", "ema-0.05", "optimizer", "loss_weighting"):
        mine, other = (load_file(run / "checkpoints" / str(images) / f"{name}.safetensors") for run in (left, right))
        assert mine.keys() == other.keys()
        assert all(torch.equal(mine[key], other[key]) for key in mine)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["digits-mpuvit", *(pytest.param(n, marks=pytest.mark.exhaustive) for n in NAMES[::2])]
)
def test_rows_are_normalised_after_each_step_on_two_ranks_under_every_stage(name):
    ranks = [json.loads(out.strip().splitlines()[-1]) for out in run_on_ranks(2, "magnitude_run.py", name)]
    assert all(found.keys() == set(map(str, STAGES)) for found in ranks)
    assert max(worst for found in ranks for worst, _ in found.values()) < 1e-3
    weights = {stage: {found[str(stage)][1] for found in ranks} for stage in STAGES}
    assert all(len(digests) == 1 for digests in weights.values()), "ranks differ"
    # AdamW's kernel rounds the ends of tensors otherwise, which without ZeRO and under ZeRO 3 are other ones.
    assert weights[1] == weights[2]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "stage"),
    [("digits-mpdit", 2), ("digits-mpuvit", 3), pytest.param("edm2", 1, marks=pytest.mark.exhaustive)],
)
def test_resuming_is_exact(tmp_path, name, stage):
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    config = small(name, straight, zero_stage=stage, total_images=4 * STEP)
    assert train(config) == 0
    for total in (2 * STEP, 4 * STEP):
        assert train(replace(config, run=resumed, total_images=total)) == 0
    assert_same_run(straight, resumed, 4 * STEP)
    assert_unit_rows(straight, 4 * STEP, config)


@pytest.mark.exhaustive
@pytest.mark.parametrize(("recipe", "stage"), list(product(("digits-mpdit", "digits-mpuvit"), STAGES)))
def test_fifty_steps_on_two_ranks_and_resuming_them_are_exact(tmp_path, recipe, stage):
    arguments = [
        *(recipe, "--model.width", "32", "--model.depth", "2", "--images-per-step", STEP, "--zero-stage", stage),
        *("--optimizer.warmup-images", "32", "--sample.num-images", "10", "--sample.steps", "2"),
        *("--images-per-log", "0"),
    ]
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    train_on_ranks(2, *arguments, "--run", straight, "--total-images", 50 * STEP)
    for steps in (20, 50):
        train_on_ranks(2, *arguments, "--run", resumed, "--total-images", steps * STEP)
    assert_same_run(straight, resumed, 50 * STEP)
    assert_unit_rows(straight, 50 * STEP, small(recipe, straight))


def test_configurations_survive_json():
    for name in ("digits-mpdit", "digits-mpuvit", "imagenet256-mpdit-xl2", "imagenet64-edm2-s"):
        assert config_from_dict(config_to_dict(RECIPES[name])) == RECIPES[name]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["digits-uvit", "--model.magnitude-preserving", "True"], "optimizer.weight_decay must be 0, got 0.03"),
        (["digits-dit", "--model.magnitude-preserving", "True"], r"optimizer.schedule must fall .*, got 'constant'"),
        (["digits-mpdit", "--optimizer.schedule", "constant"], r"optimizer.schedule must fall .*, got 'constant'"),
        (["digits-mpuvit", "--optimizer.weight-decay", "0.1"], "optimizer.weight_decay must be 0, got 0.1"),
        (["digits-mpdit", "--model.qk-norm", "True"], "qk_norm and magnitude_preserving exclude each other"),
        (["digits-mpdit", "--model.skip", "layer-norm"], "skip layer-norm and magnitude_preserving exclude each other"),
        (["digits-unet", "--model.magnitude-preserving", "True"], "--model.magnitude-preserving"),
    ],
    ids=lambda value: value[-2] if isinstance(value, list) else "",
)
def test_what_does_not_go_together_is_refused_by_name(arguments, message):
    with pytest.raises(UserError, match=message):
        parse_train_arguments(arguments)
