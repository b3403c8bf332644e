"""How far a run from weights is ahead of one from nothing: digits 5 to 9, from a network that was trained on 0 to 4.

    python -m scalelong.bench.fine_tuning            # some 25 minutes on two cores
    python -m scalelong.bench.fine_tuning --images 640 --samples 50

Three runs of the recipe digits-uvit, then the label accuracy of samples with guidance at each checkpoint. Stopped, the
same command goes on. Rows go to bench/results/trained/fine-tuning.csv, the curves to docs/images/fine-tuning.png.
"""

import argparse
import csv
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from scalelong.bench.record import RESULTS, ROOM, provenance
from scalelong.train.checkpoint import list_checkpoints, load_model
from scalelong.train.commands.evaluate import EvaluateArguments, evaluate
from scalelong.train.commands.export import write_export
from scalelong.train.config import DataConfig, TrainConfig
from scalelong.train.data.digits import digits_folder
from scalelong.train.errors import run_command
from scalelong.train.hosts.processes import join_if_several
from scalelong.train.loop import train
from scalelong.train.recipes import RECIPES
from scalelong.train.write_whole import staged

FIRST, SECOND = range(5), range(5, 10)
NUM_POINTS = 10
OUT = RESULTS / "trained" / "fine-tuning.csv"
PICTURE = ROOM.parent / "docs" / "images" / "fine-tuning.png"
STARTS = ("from weights", "from nothing")


def folder_of_digits(folder: Path, digits: range) -> Path:
    """A folder of images with these digits as its classes, which links to the embedded ones."""
    folder.mkdir(parents=True, exist_ok=True)
    for digit in digits:
        link = folder / str(digit)
        if not link.is_symlink():
            link.symlink_to(digits_folder() / "train" / str(digit))
    return folder


def config_of(work: Path, name: str, digits: range, images: int, init_from: Path | None = None) -> TrainConfig:
    """The recipe on five digits, with a checkpoint at each point of the curve."""
    base = RECIPES["digits-uvit"]
    return replace(
        base,
        run=work / name,
        init_from=None if init_from is None else str(init_from),
        total_images=images,
        images_per_checkpoint=images // NUM_POINTS,
        images_per_grid=0,
        keep_checkpoints=NUM_POINTS + 1,
        model=replace(base.model, num_classes=len(digits) + 1),
        optimizer=replace(
            base.optimizer,
            warmup_images=min(base.optimizer.warmup_images, images // NUM_POINTS),
            ema_rampup=0.05,  # or samples would show the other five digits for long
        ),
        data=DataConfig(path=str(folder_of_digits(work / f"digits-{digits[0]}-to-{digits[-1]}", digits))),
    )


def curve(run: Path, samples: int) -> list[tuple[int, float]]:
    """The label accuracy of samples at each checkpoint."""
    points = sorted(int(checkpoint.name) for checkpoint in list_checkpoints(run))
    processes = join_if_several()
    scores = [evaluate(EvaluateArguments(run=run, checkpoint=point, num_images=samples), processes) for point in points]
    return [(point, score["samples"][0]["accuracy"]) for point, score in zip(points, scores, strict=True)]


def draw(rows: Sequence[dict[str, str]], path: Path) -> None:
    """Label accuracy over images, a line for each start."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.6), layout="constrained")
    panel = figure.add_subplot(xlabel="images, thousands", ylabel="label accuracy of samples, %", ylim=(0, 102))
    for start, color, mark in zip(STARTS, ("#0072b2", "#d55e00"), "os", strict=True):
        line = [row for row in rows if row["start"] == start]
        images = [int(row["images_seen"]) / 1000 for row in line]
        panel.plot(images, [100 * float(row["label_accuracy"]) for row in line], color=color, marker=mark, label=start)
    panel.grid(alpha=0.3)
    panel.legend(loc="lower right")
    with staged(path) as staging:
        figure.savefig(staging, format="png", dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=96_000, help="of each run")
    parser.add_argument("--samples", type=int, default=500, help="drawn at each point")
    parser.add_argument("--work", type=Path, default=Path("runs/fine-tuning"), help="folder of the runs")
    parser.add_argument("--results", type=Path, default=OUT)
    parser.add_argument("--picture", type=Path, default=PICTURE)
    arguments = parser.parse_args()
    work, images = arguments.work, arguments.images
    first = config_of(work, "first", FIRST, images)
    train(first)
    if not (work / "export").exists():
        write_export(load_model(first.run)[0], work / "export")
    where = provenance("cpu")
    rows = []
    for start, init_from in zip(STARTS, (work / "export", None), strict=True):
        config = config_of(work, start.replace(" ", "-"), SECOND, images, init_from)
        train(config)
        for images_seen, accuracy in curve(config.run, arguments.samples):
            print(f"{start:<14} {images_seen:>8,} images  label accuracy {accuracy:.1%}", flush=True)
            rows.append({"start": start, "images_seen": f"{images_seen}", "label_accuracy": f"{accuracy:.4f}"} | where)
    with staged(arguments.results) as staging, staging.open("w", newline="") as file:
        table = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        table.writeheader()
        table.writerows(rows)
    draw(rows, arguments.picture)
    print(f"-> {arguments.results}, {arguments.picture}")


if __name__ == "__main__":
    run_command(main)
