"""The tables that documents have of bench/results/trained: what trainings of minutes came to.

Each gives a ``Table`` whose note names the command, commit, machine and date; None where there are no rows yet.
"""

import statistics
from collections.abc import Callable, Sequence

from scalelong.bench import probe_comparison
from scalelong.bench.lab.report_table import Table, Value, mean_and_spread
from scalelong.bench.objectives import VARIED

Line = dict[str, str]


def objectives(rows: Sequence[Line]) -> Table:
    """What each value of a flag comes to, in the order of the flags."""
    order = [(flag, value) for flag, values in VARIED.items() for value in values]
    lines: list[list[Value]] = []
    for row in sorted(rows, key=lambda row: (order.index((row["varied"], row["value"])), row["beside"])):
        accuracies = [f"{100 * float(row[name]):.1f} %" for name in ("accuracy_with_guidance", "accuracy")]
        distances = [f"{1000 * float(row[name]):.1f}" for name in ("kernel_distance_with_guidance", "kernel_distance")]
        beside = f" --{row['beside'].replace('=', ' ')}" if row["beside"] else ""
        lines.append([f"`--{row['varied']} {row['value']}{beside}`", *accuracies, *distances])
    first = rows[0]
    scored = f"{int(first['num_images']):,} samples each, {first['sampler']}; kernel distance times 1,000"
    note = f"{first['recipe']}, {int(first['total_images']):,} images; {scored}"
    distances = ("kernel distance, guided", "unguided")
    return Table("objectives", "", note, ("", "label accuracy, guided", "unguided", *distances), lines)


def scores(rows: Sequence[Line]) -> Table:
    """Images in order of their expected distance, of each recipe, by one process and by two."""
    order = ["real, held out", "samples", "noise"]
    one = [row for row in rows if row["processes"] == "1"]
    two = {(row["recipe"], row["images"], row["checkpoint"]): row for row in rows if row["processes"] == "2"}
    recipes = list(dict.fromkeys(row["recipe"] for row in rows))
    lines: list[list[Value]] = []
    for row in sorted(
        one, key=lambda r: (recipes.index(r["recipe"]), order.index(r["images"]), -int(r["checkpoint"] or 0))
    ):
        at = f", after {int(row['checkpoint']):,} images" if row["checkpoint"] else ""
        other = two[row["recipe"], row["images"], row["checkpoint"]]
        distances = [
            f"{1000 * float(r['kernel_distance']):.1f} ± {1000 * float(r['kernel_distance_error']):.1f}"
            for r in (row, other)
        ]
        shares = [f"{float(row[name]):.2f}" for name in ("precision", "recall")]
        lines.append([row["recipe"], row["images"] + at, *distances, *shares])
    note = f"Kernel distance in `{rows[0]['features']}` to the training images, times 1,000, with its standard error"
    header = ("recipe", "images", "kernel distance", "by two processes", "precision", "recall")
    return Table("scores", "", note, header, lines)


def fine_tuning(rows: Sequence[Line]) -> Table:
    """Label accuracy over images, a column for each start."""
    starts = list(dict.fromkeys(row["start"] for row in rows))
    at = {(row["start"], int(row["images_seen"])): f"{100 * float(row['label_accuracy']):.1f} %" for row in rows}
    images = sorted({images for _, images in at})
    lines: list[list[Value]] = [[f"{n:,}", *(at.get((start, n), "-") for start in starts)] for n in images]
    return Table("fine-tuning", "", "Label accuracy of samples with guidance", ("images", *starts), lines)


def ddae(rows: Sequence[Line]) -> Table:
    """Of each method and kappa over the seeds: the best block, its probe, the kernel distance, the validation loss."""
    lines: list[list[Value]] = []
    for (method, kappa), those in probe_comparison.methods_of(rows).items():
        blocks = {block: statistics.fmean(values) for block, values in probe_comparison.accuracies_of(those).items()}
        best = max(blocks, key=lambda block: blocks[block])
        of_best = [100 * float(row["accuracy"]) for row in those if row["block"] == best]
        runs = {row["seed"]: row for row in those}.values()
        distances = [float(row["kernel_distance"]) for row in runs]
        losses = [float(row["validation_loss"]) for row in runs]
        spread = [f"{mean_and_spread(of_best, 1)} %", mean_and_spread(distances), mean_and_spread(losses, 4)]
        lines.append([method, kappa, best, *spread, len(runs)])
    images, samples = int(rows[0]["images"]), int(rows[0]["samples"])
    note = (
        f"{images:,} images a run; linear probes at sigma {probe_comparison.SIGMA:g}; kernel distance of {samples:,} "
        f"samples in principal components of pixels; mean and standard deviation over seeds"
    )
    header = ("", "kappa", "best block", "accuracy of its probe", "kernel distance", "validation loss", "seeds")
    return Table("ddae", "", note, header, lines)


def skip_tuning(rows: Sequence[Line]) -> Table:
    """Of each policy and number of steps: the distance at a factor of 1, and what other factors add to it."""
    factors = sorted({row["bottom"] for row in rows}, key=float)
    others = [factor for factor in factors if float(factor) != 1]
    lines: list[list[Value]] = []
    for policy, steps in dict.fromkeys((row["skip_scale"], row["steps"]) for row in rows):
        those = [row for row in rows if (row["skip_scale"], row["steps"]) == (policy, steps)]
        at = {(float(row["bottom"]), row["seed"]): float(row["kernel_distance"]) for row in those}
        seeds = list(dict.fromkeys(row["seed"] for row in those))
        changes = [[1000 * (at[float(factor), seed] - at[1.0, seed]) for seed in seeds] for factor in others]
        plain = mean_and_spread([1000 * at[1.0, seed] for seed in seeds], 2)
        lines.append([policy, steps, len(seeds), plain, *(mean_and_spread(those, 2) for those in changes)])
    images, samples = int(rows[0]["images"]), int(rows[0]["samples"])
    note = (
        f"{images:,} images a network of depth {rows[0]['depth']}; kernel distance of {samples:,} samples by "
        f"{rows[0]['sampler']} without guidance, in principal components of pixels, times 1,000; then what is added to "
        f"it, network by network, where the innermost skip is multiplied by the factor, the outermost by 1, and those "
        f"between by numbers on a line; mean and standard deviation over seeds"
    )
    header = ("skip scale", "steps", "seeds", "distance at 1", *(f"change at {factor}" for factor in others))
    return Table("skip-tuning", "", note, header, lines)


TABLES: dict[str, tuple[str, Callable[[Sequence[Line]], Table]]] = {
    "objectives": ("scalelong.bench.objectives", objectives),
    "scores": ("scalelong.bench.scores", scores),
    "fine-tuning": ("scalelong.bench.fine_tuning", fine_tuning),
    "ddae": ("scalelong.bench.probe_comparison", ddae),
    "skip-tuning": ("scalelong.bench.skip_tuning", skip_tuning),
}
"""The name of a table and of its file, the module that makes the rows, and what makes a table of them."""


def where(rows: Sequence[Line]) -> str:
    """From which commit, where and when."""
    commits, devices, dates = (
        ", ".join(dict.fromkeys(row[name] for row in rows)) for name in ("commit", "device", "date")
    )
    return f"commit {commits}, {devices}, {dates}"
