"""The trainings of bench/objectives.py: which there are, that they go on where they were, and what a row says."""

import csv
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("tyro")

from scalelong.bench.objectives import Row, Trial, describe, row_of, trials
from scalelong.bench.trials import finished, run_trials
from scalelong.train.command_line import parse_train_arguments


def row(trial: Trial) -> Row:
    scores: dict[str, Any] = {"accuracy_with_guidance": 1.0, "accuracy": 0.9}
    scores |= dict.fromkeys(("distance", "distance_with_guidance", "kernel_distance", "kernel_distance_with_guidance"))
    where: dict[str, Any] = {"sampler": "heun", "date": "2026-11-26", "commit": "abc", "device": "CPU", "torch": "2"}
    return Row(**asdict(trial), seconds=1.0, loss=0.5, **scores, **where)


def test_each_value_has_a_run_that_the_command_line_takes():
    wanted = trials("digits-uvit", 640, 100)
    # The recipe as it is has a value of each of the four, and is trained once; one value has two more runs.
    assert len(wanted) == 17 - 3 + 2
    for trial in wanted:
        (module, *flags), _ = trial.commands(Path("runs/x"))
        config = parse_train_arguments(flags)
        section, name = trial.varied.split(".")
        assert module == "scalelong.train"
        assert getattr(getattr(config, section), name) == trial.value
        assert config.total_images == 640
        if trial.beside:
            flag, _, value = trial.beside.partition("=")
            assert getattr(config.objective, flag.removeprefix("objective.")) == value


def test_some_can_be_named():
    assert [str(t) for t in trials("digits-uvit", 1, 1, ["times=edm", "schedule=cosine"])] == [
        "times=edm",
        "schedule=cosine",
    ]
    with pytest.raises(ValueError, match=r"no run of times=never; there are prediction=eps, "):
        trials("digits-uvit", 1, 1, ["times=never"])


def test_what_failed_is_done_again_and_what_has_a_row_is_not(tmp_path, capsys):
    wanted, out = (
        trials("digits-uvit", 640, 100, ["prediction=eps", "prediction=v", "prediction=x0"]),
        tmp_path / "r.csv",
    )
    done: list[str] = []

    def work(trial: Trial, run: Path) -> list[Row]:
        if trial.value == "v" and not done:
            raise RuntimeError("no disk")
        done.append(str(run.relative_to(tmp_path)))
        return [row(trial)]

    assert run_trials(wanted, tmp_path, out, 1, lambda t, r: work(t, r) if t.value == "v" else [row(t)], describe) == 1
    assert "prediction=v: no disk" in capsys.readouterr().err
    done.append("")
    assert run_trials(wanted, tmp_path, out, 2, work, describe) == 0
    assert done == ["", "digits-uvit/prediction=v-640"]
    assert sorted(r["value"] for r in finished(out)) == ["eps", "v", "x0"]
    assert run_trials(wanted, tmp_path, out, 2, work, describe) == 0
    assert len(done) == 2
    # Another length is another run.
    assert run_trials(trials("digits-uvit", 1280, 100, ["prediction=eps"]), tmp_path, out, 2, work, describe) == 0
    with out.open(newline="") as file:
        assert len(list(csv.reader(file))) == 1 + 4


def test_a_row_says_what_log_and_scores_say(tmp_path):
    lines = [{"images_seen": 64 * n, "loss": 1 / n, "images_per_second": 32.0} for n in range(1, 21)]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    samples = [
        {"guidance": 1.0, "accuracy": 0.99, "distance": 0.12345},
        {"guidance": 0.0, "accuracy": 0.8, "distance": 1},
    ]
    (tmp_path / "evaluation.json").write_text(json.dumps({"samples": samples}))
    (trial,) = trials("digits-uvit", 1280, 100, ["prediction=flow"])
    found = row_of(trial, tmp_path)
    assert found.seconds == pytest.approx(40)
    assert found.loss == pytest.approx((1 / 19 + 1 / 20) / 2, abs=1e-5)
    assert (found.accuracy_with_guidance, found.distance_with_guidance) == (0.99, 0.12345)
    assert (found.accuracy, found.distance, found.kernel_distance) == (0.8, 1, None)
    assert (found.varied, found.value, found.sampler) == (
        "objective.prediction",
        "flow",
        "dpm-solver++, 30 steps, guidance 1",
    )
