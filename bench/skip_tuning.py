"""Whether Skip-Tuning (arXiv:2402.15170) improves samples of few steps, of networks trained unscaled and with CS.

    python -m scalelong.bench.skip_tuning                 # all networks
    python -m scalelong.bench.skip_tuning --images 640 --samples 60 --seeds 1

Each network is a short run of digits-uvit, whose averaged weights draw samples with the innermost skip multiplied by
each of FACTORS (``scalelong evaluate --sweep``); two runs at a time, a process of one thread each. Stopped, the same
command goes on: a run that is there continues, one that has its rows is passed over. Rows go to
bench/results/trained/skip-tuning.csv.
"""

import argparse
import itertools
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from scalelong.bench.modules import run_module
from scalelong.bench.record import RESULTS, provenance
from scalelong.bench.trials import finished, run_trials
from scalelong.train.errors import run_command

POLICIES = {"none": ("--skip-scale", "none"), "cs:0.7": ("--skip-scale", "cs", "--skip-scale.kappa", "0.7")}
FACTORS, STEPS = ("0.8", "0.9", "1", "1.1"), ("4", "8")
DEPTH = 12
"""Of six skips, so that the factors between the innermost and the outermost make a line."""
FLAGS = (
    *("--model.depth", DEPTH, "--model.width", 64, "--optimizer.schedule", "cosine", "--optimizer.ema-rampup", 0.05),
    *("--images-per-grid", 0, "--num-validation-images", 0),
)


@dataclass(frozen=True, kw_only=True)
class Trial:
    """A network that is wanted."""

    skip_scale: str
    """One of POLICIES."""
    seed: int
    images: int
    samples: int

    def __str__(self) -> str:
        return f"skip-scale={self.skip_scale},seed={self.seed}"

    @property
    def folder(self) -> str:
        return f"{self}-{self.images}".replace(":", "_")

    def commands(self, run: Path) -> list[list[str]]:
        """The modules and their arguments that train the run to its end from where it is, and score its samples."""
        ends = ["--run", run, "--seed", self.seed, "--total-images", self.images]
        ends += ["--images-per-checkpoint", max(self.images // 4, 1), "--optimizer.warmup-images", self.images // 10]
        sweep = ["--sweep", f"steps={','.join(STEPS)}", f"skip-tuning={','.join(FACTORS)}"]
        scored = ["--features", "pixels", "--num-images", self.samples, "--guidance", 0, *sweep]
        commands = [
            ["scalelong.train", "digits-uvit", *FLAGS, *POLICIES[self.skip_scale], *ends],
            ["scalelong", "evaluate", run, *scored],
        ]
        return [[str(word) for word in command] for command in commands]


@dataclass(frozen=True, kw_only=True)
class Row(Trial):
    """What came of it with one factor and number of steps."""

    depth: int
    steps: int
    bottom: float
    """The factor of the innermost skip; the outermost has 1."""
    kernel_distance: float
    kernel_distance_error: float
    accuracy: float
    """Of the labels of samples."""
    sampler: str
    date: str
    commit: str
    device: str
    torch: str


def trials(images: int, samples: int, seeds: int) -> list[Trial]:
    """All of them, one seed of each before the next of any."""
    grid = itertools.product(range(seeds), POLICIES)
    return [Trial(skip_scale=policy, seed=seed, images=images, samples=samples) for seed, policy in grid]


def train_and_score(trial: Trial, run: Path) -> list[Row]:
    """
    Raises:
        RuntimeError: a command failed; says what it printed.
    """
    for arguments in trial.commands(run):
        run_module(arguments)
    return rows_of(trial, finished(run / "sweep.csv"))


def rows_of(trial: Trial, sweep: Sequence[dict[str, str]]) -> list[Row]:
    """A row for each set of samples of a sweep."""
    return [
        Row(
            **asdict(trial),
            depth=DEPTH,
            steps=int(line["steps"]),
            bottom=float(line["skip-tuning"]),
            kernel_distance=float(line["kernel_distance"]),
            kernel_distance_error=float(line["kernel_distance_error"]),
            accuracy=float(line["accuracy"]),
            sampler=line["sampler"],
            **provenance("cpu", "1 thread"),
        )
        for line in sweep
        if line["images"] == "samples"
    ]


def describe(rows: Sequence[Row]) -> str:
    best = min(rows, key=lambda row: row.kernel_distance)
    return f"kernel distance {best.kernel_distance:.4f} at best, of {best.steps} steps and a factor of {best.bottom:g}"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=64_000, help="of each run")
    parser.add_argument("--samples", type=int, default=1000, help="scored with each factor and number of steps")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--runs", type=Path, default=Path("runs/skip-tuning"), help="folder of the runs")
    parser.add_argument("--out", type=Path, default=RESULTS / "trained" / "skip-tuning.csv")
    parser.add_argument("--jobs", type=int, default=2)
    a = parser.parse_args(argv)
    wanted = trials(a.images, a.samples, a.seeds)
    num_failed = run_trials(wanted, a.runs, a.out, a.jobs, train_and_score, describe)
    print(f"-> {a.out}")
    if num_failed:
        sys.exit(f"{num_failed} of {len(wanted)} runs failed; the same command goes on")


if __name__ == "__main__":
    run_command(main)
