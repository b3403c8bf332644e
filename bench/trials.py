"""Trainings that are no grid, a row or several for each, done a few at a time: stopped, the same command goes on."""

import csv
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, Protocol, TypeVar


class Named(Protocol):
    """What a trial says of itself, beside its fields: a short text of it, and where its run stands."""

    @property
    def folder(self) -> str:
        """Below the folder of all runs; of one trial alone."""
        ...


Trial = TypeVar("Trial", bound=Named)
Row = TypeVar("Row")


def finished(path: Path) -> list[dict[str, str]]:
    """The rows that are there."""
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def append_rows(path: Path, rows: Iterable[Any]) -> None:
    """Rows are dataclasses of one kind; the file begins with the names of their fields."""
    path.parent.mkdir(parents=True, exist_ok=True)
    is_new = not path.is_file()
    with path.open("a", newline="") as file:
        for row in rows:
            writer = csv.DictWriter(file, [field.name for field in fields(row)], lineterminator="\n")
            if is_new:
                writer.writeheader()
                is_new = False
            writer.writerow(asdict(row))


def run_trials(
    wanted: Sequence[Trial],
    runs: Path,
    out: Path,
    jobs: int,
    work: Callable[[Trial, Path], Sequence[Row]],
    describe: Callable[[Sequence[Row]], str],
) -> int:
    """Does what has no rows yet, so many at a time, and appends its rows as they come; returns how many failed.

    Args:
        wanted: dataclasses whose fields are columns of the rows.
        runs: where the runs stand.
        out: the table.
        work: trains a trial in its folder and says what came of it; a ``RuntimeError`` says what failed.
        describe: what came of it, in a few words.
    """
    names = [field.name for field in fields(wanted[0])] if wanted else []  # pyright: ignore[reportArgumentType]
    there = {tuple(row[name] for name in names) for row in finished(out)}
    left = [trial for trial in wanted if tuple(str(getattr(trial, name)) for name in names) not in there]
    print(f"{len(wanted)} runs: {len(wanted) - len(left)} in {out}, {len(left)} to do", flush=True)
    began, num_failed = time.monotonic(), 0

    def attempt(trial: Trial) -> Sequence[Row] | str:
        try:
            return work(trial, runs / trial.folder)
        except RuntimeError as error:
            return f"{trial}: {error}"

    with ThreadPoolExecutor(jobs) as pool:
        for number, (trial, came) in enumerate(zip(left, pool.map(attempt, left), strict=True), start=1):
            if isinstance(came, str):
                num_failed += 1
                print(came, file=sys.stderr, flush=True)
                continue
            append_rows(out, came)
            minutes = (time.monotonic() - began) / 60 / number * (len(left) - number)
            print(f"{trial}: {describe(came)}; about {minutes:.0f} min left", flush=True)
    return num_failed
