"""``scalelong evaluate RUN --sweep ema=0.05,0.1 guidance=0,0.5,1``: the scores of every combination, in one table.

The samples of all combinations start from the same noise, so that what differs is the setting. The table has the real
held-out images and uniform noise too, between which samples are to be found.
"""

import csv
import io
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

from scalelong.model.backbone import Backbone
from scalelong.train.checkpoint import load_model
from scalelong.train.commands.ema_posthoc import LARGEST_ERROR, combine, plan_average
from scalelong.train.commands.load import SamplingArguments, config_of, is_export, load_export, load_sampling
from scalelong.train.config import NUM_TIMES, EvaluationConfig
from scalelong.train.errors import UserError, warn
from scalelong.train.evaluation import make_judge, score_samples
from scalelong.train.hosts.processes import Processes
from scalelong.train.run_folder import read_config
from scalelong.train.scores import table
from scalelong.train.scores.feature_spaces import check_feature_space
from scalelong.train.scores.judge import Scores
from scalelong.train.write_whole import staged, write_whole

Axes = dict[str, list[Any]]
"""The values of each setting that is swept, in the order given."""


class Axis(NamedTuple):
    """A setting that can be swept."""

    kind: type
    is_valid: Callable[[Any], bool]
    what: str


AXES = {
    "checkpoint": Axis(int, lambda v: v >= 0, "the images_seen of a checkpoint"),
    "ema": Axis(float, lambda v: 0 < v < 1, "a relative width of the averaged weights"),
    "steps": Axis(int, lambda v: 1 <= v <= NUM_TIMES, f"a number of steps in 1 .. {NUM_TIMES}"),
    "guidance": Axis(float, lambda v: 0 <= v < math.inf, "a strength from 0 on"),
    "skip-tuning": Axis(float, lambda v: 0 < v < math.inf, "a factor of the innermost skip"),
}


class Row(NamedTuple):
    """A row of the table: which images, at which settings, and their scores."""

    images: str
    settings: dict[str, Any]
    scores: Scores


def parse_axes(texts: Sequence[str]) -> Axes:
    """
    Raises:
        UserError: an axis that there is not, one given twice, or a value that it cannot have.
    """
    axes: Axes = {}
    for text in texts:
        name, equals, values = text.partition("=")
        if name not in AXES or not equals:
            raise UserError(f"--sweep {text}: expected NAME=VALUE,VALUE; there are {', '.join(AXES)}")
        if name in axes:
            raise UserError(f"--sweep has {name} twice: give all its values behind one =")
        axes[name] = [_parse_value(name, value) for value in values.split(",")]
        if len(set(axes[name])) < len(axes[name]):
            raise UserError(f"--sweep {text} has a value twice")
    return axes


def _parse_value(name: str, text: str) -> Any:
    axis = AXES[name]
    try:
        value = axis.kind(text)
    except ValueError:
        value = None
    if value is None or not axis.is_valid(value):
        raise UserError(f"--sweep {name}={text}: expected {axis.what}")
    return value


def run_sweep(
    arguments: SamplingArguments, evaluation: EvaluationConfig, axes: Axes, out: Path, processes: Processes
) -> None:
    """Scores every combination, prints the table, and writes it as CSV, Markdown and a plot. Every rank must call it.

    Raises:
        UserError: a width that was not kept, a checkpoint that is not there, and all that ``evaluate`` refuses, before
            anything is drawn or written.
    """
    processes.agree(lambda: check_feature_space(evaluation))
    processes.agree(lambda: check_axes(arguments, axes))
    sampling = processes.agree(lambda: load_sampling(arguments))
    config, fixed = sampling.config, fixed_settings(arguments, sampling.settings, axes)
    judge = make_judge(config, evaluation, processes)
    rows = []
    for settings, model, how in combinations(arguments, axes, processes):
        scores = score_samples(judge, model, config, how, evaluation.num_images, processes)
        if scores is not None:
            rows.append(Row("samples", settings, scores))
            print(f"{describe(settings)}: kernel distance {kernel_distance(scores)}", flush=True)
    held_out, noise = judge.of_held_out(), judge.of_noise()
    if held_out is not None and noise is not None:
        rows += [Row("real, held out", {}, held_out), Row("noise", {}, noise)]
        about = table.notes(
            judge.space.name,
            len(judge.real.train),
            held_out_from_training=judge.real.held_out_from_training,
            why_no_distance=judge.why_no_distance(evaluation.num_images),
        )
        write_sweep(rows, axes, {**fixed, "features": judge.space.name}, [describe(fixed), *about], out)


def check_axes(arguments: SamplingArguments, axes: Axes) -> None:
    """
    Raises:
        UserError: guidance that the run was not trained for, a width or a checkpoint that was not kept; or either of
            an export.
    """
    if is_export(arguments.run):
        if of_runs := [name for name in ("checkpoint", "ema") if name in axes]:
            raise UserError(f"--sweep {of_runs[0]} is of runs; {arguments.run} is an export, of one checkpoint")
        config = config_of(load_export(arguments), arguments.run)
    else:
        config = read_config(arguments.run)
    if "skip-tuning" in axes and not config.model.has_skips:
        raise UserError("--sweep skip-tuning needs a network with long skips")
    if any(axes.get("guidance", ())) and not config.label_drop:
        raise UserError("--sweep guidance needs a run that was trained with --label-drop above 0")
    for at in axes.get("checkpoint", [arguments.checkpoint]):
        if "checkpoint" in axes:
            load_model(arguments.run, checkpoint=at, weights=arguments.weights)
        for width in axes.get("ema", ()):
            plan_average(arguments.run, width, at=at, largest_error=LARGEST_ERROR, flag="--sweep ema=")


def combinations(
    arguments: SamplingArguments, axes: Axes, processes: Processes
) -> Iterator[tuple[dict[str, Any], Backbone, dict[str, Any]]]:
    """Each combination's settings as the table has them, its model, and what ``generate`` takes; models change last."""
    for at, width in itertools.product(axes.get("checkpoint", [arguments.checkpoint]), axes.get("ema", [None])):
        loaded = processes.agree(lambda at=at: load_sampling(replace(arguments, checkpoint=at)))
        if width is not None:
            plan = plan_average(arguments.run, width, at=at, largest_error=LARGEST_ERROR, flag="--sweep ema=")
            loaded.model.load_state_dict(combine(*plan[:2]))
        steps, strengths = axes.get("steps", [loaded.settings["steps"]]), axes.get("guidance", [None])
        for num_steps, guidance, bottom in itertools.product(steps, strengths, axes.get("skip-tuning", [None])):
            strength = loaded.settings["guidance"] if guidance is None else guidance
            tuning = loaded.settings["skip_tuning"] if bottom is None else (bottom, 1.0)
            chosen = {"checkpoint": at, "ema": width, "steps": num_steps, "guidance": strength, "skip-tuning": bottom}
            how = {**loaded.settings, "steps": num_steps, "guidance": strength, "skip_tuning": tuning}
            yield {name: chosen[name] for name in axes}, loaded.model, how


def describe(settings: dict[str, Any]) -> str:
    """The settings of a combination in a line."""
    return " ".join(
        f"{name}={value:g}" if isinstance(value, float) else f"{name}={value}" for name, value in settings.items()
    )


def kernel_distance(scores: Scores) -> str:
    return table.with_error(scores.kernel_distance, scores.kernel_distance_error)


def fixed_settings(arguments: SamplingArguments, settings: dict[str, Any], axes: Axes) -> dict[str, Any]:
    """Those that are the same in every combination."""
    fixed = {
        "checkpoint": "newest" if arguments.checkpoint is None else arguments.checkpoint,
        "weights": arguments.weights,
        "sampler": settings["sampler"],
        "steps": settings["steps"],
        "guidance": settings["guidance"],
        "seed": arguments.seed,
    }
    swept = {"weights" if name == "ema" else name for name in axes}
    return {name: value for name, value in fixed.items() if name not in swept}


def write_sweep(rows: Sequence[Row], axes: Axes, fixed: dict[str, Any], about: Sequence[str], out: Path) -> None:
    """Prints the table and writes it beside ``out``: .csv, .md, .png.

    Args:
        fixed: what is the same in all rows of samples, and the feature space.
        about: what has to be known to read the table, a line each.

    Raises:
        UserError: it cannot be written.
    """
    written = [
        {"": row.images, **{name: f"{row.settings.get(name, '-')}" for name in axes}, **table.cells(row.scores)}
        for row in rows
    ]
    print(table.table(written))
    print("\n".join(about))
    csv_path, markdown, plot = (out.with_suffix(suffix) for suffix in (".csv", ".md", ".png"))
    try:
        write_whole(csv_path, as_csv(rows, axes, fixed).encode())
        write_whole(markdown, (table.table(written, markdown=True) + "\n" + "\n\n".join(about) + "\n").encode())
        drawn = draw(rows, axes, fixed["features"], plot)
    except OSError as error:
        raise UserError(f"cannot write {error.filename or out}: {error.strerror}") from error
    print(f"-> {csv_path}, {markdown}" + (f", {plot}" if drawn else ""))


def as_csv(rows: Sequence[Row], axes: Axes, fixed: dict[str, Any]) -> str:
    """A line for each row: images, the settings, the feature space, and the fields of ``Scores``; empty where none."""
    names = ["images", *axes, *fixed, *(field.name for field in fields(Scores))]
    text = io.StringIO()
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        known = fixed if row.settings else {"features": fixed["features"]}
        writer.writerow({"images": row.images, **row.settings, **known, **asdict(row.scores)})
    return text.getvalue()


def draw(rows: Sequence[Row], axes: Axes, features: str, path: Path) -> bool:
    """Kernel distance over the last setting that has several values, a line for each combination of the others.

    Returns:
        Whether it was drawn; matplotlib may be missing, which is said.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        warn('no plot, for want of matplotlib: pip install "scalelong[scores]"')
        return False
    across = next((name for name in reversed(axes) if len(axes[name]) > 1), next(reversed(axes)))
    lines: dict[str, list[Row]] = {}
    for row in rows:
        if row.settings:
            rest = describe({name: value for name, value in row.settings.items() if name != across})
            lines.setdefault(rest or "samples", []).append(row)
    figure = Figure(figsize=(6, 4), layout="constrained")
    plot = figure.add_subplot(xlabel=across, ylabel=f"kernel distance ({features})")
    for label, line in lines.items():
        line = sorted(line, key=lambda row: row.settings[across])
        scores = [row.scores for row in line]
        distances, errors = [s.kernel_distance for s in scores], [s.kernel_distance_error for s in scores]
        plot.errorbar([row.settings[across] for row in line], distances, errors, marker="o", capsize=3, label=label)
    held_out = next(row.scores for row in rows if row.images == "real, held out")
    plot.axhline(held_out.kernel_distance, color="black", linestyle="--", label="real images, held out")
    plot.legend()
    with staged(path) as staging:
        figure.savefig(staging, format="png", dpi=150)
    return True
