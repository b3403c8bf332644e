"""``--config FILE``, ``--print-config``, and a run in the place of a recipe."""

import json
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("tyro")
pytest.importorskip("yaml")

from images import random_pixels, write_image

from scalelong.model.skip_scale import ConstantScale, make_skip_scale
from scalelong.train.__main__ import main as train_main
from scalelong.train.command_line import parse_train_arguments, read_train_arguments
from scalelong.train.config_json import config_from_dict, config_to_dict
from scalelong.train.data.classes import with_classes_of_data
from scalelong.train.errors import UserError
from scalelong.train.hosts.launch import main as launch_main
from scalelong.train.recipes import FOR_ONES_OWN, RECIPES
from scalelong.train.run_folder import write_config

DIGITS = RECIPES["digits-uvit"]


@pytest.fixture
def file(tmp_path):
    def write(text: str, name: str = "mine.yaml") -> str:
        (tmp_path / name).write_text(text)
        return str(tmp_path / name)

    return write


def test_a_file_has_fields_in_the_place_of_flags_which_count_more(file):
    path = file(
        """
        recipe: digits-uvit
        run: runs/mine
        total_images: 640
        skip_scale: {kind: cs, kappa: 0.7}
        model: {width: 64}
        optimizer.learning_rate: 1e-3
        optimizer: {ema_stds: [0.05, 0.1]}
        sample: {guidance-interval: [0.2, 5]}
        data: {flip: true}
        """
    )
    expected = replace(
        DIGITS,
        run=Path("runs/mine"),
        total_images=640,
        skip_scale=ConstantScale(kappa=0.7),
        model=replace(DIGITS.model, width=64),
        optimizer=replace(DIGITS.optimizer, learning_rate=1e-3, ema_stds=(0.05, 0.1)),
        sample=replace(DIGITS.sample, guidance_interval=(0.2, 5.0)),
        data=replace(DIGITS.data, flip=True),
    )
    assert parse_train_arguments(["--config", path]) == expected
    assert parse_train_arguments(["digits-uvit", f"--config={path}"]) == expected
    flags = ["--kappa", "0.6", "--run-folder", "b", "--total-images=1280", "--optimizer.ema-stds", "0.2"]
    found = parse_train_arguments([*flags, "--config", path])
    assert (found.skip_scale, found.run, found.total_images) == (ConstantScale(kappa=0.6), Path("b"), 1280)
    assert found.optimizer.ema_stds == (0.2,)
    assert parse_train_arguments(["--config", file("recipe: digits-uvit\nskip_scale: ls"), "--skip-scale", "none"]) == (
        replace(DIGITS, skip_scale=make_skip_scale("none"))
    )


@pytest.mark.parametrize("recipe", ["digits-unet", "imagenet256-dit-s2", "mscoco-uvit-s2"])
def test_what_is_printed_and_a_runs_own_file_are_configurations(recipe, file, capsys):
    with pytest.raises(SystemExit) as stopped:
        parse_train_arguments([recipe, "--total-images", "640", "--print-config"])
    assert stopped.value.code == 0
    expected = replace(RECIPES[recipe], total_images=640)
    path = file(capsys.readouterr().out)
    assert parse_train_arguments(["--config", path]) == expected
    path = file(json.dumps(config_to_dict(expected)), "config.json")
    assert parse_train_arguments(["--config", path, "--seed", "3"]) == replace(expected, seed=3)


def test_the_name_of_a_run_goes_on_with_it_wherever_it_is_now(tmp_path):
    config = replace(DIGITS, run=tmp_path / "run", label_drop=0.2)
    write_config(config)
    moved = (tmp_path / "run").rename(tmp_path / "moved")
    assert parse_train_arguments([str(moved)]) == replace(config, run=moved)
    more = parse_train_arguments([str(moved), "--total-images", "7"])
    assert more == replace(config, run=moved, total_images=7)


def test_a_model_has_the_classes_of_a_folder_of_ones_own(tmp_path):
    for name in ("ant", "bee", "cat"):
        write_image(tmp_path / "mine" / name / "0.png", random_pixels(8, 8, seed=0))
    own = ["digits-uvit", "--data.path", str(tmp_path / "mine")]
    for flags, expected in (
        (own, 4),
        ([*own, "--label-drop", "0", "--sample.guidance", "0"], 3),
        ([*own, "--model.num-classes", "7"], 7),
        (["digits-uvit"], 11),
        (["imagenet64-uvit-m4", *own[1:]], RECIPES["imagenet64-uvit-m4"].model.num_classes),
    ):
        assert with_classes_of_data(read_train_arguments(flags)).model.num_classes == expected, flags


@pytest.mark.parametrize("recipe", FOR_ONES_OWN)
def test_a_recipe_for_ones_own_images_learns_what_the_folder_has(tmp_path, recipe):
    plain, three = RECIPES[recipe], tmp_path / "three"
    for name in ("ant", "bee", "cat"):
        write_image(three / name / "0.png", random_pixels(8, 8, seed=0))
    flags = [recipe, "--images-per-step", "2", "--data.path"]
    found = with_classes_of_data(read_train_arguments([*flags, str(three)]))
    assert (found.model, found.label_drop, found.sample) == (replace(plain.model, num_classes=4), 0.1, plain.sample)
    given = with_classes_of_data(read_train_arguments([*flags, str(three), "--model.num-classes", "6"]))
    assert given.model.num_classes == 6
    for folder in (three / "ant", tmp_path / "one"):  # images without labels, or with one for all
        write_image(tmp_path / "one" / "ant" / "0.png", random_pixels(8, 8, seed=0))
        write_image(folder / ("1.png" if folder.name == "ant" else "ant/1.png"), random_pixels(8, 8, seed=1))
        alone = with_classes_of_data(read_train_arguments([*flags, str(folder)]))
        assert (alone.model.num_classes, alone.label_drop, alone.sample.guidance) == (0, 0, 0)
        assert config_from_dict(config_to_dict(alone)) == alone
    with pytest.raises(UserError, match=r"three has 4 images, fewer than the \d+ of one step") as raised:
        with_classes_of_data(read_train_arguments([recipe, "--data.path", str(three)]))
    assert "\n" not in str(raised.value)
    assert with_classes_of_data(read_train_arguments([recipe])) == plain


def test_a_launch_prints_what_the_run_will_have(tmp_path, monkeypatch, capsys):
    for name in ("ant", "bee"):
        write_image(tmp_path / name / "0.png", random_pixels(8, 8, seed=0))

    def here(line: list[str]) -> int:
        assert line[1:3] == ["-m", "scalelong.train"]
        with pytest.raises(SystemExit) as stopped:
            train_main(line[3:])
        return int(stopped.value.code or 0)

    monkeypatch.setattr(subprocess, "call", here)
    with pytest.raises(SystemExit) as stopped:
        launch_main(["--num-accelerators", "2", "digits-uvit", "--data.path", str(tmp_path), "--print-config"])
    assert stopped.value.code == 0
    assert "num_classes: 3\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "flags", "words"),
    [
        ("total_imags: 3", [], "unknown field 'total_imags'; perhaps you meant total_images"),
        ("model: {widht: 3}", [], r"unknown field 'model\.widht'; perhaps you meant model\.width"),
        ("learning_rate: 3", [], r"unknown field 'learning_rate'; perhaps you meant optimizer\.learning_rate"),
        ("optimizer: 3", [], "unknown field 'optimizer'; it is a section, of optimizer.beta1 and others"),
        ("total_images: many", [], "total-images"),
        ("total_images: 0", [], "total_images must be at least 1"),
        ("[1, 2]", [], "expected fields and their values"),
        ("", [], "expected fields and their values"),
        ("a: [", [], "neither YAML nor JSON"),
        ("recipe: digits-unet", [], "is of the recipe digits-unet, not digits-uvit: give one"),
        ("seed: 3", ["--config", "other"], "--config takes one file"),
    ],
)
def test_a_file_that_makes_no_sense_is_one_line(file, text, flags, words):
    with pytest.raises(UserError, match=words) as raised:
        parse_train_arguments(["digits-uvit", "--config", file(text), *flags])
    assert "\n" not in str(raised.value)


def test_whole_files_and_missing_ones_are_told_from_others(file, tmp_path):
    whole = config_to_dict(DIGITS)
    with pytest.raises(UserError, match="is a whole configuration: leave out the recipe digits-uvit"):
        parse_train_arguments(["digits-uvit", "--config", file(json.dumps(whole))])
    whole["optimizer"]["learning_rat"] = 1
    with pytest.raises(UserError, match=r"learning_rat.*; perhaps you meant learning_rate"):
        parse_train_arguments(["--config", file(json.dumps(whole))])
    with pytest.raises(UserError, match="names no recipe"):
        parse_train_arguments(["--config", file("seed: 3")])
    with pytest.raises(UserError, match="unknown recipe 'digits-uvi'; perhaps you meant digits-uvit"):
        parse_train_arguments(["--config", file("recipe: digits-uvi")])
    with pytest.raises(UserError, match="cannot be read: No such file"):
        parse_train_arguments(["--config", str(tmp_path / "nowhere.yaml")])
