"""The table of a laboratory: ``cells.csv``, a row for each finished cell, which is all that its report is made of.

A row carries the digest of what it stands for, so that the table alone lets a grid go on, on another machine too.
Lists stand in a cell with spaces between; what was not measured stays blank.
"""

import csv
import io
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from scalelong.train.errors import UserError
from scalelong.train.write_whole import write_whole

List = list[float]


@dataclass(frozen=True, kw_only=True)
class Row:
    """A finished cell; all but what it cost is the same on every machine that computes alike."""

    cell: str
    digest: str
    preset: str
    state: str
    """ "finished", "diverged" (not finite, far above its median for long, or no better than at its start), or "start":
    not trained."""
    reason: str = ""
    diverged_step: float = math.nan
    images: float = math.nan
    """As far as it came."""
    images_per_step: float = math.nan
    start_loss: float = math.nan
    """The mean over the first steps."""
    final_loss: float = math.nan
    """The last validation loss, or the mean training loss of the last quarter; blank if it diverged."""
    final_is: str = ""
    """ "validation" or "training"."""
    spikes_loss: float = math.nan
    spikes_gradient: float = math.nan
    spikes_both: float = math.nan
    largest_gradient: float = math.nan
    oscillation: float = math.nan
    """Of the h_i, the largest of all skips, over the last half."""
    hidden_norm: float = math.nan
    """Of h_1, which the outermost block puts out: the median over the last quarter."""
    magnitude: float = math.nan
    """Of the features, the largest of all blocks: the median over the last quarter."""
    weight_norm: float = math.nan
    """Of the whole network, at the end."""
    weight_growth: float = math.nan
    """That norm over what it was at the first logged step."""
    gradient_alignment: float = math.nan
    """The cosine of all weights and their gradients: the median size over the last quarter."""
    kernel_distance: float = math.nan
    """Of samples at the end to real images, where the run scores them."""
    growth_forward: float = math.nan
    growth_backward: float = math.nan
    kappa_squares: float = math.nan
    norm_ratio: float = math.nan
    sigma_max: float = math.nan
    gain_0_01: List = field(default_factory=list)
    """Perturbation gains at the times of probes.TIMES."""
    gain_0_1: List = field(default_factory=list)
    gain_0_3: List = field(default_factory=list)
    mean_mode_share: List = field(default_factory=list)
    """Of each block."""
    probe_accuracy: List = field(default_factory=list)
    """Of the linear probe of each block, on held-out images; where it was asked for."""
    curve_images: List = field(default_factory=list)
    curve_loss: List = field(default_factory=list)
    curve_gradient: List = field(default_factory=list)
    curve_hidden: List = field(default_factory=list)
    curve_weights: List = field(default_factory=list)
    curve_flops: List = field(default_factory=list)
    """Of training so far, forward and backward."""
    curve_scored_images: List = field(default_factory=list)
    curve_kernel_distance: List = field(default_factory=list)
    """Of samples to real images, at the scores that the run takes while it trains."""
    operators_speedup: float = math.nan
    """How many times faster this project's operators make the passes of a training step (probes.operators_speedup)."""
    images_per_second: float = math.nan
    seconds: float = math.nan
    date: str = ""
    commit: str = ""
    device: str = ""
    command: str = ""


COLUMNS = tuple(f.name for f in fields(Row))
COST = ("operators_speedup", "images_per_second", "seconds", "date", "commit", "device")
"""What differs from one time to the next."""
TEXTS = {f.name for f in fields(Row) if f.type is str}
LISTS = {f.name for f in fields(Row) if f.type is List}


def read_table(path: Path) -> list[Row]:
    """The rows of a table, without a line that was never finished; none if there is no table yet.

    Raises:
        UserError: the file cannot be read, or is no table of this version.
    """
    try:
        with path.open(newline="") as file:
            lines = list(csv.reader(file))
    except FileNotFoundError:
        return []
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"cannot read {path}: {error}") from error
    if not lines:
        return []
    header, *rows = lines
    missing = {"cell", "digest", "state"} - set(header)
    if missing:
        raise UserError(f"{path} is no table of the laboratory: it has no column {', '.join(sorted(missing))}")
    try:
        return [_parse(dict(zip(header, line, strict=True))) for line in rows if len(line) == len(header)]
    except (ValueError, TypeError) as error:
        raise UserError(f"{path} is damaged: {error}") from error


def write_table(path: Path, rows: Iterable[Row]) -> None:
    """
    Raises:
        UserError: it cannot be written; what stood there stays.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerows([show(getattr(row, name)) for name in COLUMNS] for row in rows)
    try:
        write_whole(path, text.getvalue().encode())
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error


def show(value: str | float | Sequence[float]) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        return " ".join(f"{x:.5g}" for x in value)
    return "" if isinstance(value, float) and math.isnan(value) else f"{value:.7g}"


def _parse(cells: dict[str, str]) -> Row:
    values: dict[str, Any] = {}
    for name in COLUMNS:
        text = cells.get(name, "")
        if name in TEXTS:
            values[name] = text
        elif name in LISTS:
            values[name] = [float(x) for x in text.split()]
        else:
            values[name] = float(text) if text else math.nan
    return Row(**values)
