"""One row for each measured figure, appended to bench/results/<device>.csv and printed as a table.

What was not measured stays blank. SCALELONG_RESULTS names another folder, SCALELONG_COMMIT the commit, where there
is no git.
"""

import csv
import math
import os
import re
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass, fields
from datetime import UTC, datetime
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

ROOM = Path(__file__).resolve().parent
RESULTS = Path(os.environ.get("SCALELONG_RESULTS") or ROOM / "results")


@dataclass(frozen=True, kw_only=True)
class Row:
    date: str
    commit: str
    device: str
    torch: str
    triton: str
    op: str
    shape: str
    dtype: str
    layout: str
    direction: str
    provider: str
    ms_median: float = math.nan
    ms_p20: float = math.nan
    ms_p80: float = math.nan
    gb_per_s: float | None = None
    percent_of_copy: float | None = None
    peak_mb: float | None = None
    host_us: float | None = None
    """What one call takes on the host until the GPU has all its work."""
    error: str = ""
    """Why a provider has no figures: the first line of what it raised."""


COLUMNS = tuple(field.name for field in fields(Row))
FIGURES = COLUMNS[COLUMNS.index("ms_median") : COLUMNS.index("error")]
HOISTED = ("date", "commit", "device", "torch", "triton", "dtype", "layout")


def append_rows(rows: Iterable[Row], folder: Path = RESULTS) -> None:
    """A file from before the last columns gets them, blank.

    Raises:
        ValueError: a file has other columns; two formats are not mixed in it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for device, rows_of_device in groupby(rows, key=lambda row: row.device):
        path = folder / f"{slug(device)}.csv"
        lines = _lines(path) if path.exists() else []
        if not lines or len(lines[0]) < len(COLUMNS):
            blanks = [[*line, *[""] * (len(COLUMNS) - len(line))] for line in lines[1:]]
            _write(path, "w", [COLUMNS, *blanks])
        _write(path, "a", map(_cells, rows_of_device))


def read_rows(path: Path) -> list[Row]:
    """Those of a file, also of one from before the last columns, without a line that was never finished.

    Raises:
        ValueError: it has other columns.
    """
    if not path.exists():
        return []

    def row(line: Sequence[str]) -> Row:
        cells: dict[str, Any] = dict(zip(header, line, strict=True))
        figures: dict[str, Any] = {name: float(cells[name]) for name in FIGURES if cells.get(name)}
        return Row(**{name: cell for name, cell in cells.items() if name not in FIGURES}, **figures)

    header, *lines = _lines(path)
    return [row(line) for line in lines if len(line) == len(header)]


def print_table(rows: Iterable[Row]) -> None:
    """Aligned columns; those that say where it ran stand once above them, unless the rows differ there."""
    lines = [COLUMNS, *(_cells(row) for row in rows)]
    shared = {name for i, name in enumerate(COLUMNS) if name in HOISTED and len({line[i] for line in lines[1:]}) == 1}
    print(" | ".join(f"{name} {cell or '-'}" for name, cell in zip(*lines[:2], strict=True) if name in shared))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        print(
            "  ".join(
                cell.rjust(width) if name in FIGURES else cell.ljust(width)
                for name, cell, width in zip(COLUMNS, line, widths, strict=True)
                if name not in shared
            ).rstrip()
        )


@cache
def environment(device: torch.device | str) -> dict[str, Any]:
    """The columns that are the same for all rows of a session."""
    return {**provenance(device), "triton": triton_version()}


def provenance(device: torch.device | str, threads: str = "") -> dict[str, Any]:
    """The columns of every table of rows: when, by which version and on what they were made.

    Args:
        threads: of a CPU, where it is not this process that computes: "1 thread a process".
    """
    name = device_name(device)
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "commit": commit(),
        "device": f"{name.partition(',')[0]}, {threads}" if threads else name,
        "torch": torch.__version__,
    }


def device_name(device: torch.device | str) -> str:
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    models = re.findall(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), flags=re.MULTILINE)
    limit = os.environ.get("SCALELONG_ISA")  # of the native library
    threads = f"{torch.get_num_threads()} threads" + (f", {limit}" if limit else "")
    return f"{models[0] if models else 'CPU'}, {threads}"


def slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def commit(folder: Path = ROOM.parent) -> str:
    """SCALELONG_COMMIT, or the short hash, with "+dirty" when the tree has changes; "unknown" without git."""
    if named := os.environ.get("SCALELONG_COMMIT"):
        return named
    # Recorded rows are no change to what was measured.
    status = ["status", "--porcelain", "--", ".", ":(exclude)bench/results"]
    try:
        short_hash, changes = (_git(folder, *command) for command in (["rev-parse", "--short", "HEAD"], status))
    except (FileNotFoundError, subprocess.CalledProcessError):
        return "unknown"
    return f"{short_hash}+dirty" if changes else short_hash


def triton_version() -> str:
    try:
        import triton
    except ImportError:
        return ""
    return triton.__version__


def _lines(path: Path) -> list[list[str]]:
    with path.open(newline="") as file:
        lines = list(csv.reader(file))
    # Columns have only ever been added behind the last one.
    if lines and lines[0] != list(COLUMNS[: len(lines[0])]):
        raise ValueError(f"{path} has other columns than {', '.join(COLUMNS)}")
    return lines


def _write(path: Path, mode: Literal["w", "a"], lines: Iterable[Sequence[str]]) -> None:
    with path.open(mode, newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(lines)


def _git(folder: Path, *command: str) -> str:
    return subprocess.run(["git", "-C", folder, *command], capture_output=True, text=True, check=True).stdout.strip()


def _cells(row: Row) -> tuple[str, ...]:
    return tuple(_cell(value) for value in astuple(row))


def _cell(value: str | float | None) -> str:
    if isinstance(value, str):
        return value
    if value is None or math.isnan(value):
        return ""
    return np.format_float_positional(value, precision=4, fractional=False, trim="-")
