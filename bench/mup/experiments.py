"""What docs/mup.md shows: ``python -m scalelong.bench.mup.experiments NAME [FLAG ...]`` measures one part of it.

Tables are left in ``bench/results/mup``, pictures in ``docs/images``; a grid that was killed goes on.
"""

import csv
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from scalelong.bench.lab.report_page import csv_of, where
from scalelong.bench.lab.summary import Table, Value
from scalelong.bench.lab.table import read_table
from scalelong.bench.mup.coordinates import BUGS, MODELS, Check, Curve, curves_of, networks
from scalelong.bench.mup.lr_transfer import main as run_transfer
from scalelong.bench.mup.transfer import FIXED_RATE, tables_of
from scalelong.bench.record import provenance
from scalelong.model.skip_scale import SKIP_SCALE_NAMES, make_skip_scale
from scalelong.train.errors import UserError, run_command
from scalelong.train.write_whole import write_whole

ROOT = Path(__file__).resolve().parents[2]
RESULTS, IMAGES = ROOT / "bench" / "results" / "mup", ROOT / "docs" / "images"
COORDINATES = "coordinates"
HEADER = ("model", "parametrization", "skip scale", "worst size", "worst update", "of the layer")
MADE_BY = ("date", "commit", "device")


FIRST = f"--widths 64,256 --learning-rates {FIXED_RATE}"
"""What a grid begins with, so that one that is cut short tells whether wider is better at that rate."""


@dataclass(frozen=True)
class Transfer:
    """A grid of ``scalelong lr-transfer``."""

    arguments: str
    estimate: str
    """How long it takes on two idle cores."""


TRANSFERS: dict[str, Transfer] = {
    f"transfer-{model}": Transfer(f"--model {model} --parametrizations mup,fan-in,standard", estimate)
    for model, estimate in (
        ("uvit", "40 minutes: 126 runs of 12, 25 and 70 s by width, two at a time"),
        ("dit", "60 minutes: 126 runs of 18, 40 and 100 s by width, two at a time"),
    )
}


def main() -> None:
    """Measures what is named."""
    name, *flags = sys.argv[1:] or [""]
    if name == COORDINATES:
        measure_coordinates()
    elif name in TRANSFERS:
        folder = RESULTS / name
        for grid in (FIRST, ""):
            run_transfer([*f"{TRANSFERS[name].arguments} {grid}".split(), "--out", str(folder), *flags])
        IMAGES.mkdir(parents=True, exist_ok=True)
        if (folder / "transfer.png").is_file():
            shutil.copyfile(folder / "transfer.png", IMAGES / f"{name}.png")
    else:
        lines = (f"  {name:<14} {transfer.estimate}" for name, transfer in TRANSFERS.items())
        raise UserError("what to measure? There are\n" + "\n".join([f"  {COORDINATES:<14} 3 minutes", *lines]))


def cases() -> Iterator[tuple[str, str, str, str | None]]:
    """(model, parametrization, policy, bug) of everything that the table of coordinates has."""
    for model in MODELS:
        yield model, "standard", "none", None
        yield from ((model, "mup", policy, None) for policy in SKIP_SCALE_NAMES)
        yield from ((model, "mup", "none", bug) for bug in BUGS)


def measure_coordinates() -> None:
    check, lines, shown = Check(), [], {}
    made_by = [provenance("cpu")[name] for name in MADE_BY]
    for model, parametrization, policy, bug in cases():
        changes: dict[str, Any] = {"parametrization": "mup", "base_width": 64} if parametrization == "mup" else {}
        make = networks(replace(MODELS[model], **changes), make_skip_scale(policy), bug)
        curves = curves_of(make, check)
        name = parametrization if bug is None else f"mup, bug: {bug}"
        lines.append([model, name, policy, *worst_of(curves), *made_by])
        print(*lines[-1][:6], flush=True)
        if policy == "none" and bug is None:
            shown.setdefault(model, {})[parametrization] = curves
    RESULTS.mkdir(parents=True, exist_ok=True)
    table = Table(COORDINATES, "", "", (*HEADER, *MADE_BY), lines)
    write_whole(RESULTS / f"{COORDINATES}.csv", csv_of(table).encode())
    draw(shown["uvit"], check)


def draw(shown: dict[str, Sequence[Curve]], check: Check) -> None:
    from scalelong.bench.mup.plots import coordinates_picture

    IMAGES.mkdir(parents=True, exist_ok=True)
    write_whole(IMAGES / f"{COORDINATES}.png", coordinates_picture(shown, "update", check))


def worst_of(curves: Sequence[Curve]) -> list[Value]:
    """The worst slope of a size, that of an update, and the layer of the worse of the two."""
    worst = [max((c for c in curves if c.measure == measure), key=lambda c: c.growth) for measure in ("size", "update")]
    return [*(f"{curve.slope:+.2f}" for curve in worst), max(worst, key=lambda curve: curve.growth).layer]


def tables(results: Path = RESULTS) -> dict[str, tuple[Table, str]]:
    """The tables that documents show, each with the command that made it and where, by the words of its mark.

    Raises:
        UserError: a table that cannot be read.
    """
    found: dict[str, tuple[Table, str]] = {}
    path = results / f"{COORDINATES}.csv"
    if path.is_file():
        with path.open(newline="") as file:
            _, *lines = csv.reader(file)
        made_by = ", ".join(dict.fromkeys(word for line in lines for word in line[len(HEADER) :]))
        shown: list[list[Value]] = [[*line[: len(HEADER)]] for line in lines]
        found[COORDINATES] = Table(COORDINATES, "", "", HEADER, shown), made_by
    for name in TRANSFERS:
        rows = read_table(results / name / "cells.csv")
        found |= {f"{name} {table.key}": (table, where(rows)) for table in tables_of(rows)}
    return found


if __name__ == "__main__":
    run_command(main)
