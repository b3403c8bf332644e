"""What each objective and each schedule of the learning rate trains to: ordinary runs of the embedded digits, scored.

    python -m scalelong.bench.objectives [--total-images N] [--num-images M] [--only prediction=flow ...]

Each value of prediction, weighting, times and schedule is one run with the others at their default; the run of all
defaults stands once, under prediction, not once for each of the four. What trains nothing by itself is trained again
beside what it is made for. Runs stand in ``--runs`` (runs/objectives) and are trained ``--jobs`` (2) at a time, each a
process of one thread; a run that is there goes on, and one that has its row is passed over, so that the same command
resumes. Rows go to ``--out``.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

from scalelong.bench.modules import run_module
from scalelong.bench.record import RESULTS, provenance
from scalelong.bench.trials import run_trials
from scalelong.train.objective_config import PredictionName, TimesName, WeightingName
from scalelong.train.optimizer_config import ScheduleName
from scalelong.train.recipes import RECIPES
from scalelong.train.run_folder import log_path

VARIED = {
    "objective.prediction": get_args(PredictionName),
    "objective.weighting": get_args(WeightingName),
    "objective.times": get_args(TimesName),
    "optimizer.schedule": get_args(ScheduleName),
}
"""Flags, and the values of each that are trained."""
MADE_FOR = {("objective.weighting", "edm"): ("objective.prediction=v", "objective.times=edm")}
"""Values that are trained again beside values of other flags: EDM's weights of errors of the noise are 1 + 4 sigma²,
and times that are spread evenly reach a sigma of 150; of errors of v they are between 1 and 4."""


@dataclass(frozen=True, kw_only=True)
class Trial:
    """A run that is wanted."""

    recipe: str
    varied: str
    value: str
    beside: str = ""
    """A value of another flag, as "objective.times=edm"; the others are at their default."""
    total_images: int
    num_images: int
    """Samples that are scored."""

    def __str__(self) -> str:
        given = [f"{self.varied}={self.value}", *([self.beside] if self.beside else [])]
        return ",".join(flag.partition(".")[2] for flag in given)

    @property
    def folder(self) -> str:
        return f"{self.recipe}/{self}-{self.total_images}"

    def commands(self, run: Path) -> list[list[str]]:
        """The modules and their arguments that train the run to its end from where it is, and score its samples."""
        beside = f"--{self.beside}".split("=") if self.beside else []
        flags = [f"--{self.varied}", self.value, *beside, "--run", run, "--total-images", self.total_images]
        flags += ["--images-per-grid", 0, "--images-per-checkpoint", max(self.total_images // 4, 1)]
        commands = [
            ["scalelong.train", self.recipe, *flags],
            ["scalelong", "evaluate", run, "--num-images", self.num_images],
        ]
        return [[str(word) for word in command] for command in commands]


@dataclass(frozen=True, kw_only=True)
class Row(Trial):
    """What came of it."""

    seconds: float
    """Of its steps, beside another run."""
    loss: float
    """Of its last tenth, on average: comparable between runs of the same objective only."""
    accuracy_with_guidance: float
    distance_with_guidance: float | None
    """Frechet's; None where there are too few samples for one. So is the kernel distance where none is computed."""
    kernel_distance_with_guidance: float | None
    accuracy: float
    distance: float | None
    kernel_distance: float | None
    sampler: str
    date: str
    commit: str
    device: str
    torch: str


def is_the_recipe_itself(trial: Trial) -> bool:
    """Whether the value is the one that the recipe has anyway."""
    section, _, name = trial.varied.partition(".")
    return getattr(getattr(RECIPES[trial.recipe], section), name) == trial.value


def trials(recipe: str, total_images: int, num_images: int, only: Sequence[str] = ()) -> list[Trial]:
    """All of them, or those named, as "prediction=flow".

    Raises:
        ValueError: one that there is not.
    """
    how: Any = {"recipe": recipe, "total_images": total_images, "num_images": num_images}
    known = [Trial(varied=varied, value=value, **how) for varied, values in VARIED.items() for value in values]
    known += [
        Trial(varied=varied, value=value, beside=other, **how)
        for (varied, value), others in MADE_FOR.items()
        for other in others
    ]
    known = [trial for trial in known if trial.varied == "objective.prediction" or not is_the_recipe_itself(trial)]
    names = [str(trial) for trial in known]
    unknown = [name for name in only if name not in names]
    if unknown:
        raise ValueError(f"no run of {unknown[0]}; there are {', '.join(names)}")
    return [trial for trial in known if not only or str(trial) in only]


def train_and_score(trial: Trial, run: Path) -> list[Row]:
    """
    Raises:
        RuntimeError: a command failed; says what it printed.
    """
    for arguments in trial.commands(run):
        run_module(arguments)
    return [row_of(trial, run)]


def row_of(trial: Trial, run: Path) -> Row:
    """What the log and the scores of a finished run say."""
    rows = [json.loads(line) for line in log_path(run).read_text().splitlines()]
    seen = [0, *(row["images_seen"] for row in rows)]
    tail = [row["loss"] for row in rows[-max(len(rows) // 10, 1) :]]
    samples = json.loads((run / "evaluation.json").read_text())["samples"]
    guided, plain = samples[0], samples[-1]
    sample = RECIPES[trial.recipe].sample
    return Row(
        **asdict(trial),
        seconds=round(sum((b - a) / r["images_per_second"] for a, b, r in zip(seen, seen[1:], rows, strict=False)), 1),
        loss=round(sum(tail) / len(tail), 5),
        accuracy_with_guidance=guided["accuracy"],
        distance_with_guidance=guided.get("distance"),
        kernel_distance_with_guidance=guided.get("kernel_distance"),
        accuracy=plain["accuracy"],
        distance=plain.get("distance"),
        kernel_distance=plain.get("kernel_distance"),
        sampler=f"{sample.sampler}, {sample.steps} steps, guidance {guided['guidance']:g}",
        **provenance("cpu", "1 thread"),
    )


def describe(rows: Sequence[Row]) -> str:
    (row,) = rows
    scores = f"label accuracy {row.accuracy_with_guidance:.1%} with guidance, {row.accuracy:.1%} without"
    return f"{row.seconds:.0f} s, {scores}"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="digits-uvit", choices=["digits-uvit", "digits-unet"])
    parser.add_argument("--runs", type=Path, default=Path("runs/objectives"))
    parser.add_argument("--out", type=Path, default=RESULTS / "trained" / "objectives.csv")
    parser.add_argument("--total-images", type=int, default=0, help="0: as many as the recipe says")
    parser.add_argument("--num-images", type=int, default=1000, help="samples that are scored")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--only", nargs="*", default=[], metavar="NAME=VALUE")
    a = parser.parse_args(argv)
    try:
        wanted = trials(a.recipe, a.total_images or RECIPES[a.recipe].total_images, a.num_images, a.only)
    except ValueError as error:
        parser.error(str(error))
    num_failed = run_trials(wanted, a.runs, a.out, a.jobs, train_and_score, describe)
    if num_failed:
        sys.exit(f"{num_failed} of {len(wanted)} runs failed; the same command goes on")


if __name__ == "__main__":
    main()
