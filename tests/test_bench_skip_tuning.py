"""The sweep of bench/skip_tuning.py: runs and sweeps that the commands take, and what its rows and table say."""

from dataclasses import asdict
from pathlib import Path

import pytest

pytest.importorskip("tyro")

from scalelong.bench.skip_tuning import DEPTH, FACTORS, POLICIES, STEPS, describe, rows_of, trials
from scalelong.bench.trained import skip_tuning
from scalelong.train.command_line import parse_train_arguments
from scalelong.train.commands.evaluate import EvaluateArguments
from scalelong.train.commands.sweep import parse_axes
from scalelong.train.parsing import parse


def test_each_run_and_sweep_is_one_that_the_commands_take():
    wanted = trials(640, 60, 2)
    assert [(trial.seed, trial.skip_scale) for trial in wanted] == [(s, p) for s in (0, 1) for p in POLICIES]
    for trial in wanted:
        (module, *flags), (_, command, *scored) = trial.commands(Path("runs") / f"{trial}")
        config = parse_train_arguments(flags)
        assert (module, command, config.seed, config.total_images) == ("scalelong.train", "evaluate", trial.seed, 640)
        assert config.skip_scale.kind == trial.skip_scale.partition(":")[0]
        assert config.model.depth == DEPTH  # type: ignore[attr-defined]
        arguments = parse(EvaluateArguments, scored, prog="evaluate")
        assert (arguments.run, arguments.guidance, arguments.num_images) == (config.run, 0.0, 60)
        axes = parse_axes(arguments.sweep)
        assert axes == {"steps": [int(n) for n in STEPS], "skip-tuning": [float(x) for x in FACTORS]}


def test_rows_and_table_say_what_the_sweep_says():
    rows = []
    for trial in trials(640, 60, 2):
        sweep = [
            {
                **{"images": "samples", "steps": steps, "skip-tuning": factor, "sampler": "dpm-solver++"},
                **{"kernel_distance": f"{0.02 * float(factor) + 0.001 * trial.seed}", "accuracy": "0.5"},
                "kernel_distance_error": "0.001",
            }
            for steps in STEPS
            for factor in FACTORS
        ]
        found = rows_of(trial, [*sweep, {"images": "noise"}])
        assert len(found) == len(STEPS) * len(FACTORS)
        assert describe(found).startswith(f"kernel distance {0.016 + 0.001 * trial.seed:.4f} at best, of 4 steps")
        rows += [{name: f"{value}" for name, value in asdict(row).items()} for row in found]
    table = skip_tuning(rows)
    assert table.header[4:] == ("change at 0.8", "change at 0.9", "change at 1.1")
    assert len(table.lines) == len(STEPS) * len(POLICIES)
    # Networks differ by 1, and all by the same at another factor.
    assert table.lines[0] == ["none", "4", 2, "20.50 ± 0.71", "-4.00 ± 0.00", "-2.00 ± 0.00", "2.00 ± 0.00"]
    assert "640 images a network of depth 12; kernel distance of 60 samples by dpm-solver++" in table.note
