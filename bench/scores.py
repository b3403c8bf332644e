"""Whether the scores put images in order: samples at half and at full training, between held-out images and noise.

    python -m scalelong.bench.scores                                  # some 25 minutes on two cores
    python -m scalelong.bench.scores --recipes digits-uvit --num-images 200 --total-images 640

Each recipe is trained as it stands; ``scalelong evaluate --sweep checkpoint=HALF,FULL`` then scores it, by one process
and by two. A run that is there goes on. Rows go to ``--out``, those of a recipe in place of its last ones.
"""

import argparse
import csv
import sys
import tempfile
from dataclasses import astuple, dataclass, fields
from pathlib import Path

from scalelong.bench.modules import run_module
from scalelong.bench.record import RESULTS, provenance
from scalelong.bench.trials import finished
from scalelong.train.recipes import RECIPES
from scalelong.train.write_whole import staged

SCORED = ("digits-uvit", "photos32-uvit", "photos32-unet")
OUT = RESULTS / "trained" / "scores.csv"


@dataclass(frozen=True, kw_only=True)
class Row:
    """The scores of a set of images; what was not estimated is blank."""

    recipe: str
    processes: str
    images: str
    """Which: samples, real ones that were held out, or noise."""
    checkpoint: str
    """The images that the run had seen; blank for images that are no samples."""
    guidance: str
    features: str
    num_images: str
    kernel_distance: str
    kernel_distance_error: str
    precision: str
    recall: str
    accuracy: str
    date: str
    commit: str
    device: str
    torch: str


def train_and_score(recipe: str, run: Path, total_images: int, num_images: int) -> list[Row]:
    """
    Raises:
        RuntimeError: a command failed; says what it printed.
    """
    half = total_images // 2 // RECIPES[recipe].images_per_step * RECIPES[recipe].images_per_step
    flags = ["--run", run, "--total-images", total_images, "--images-per-checkpoint", half, "--keep-checkpoints", 4]
    run_module(["scalelong.train", recipe, *flags])
    axis = f"checkpoint={half},{total_images}"
    rows = []
    for processes in (1, 2):
        with tempfile.TemporaryDirectory() as folder:
            table = Path(folder) / "sweep.csv"
            sweep = ["scalelong", "evaluate", run, "--num-images", num_images, "--sweep", axis]
            run_module([*sweep, "--out", table], processes)
            rows += [row_of(recipe, processes, line) for line in finished(table)]
    return rows


def row_of(recipe: str, processes: int, line: dict[str, str]) -> Row:
    """A row of what the sweep wrote."""
    scores = {field.name: line[field.name] for field in fields(Row) if field.name in line}
    return Row(recipe=recipe, processes=str(processes), **scores, **provenance("cpu", "1 thread a process"))


def read_rows(path: Path = OUT) -> list[Row]:
    """Those that are there."""
    return [Row(**line) for line in finished(path)]


def write_rows(path: Path, rows: list[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with staged(path) as staging, staging.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(field.name for field in fields(Row))
        writer.writerows(astuple(row) for row in rows)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", nargs="+", default=list(SCORED), choices=SCORED)
    parser.add_argument("--runs", type=Path, default=Path("runs/scores"))
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--total-images", type=int, default=0, help="0: as many as the recipe says")
    parser.add_argument("--num-images", type=int, default=1000, help="samples that are scored at each checkpoint")
    a = parser.parse_args(argv)
    for recipe in a.recipes:
        total_images = a.total_images or RECIPES[recipe].total_images
        try:
            rows = train_and_score(recipe, a.runs / f"{recipe}-{total_images}", total_images, a.num_images)
        except RuntimeError as error:
            sys.exit(f"{error}\nthe same command goes on")
        others = [row for row in read_rows(a.out) if row.recipe != recipe]
        write_rows(a.out, sorted([*others, *rows], key=lambda row: SCORED.index(row.recipe)))
        for row in rows:
            distance = f"{float(row.kernel_distance):.5f} +- {float(row.kernel_distance_error):.5f}"
            print(f"{recipe} ({row.processes}) {row.images} {row.checkpoint}: kernel distance {distance}", flush=True)
    print(f"-> {a.out}")


if __name__ == "__main__":
    main()
