"""``scalelong lab PRESET ...``: a grid of ordinary runs, then tables, plots and a page of what came of them."""

import argparse
import os
import shlex
import sys
from dataclasses import fields
from pathlib import Path

from scalelong.bench.lab.cells import AXES, Axis, Cell, free_axis, make_cells, named_axis, variant_axis
from scalelong.bench.lab.grid import Grid, run_grid, table_path
from scalelong.bench.lab.report_page import Facts, write_report
from scalelong.bench.lab.table import read_table
from scalelong.train.command_line import choose_recipe
from scalelong.train.config import TrainConfig
from scalelong.train.errors import UserError, run_command

DEFAULTS = {
    "depths": "24",
    "skip-scale": "none,inv-sqrt2,cs:0.7,cs:0.5,ls",
    "learning-rates": "2^-8.5..2^-6.5:0.5",
    "seeds": "3",
}
QUICK = {
    "depths": "8",
    "skip-scale": "none,cs:0.7,ls",
    "learning-rates": "2^-7,2^-5",
    "seeds": "2",
    "images": 3_200,
    "warm-up": 640,
}
DIVERGED_FACTOR, DIVERGED_STEPS = 3, 10
"""A run has diverged once so many losses in a row are above so many times the running median."""
HELP = {
    "depths": "blocks of a U-ViT, or residual blocks a level of a UNet",
    "skip-scale": "policies; cs:0.7 is cs with kappa 0.7, geometric:0.7:False one with the values of two fields",
    "sparse": "dense, 0.75, 0.75:25600; of U-ViT and DiT, the share that the middle does not see, for so many images",
    "positions": "of a UNet's skip scales: before-norm, after-norm",
    "qk-norm": "True, False; of models that have it",
    "magnitude": "plain, mp; of U-ViT and DiT, mp with a rate that falls by a cosine",
    "clipping": "none, norm:1, z-score:2.5",
    "batches": "images a step",
    "starts": "published, preserving; with --images 0",
    "learning-rates": "a list, or octaves: 2^-11..2^-5, 2^-9..2^-6:0.5",
    "seeds": "how many, or which: 0,3",
}


def main(argv: list[str] | None = None) -> None:
    """The command ``scalelong lab``."""
    argv = sys.argv[1:] if argv is None else argv
    arguments, rest = parser().parse_known_args(argv)
    preset, _ = choose_recipe([arguments.preset], program="scalelong lab")
    values = {**DEFAULTS, **(QUICK if arguments.quick else {})}
    values |= {name: value for name in values if (value := getattr(arguments, name.replace("-", "_"))) is not None}
    cells = cells_of(preset, arguments, values, training_flags(rest))
    folder = arguments.out or Path("runs") / f"lab-{preset}"
    command = f"scalelong lab {shlex.join(argv)}"
    if arguments.report_only:
        rows = {row.cell: row for row in read_table(table_path(folder))}
        grid = Grid(folder, rows)
    else:
        trains = images_of(arguments, values) > 0
        grid = run_grid(cells, folder, trains=trains, workers=arguments.workers, keep=arguments.keep, say=say)
    if not grid.rows:
        problem = next(iter(grid.problems.values()), f"{table_path(folder)} has no rows")
        raise UserError(f"nothing to report: {problem}")
    facts = Facts(f"Stability of {preset}", command, grid.problems)
    page = write_report(folder, list(grid.rows.values()), facts)
    print(f"table: {table_path(folder)}\nto look at: {page}", flush=True)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="scalelong lab",
        allow_abbrev=False,
        description="A grid of ordinary runs, as many at a time as there are cores; killed at any moment, the same "
        "command goes on, on another machine from cells.csv alone. Flags of training may follow: they hold for all.",
        epilog="Leaves cells.csv, a CSV for each table, plots, report.md and report.html in --out.",
    )
    made.add_argument("preset", help="a recipe of scalelong train")
    for name in AXES:
        default = DEFAULTS.get(name)
        made.add_argument(f"--{name}", metavar="LIST", help=HELP[name] + (f" ({default})" if default else ""))
    made.add_argument("--axis", action="append", default=[], metavar="FLAG=LIST", help="any flag of training")
    made.add_argument(
        "--variant", action="append", default=[], metavar="NAME=FLAGS", help="several flags of training under a name"
    )
    made.add_argument("--probe", action="store_true", help="linear probes of the blocks of each finished run")
    made.add_argument("--images", type=int, help="images each run is trained on (12,800); 0: networks as they begin")
    made.add_argument("--warm-up", type=int, dest="warm_up", help="images of the warm-up (a tenth)")
    made.add_argument("--out", type=Path, help="folder (runs/lab-PRESET)")
    made.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="runs at a time (the cores)")
    made.add_argument("--keep", action="store_true", help="keep the checkpoints of finished runs")
    made.add_argument("--quick", action="store_true", help="a small grid, under five minutes on two cores")
    made.add_argument("--report-only", action="store_true", help="only the report, of every row that is there")
    return made


def training_flags(rest: list[str]) -> tuple[str, ...]:
    return tuple(flag for flag in rest if flag != "--")


def images_of(arguments: argparse.Namespace, values: dict) -> int:
    return int(arguments.images if arguments.images is not None else values.get("images", 12_800))


def cells_of(preset: str, arguments: argparse.Namespace, values: dict[str, str], extra: tuple[str, ...]) -> list[Cell]:
    """The cells of the grid.

    Raises:
        UserError: a value that is none of its axis.
    """
    images = images_of(arguments, values)
    warm_up = arguments.warm_up if arguments.warm_up is not None else values.get("warm-up", images // 10)
    chosen = {option: getattr(arguments, option.replace("-", "_")) or values.get(option) for option in AXES}
    if images == 0 and arguments.learning_rates is None:
        chosen["learning-rates"] = None
    axes: list[Axis] = [named_axis(option, preset, str(text)) for option, text in chosen.items() if text]
    variants = [variant_axis(arguments.variant)] if arguments.variant else []
    axes[-1:-1] = [*variants, *(free_axis(text) for text in arguments.axis)]  # seeds run fastest
    if images == 0 and arguments.probe:
        raise UserError("--probe is of trained networks, --images 0 of such as they begin")
    fixed = (*fixed_flags(max(images, 1), int(warm_up)), *extra)
    return make_cells(preset, axes, fixed, is_probed=arguments.probe)


def fixed_flags(images: int, warm_up: int) -> tuple[str, ...]:
    """What every cell shares: a log of each step, nothing to look at, and the end of what has diverged."""
    flags = {
        "--total-images": images,
        "--optimizer.warmup-images": warm_up,
        "--images-per-log": 0,
        "--images-per-grid": 0,
        "--images-per-checkpoint": images,
        "--sample.num-images": 1,
        "--sample.steps": 1,
        "--guard.roll-back-factor": DIVERGED_FACTOR,
        "--guard.roll-back-steps": DIVERGED_STEPS,
        "--guard.roll-backs": 0,
    }
    if any(field.name == "images_per_validation" for field in fields(TrainConfig)):
        flags["--images-per-validation"] = max(1, images // 20)
    return tuple(str(part) for flag in flags.items() for part in flag)


def say(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    run_command(main)
