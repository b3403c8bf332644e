"""Whether what was hoped for of scaled skips is there, in the deepest networks of a grid."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from scalelong.bench.lab.cells import place_of
from scalelong.bench.lab.groups import baseline_of, contexts_of, depth_of, groups_of, speed_of, trained
from scalelong.bench.lab.metrics import StableWidth
from scalelong.bench.lab.summary import show_ratio
from scalelong.bench.lab.table import Row


@dataclass(frozen=True)
class Verdict:
    """One thing that was hoped for, and what was found."""

    claim: str
    found: str
    holds: bool | None
    """None where the rows do not tell."""


def verdicts_of(rows: Sequence[Row]) -> list[Verdict]:
    """Of the deepest network: the better of cs and ls against the unscaled one."""
    contexts = contexts_of(groups_of(trained(rows)))
    if not contexts:
        return []
    deepest = max(contexts, key=lambda c: depth_of(place_of(contexts[c][0].rows[0].cell)))
    groups = contexts[deepest]
    baseline = baseline_of(groups)
    scaled = [group for group in groups if group.mode.startswith(("cs", "ls"))]
    if baseline is None or not scaled:
        return [Verdict("scaled skips against none", "the grid has no pair to compare", None)]
    if math.isinf(baseline.best_loss):
        return [Verdict("scaled skips against none", f"{deepest}: none diverges at every rate", None)]
    best = min(group.best_loss for group in groups)
    widths = {group.mode: group.width(best).octaves for group in (baseline, *scaled)}
    top = max(scaled, key=lambda group: -math.inf if math.isnan(widths[group.mode]) else widths[group.mode])
    gained = _beyond(top.width(best), baseline.width(best))
    quick = max(scaled, key=lambda group: np.nan_to_num(speed_of(group, baseline).at_own_rate.value, nan=-1.0))
    speed = speed_of(quick, baseline).at_own_rate
    calm = min(scaled, key=lambda group: group.sensitivity)
    still = min(scaled, key=lambda group: group.mean("spikes_gradient"))
    sensitivity = calm.sensitivity / baseline.sensitivity if baseline.sensitivity else math.nan
    spikes = _share(still.mean("spikes_gradient"), baseline.mean("spikes_gradient"))
    at = f"{deepest}: "
    return [
        Verdict(
            "the largest stable rate lies at least one octave beyond that of none",
            at + _octaves(top.mode, gained),
            None if math.isnan(gained) else gained >= 1,
        ),
        Verdict(
            "sensitivity at most 0.6 x that of none",
            f"{at}{calm.mode} {calm.sensitivity:.3g}, none {baseline.sensitivity:.3g}: {sensitivity:.2f} x",
            None if math.isnan(sensitivity) else sensitivity <= 0.6,
        ),
        Verdict(
            "at most 0.5 x the gradient spikes of none",
            f"{at}{still.mode} {100 * still.mean('spikes_gradient'):.2g} % of the steps, none "
            f"{100 * baseline.mean('spikes_gradient'):.2g} %: {spikes:.2f} x",
            None if math.isnan(spikes) else spikes <= 0.5,
        ),
        Verdict(
            "at least 1.3 x fewer images to the target than a tuned none",
            f"{at}{quick.mode}, times fewer: {show_ratio(speed)}",
            None if math.isnan(speed.value) else speed.value >= 1.3,
        ),
    ]


def _beyond(mine: StableWidth, theirs: StableWidth) -> float:
    """How many octaves the largest stable rate lies beyond another; unbounded if the other has none."""
    if math.isnan(mine.octaves):
        return math.nan
    return math.log2(mine.largest / theirs.largest) if not math.isnan(theirs.octaves) else math.inf


def _octaves(mode: str, gained: float) -> str:
    if math.isnan(gained):
        return "no mode has a stable rate"
    if math.isinf(gained):
        return f"{mode} has stable rates, none has no rate within 1.1 x the best loss"
    return f"{mode}, {gained:+.2g} octaves"


def _share(a: float, b: float) -> float:
    return a / b if b > 0 else math.nan
