"""What the rows of a grid amount to: tables, for CSV, Markdown and the page alike."""

import math
from collections.abc import Iterator, Sequence
from statistics import median

import numpy as np

from scalelong.bench.lab.best_table import best_table
from scalelong.bench.lab.cells import place_of, sorted_values
from scalelong.bench.lab.groups import (
    KERNEL_DISTANCE,
    LOSS,
    LOSS_BY_FLOPS,
    MIN_SEEDS_OF_SPEED,
    Curve,
    Group,
    baseline_of,
    contexts_of,
    depth_of,
    flops_per_image,
    groups_of,
    speed_of,
    target_of,
    trained,
    untrained,
)
from scalelong.bench.lab.metrics import Ratio, fit_depth_law
from scalelong.bench.lab.probe_points import DELTAS, TIMES
from scalelong.bench.lab.report_table import Table, Value
from scalelong.bench.lab.table import Row


def tables_of(rows: Sequence[Row]) -> list[Table]:
    """Every table that the rows have something for."""
    groups = groups_of(trained(rows))
    tables = [
        stability_table(groups),
        loss_table(groups),
        gradient_table(groups),
        speed_table(groups),
        score_speed_table(groups),
        flops_table(groups),
    ]
    tables += [magnitude_table(groups), best_table(groups)]
    tables += start_tables(untrained(rows))
    tables.append(gain_table(groups_of([row for row in rows if row.gain_0_1])))
    return [table for table in tables if table.lines]


def stability_table(groups: Sequence[Group]) -> Table:
    lines: list[list[Value]] = []
    for context, modes in contexts_of(groups).items():
        best = min((group.best_loss for group in modes), default=math.nan)
        for group in modes:
            width = group.width(best)
            lines.append(
                [
                    *(context, group.mode, len(group.rows), int(group.diverged.sum())),
                    *(group.best_rate, group.best_loss, group.sensitivity, width.octaves, width.first_diverging),
                    *(100 * group.mean(column) for column in ("spikes_loss", "spikes_gradient", "spikes_both")),
                    *(group.median("oscillation"), group.median_at_best("hidden_norm")),
                    *(group.median_at_best(column) for column in ("growth_forward", "growth_backward")),
                    *(group.median_at_best("sigma_max"), group.median_at_best("images_per_second")),
                ]
            )
    header = (
        *("network", "mode", "runs", "diverged", "best rate", "best loss", "sensitivity S", "stable octaves"),
        *("first diverging rate", "loss spikes %", "gradient spikes %", "both %", "oscillation", "norm of h_1"),
        *("growth forward", "growth backward", "sigma_max", "images/s"),
    )
    note = (
        "Losses are medians over seeds; S, 0 at best, is the mean excess loss over log rates as a share of what "
        "training gains; stable octaves count rates within 1.1 x the best of all modes of which 2/3 of the seeds "
        "survive; spikes are means and oscillation the median over all runs of the mode, all rates; the rest is at the "
        "mode's own best rate. images/s is the wall-clock speed of these runs with this project's operators, which "
        "change no other column."
    )
    return Table("stability", "Stability of each mode", note, header, lines)


def loss_table(groups: Sequence[Group]) -> Table:
    rates = sorted_values([rate for group in groups for rate in group.rates])
    lines: list[list[Value]] = []
    for group in groups:
        line: list[Value] = [group.context, group.mode]
        for rate in rates:
            if rate not in group.rates:
                line.append("")
                continue
            place = group.rates.index(rate)
            lost, runs = int(group.diverged[place].sum()), len(group.at(rate))
            shown = "diverged" if math.isinf(group.medians[place]) else f"{group.medians[place]:.3g}"
            line.append(f"{shown} ({lost} of {runs} diverged)" if lost and shown != "diverged" else shown)
        lines.append(line)
    kinds = {row.final_is for group in groups for row in group.rows if row.final_is}
    note = f"The final loss ({' or '.join(sorted(kinds)) or 'none'}), median over seeds."
    return Table("losses", "Final loss by learning rate", note, ("network", "mode", *rates), lines)


def gradient_table(groups: Sequence[Group]) -> Table:
    rates = sorted_values([rate for group in groups for rate in group.rates])

    def shown(norms: Sequence[float]) -> str:
        return f"{median(norms):.3g} ({max(norms):.3g})" if norms else ""

    lines: list[list[Value]] = [
        [group.context, group.mode, *(shown([row.largest_gradient for row in group.at(rate)]) for rate in rates)]
        for group in groups
    ]
    has_any = any(not math.isnan(row.largest_gradient) for group in groups for row in group.rows)
    note = "The largest norm that a run's gradient had: the median over seeds, and the largest of all."
    title = "Largest gradient by learning rate"
    return Table("gradients", title, note, ("network", "mode", *rates), lines if has_any else [])


def speed_table(groups: Sequence[Group]) -> Table:
    header = ("network", "mode", "rate", "seeds", "target loss", *SPEED_HEADER, "operators")
    note = (
        "Images until the loss reaches the best of the unscaled network at its own best rate, and how many times fewer "
        "that is (ratio of medians over seeds, 95 % of bootstrap replicates); at equal rate: the mode at the "
        "baseline's rate; half-way: to the best that the unscaled network has after half of its images. Of fewer than "
        f"{MIN_SEEDS_OF_SPEED} seeds an interval says little. Operators: how many times faster this project's make the "
        "passes of a step, beside PyTorch's layers in turns, which multiplies what fewer images save."
    )
    lines = [[*line, group.median_at_best("operators_speedup")] for group, line in speed_lines(groups, LOSS)]
    return Table("speed", "Images to the baseline's best loss", note, header, lines)


def score_speed_table(groups: Sequence[Group]) -> Table:
    header = ("network", "mode", "rate", "seeds", "target distance", *SPEED_HEADER)
    note = (
        "As for the loss, of the kernel distance of samples to real images, of runs that are scored while they train; "
        "rates are the best by the loss."
    )
    lines = [line for _, line in speed_lines(groups, KERNEL_DISTANCE)]
    return Table("score-speed", "Images to the baseline's best kernel distance", note, header, lines)


def flops_table(groups: Sequence[Group]) -> Table:
    """Of contexts whose modes differ in what an image costs."""
    costs = {id(group): flops_per_image(group) for group in groups}
    compared = [
        group
        for modes in contexts_of(groups).values()
        if len({costs[id(group)] for group in modes}) > 1 and not any(math.isnan(costs[id(group)]) for group in modes)
        for group in modes
    ]
    lines: list[list[Value]] = []
    for group, (*line, flops, own, equal, half) in speed_lines(compared, LOSS_BY_FLOPS):
        lines.append([*line, costs[id(group)] / 1e9, float(flops) / 1e12, own, equal, half])
    header = ("network", "mode", "rate", "seeds", "target loss", "GFLOP an image", "TFLOP to target", *SPEED_HEADER[1:])
    note = (
        "As for images, of the operations of training, forward and backward, matrix products and attention alone; an "
        "image's over the whole run. The validation loss is that of the network with all tokens."
    )
    return Table("flops", "Operations to the baseline's best loss", note, header, lines)


SPEED_HEADER = ("images to target", "times fewer", "at equal rate", "half-way")


def speed_lines(groups: Sequence[Group], curve: Curve) -> Iterator[tuple[Group, list[Value]]]:
    """A line for each mode of the contexts whose baseline has the curve."""
    for context, modes in contexts_of(groups).items():
        baseline = baseline_of(modes)
        if baseline is None or math.isinf(baseline.best_loss) or math.isinf(target := target_of(baseline, curve)):
            continue
        for group in modes:
            speed = speed_of(group, baseline, curve)
            ratios = map(show_ratio, (speed.at_own_rate, speed.at_equal_rate, speed.halfway))
            yield group, [context, group.mode, group.best_rate, speed.num_seeds, target, speed.images, *ratios]


def show_ratio(ratio: Ratio | None) -> str:
    if ratio is None:
        return "not run"
    if math.isnan(ratio.value):
        return "neither reaches it"
    if ratio.value == 0:
        return "not reached"
    if math.isinf(ratio.value):
        return "reached by this mode alone"
    high = "unbounded" if not math.isfinite(ratio.high) else f"{ratio.high:.2f}"
    return f"{ratio.value:.2f} ({ratio.low:.2f} to {high})"


def magnitude_table(groups: Sequence[Group]) -> Table:
    columns = ("magnitude", "weight_norm", "weight_growth", "gradient_alignment", "kernel_distance")
    lines: list[list[Value]] = [
        [group.context, group.mode, group.best_rate, *(group.median_at_best(column) for column in columns)]
        for group in groups
        if not math.isnan(group.median_at_best("weight_norm"))
    ]
    header = (
        "network",
        "mode",
        "rate",
        "largest magnitude",
        "weight norm",
        "times its first",
        "|cosine|",
        "kernel distance",
    )
    note = (
        "At the mode's own best rate, medians over seeds: the root mean square of the features of the block where it "
        "is largest; the norm of all weights at the end, and over that at the first logged step; the size of the "
        "cosine of all weights and their gradients (magnitude and cosine: median over the last quarter); the kernel "
        "distance of samples to real images, where runs score them."
    )
    return Table("magnitudes", "Magnitudes of features and weights", note, header, lines)


def start_tables(rows: Sequence[Row]) -> list[Table]:
    """The law at initialisation: points, and lines through those of one mode over depth."""
    points: list[list[Value]] = []
    fits: list[list[Value]] = []
    by_mode: dict[tuple[str, str], dict[float, list[Row]]] = {}
    for row in rows:
        place = place_of(row.cell)
        key = place.get("start", "published"), place.get("skip-scale", "none")
        by_mode.setdefault(key, {}).setdefault(depth_of(place), []).append(row)
    for (start, mode), depths in by_mode.items():
        medians = {depth: _medians(group) for depth, group in depths.items()}
        for depth, (kappa_squares, ratio) in medians.items():
            sigma_max = median([row.sigma_max for row in depths[depth]])
            forward, backward = (
                median([getattr(row, name) for row in depths[depth]]) for name in ("growth_forward", "growth_backward")
            )
            points.append([start, mode, depth, kappa_squares, ratio, forward, backward, sigma_max])
        sums, ratios = zip(*medians.values(), strict=True)
        law = fit_depth_law(sums, ratios)
        per_skip = fit_depth_law([depth / 2 for depth in medians], ratios).slope
        fits.append([start, mode, len(medians), law.slope, law.offset, law.r_squared, per_skip])
    for start in dict.fromkeys(start for start, _ in by_mode):
        shared = [_medians(group) for key, depths in by_mode.items() if key[0] == start for group in depths.values()]
        law = fit_depth_law(*zip(*shared, strict=True))
        fits.append([start, "all of these", len(shared), law.slope, law.offset, law.r_squared, math.nan])
    header = (
        "weights",
        "mode",
        "depth",
        "sum kappa²",
        "‖h_0‖²/‖x‖²",
        "growth forward",
        "growth backward",
        "sigma_max",
    )
    points_note = "Untrained networks, medians over seeds; ‖x‖ is what the first block puts out, ‖h_0‖ the last."
    fits_note = (
        "Least squares of ‖h_0‖²/‖x‖² = slope * sum kappa² + offset over depth (arXiv:2310.13545, theorem 3.1); "
        "the last column is the slope over the number of skips. The theorem takes projections that preserve norms "
        "(preserving); the published initialisation, of standard deviation 0.02, shrinks the stream at each of them."
    )
    fit_header = ("weights", "mode", "points", "slope", "offset", "R²", "slope per skip")
    return [
        Table("law", "The law at initialisation", fits_note, fit_header, fits),
        Table("start", "Norms and gains at initialisation", points_note, header, points),
    ]


def _medians(rows: Sequence[Row]) -> tuple[float, float]:
    return median([row.kappa_squares for row in rows]), median([row.norm_ratio for row in rows])


def gain_table(groups: Sequence[Group]) -> Table:
    lines: list[list[Value]] = []
    for group in groups:
        finished = [row for row in group.at(group.best_rate) if row.gain_0_1] or [r for r in group.rows if r.gain_0_1]
        for delta, column in zip(DELTAS, ("gain_0_01", "gain_0_1", "gain_0_3"), strict=True):
            gains = [float(np.median([getattr(row, column)[n] for row in finished])) for n in range(len(TIMES))]
            lines.append([group.context, group.mode, delta, *gains])
    note = (
        "E ‖f(x + delta u) - f(x)‖ / ‖delta u‖, delta in root mean squares of x, at five times of the training "
        "distribution; trained networks at the mode's own best rate, medians over seeds."
    )
    return Table("gain", "Perturbation gain", note, ("network", "mode", "delta", *(f"t {t:g}" for t in TIMES)), lines)
