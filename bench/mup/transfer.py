"""Whether a learning rate found on a narrow network serves the wide one: what the rows of a grid over widths tell."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from scalelong.bench.lab.cells import number, place_of, sorted_values
from scalelong.bench.lab.metrics import median_loss
from scalelong.bench.lab.report_table import Table, Value
from scalelong.bench.lab.table import Row
from scalelong.bench.lab.verdicts import Verdict

FIXED_RATE = "2^-7"
"""At which a wider network does better under muP and worse in the standard parametrisation."""
LEAST_LOSS_OF_STANDARD, LARGEST_REGRET = 1.3, 0.08


@dataclass(frozen=True)
class Losses:
    """The runs of one parametrisation, over widths, rates and seeds."""

    rows: tuple[Row, ...]

    @cached_property
    def names(self) -> list[str]:
        """The rates as they were asked for, smallest first."""
        return sorted_values([place_of(row.cell)["learning-rate"] for row in self.rows])

    @cached_property
    def rates(self) -> list[float]:
        return [number(name) for name in self.names]

    @cached_property
    def widths(self) -> list[int]:
        return sorted({int(place_of(row.cell)["width"]) for row in self.rows})

    def of_width(self, width: int) -> np.ndarray:
        """Final losses of R rates and S seeds, infinite where a run diverged, NaN where there is none."""
        found: dict[str, list[float]] = {name: [] for name in self.names}
        for row in self.rows:
            place = place_of(row.cell)
            if int(place["width"]) == width:
                found[place["learning-rate"]].append(row.final_loss if row.state == "finished" else math.inf)
        most = max(map(len, found.values()))
        return np.array([[*line, *[math.nan] * (most - len(line))] for line in found.values()])

    def medians(self, width: int) -> np.ndarray:
        """Over seeds, of each rate; NaN where there is no run."""
        return np.array([median_loss(line) for line in self.of_width(width)])

    def best(self, width: int) -> int:
        """Which rate is best.

        Raises:
            ValueError: there is no run.
        """
        return int(np.nanargmin(self.medians(width)))

    def at(self, width: int, rate: str) -> float:
        """NaN where there is no run."""
        return float(self.medians(width)[self.names.index(rate)]) if rate in self.names else math.nan

    def regret(self, width: int) -> float:
        """By which share the loss is above the width's own best, at the rate that is best for the narrowest network.

        NaN where there was no choice of a rate.
        """
        if len(self.names) < 2:
            return math.nan
        medians = self.medians(width)
        return float(medians[self.best(self.widths[0])] / medians[self.best(width)] - 1)


def losses_of(rows: Iterable[Row]) -> dict[str, Losses]:
    """By parametrisation, in the order of the rows; rows of other grids are passed over."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        place = place_of(row.cell)
        if row.state in ("finished", "diverged") and {"parametrization", "width", "learning-rate"} <= place.keys():
            found.setdefault(place["parametrization"], []).append(row)
    return {name: Losses(tuple(group)) for name, group in found.items()}


def tables_of(rows: Sequence[Row]) -> list[Table]:
    """The best rate of each width and the regret, and every loss."""
    losses = losses_of(rows)
    return [transfer_table(losses), loss_table(losses)] if losses else []


def transfer_table(losses: Mapping[str, Losses]) -> Table:
    lines: list[list[Value]] = []
    for name, found in losses.items():
        for width in found.widths:
            best = found.best(width)
            regret = 100 * found.regret(width)
            lines.append([name, str(width), found.names[best], found.medians(width)[best], round(regret, 1)])
            lines[-1].append(found.at(width, FIXED_RATE))
    header = ("parametrization", "width", "best rate", "best loss", "regret %", f"loss at {FIXED_RATE}")
    note = (
        "Final losses, medians over seeds. Regret: how far the loss is above the width's own best at the rate that is "
        "best for the narrowest network."
    )
    return Table("transfer", "Transfer of the learning rate over the width", note, header, lines)


def loss_table(losses: Mapping[str, Losses]) -> Table:
    rates = sorted_values([rate for found in losses.values() for rate in found.names])
    lines: list[list[Value]] = []
    for name, found in losses.items():
        for width in found.widths:
            lines.append([name, str(width), *(_shown(found.at(width, rate)) for rate in rates)])
    note = "Final losses, medians over seeds."
    return Table("losses", "Loss by width and learning rate", note, ("parametrization", "width", *rates), lines)


def _shown(loss: float) -> Value:
    return "diverged" if math.isinf(loss) else loss


def verdicts_of(rows: Sequence[Row]) -> list[Verdict]:
    """Whether what is hoped for of muP is there, of the narrowest network and the widest."""
    losses = losses_of(rows)
    verdicts = [_wider(name, losses[name]) for name in ("mup", "standard", "fan-in") if name in losses]
    if "mup" in losses:
        verdicts.append(_regret(losses["mup"]))
    return verdicts


def _wider(name: str, found: Losses) -> Verdict:
    narrow, wide = found.widths[0], found.widths[-1]
    ratio = found.at(wide, FIXED_RATE) / found.at(narrow, FIXED_RATE)
    text = f"{name}: loss at width {wide} over that at {narrow}: {ratio:.3g}"
    known = narrow < wide and not math.isnan(ratio)
    if name == "mup":
        return Verdict(f"under muP wider is better at {FIXED_RATE}", text, ratio < 1 if known else None)
    claim = f"with one rate for all widths ({name}) wider is worse at {FIXED_RATE}, {LEAST_LOSS_OF_STANDARD} x or more"
    return Verdict(claim, text, ratio >= LEAST_LOSS_OF_STANDARD if known else None)


def _regret(found: Losses) -> Verdict:
    narrow, wide = found.widths[0], found.widths[-1]
    regret = found.regret(wide)
    claim = f"under muP the narrowest network's rate costs the widest at most {LARGEST_REGRET:.0%}"
    text = f"width {wide} at the best rate of {narrow}: {regret:+.1%}"
    known = narrow < wide and len(found.names) > 1 and not math.isnan(regret)
    return Verdict(claim, text, regret <= LARGEST_REGRET if known else None)
