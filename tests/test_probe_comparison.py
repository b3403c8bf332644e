"""The comparison of bench/probe_comparison.py: its runs, that it goes on where it was, and what its table says."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("tyro")

from scalelong.bench.probe_comparison import Row, Trial, describe, draw, rows_of, trials
from scalelong.bench.trained import ddae
from scalelong.bench.trials import finished, run_trials
from scalelong.train.command_line import parse_train_arguments
from scalelong.train.commands.probe import ProbeArguments
from scalelong.train.parsing import parse


def rows_for(trial: Trial) -> list[Row]:
    """The middle block is the best one, and better by a tenth of the seed."""
    where: dict[str, Any] = {"date": "2026-11-27", "commit": "abc", "device": "CPU", "torch": "2"}
    scores: dict[str, Any] = {"kernel_distance": 0.01, "validation_loss": 0.25, "seconds": 1.0}
    accuracies = {"in_blocks.0": 0.5, "mid_block": 0.7 + trial.seed / 10}
    return [Row(**asdict(trial), **scores, **where, block=b, accuracy=a) for b, a in accuracies.items()]


def test_each_run_is_one_that_the_commands_take():
    wanted = trials(640, 20, 3)
    assert len({str(trial) for trial in wanted}) == len(wanted) == 2 * 2 * 2 * 3
    assert {(t.is_of, t.kappa) for t in wanted if t.seed == 0} == {
        (method, kappa)
        for method in ("neither", "block 2", "contrast 0.1", "block 2 + contrast 0.1")
        for kappa in (1.0, 0.7)
    }
    for trial in trials(640, 20, 1):
        (_, *flags), _, (_, _, *probed) = trial.commands(Path("runs/x"))
        config = parse_train_arguments(flags)
        assert config.model.num_classes == 0
        assert (config.seed, config.objective.contrast) == (trial.seed, trial.contrast)
        assert config.skip_scale.kappa == trial.kappa  # type: ignore[attr-defined]
        assert (config.model.self_condition_block is None) == (trial.self_condition == "none")
        assert parse(ProbeArguments, probed, prog="probe").heads.standardise


def test_it_goes_on_where_it_was_and_says_what_came(tmp_path):
    wanted, out, done = trials(640, 20, 2), tmp_path / "ddae.csv", []

    def work(trial: Trial, run: Path) -> list[Row]:
        done.append(trial)
        if len(done) == 3:
            raise RuntimeError("no disk")
        return rows_for(trial)

    assert run_trials(wanted, tmp_path, out, 1, work, describe) == 1
    assert run_trials(wanted, tmp_path, out, 2, work, describe) == 0
    assert len(done) == len(wanted) + 1
    rows = finished(out)
    table = ddae(rows)
    assert len(table.lines) == 8
    assert sorted(table.lines)[0] == [
        "block 2",
        "0.7",
        "mid_block",
        "75.0 ± 7.1 %",
        "0.0100 ± 0.0000",
        "0.2500 ± 0.0000",
        2,
    ]
    draw(rows, tmp_path / "ddae.png")
    assert (tmp_path / "ddae.png").read_bytes().startswith(b"\x89PNG")


def test_rows_say_what_log_scores_and_probes_say(tmp_path):
    log = [{"images_seen": 64 * n, "images_per_second": 32.0, "validation_loss_ema": 1 / n} for n in (1, 2)]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))
    (tmp_path / "evaluation.json").write_text(json.dumps({"samples": [{"guidance": 0.0, "kernel_distance": 0.02}]}))
    (tmp_path / "probe.csv").write_text("source,sigma,accuracy\nin_blocks.0,0.06,0.5\nmid_block,0.06,0.75\n")
    rows = rows_of(trials(128, 20, 1)[0], tmp_path)
    assert [(row.block, row.accuracy) for row in rows] == [("in_blocks.0", 0.5), ("mid_block", 0.75)]
    assert (rows[0].validation_loss, rows[0].kernel_distance, rows[0].seconds) == (0.5, 0.02, 4.0)
