"""Methods that share nothing but the task, beside each other: each mode of a grid at its own best rate."""

import math
from collections.abc import Sequence

import numpy as np

from scalelong.bench.lab.groups import Group, baseline_of, contexts_of
from scalelong.bench.lab.report_table import Table, Value, mean_and_spread
from scalelong.bench.lab.table import Row


def best_table(groups: Sequence[Group]) -> Table:
    """What each mode comes to at its own best rate, with the spread over seeds."""
    lines: list[list[Value]] = []
    for context, modes in contexts_of(groups).items():
        baseline = baseline_of(modes)
        for group in (group for group in modes if not math.isinf(group.best_loss)):
            rows = group.at(group.best_rate)
            finished = [row for row in rows if row.state == "finished"]
            accuracies, block = best_block(finished)
            lines.append(
                [
                    *(context, group.mode, end_of(group.rates, group.best_rate) + group.best_rate),
                    f"{len(finished)}" if len(finished) == len(rows) else f"{len(finished)} of {len(rows)}",
                    f"{group.best_loss:.4f}",
                    mean_and_spread([row.final_loss for row in finished], 4),
                    mean_and_spread([row.kernel_distance for row in finished]),
                    f"{mean_and_spread(accuracies, 1)} ({block})" if accuracies else "-",
                    mean_and_spread([100 * row.spikes_gradient for row in finished], 2),
                    mean_and_spread([row.largest_gradient for row in finished]),
                    mean_and_spread([row.oscillation for row in finished]),
                    mean_and_spread([] if baseline is None else relative_times(group, baseline), 2),
                ]
            )
    header = (
        *("network", "mode", "rate", "seeds", "median loss", "loss", "kernel distance", "probe % (block)"),
        *("gradient spikes %", "largest gradient", "oscillation", "time a step"),
    )
    note = (
        "At the rate whose median loss is the mode's best (≤, ≥: the lowest, the highest of several): mean and "
        "standard deviation over the seeds that came to their end. Kernel distance of samples to real images; "
        "accuracy of a linear probe of the averaged network's best block, 0 the first; share of steps whose gradient "
        "spikes; time a step by the wall clock, over that of the unscaled network with the same seed (medians over "
        "rates)."
    )
    return Table("best", "Each mode at its own best rate", note, header, lines)


def end_of(rates: Sequence[str], rate: str) -> str:
    """Whether a rate is one of the ends of those that were tried, beyond which a better one may lie."""
    if len(rates) < 2:
        return ""
    return "≤ " if rate == rates[0] else "≥ " if rate == rates[-1] else ""


def best_block(rows: Sequence[Row]) -> tuple[list[float], int]:
    """The accuracies in percent that each run's probe has at the block that is best on average, and which that is."""
    probed = [row.probe_accuracy for row in rows if row.probe_accuracy]
    if not probed:
        return [], 0
    block = int(np.mean(probed, axis=0).argmax())
    return [100 * accuracies[block] for accuracies in probed], block


def relative_times(group: Group, baseline: Group) -> list[float]:
    """How many times longer a step takes than the baseline's, of each seed that both have: medians over rates."""
    mine, theirs = ({seed: group.pace(seed) for seed in group.seeds} for group in (group, baseline))
    return [theirs[seed] / pace for seed, pace in mine.items() if seed in theirs]
