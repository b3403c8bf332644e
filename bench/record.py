"""One row for each measured figure, appended to bench/results/<device>.csv and printed as a table.

What was not measured stays blank.
"""

import csv
import os
import re
import subprocess
from collections.abc import Iterable
from dataclasses import astuple, dataclass, fields
from datetime import UTC, datetime
from functools import cache
from itertools import groupby
from pathlib import Path

import numpy as np
import torch

ROOM = Path(__file__).resolve().parent
RESULTS = ROOM / "results"


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
    ms_median: float
    ms_p20: float
    ms_p80: float
    gb_per_s: float | None
    percent_of_copy: float | None
    peak_mb: float | None


COLUMNS = tuple(field.name for field in fields(Row))
FIGURES = COLUMNS[COLUMNS.index("ms_median") :]
HOISTED = ("date", "commit", "device", "torch", "triton", "dtype", "layout")


def append_rows(rows: Iterable[Row], folder: Path = RESULTS) -> None:
    """Raises ValueError where a file has other columns, rather than mix two formats in it."""
    folder.mkdir(parents=True, exist_ok=True)
    for device, rows_of_device in groupby(rows, key=lambda row: row.device):
        path = folder / f"{slug(device)}.csv"
        is_new = not path.exists()
        if not is_new:
            with path.open(newline="") as file:
                if next(csv.reader(file), None) != list(COLUMNS):
                    raise ValueError(f"{path} has other columns than {', '.join(COLUMNS)}")
        with path.open("a", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            if is_new:
                writer.writerow(COLUMNS)
            writer.writerows(_cells(row) for row in rows_of_device)


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
def environment(device: torch.device | str) -> dict[str, str]:
    """The columns that are the same for all rows of a session."""
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "commit": commit(),
        "device": device_name(device),
        "torch": torch.__version__,
        "triton": triton_version(),
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
    """Short hash, with "+dirty" when the tree has changes; "unknown" without git or without a commit."""
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


def _git(folder: Path, *command: str) -> str:
    return subprocess.run(["git", "-C", folder, *command], capture_output=True, text=True, check=True).stdout.strip()


def _cells(row: Row) -> tuple[str, ...]:
    return tuple(_cell(value) for value in astuple(row))


def _cell(value: str | float | None) -> str:
    if value is None or isinstance(value, str):
        return value or ""
    return np.format_float_positional(value, precision=4, fractional=False, trim="-")
