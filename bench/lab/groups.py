"""The rows of a grid by mode: all rates and seeds of one, and how many images it takes to a baseline's loss."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import median, median_high
from typing import NamedTuple

import numpy as np

from scalelong.bench.lab.cells import VARIANT, number, place_of, sorted_values
from scalelong.bench.lab.metrics import (
    Ratio,
    StableWidth,
    images_to_target,
    learning_rate_sensitivity,
    median_loss,
    ratio_of_medians,
    stable_width,
)
from scalelong.bench.lab.table import Row

CONTEXT = ("depth", "batch", "start")
"""Axes along which modes are compared with each other, not part of a mode."""
MIN_SEEDS_OF_SPEED = 5


@dataclass(frozen=True)
class Group:
    """All runs of one mode in one context: several rates, several seeds."""

    context: str
    mode: str
    rows: tuple[Row, ...]

    @cached_property
    def rates(self) -> list[str]:
        return sorted_values([place_of(row.cell).get("learning-rate", "") for row in self.rows])

    @cached_property
    def rate_values(self) -> np.ndarray:
        return np.array([number(rate) if rate else 1.0 for rate in self.rates])

    def at(self, rate: str) -> list[Row]:
        return [row for row in self.rows if place_of(row.cell).get("learning-rate", "") == rate]

    @cached_property
    def losses(self) -> np.ndarray:
        """Final losses of R rates and S seeds, infinite where a run diverged, NaN where there is none."""
        return self._by_rate(lambda row: row.final_loss if row.state == "finished" else math.inf)

    @cached_property
    def diverged(self) -> np.ndarray:
        return self._by_rate(lambda row: float(row.state == "diverged")) == 1.0

    def _by_rate(self, value: Callable[[Row], float]) -> np.ndarray:
        lines = [[value(row) for row in self.at(rate)] for rate in self.rates]
        width = max(map(len, lines))
        return np.array([[*line, *[math.nan] * (width - len(line))] for line in lines])

    @cached_property
    def medians(self) -> np.ndarray:
        return np.array([median_loss(line) for line in self.losses])

    @property
    def best_loss(self) -> float:
        return float(np.nanmin(self.medians))

    @property
    def best_rate(self) -> str:
        return self.rates[int(np.nanargmin(self.medians))]

    @property
    def start_loss(self) -> float:
        return float(np.nanmedian([row.start_loss for row in self.rows]))

    @property
    def sensitivity(self) -> float:
        return learning_rate_sensitivity(self.rate_values, self.medians, self.start_loss)

    def width(self, best_loss: float) -> StableWidth:
        return stable_width(self.rate_values, self.losses, self.diverged, best_loss)

    @cached_property
    def seeds(self) -> list[str]:
        return list(dict.fromkeys(place_of(row.cell).get("seed", "") for row in self.rows))

    def pace(self, seed: str) -> float:
        """Images a second of a seed, the median over rates; NaN where no run took a step."""
        rows = [row for row in self.rows if place_of(row.cell).get("seed", "") == seed]
        return median_of(known(rows, "images_per_second"))

    def mean(self, column: str) -> float:
        values = known(self.rows, column)
        return float(np.mean(values)) if values else math.nan

    def median(self, column: str) -> float:
        """Over all runs: of a figure that has no bound where a run diverges."""
        return median_of(known(self.rows, column))

    def median_at_best(self, column: str) -> float:
        return median_of(known(self.at(self.best_rate), column))


def known(rows: Iterable[Row], column: str) -> list[float]:
    """The values of a column that are no NaN."""
    return [value for row in rows if not math.isnan(value := getattr(row, column))]


def median_of(values: Sequence[float]) -> float:
    """NaN of none."""
    return median(values) if values else math.nan


def groups_of(rows: Iterable[Row]) -> list[Group]:
    """The groups by context in the order of the rows, the baseline first; a mode is named by the axes that differ."""
    rows = list(rows)
    places = [place_of(row.cell) for row in rows]
    varying = {axis for place in places for axis in place if len({p.get(axis) for p in places}) > 1}
    varying |= {"depth", "skip-scale"}
    found: dict[tuple[str, str], list[Row]] = {}
    for row, place in zip(rows, places, strict=True):
        context = ", ".join(f"{axis} {place[axis]}" for axis in CONTEXT if axis in place and axis in varying)
        mode = [
            place[axis] if axis in ("skip-scale", VARIANT) else f"{axis} {place[axis]}"
            for axis in place
            if axis not in (*CONTEXT, "learning-rate", "seed") and axis in varying
        ]
        found.setdefault((context or "all", ", ".join(mode) or "all"), []).append(row)
    groups = [Group(context, mode, tuple(group)) for (context, mode), group in found.items()]
    return [group for modes in contexts_of(groups).values() for group in baseline_first(modes)]


def baseline_first(groups: Sequence[Group]) -> list[Group]:
    """The modes of one context, the others as they were."""
    baseline = baseline_of(groups)
    return sorted(groups, key=lambda group: group is not baseline)


def trained(rows: Iterable[Row]) -> list[Row]:
    return [row for row in rows if row.state in ("finished", "diverged")]


def untrained(rows: Iterable[Row]) -> list[Row]:
    return [row for row in rows if row.state == "start"]


def contexts_of(groups: Iterable[Group]) -> dict[str, list[Group]]:
    found: dict[str, list[Group]] = {}
    for group in groups:
        found.setdefault(group.context, []).append(group)
    return found


PLAIN = {"magnitude": "plain", "clipping": "none"}
"""What a network has along an axis that its mode leaves as it is."""


def baseline_of(groups: Sequence[Group]) -> Group | None:
    """The mode whose skips are unscaled, the plainest of those that see all tokens; None without one."""

    def changes(group: Group) -> tuple[bool, int]:
        place = place_of(group.rows[0].cell)
        return VARIANT in place, sum(place.get(axis, plain) != plain for axis, plain in PLAIN.items())

    unscaled = [group for group in groups if group.mode.split(", ")[0] == "none"]
    dense = [group for group in unscaled if place_of(group.rows[0].cell).get("sparse", "dense") == "dense"]
    return min(dense, key=changes, default=None)


class Curve(NamedTuple):
    """What falls while a run trains, by the columns of the table."""

    images: str
    """Or what else training costs."""
    values: str


LOSS = Curve("curve_images", "curve_loss")
KERNEL_DISTANCE = Curve("curve_scored_images", "curve_kernel_distance")
LOSS_BY_FLOPS = Curve("curve_flops", "curve_loss")


class Speed(NamedTuple):
    """Images (or FLOPs) to the best that the baseline's curve has, against the baseline at its own best rate."""

    images: float
    """The median over seeds, at the mode's own best rate; infinite if most never came there."""
    at_own_rate: Ratio
    at_equal_rate: Ratio | None
    """None where the mode was not run at the baseline's rate."""
    halfway: Ratio
    """As ``at_own_rate``, to the best that the baseline has after half of its images: almost all runs come there."""
    num_seeds: int


def target_of(baseline: Group, curve: Curve = LOSS, share: float = 1.0) -> float:
    """The median over seeds of the lowest value that the baseline's curve has at its best rate.

    The upper one of an even number, so that more than half of the seeds come there.

    Args:
        share: of the baseline's images, from the start, that count.
    """
    curves = [(getattr(row, curve.images), getattr(row, curve.values)) for row in baseline.at(baseline.best_rate)]
    within = ([v for n, v in zip(images, values, strict=True) if n <= share * images[-1]] for images, values in curves)
    return median_high([min(values, default=math.inf) for values in within])


def speed_of(group: Group, baseline: Group, curve: Curve = LOSS) -> Speed:
    """Rates are the best by the final loss, whatever the curve."""

    def images_of(rows: Sequence[Row], target: float) -> list[float]:
        return [images_to_target(getattr(row, curve.images), getattr(row, curve.values), target) for row in rows]

    mine, theirs = group.at(group.best_rate), baseline.at(baseline.best_rate)
    equal, best, half = group.at(baseline.best_rate), target_of(baseline, curve), target_of(baseline, curve, 0.5)
    images, base = images_of(mine, best), images_of(theirs, best)
    at_equal_rate = ratio_of_medians(base, images_of(equal, best)) if equal else None
    halfway = ratio_of_medians(images_of(theirs, half), images_of(mine, half))
    return Speed(median(images), ratio_of_medians(base, images), at_equal_rate, halfway, len(mine))


def flops_per_image(group: Group) -> float:
    """Of training, the mean over a run; the median over runs, NaN where one of them does not have it."""
    if any(len(row.curve_flops) != len(row.curve_loss) for row in group.rows):
        return math.nan
    return median_of([row.curve_flops[-1] / row.curve_images[-1] for row in group.rows if row.curve_flops])


def depth_of(place: dict[str, str]) -> float:
    """Of a cell's place; NaN where depth is no axis."""
    return number(place["depth"]) if "depth" in place else math.nan
