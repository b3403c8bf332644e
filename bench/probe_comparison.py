"""With and without internal self-conditioning and contrast, at kappa 1 and 0.7: what the features of blocks are worth.

    python -m scalelong.bench.probe_comparison                 # all runs
    python -m scalelong.bench.probe_comparison --images 640 --samples 20 --seeds 1

Each run is trained, its samples are scored by kernel distance, and its blocks are probed, two runs at a time, a process
of one thread each. Stopped, the same command goes on: a run that is there continues, one that has its rows is passed
over. Rows, one a block, go to bench/results/trained/ddae.csv, the curves to docs/images/ddae.png.
"""

import argparse
import csv
import itertools
import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch

from scalelong.bench.modules import run_module
from scalelong.bench.record import RESULTS, ROOM, commit, device_name
from scalelong.bench.trials import finished, run_trials
from scalelong.train.errors import run_command
from scalelong.train.run_folder import log_path
from scalelong.train.write_whole import staged

BLOCK = 2
"""Whose features condition the later ones: the middle one."""
SIGMA = 0.06
"""Where blocks are probed."""
KAPPAS = (1.0, 0.7)
CONTRASTS = (0.0, 0.1)
RECIPE = "photos32-uvit"
"""Without labels, which features would give away; the photograph is the class that is read from them."""
FLAGS = ("--model.width", "64", "--skip-scale", "cs", "--images-per-grid", "0")
PROBE = ("--heads.standardise", "True", "--heads.epochs", "30", "--heads.learning-rate", "0.01")
"""Few images: DDAE's 15 epochs at 0.001 would end far from where they lead."""


@dataclass(frozen=True, kw_only=True)
class Trial:
    """A run that is wanted."""

    self_condition: str
    """The block, or none."""
    contrast: float
    kappa: float
    seed: int
    images: int
    samples: int

    def __str__(self) -> str:
        return f"self-condition={self.self_condition},contrast={self.contrast:g},kappa={self.kappa:g},seed={self.seed}"

    @property
    def folder(self) -> str:
        return f"{self}-{self.images}"

    @property
    def is_of(self) -> str:
        """The method, in words, whatever the seed."""
        parts = [f"block {self.self_condition}"] if self.self_condition != "none" else []
        parts += [f"contrast {self.contrast:g}"] if self.contrast else []
        return " + ".join(parts) or "neither"

    def commands(self, run: Path) -> list[list[str]]:
        """The modules and their arguments that train the run to its end from where it is, and judge it."""
        flags = ["--kappa", self.kappa, "--seed", self.seed, "--objective.contrast", self.contrast]
        if self.self_condition != "none":
            flags += ["--model.self-condition-block", self.self_condition]
        ends = ["--run", run, "--total-images", self.images, "--images-per-checkpoint", max(self.images // 4, 1)]
        scored = ["--features", "pixels", "--num-images", self.samples]
        probed = ["--times", SIGMA, *PROBE, "--max-images", self.images]
        commands = [
            ["scalelong.train", RECIPE, *FLAGS, *flags, *ends, "--images-per-validation", self.images],
            ["scalelong", "evaluate", run, *scored],
            ["scalelong", "probe", run, *probed],
        ]
        return [[str(word) for word in command] for command in commands]


@dataclass(frozen=True, kw_only=True)
class Row(Trial):
    """What came of a block of it, and of the run."""

    block: str
    accuracy: float
    """Of its probe, on held-out images."""
    kernel_distance: float
    validation_loss: float
    seconds: float
    """Of the run's steps, beside another run."""
    date: str
    commit: str
    device: str
    torch: str


def trials(images: int, samples: int, seeds: int) -> list[Trial]:
    """All of them, one seed of each before the next of any."""
    grid = itertools.product(range(seeds), KAPPAS, ("none", str(BLOCK)), CONTRASTS)
    return [
        Trial(self_condition=block, contrast=contrast, kappa=kappa, seed=seed, images=images, samples=samples)
        for seed, kappa, block, contrast in grid
    ]


def train_and_judge(trial: Trial, run: Path) -> list[Row]:
    """
    Raises:
        RuntimeError: a command failed; says what it printed.
    """
    for arguments in trial.commands(run):
        run_module(arguments)
    return rows_of(trial, run)


def rows_of(trial: Trial, run: Path) -> list[Row]:
    """What the log, the scores and the probes of a finished run say."""
    log = [json.loads(line) for line in log_path(run).read_text().splitlines()]
    seen = [0, *(row["images_seen"] for row in log)]
    scores = json.loads((run / "evaluation.json").read_text())["samples"][-1]
    with (run / "probe.csv").open(newline="") as file:
        probes = list(csv.DictReader(file))
    seconds = sum((b - a) / row["images_per_second"] for a, b, row in zip(seen, seen[1:], log, strict=False))
    of_run = {
        "kernel_distance": scores["kernel_distance"],
        "validation_loss": log[-1]["validation_loss_ema"],
        "seconds": round(seconds, 1),
        "date": datetime.now(UTC).date().isoformat(),
        "commit": commit(),
        "device": device_name("cpu").partition(",")[0] + ", 1 thread",
        "torch": torch.__version__,
    }
    return [Row(**asdict(trial), **of_run, block=p["source"], accuracy=float(p["accuracy"])) for p in probes]


def describe(rows: Sequence[Row]) -> str:
    best = max(rows, key=lambda row: row.accuracy)
    return f"{best.accuracy:.1%} of {best.block}"


def methods_of(rows: Sequence[dict[str, str]]) -> dict[tuple[str, str], list[dict[str, str]]]:
    """The rows of each method by its name and its kappa, in order."""
    found: dict[tuple[str, str], list[dict[str, str]]] = {}
    for row in rows:
        trial = Trial(
            self_condition=row["self_condition"], contrast=float(row["contrast"]), kappa=float(row["kappa"]), seed=0,
            images=0, samples=0,
        )  # fmt: skip
        found.setdefault((trial.is_of, f"{trial.kappa:g}"), []).append(row)
    return found


def accuracies_of(rows: Sequence[dict[str, str]]) -> dict[str, list[float]]:
    """The accuracies of all seeds by block, in the order of the blocks."""
    found: dict[str, list[float]] = {}
    for row in rows:
        found.setdefault(row["block"], []).append(float(row["accuracy"]))
    return found


def draw(rows: Sequence[dict[str, str]], path: Path) -> None:
    """Accuracy over blocks, a panel for each kappa, a line for each method, from the least seed to the highest."""
    from matplotlib.figure import Figure

    methods = methods_of(rows)
    kappas = list(dict.fromkeys(kappa for _, kappa in methods))
    figure = Figure(figsize=(4.2 * len(kappas), 3.8), layout="constrained")
    panels = figure.subplots(1, len(kappas), sharey=True, squeeze=False)[0]
    for panel, kappa in zip(panels, kappas, strict=True):
        for (method, its_kappa), those in methods.items():
            if its_kappa != kappa:
                continue
            blocks = accuracies_of(those)
            means = [100 * statistics.fmean(values) for values in blocks.values()]
            (line,) = panel.plot(range(len(blocks)), means, marker="o", label=method)
            ends = [[100 * end(values) for values in blocks.values()] for end in (min, max)]
            panel.fill_between(range(len(blocks)), *ends, alpha=0.15, color=line.get_color())
            panel.set_xticks(range(len(blocks)), list(blocks), rotation=45, ha="right", fontsize="small")
        panel.set_title(f"kappa {kappa}")
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("accuracy of linear probes, %")
    panels[-1].legend(fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    with staged(path) as staging:
        figure.savefig(staging, format="png", dpi=120)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=32_000, help="of each run")
    parser.add_argument("--samples", type=int, default=1000, help="scored of each run")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--runs", type=Path, default=Path("runs/probe-comparison"), help="folder of the runs")
    parser.add_argument("--out", type=Path, default=RESULTS / "trained" / "ddae.csv")
    parser.add_argument("--picture", type=Path, default=ROOM.parent / "docs" / "images" / "ddae.png")
    parser.add_argument("--jobs", type=int, default=2)
    a = parser.parse_args(argv)
    wanted = trials(a.images, a.samples, a.seeds)
    num_failed = run_trials(wanted, a.runs, a.out, a.jobs, train_and_judge, describe)
    if finished(a.out):
        draw(finished(a.out), a.picture)
        print(f"-> {a.out}, {a.picture}")
    if num_failed:
        sys.exit(f"{num_failed} of {len(wanted)} runs failed; the same command goes on")


if __name__ == "__main__":
    run_command(main)
