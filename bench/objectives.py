"""What each objective and each schedule of the learning rate trains to: ordinary runs of the embedded digits, scored.

    python -m scalelong.bench.objectives [--total-images N] [--num-images M] [--only prediction=flow ...]

Each value of prediction, weighting, times and schedule is one run with the others at their default. Runs stand in
``--runs`` (runs/objectives) and are trained ``--jobs`` (2) at a time, each a process of one thread; a run that is there
goes on, and one that has its row is passed over, so that the same command resumes. Rows go to ``--out``.
"""

import argparse
import csv
import json
import os
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from threading import Lock
from typing import Any, get_args

from scalelong.bench.record import RESULTS, commit, device_name
from scalelong.train.config import ScheduleName
from scalelong.train.objective_config import PredictionName, TimesName, WeightingName
from scalelong.train.recipes import RECIPES
from scalelong.train.run_folder import log_path

VARIED = {"prediction": PredictionName, "weighting": WeightingName, "times": TimesName, "schedule": ScheduleName}
SECTION_OF = {"prediction": "objective", "weighting": "objective", "times": "objective", "schedule": "optimizer"}
ONE_THREAD = {"OMP_NUM_THREADS": "1"}


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A row: a run, and how its samples score."""

    date: str
    commit: str
    device: str
    torch: str
    recipe: str
    varied: str
    value: str
    total_images: int
    seconds: float
    """Of its steps, beside another run."""
    loss: float
    """Of its last tenth, on average; comparable only between runs of the same objective."""
    sampler: str
    num_images: int
    accuracy_with_guidance: float
    distance_with_guidance: float
    accuracy: float
    distance: float


def variants(only: Iterable[str] = ()) -> list[tuple[str, str]]:
    """(what varies, its value) of each run; only those named, as "prediction=flow", if any are.

    Raises:
        ValueError: one that there is not.
    """
    known = [(varied, value) for varied, names in VARIED.items() for value in get_args(names)]
    wanted = [tuple(text.partition("=")[::2]) for text in only]
    for varied, value in wanted:
        if (varied, value) not in known:
            raise ValueError(f"no run varies {varied}={value}; there are {', '.join('='.join(pair) for pair in known)}")
    return [pair for pair in known if not wanted or pair in wanted]


def train_and_score(recipe: str, varied: str, value: str, run: Path, total_images: int, num_images: int) -> Trained:
    """The run, trained to its end from where it is, and the scores of its samples.

    Raises:
        RuntimeError: a command failed; says what it printed.
    """
    flag = f"--{SECTION_OF[varied]}.{varied}"
    command = ["scalelong.train", recipe, flag, value, "--run", run, "--total-images", total_images]
    _run_module(*command, "--images-per-grid", 0, "--images-per-checkpoint", max(total_images // 4, 1))
    _run_module("scalelong", "evaluate", run, "--num-images", num_images)
    return row_of(recipe, varied, value, run, total_images, num_images)


def row_of(recipe: str, varied: str, value: str, run: Path, total_images: int, num_images: int) -> Trained:
    """What the log and the scores of a finished run say."""
    rows = [json.loads(line) for line in log_path(run).read_text().splitlines()]
    seen = [0, *(row["images_seen"] for row in rows)]
    seconds = sum((b - a) / row["images_per_second"] for a, b, row in zip(seen, seen[1:], rows, strict=False))
    tail = [row["loss"] for row in rows[-max(len(rows) // 10, 1) :]]
    guided, plain = (json.loads((run / "evaluation.json").read_text())["samples"][n] for n in (0, -1))
    import torch

    return Trained(
        date=datetime.now(UTC).date().isoformat(),
        commit=commit(),
        device=device_name("cpu").partition(",")[0] + ", 1 thread beside another run",
        torch=torch.__version__,
        recipe=recipe,
        varied=varied,
        value=value,
        total_images=total_images,
        seconds=round(seconds, 1),
        loss=round(sum(tail) / len(tail), 5),
        sampler=f"{RECIPES[recipe].sample.sampler}, {RECIPES[recipe].sample.steps} steps",
        num_images=num_images,
        accuracy_with_guidance=guided["accuracy"],
        distance_with_guidance=round(guided["distance"], 4),
        accuracy=plain["accuracy"],
        distance=round(plain["distance"], 4),
    )


def _run_module(module: str, *arguments: object) -> None:
    command = [sys.executable, "-m", module, *map(str, arguments)]
    done = subprocess.run(command, env={**os.environ, **ONE_THREAD}, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed with {done.returncode}: {(done.stderr or done.stdout).strip()}")


def rows_there(path: Path) -> list[dict[str, str]]:
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def append_row(path: Path, row: Trained) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    is_new = not path.is_file()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Trained)], lineterminator="\n")
        if is_new:
            writer.writeheader()
        writer.writerow(asdict(row))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="digits-uvit", choices=["digits-uvit", "digits-unet"])
    parser.add_argument("--runs", type=Path, default=Path("runs/objectives"))
    parser.add_argument("--out", type=Path, default=RESULTS / "trained" / "objectives.csv")
    parser.add_argument("--total-images", type=int, default=0, help="0: as many as the recipe says")
    parser.add_argument("--num-images", type=int, default=1000, help="samples that are scored")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--only", nargs="*", default=[], metavar="VARIED=VALUE")
    arguments = parser.parse_args(argv)
    total_images = arguments.total_images or RECIPES[arguments.recipe].total_images
    try:
        wanted = variants(arguments.only)
    except ValueError as error:
        parser.error(str(error))

    def key(values: Any) -> tuple[str, ...]:
        names = ("recipe", "varied", "value", "total_images", "num_images")
        return tuple(str(values[name]) for name in names)

    there = {key(row) for row in rows_there(arguments.out)}
    lock = Lock()

    def work(varied: str, value: str) -> str | None:
        """Why it failed; None if it did not."""
        named = {"recipe": arguments.recipe, "varied": varied, "value": value, "total_images": total_images}
        if key({**named, "num_images": arguments.num_images}) in there:
            return None
        run = arguments.runs / arguments.recipe / f"{varied}-{value}-{total_images}"
        try:
            row = train_and_score(**named, run=run, num_images=arguments.num_images)
        except RuntimeError as error:
            print(f"{varied} {value}: {error}", file=sys.stderr, flush=True)
            return str(error)
        with lock:
            append_row(arguments.out, row)
            print(
                f"{varied:<11}{value:<20}{row.seconds:>7.0f} s   with guidance {row.accuracy_with_guidance:.1%}, "
                f"distance {row.distance_with_guidance:.3f}; without {row.accuracy:.1%}, {row.distance:.3f}",
                flush=True,
            )
        return None

    with ThreadPoolExecutor(arguments.jobs) as pool:
        failures = [error for error in pool.map(lambda pair: work(*pair), wanted) if error]
    if failures:
        sys.exit(f"{len(failures)} of {len(wanted)} runs failed; the same command goes on")


if __name__ == "__main__":
    main()
