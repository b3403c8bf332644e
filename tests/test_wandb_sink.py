"""Weights & Biases offline: the rows and grids of the run folder, without doubles, and what happens without it."""

import importlib.util
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("deepspeed")

from images import random_pixels, write_image
from running import log_rows, small_config
from wandb_file import history, records

from scalelong.train import wandb_sink
from scalelong.train.config import LogConfig
from scalelong.train.errors import UserError
from scalelong.train.loop import train
from scalelong.train.report import open_report
from scalelong.train.run_folder import wandb_path

pytestmark = pytest.mark.slow

STEP = 32
KEY = "5ec7e7" * 6 + "beef"


@pytest.fixture
def wandb(monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    return wandb


def rows_of_history(run: Path) -> list[dict]:
    """As the log has them, and pictures by their files' bytes."""
    rows = []
    for row in history(run):
        row["images_seen"] = row.get("images_seen", row.pop("_step"))
        row.pop("_step", None)
        if "samples/path" in row:
            (picture,) = (run / "wandb").glob(f"offline-run-*/files/{row['samples/path']}")
            row = {name: value for name, value in row.items() if not name.startswith("samples/")}
            row["samples"] = picture.read_bytes()
        rows.append(row)
    return rows


def test_a_run_and_its_resuming_are_one_run_there(wandb, tmp_path, capfd):
    config = small_config(tmp_path / "run", log=LogConfig(wandb="mine"), num_validation_images=0)
    train(replace(config, total_images=2 * STEP))
    train(replace(config, total_images=4 * STEP))
    expected = log_rows(config.run)
    for row in expected:
        picture = config.run / "samples" / f"{row['images_seen']}.png"
        if picture.is_file():
            row["samples"] = picture.read_bytes()
    assert ["samples" in row for row in expected] == [False, True, False, True]
    assert rows_of_history(config.run) == expected
    starts = [list(records(path)) for path in sorted((config.run / "wandb").glob("offline-run-*/*.wandb"))]
    told = [next(record.run for record in start if record.WhichOneof("record_type") == "run") for start in starts]
    assert len(told) == 2
    assert {(run.run_id, run.project) for run in told} == {
        (json.loads(wandb_path(config.run).read_text())["id"], "mine")
    }
    configured = {item.key: json.loads(item.value_json) for item in told[0].config.update}
    assert configured["images_per_step"] == STEP
    printed = capfd.readouterr()
    assert "Weights & Biases, project mine: wandb sync " in printed.out
    assert KEY not in printed.out + printed.err
    files = [path for path in config.run.rglob("*") if path.is_file()]
    assert not [path for path in files if KEY.encode() in path.read_bytes()]


def row(images_seen: int) -> dict:
    return {"images_seen": images_seen, "loss": images_seen / 7, "images_per_second": 1.0}


def test_what_a_killed_start_has_sent_is_sent_again_and_nothing_twice(wandb, tmp_path):
    def start(images_seen: int, *rows: int):
        report = open_report(tmp_path, images_seen, 100, wandb="mine")
        for n in rows:
            report.log(row(n))
        return report

    for n in (15, 20):
        write_image(tmp_path / "samples" / f"{n}.png", random_pixels(8, 8, seed=n))
    killed = start(0, 10, 20, 30)
    sink = next(sink for sink in killed._sinks if isinstance(sink, wandb_sink.WeightsAndBiases))
    sink._there.finish()  # its file is whole here, which after a kill it need not be
    with start(20, 30, 40):  # from a checkpoint at 20 images
        pass
    with start(30, 40, 50):  # the newest checkpoint was damaged: 40 is there already
        pass
    found = rows_of_history(tmp_path)
    assert [row["images_seen"] for row in found] == [10, 15, 20, 30, 40, 50]
    assert [row["loss"] for row in found if "loss" in row] == [n / 7 for n in (10, 20, 30, 40, 50)]
    for n, where in ((15, found[1]), (20, found[2])):
        assert where["samples"] == (tmp_path / "samples" / f"{n}.png").read_bytes()


def test_training_goes_on_where_wandb_refuses(wandb, tmp_path, monkeypatch, capsys):
    def refuse(**_):
        raise wandb.errors.CommError("the server\nis gone")

    monkeypatch.setattr(wandb, "init", refuse)
    with open_report(tmp_path, 0, 100, wandb="mine") as report:
        report.log(row(10))
        report.log(row(20))
    assert capsys.readouterr().err == "warning: no rows go to Weights & Biases: CommError: the server is gone\n"
    assert len(log_rows(tmp_path)) == 2


@pytest.mark.parametrize(
    ("package", "message"),
    [
        ("wandb", '--log.wandb: wandb is not installed: pip install "scalelong[wandb]"'),
        ("tensorboard", 'tensorboard is not installed: pip install "scalelong[train]"'),
    ],
)
def test_without_the_package_nothing_is_written(package, message, tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == package else find(name, *more))
    config = small_config(tmp_path / "run", log=LogConfig(wandb="mine"))
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        train(config)
    assert not config.run.exists()
