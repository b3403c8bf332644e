"""Runs with internal self-conditioning and contrastive self-distillation: they train and resume exactly."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("deepspeed")

from running import SMALL, log_rows, losses, run_command, small_config, train_on_ranks
from test_train_objectives import STEP, files, resumes_exactly

from scalelong import Pipeline
from scalelong.train.checkpoint import load_model
from scalelong.train.command_line import parse_train_arguments
from scalelong.train.commands import export
from scalelong.train.config import TrainConfig
from scalelong.train.errors import UserError
from scalelong.train.loop import train
from scalelong.train.objective_config import ObjectiveConfig
from scalelong.train.recipes import RECIPES

CONTRAST = ObjectiveConfig(contrast=0.1)
SIZES = ("--model.depth", "2", "--model.width", "32")
SIZES_OF_UNET = ("--model.model-channels", "32", "--model.num-res-blocks", "1")
AS_MODULATION = ("--model.self-condition-form", "modulation")
OPTIONS: dict[str, tuple[str, ...]] = {
    "token": ("digits-uvit", *SIZES, "--model.self-condition-block", "1"),
    "modulation": ("digits-uvit", *SIZES, "--model.self-condition-block", "0", *AS_MODULATION),
    "dit": ("digits-dit", *SIZES, "--model.self-condition-block", "0"),
    "unet": ("digits-unet", *SIZES_OF_UNET, "--model.self-condition-block", "3", "--objective.contrast", "0.1"),
    "magnitude": ("digits-mpuvit", *SIZES, "--model.self-condition-block", "1", "--objective.contrast", "0.1"),
    "contrast": ("digits-uvit", *SIZES, "--model.self-condition-block", "1", "--objective.contrast", "0.1"),
}
OTHERS = SMALL[4:]
WITHOUT_PICTURES = ("--images-per-grid", "0", "--num-validation-images", "0")


def contrasting(run: Path, **changes: Any) -> TrainConfig:
    return small_config(run, **{"objective": CONTRAST, **changes})


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.parametrize("option", OPTIONS)
def test_it_trains_on_two_ranks_under_zero_2_and_resumes_exactly(tmp_path, option):
    recipe, *flags = OPTIONS[option]
    flags = [recipe, *OTHERS, *flags, "--zero-stage", "2", *WITHOUT_PICTURES]
    once, twice = tmp_path / "once", tmp_path / "twice"
    train_on_ranks(2, *flags, "--run", once, "--total-images", 50 * STEP)
    train_on_ranks(2, *flags, "--run", twice, "--total-images", 25 * STEP)
    train_on_ranks(2, *flags, "--run", twice, "--total-images", 50 * STEP)
    assert losses(twice) == losses(once)
    assert files(twice) == files(once)
    assert all(torch.tensor(losses(once)).isfinite())
    assert sum(losses(once)[-10:]) < sum(losses(once)[:10])


@pytest.mark.slow
def test_two_ranks_have_the_queries_and_keys_of_one_process(tmp_path):
    recipe, *flags = OPTIONS["contrast"]
    flags = [recipe, *OTHERS, *flags, *WITHOUT_PICTURES, "--total-images", f"{3 * STEP}"]
    train_on_ranks(2, *flags, "--zero-stage", "2", "--run", tmp_path / "two")
    train(parse_train_arguments([*flags, "--run", f"{tmp_path / 'one'}"]))
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)
    one, two = (log_rows(tmp_path / name) for name in ("one", "two"))
    # Negatives are those of both ranks: of half as many, it would be smaller by a fifth and more.
    assert two[0]["contrast_loss"] == pytest.approx(one[0]["contrast_loss"], rel=0.05)
    assert two[0]["uniformity"] == pytest.approx(one[0]["uniformity"], rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("option", OPTIONS)
def test_each_option_resumes_exactly(tmp_path, option):
    recipe, *flags = OPTIONS[option]
    config = parse_train_arguments([recipe, *OTHERS, *flags, *WITHOUT_PICTURES, "--zero-stage", "2"])
    run = resumes_exactly(config, tmp_path, steps=2)
    names = load_file(run / "checkpoints" / str(2 * STEP) / "model.safetensors").keys()
    assert any(name.startswith("self_condition.") for name in names)
    assert ("contrast_heads.safetensors" in files(run)) == (config.objective.contrast > 0)


@pytest.mark.slow
def test_the_heads_are_saved_beside_the_network_and_are_in_no_export(tmp_path):
    config = contrasting(tmp_path / "run", total_images=3 * STEP, num_validation_images=0, recompute="blocks")
    assert config.model.augment_dim == 9
    train(config)
    row = log_rows(config.run)[-1]
    assert row["contrast_loss"] > 0
    assert 0 < row["alignment"] < 4
    assert row["uniformity"] < 0
    checkpoint = config.run / "checkpoints" / str(3 * STEP)
    heads = load_file(checkpoint / "contrast_heads.safetensors")
    assert {name.partition(".")[0] for name in heads} == {"projector", "predictor"}
    model, _ = load_model(config.run)
    assert load_file(checkpoint / "model.safetensors").keys() == model.state_dict().keys()
    assert model.augment_embed.weight.any()  # type: ignore[union-attr]
    export.main([str(config.run), "--out", str(tmp_path / "export")])
    assert not [name for name in load_file(tmp_path / "export" / "model.safetensors") if "contrast" in name]
    assert len(Pipeline.from_pretrained(tmp_path / "export")(labels=[3], steps=2)) == 1


@pytest.mark.slow
def test_the_contrast_changes_what_is_learned_and_not_what_is_reported(tmp_path):
    """The first losses are of the same network on the same views; later ones differ."""
    weights = (0.1, 1.0)
    runs = [contrasting(tmp_path / f"{w}", total_images=3 * STEP, num_validation_images=0) for w in weights]
    for weight, config in zip(weights, runs, strict=True):
        train(replace(config, objective=replace(CONTRAST, contrast=weight), images_per_grid=0))
    first, second = (losses(config.run) for config in runs)
    assert first[0] == second[0]
    assert first[1:] != second[1:]


def test_bad_input_is_named(tmp_path):
    base, run = RECIPES["digits-uvit"], tmp_path / "run"
    for changes, words in (
        ({"zero_stage": 3}, "ZeRO 3 .* take zero_stage 0, 1 or 2"),
        ({"optimizer": replace(base.optimizer, ema_decay=0.0)}, r"averages of the weights: optimizer\.ema_decay"),
        ({"images_per_step": 1}, "at least 2 of them at a time"),
        ({"objective": replace(CONTRAST, contrast_block=5)}, r"contrast_block 5: this UViT has the blocks 0 to 4"),
        ({"model": replace(base.model, augment_dim=3)}, r"model\.augment_dim is 3"),
    ):
        with pytest.raises(ValueError, match=words):
            contrasting(run, **{"model": base.model, **changes})
    wrong: list[dict[str, Any]] = [{"contrast": -1.0}, {"augment_probability": 1.5}, {"contrast_hidden": 0}]
    for field in wrong:
        with pytest.raises(ValueError, match=rf"objective\.{next(iter(field))}"):
            ObjectiveConfig(**field)
    done = run_command("digits-uvit", "--run", run, "--objective.contrast", "0.1", "--zero-stage", "3")
    assert done.returncode == 2
    assert "ZeRO 3" in done.stderr
    assert "Traceback" not in done.stderr
    with pytest.raises(UserError, match="self_condition_block 4: this UViT has the blocks 0 to 4"):
        parse_train_arguments(["digits-uvit", "--run", str(run), "--model.self-condition-block", "4"])
    assert not run.exists()


def test_runs_without_it_say_what_they_said(tmp_path):
    """Older runs know none of the fields, and mean none of it."""
    from scalelong.train.config_json import config_from_dict, config_to_dict

    config = small_config(tmp_path)
    values = json.loads(json.dumps(config_to_dict(config)))
    for name in ("self_condition_block", "augment_dim", "self_condition_form"):
        del values["model"]["config"][name]
    values["objective"] = {n: v for n, v in values["objective"].items() if "contrast" not in n and "augment" not in n}
    assert config_from_dict(values) == config
    with pytest.raises(UserError, match="does not fit this version"):
        config_from_dict({**values, "objective": {"contrasts": 0.1}})
