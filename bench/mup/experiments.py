"""What docs/mup.md shows: ``python -m scalelong.bench.mup.experiments NAME [FLAG ...]`` measures one part of it.

Tables are left in ``bench/results/mup``, pictures in ``docs/images``; a grid that was killed goes on.
"""

import csv
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, get_args

from scalelong.bench.lab.report_page import csv_of, where
from scalelong.bench.lab.report_table import Table, Value
from scalelong.bench.lab.table import read_table
from scalelong.bench.mup.coordinates import BUGS, MODELS, Check, Curve, curves_of, networks
from scalelong.bench.mup.lr_transfer import main as run_transfer
from scalelong.bench.mup.transfer import FIXED_RATE, tables_of
from scalelong.bench.record import provenance
from scalelong.model.backbone_config import LinearName
from scalelong.model.skip_scale import (
    SKIP_SCALE_NAMES,
    GivenScale,
    ProfiledScale,
    SkipScale,
    Unscaled,
    make_skip_scale,
)
from scalelong.train.errors import UserError, run_command
from scalelong.train.optimizer_config import OptimizerName
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


TRANSFERS = {
    "transfer-uvit": Transfer(
        "--model uvit --parametrizations mup,fan-in,standard",
        "40 minutes: 126 runs of 12, 25 and 70 s by width, two at a time",
    ),
    # DiT's published weights begin by their fan-in: what else is "fan-in" is "standard".
    "transfer-dit": Transfer(
        "--model dit --parametrizations mup,standard",
        "31 minutes: 84 runs of 15, 30 and 80 s by width, two at a time",
    ),
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
        raise UserError("what to measure? There are\n" + "\n".join([f"  {COORDINATES:<14} 5 minutes", *lines]))


class Case(NamedTuple):
    """A network of MODELS, with one thing that is not as in the plain one."""

    model: str
    parametrization: str = "mup"
    policy: SkipScale = Unscaled()
    linear: LinearName = "plain"
    optimizer: OptimizerName = "adamw"
    bug: str | None = None

    @property
    def words(self) -> tuple[str, str, str]:
        """What it is called in the first columns of the table."""
        beside = [self.linear] if self.linear != "plain" else []
        beside += [self.optimizer] if self.optimizer != "adamw" else []
        beside += [f"bug: {self.bug}"] if self.bug else []
        return self.model, ", ".join([self.parametrization, *beside]), self.policy.kind

    def curves(self) -> list[Curve]:
        changes: dict[str, Any] = {"parametrization": "mup", "base_width": 64} if self.parametrization == "mup" else {}
        config = replace(MODELS[self.model], linear=self.linear, **changes)
        return curves_of(networks(config, self.policy, self.bug), Check(optimizer=self.optimizer))


POLICIES = (*map(make_skip_scale, SKIP_SCALE_NAMES), GivenScale((1.0, 0.5)), ProfiledScale())
"""All that train the network; adapters leave it as it is."""
PICTURED = (Case("uvit", "standard"), Case("uvit"))


def cases() -> Iterator[Case]:
    """Everything that the table of coordinates has."""
    for model in MODELS:
        yield Case(model, "standard")
        yield from (Case(model, policy=policy) for policy in POLICIES)
        yield from (Case(model, linear=linear) for linear in get_args(LinearName) if linear != "plain")
        yield Case(model, optimizer="muon")
        yield from (Case(model, bug=bug) for bug in BUGS)


def measure_coordinates() -> None:
    """Each row is written as it comes, and stays: to measure all anew, remove the table."""
    made_by = [provenance("cpu")[name] for name in MADE_BY]
    lines: dict[tuple[str, ...], list[Value]] = {tuple(line[:3]): [*line] for line in coordinate_rows(RESULTS)}
    RESULTS.mkdir(parents=True, exist_ok=True)
    pictured: dict[Case, Sequence[Curve]] = {}
    for case in cases():
        if case.words not in lines:
            curves = case.curves()
            pictured |= {case: curves} if case in PICTURED else {}
            lines[case.words] = [*case.words, *worst_of(curves), *made_by]
            in_order = [lines[other.words] for other in cases() if other.words in lines]
            table = Table(COORDINATES, "", "", (*HEADER, *MADE_BY), in_order)
            write_whole(RESULTS / f"{COORDINATES}.csv", csv_of(table).encode())
        print(*lines[case.words][: len(HEADER)], flush=True)
    if pictured:
        draw({case.parametrization: pictured.get(case) or case.curves() for case in PICTURED}, Check())


def coordinate_rows(results: Path) -> list[list[str]]:
    """The lines of the table of coordinates; none if it was never made."""
    path = results / f"{COORDINATES}.csv"
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        return list(csv.reader(file))[1:]


def draw(shown: Mapping[str, Sequence[Curve]], check: Check) -> None:
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
    lines = coordinate_rows(results)
    if lines:
        columns = zip(*(line[len(HEADER) :] for line in lines), strict=True)
        made_by = ", ".join(word for column in columns for word in dict.fromkeys(column))
        shown: list[list[Value]] = [[*line[: len(HEADER)]] for line in lines]
        found[COORDINATES] = Table(COORDINATES, "", "", HEADER, shown), made_by
    for name in TRANSFERS:
        rows = read_table(results / name / "cells.csv")
        found |= {f"{name} {table.key}": (table, where(rows)) for table in tables_of(rows)}
    return found


if __name__ == "__main__":
    run_command(main)
