"""Whether what was hoped for of scaled skips is there, in the deepest networks of a grid."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from scalelong.bench.lab.cells import place_of
from scalelong.bench.lab.groups import (
    LOSS,
    LOSS_BY_FLOPS,
    Curve,
    Group,
    baseline_of,
    contexts_of,
    depth_of,
    flops_per_image,
    groups_of,
    speed_of,
    trained,
)
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
    """Of the deepest network: for each claim the best of the modes of cs and ls, against the unscaled one."""
    contexts = contexts_of(groups_of(trained(rows)))
    if not contexts:
        return []
    deepest = max(contexts, key=lambda context: depth_of(place_of(contexts[context][0].rows[0].cell)))
    groups = contexts[deepest]
    baseline = baseline_of(groups)
    scaled = [group for group in groups if group.mode.startswith(("cs", "ls"))]
    if baseline is None or not scaled:
        return [Verdict("scaled skips against none", "the grid has no pair to compare", None)]
    if math.isinf(baseline.best_loss):
        return [Verdict("scaled skips against none", f"{deepest}: none diverges at every rate", None)]
    best_loss = min(group.best_loss for group in groups)
    return [
        width_verdict(scaled, baseline, best_loss, deepest),
        sensitivity_verdict(scaled, baseline, deepest),
        spike_verdict(scaled, baseline, deepest),
        speed_verdict(scaled, baseline, deepest),
        *flops_verdicts(scaled, baseline, deepest),
    ]


def width_verdict(scaled: Sequence[Group], baseline: Group, best_loss: float, deepest: str) -> Verdict:
    claim = "a stable width of at least one octave more than none"
    widths = {group.mode: group.width(best_loss) for group in scaled}
    mode, mine = max(widths.items(), key=lambda item: _or_lowest(item[1].octaves))
    theirs = baseline.width(best_loss)
    if math.isnan(mine.octaves):
        return Verdict(claim, f"{deepest}: no rate of cs or ls is within 1.1 x the best loss", None)
    found = f"{deepest}: {mode} {mine.octaves:.2g} octaves, up to {mine.largest:.2g}"
    if math.isnan(theirs.octaves):
        return Verdict(claim, f"{found}; no rate of none is within 1.1 x the best loss", mine.octaves >= 1)
    found = f"{found}; none {theirs.octaves:.2g}, up to {theirs.largest:.2g}"
    return Verdict(claim, found, mine.octaves - theirs.octaves >= 1)


def sensitivity_verdict(scaled: Sequence[Group], baseline: Group, deepest: str) -> Verdict:
    group = min(scaled, key=lambda group: -_or_lowest(-group.sensitivity))
    return _at_most(
        0.6, "sensitivity to the learning rate", deepest, group.mode, group.sensitivity, baseline.sensitivity
    )


def spike_verdict(scaled: Sequence[Group], baseline: Group, deepest: str) -> Verdict:
    column = "spikes_gradient"
    group = min(scaled, key=lambda group: -_or_lowest(-group.mean(column)))
    return _at_most(
        0.5, "share of steps whose gradient spikes", deepest, group.mode, group.mean(column), baseline.mean(column)
    )


def _at_most(factor: float, what: str, deepest: str, mode: str, mine: float, theirs: float) -> Verdict:
    claim = f"{what} at most {factor} x that of none"
    if math.isnan(mine) or math.isnan(theirs) or theirs == 0:
        return Verdict(claim, f"{deepest}: {mode} {mine:.3g}, none {theirs:.3g}", None)
    found = f"{deepest}: {mode} {mine:.3g}, none {theirs:.3g}: {mine / theirs:.2f} x"
    return Verdict(claim, found, mine <= factor * theirs)


def speed_verdict(scaled: Sequence[Group], baseline: Group, deepest: str) -> Verdict:
    claim = "at least 1.3 x fewer images to the best loss of none at its own best rate"
    return _times_fewer(1.3, claim, scaled, baseline, deepest, LOSS)


def flops_verdicts(scaled: Sequence[Group], baseline: Group, deepest: str) -> list[Verdict]:
    """Of a sparse middle, where there is one."""
    claim = "with a sparse middle and scaled skips, at least 2 x fewer operations to the best loss of the dense none"
    sparse = [group for group in scaled if flops_per_image(group) < flops_per_image(baseline)]
    if not sparse:
        return []
    return [_times_fewer(2, claim, sparse, baseline, deepest, LOSS_BY_FLOPS)]


def _times_fewer(
    factor: float, claim: str, groups: Sequence[Group], baseline: Group, deepest: str, curve: Curve
) -> Verdict:
    """Of the group that is the fastest by a curve, each at its own best rate."""
    ratios = {group.mode: speed_of(group, baseline, curve).at_own_rate for group in groups}
    mode, ratio = max(ratios.items(), key=lambda item: _or_lowest(item[1].value))
    found = f"{deepest}: {mode}, times fewer: {show_ratio(ratio)}"
    return Verdict(claim, found, None if math.isnan(ratio.value) else ratio.value >= factor)


def _or_lowest(value: float) -> float:
    return -math.inf if math.isnan(value) else value
