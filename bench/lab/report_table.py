"""A table of a report, and how its numbers are written; imports no torch."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean, stdev

Value = str | float
DIGITS = 3


@dataclass(frozen=True)
class Table:
    """Numbers with a heading each."""

    key: str
    title: str
    note: str
    header: tuple[str, ...]
    lines: list[list[Value]]


def mean_and_spread(values: Sequence[float], decimals: int | None = None) -> str:
    """Of those that are known, "0.250 ± 0.013"; "-" of none.

    Args:
        decimals: as many as give the mean three digits, unless told otherwise.
    """
    known = [value for value in values if not math.isnan(value)]
    if not known:
        return "-"
    middle = mean(known)
    if decimals is None:
        decimals = max(0, DIGITS - 1 - math.floor(math.log10(abs(middle)))) if middle and math.isfinite(middle) else 2
    spread = f" ± {stdev(known):.{decimals}f}" if len(known) > 1 else ""
    return f"{middle:.{decimals}f}{spread}"
