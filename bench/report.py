"""Rebuilds the tables of documents from committed rows: ``python -m scalelong.bench.report``.

In a document, ``<!-- lab NAME TABLE -->`` and ``<!-- end -->`` hold a table of ``bench/results/lab/NAME/cells.csv``;
``<!-- lab NAME TABLE COLUMN, COLUMN -->`` has some of its columns alone. What stands between them is written here and
nowhere else: no figure is typed by hand. ``<!-- trained NAME -->`` is the same for ``bench/results/trained/NAME.csv``,
``<!-- mup coordinates -->`` and ``<!-- mup transfer-uvit transfer -->`` for tables of ``bench/results/mup``, and
``<!-- recipes -->`` for the table of published recipes, ``<!-- recipes of images -->`` for that of one's own images,
``<!-- recipe costs -->`` for what each recipe computes. ``<!-- measured nvidia-h200 norms -->`` is a table of the rows
that benchmarks have left of that device.
"""

import re
from dataclasses import replace
from pathlib import Path

import torch

from scalelong.bench.lab.experiments import EXPERIMENTS, RESULTS
from scalelong.bench.lab.report_page import markdown_table, where
from scalelong.bench.lab.report_table import Table, Value
from scalelong.bench.lab.summary import tables_of
from scalelong.bench.lab.table import read_table
from scalelong.bench.measured import table_of
from scalelong.bench.mup import experiments
from scalelong.bench.trained import TABLES
from scalelong.bench.trained import where as sources
from scalelong.bench.trials import finished
from scalelong.model.architectures import make_backbone
from scalelong.train.errors import UserError, run_command
from scalelong.train.objective_config import ObjectiveConfig
from scalelong.train.recipes import FOR_ONES_OWN, RECIPES
from scalelong.train.usage import DESCRIPTIONS
from scalelong.train.write_whole import write_whole

ROOT = Path(__file__).resolve().parents[1]
NAMES = ("results", "recipes", "training", "mup", "methods", "magnitude", "objectives", "scores", "fine-tuning", "ddae")
DOCUMENTS = (ROOT / "README.md", *(ROOT / "docs" / f"{name}.md" for name in NAMES))
TRAINED = re.compile(r"(<!-- trained (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)
RECIPE_TABLE = re.compile(r"(<!-- recipes( of images)? -->\n).*?(<!-- end -->)", re.DOTALL)
COSTS_TABLE = re.compile(r"(<!-- recipe costs -->\n).*?(<!-- end -->)", re.DOTALL)
MUP_TABLE = re.compile(r"(<!-- mup ([^>]+?) -->\n).*?(<!-- end -->)", re.DOTALL)
MEASURED = re.compile(r"(<!-- measured (\S+) ([^>]+?) -->\n).*?(<!-- end -->)", re.DOTALL)
MARKED = re.compile(r"(<!-- lab (\S+) (\S+)(?: ([^>]+?))? -->\n).*?(<!-- end -->)", re.DOTALL)


def rebuilt(
    text: str,
    results: Path = RESULTS,
    *,
    trained: Path = RESULTS.parent / "trained",
    mup_results: Path = experiments.RESULTS,
) -> str:
    """A document with every marked table made anew.

    Raises:
        UserError: a mark that names no experiment, table or column.
    """
    text = TRAINED.sub(lambda mark: f"{mark[1]}\n{trained_section(trained, mark[2])}\n\n{mark[3]}", text)
    text = MUP_TABLE.sub(lambda mark: f"{mark[1]}\n{mup_section(mup_results, mark[2])}\n\n{mark[3]}", text)
    text = MARKED.sub(lambda mark: f"{mark[1]}\n{section(results, mark[2], mark[3], mark[4])}\n\n{mark[5]}", text)
    text = MEASURED.sub(
        lambda mark: f"{mark[1]}\n{measured_section(RESULTS.parent, mark[2], mark[3])}\n\n{mark[4]}", text
    )
    text = COSTS_TABLE.sub(lambda mark: f"{mark[1]}\n{markdown_table(costs_table())}\n\n{mark[2]}", text)
    return RECIPE_TABLE.sub(lambda mark: f"{mark[1]}\n{markdown_table(recipes_table(mark[2]))}\n\n{mark[3]}", text)


def mup_section(results: Path, name: str) -> str:
    """A table of muP with the command, commit, machine and date of its rows; or the command that would make it."""
    what = name.split()[0]
    if what != experiments.COORDINATES and what not in experiments.TRANSFERS:
        raise UserError(f"no experiment {what!r} of muP; there are coordinates, {', '.join(experiments.TRANSFERS)}")
    command = f"`python -m scalelong.bench.mup.experiments {what}`"
    tables = experiments.tables(results)
    if not any(key.split()[0] == what for key in tables):
        return f"Not measured yet: {command}."
    if name not in tables:
        raise UserError(f"no table {name!r} of muP; there are {', '.join(tables)}")
    table, made_by = tables[name]
    text = f"{markdown_table(table)}\n\n{command}: {made_by}. {table.note}".rstrip()
    if table.key == "transfer" and (experiments.IMAGES / f"{what}.png").is_file():
        return f"![Loss against learning rate, a line a width; stars at the best](images/{what}.png)\n\n{text}"
    return text


def measured_section(results: Path, device: str, name: str) -> str:
    table, where_measured = table_of(results, device, name)
    return f"{markdown_table(table)}\n\n{table.note}. `make gpu`: {where_measured}."


def recipes_table(of_images: str | None) -> Table:
    """The recipes of published networks, whose data has to be given; or those for images of one's own."""
    lines: list[list[Value]] = []
    for name, config in RECIPES.items():
        if config.data.path or (name in FOR_ONES_OWN) != bool(of_images):
            continue
        o, steps = config.optimizer, config.total_images // config.images_per_step
        rates = [f"{o.learning_rate:g}", f"{o.beta1:g}, {o.beta2:g}", f"{o.weight_decay:g}", o.warmup_images]
        lines.append([name, DESCRIPTIONS[name], config.images_per_step, steps, *rates, described(config.objective)])
    header = ("recipe", "what", "batch", "steps", "rate", "betas", "weight decay", "warm-up images", "objective")
    return Table("recipes", "Published recipes", "", header, lines)


def costs_table() -> Table:
    """What each recipe computes: the network on tensors without data, a training step as three forward passes."""
    lines: list[list[Value]] = []
    for name, config in RECIPES.items():
        with torch.device("meta"):
            network = make_backbone(config.model, skip_scale=config.skip_scale)
        gflops = network.flops() / 1e9
        petaflops = 3 * gflops * config.total_images / 1e6
        size, images = f"{network.num_params() / 1e6:.3g} M", f"{config.total_images / 1e6:.3g} M"
        whole = f"{petaflops:,.0f}" if petaflops >= 10 else f"{petaflops:.2g}"
        lines.append([name, size, f"{gflops:.3g}", config.images_per_step, images, whole])
    header = ("recipe", "parameters", "GFLOP an image, forward", "batch", "images", "PFLOP in all")
    return Table("recipe costs", "What recipes compute", "", header, lines)


def described(objective: ObjectiveConfig) -> str:
    """The prediction, and the noise where the prediction leaves a choice of it."""
    return objective.prediction if objective.has_own_noise else f"{objective.prediction}, {objective.noise}"


def section(results: Path, name: str, key: str, columns: str | None) -> str:
    """A table with the command, commit, machine and date of its rows; or the command that would make it."""
    if name not in EXPERIMENTS:
        raise UserError(f"no experiment {name!r}; there are {', '.join(EXPERIMENTS)}")
    command = f"`python -m scalelong.bench.lab.experiments {name}`"
    rows = read_table(results / name / "cells.csv")
    if not rows:
        return f"Not measured yet: {command} ({EXPERIMENTS[name].estimate})."
    tables = {table.key: table for table in tables_of(rows)}
    if key not in tables:
        raise UserError(f"the experiment {name} has no table {key!r}; it has {', '.join(tables)}")
    table = tables[key] if columns is None else chosen(tables[key], [column.strip() for column in columns.split(",")])
    return f"{markdown_table(table)}\n\n{command}: {where(rows)}. {table.note}"


def trained_section(folder: Path, name: str) -> str:
    """The same of a training that is no grid."""
    if name not in TABLES:
        raise UserError(f"no table of trainings {name!r}; there are {', '.join(TABLES)}")
    module, make_table = TABLES[name]
    rows = finished(folder / f"{name}.csv")
    if not rows:
        return f"Not measured yet: `python -m {module}`."
    table = make_table(rows)
    return f"{markdown_table(table)}\n\n{table.note}. `python -m {module}`: {sources(rows)}."


def chosen(table: Table, columns: list[str]) -> Table:
    """Some columns of a table."""
    unknown = [column for column in columns if column not in table.header]
    if unknown:
        raise UserError(f"the table {table.key} has no column {unknown[0]!r}; it has {', '.join(table.header)}")
    places = [table.header.index(column) for column in columns]
    return replace(table, header=tuple(columns), lines=[[line[place] for place in places] for line in table.lines])


def main() -> None:
    """Rewrites the documents that are no longer true, and names them."""
    for path in DOCUMENTS:
        text = path.read_text()
        now = rebuilt(text)
        if now != text:
            write_whole(path, now.encode())
        print(f"{path.relative_to(ROOT)}: {'rewritten' if now != text else 'as it is'}")


if __name__ == "__main__":
    run_command(main)
