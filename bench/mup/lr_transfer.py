"""``scalelong lr-transfer``: a grid of ordinary runs over width and learning rate, in both parametrisations.

Killed at any moment, the same command goes on, from ``cells.csv`` alone on another machine too. Leaves that table, one
CSV for each table made of it, ``report.md`` and ``transfer.png`` in --out.
"""

import argparse
import os
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from scalelong.bench.lab.cells import Axis, Cell, Flags, make_cells, named_axis
from scalelong.bench.lab.command import fixed_flags
from scalelong.bench.lab.grid import run_grid, table_path
from scalelong.bench.lab.report_page import WORDS, csv_of, markdown_table, where
from scalelong.bench.lab.table import Row, read_table
from scalelong.bench.mup.coord_check import listed, widths_of
from scalelong.bench.mup.transfer import losses_of, tables_of, verdicts_of
from scalelong.train.errors import UserError, run_command, warn
from scalelong.train.write_whole import write_whole

PRESETS = {"uvit": "digits-uvit", "dit": "digits-dit"}
PARAMETRIZATIONS: dict[str, Callable[[int, int], Flags]] = {
    "standard": lambda width, base_width: (),
    "fan-in": lambda width, base_width: ("--parametrization", "mup", "--base-width", str(width)),
    "mup": lambda width, base_width: ("--parametrization", "mup", "--base-width", str(base_width)),
}
"""The flags of a width and a base width. "fan-in" begins as muP does and is the same at the base width, with one rate
for all widths: muP whose base is the width itself. "standard" begins as published, a U-ViT with 0.02 at every width."""
BATCH = 32
DEFAULTS = {"widths": "64,128,256", "learning_rates": "2^-11..2^-5", "seeds": "2", "images": 12_800}
QUICK = {"widths": "32,64", "learning_rates": "2^-8,2^-6", "seeds": "1", "images": 1_280}


def main(argv: list[str] | None = None) -> None:
    """The command ``scalelong lr-transfer``."""
    argv = sys.argv[1:] if argv is None else argv
    arguments, rest = parser().parse_known_args(argv)
    for name, value in (QUICK if arguments.quick else DEFAULTS).items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)
    cells = cells_of(arguments, tuple(flag for flag in rest if flag != "--"))
    folder = arguments.out or Path("runs") / f"lr-transfer-{arguments.model}"
    problems: Mapping[str, str] = {}
    if not arguments.report_only:
        problems = run_grid(cells, folder, trains=True, workers=arguments.workers, say=say).problems
    rows = read_table(table_path(folder))
    if not losses_of(rows):
        raise UserError(f"nothing to report: {next(iter(problems.values()), f'{table_path(folder)} has no rows')}")
    print(write_report(folder, rows, arguments.model, f"scalelong lr-transfer {shlex.join(argv)}"))
    print(f"table: {table_path(folder)}\nto look at: {folder / 'report.md'}", flush=True)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="scalelong lr-transfer",
        allow_abbrev=False,
        description="Trains a network at several widths and learning rates: the best rate of each width, and what the "
        "narrowest one's choice costs the wider ones. Flags of training may follow: they hold for all.",
    )
    made.add_argument("--model", choices=sorted(PRESETS), default="uvit", help="trained on digits (uvit)")
    made.add_argument(
        "--parametrizations",
        default="standard,mup",
        metavar="LIST",
        help="standard: as published; fan-in: begins as mup, one rate for all widths; mup (standard,mup)",
    )
    made.add_argument("--widths", metavar="LIST", help=f"multiples of a head ({DEFAULTS['widths']})")
    made.add_argument("--base-width", type=int, help="of mup (the first of the widths)")
    made.add_argument("--head-width", type=int, default=16, help="of each attention head (16)")
    made.add_argument("--learning-rates", metavar="LIST", help=f"a list, or octaves ({DEFAULTS['learning_rates']})")
    made.add_argument("--seeds", metavar="LIST", help="how many, or which: 0,3 (2)")
    made.add_argument("--images", type=int, help=f"each run is trained on, {BATCH} a step, without warm-up (12,800)")
    made.add_argument("--out", type=Path, help="folder (runs/lr-transfer-MODEL)")
    made.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="runs at a time (the cores)")
    made.add_argument("--quick", action="store_true", help="a small grid, to see it work")
    made.add_argument("--report-only", action="store_true", help="only the report, of every row that is there")
    return made


def say(line: str) -> None:
    print(line, flush=True)


def cells_of(arguments: argparse.Namespace, extra: tuple[str, ...]) -> list[Cell]:
    """The cells of the grid.

    Raises:
        UserError: a value that is none of its axis, or a width that heads do not fit.
    """
    preset, images = PRESETS[arguments.model], int(arguments.images)
    if images < BATCH:
        raise UserError(f"--images {images}: a step takes {BATCH}")
    widths = widths_of(arguments.widths)
    base_width = widths[0] if arguments.base_width is None else arguments.base_width
    shared = (
        named_axis("learning-rates", preset, arguments.learning_rates),
        named_axis("seeds", preset, arguments.seeds),
    )
    fixed = (
        *fixed_flags(images, warm_up=0),
        *("--images-per-step", str(BATCH), "--num-validation-images", "0"),
    )
    cells: list[Cell] = []
    for name in listed(arguments.parametrizations, tuple(PARAMETRIZATIONS), "--parametrizations"):
        by_width = {
            str(width): (*width_flags(width, arguments.head_width), *PARAMETRIZATIONS[name](width, base_width))
            for width in widths
        }
        axes = (Axis("parametrization", {name: ()}), Axis("width", by_width), *shared)
        cells += make_cells(preset, axes, (*fixed, *extra))
    return cells


def width_flags(width: int, head_width: int) -> tuple[str, ...]:
    """
    Raises:
        UserError: the heads do not fit.
    """
    if head_width < 1 or width % head_width:
        raise UserError(f"--widths: {width} is no multiple of --head-width {head_width}")
    return ("--model.width", str(width), "--model.num-heads", str(width // head_width))


def write_report(folder: Path, rows: Sequence[Row], model: str, command: str) -> str:
    """Writes what the rows amount to; returns the table of best rates and what was hoped for.

    Raises:
        UserError: it cannot be written.
    """
    tables, verdicts = tables_of(rows), verdicts_of(rows)
    found = "\n".join(f"- {WORDS[verdict.holds][1]}: {verdict.claim}. {verdict.found}" for verdict in verdicts)
    parts = [f"# Transfer of the learning rate, {model}", where(rows), f"`{command}`", found, "![losses](transfer.png)"]
    for table in tables:
        parts += [f"## {table.title}", table.note, markdown_table(table)]
    files = {"report.md": ("\n\n".join(parts) + "\n").encode()}
    files |= {f"{table.key}.csv": csv_of(table).encode() for table in tables}
    try:
        from scalelong.bench.mup.plots import transfer_picture
    except ModuleNotFoundError as error:
        warn(f"no plots: {error.name} is not installed (pip install 'scalelong[lab]')")
    else:
        files["transfer.png"] = transfer_picture(losses_of(rows))
    try:
        for name, data in files.items():
            write_whole(folder / name, data)
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror}") from error
    return f"{markdown_table(tables[0])}\n\n{found}"


if __name__ == "__main__":
    run_command(main)
