"""Runs the cells of a grid, a process each, as many at a time as there are cores; killed at any moment, it goes on.

A cell is done when the table has its row. The processes are forks of one that has imported what they need, or fresh
ones where there is a GPU, which does not survive a fork.
"""

import json
import math
import multiprocessing
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from scalelong.bench.lab.cells import Cell, digest_of
from scalelong.bench.lab.table import Row, read_table, write_table
from scalelong.train.config import TrainConfig
from scalelong.train.config_json import config_differences
from scalelong.train.errors import UserError
from scalelong.train.run_folder import checkpoints_folder, config_path, read_config, tensorboard_folder
from scalelong.train.run_lock import RunLock

PRELOADED = ["scalelong.bench.lab.cell", "deepspeed"]
SECONDS_TO_SAVE = 60


@dataclass
class Grid:
    """Where a grid stands."""

    folder: Path
    rows: dict[str, Row]
    """The rows of its cells, by their names, in the order of the cells."""
    problems: dict[str, str] = field(default_factory=dict)
    """Why cells have no row, by their names."""


@dataclass(frozen=True)
class Planned:
    """A cell that is to run."""

    cell: Cell
    run: Path
    config: TrainConfig


def table_path(folder: Path) -> Path:
    return folder / "cells.csv"


def run_grid(
    cells: Sequence[Cell], folder: Path, *, trains: bool, workers: int, keep: bool = False, say: Callable[[str], None]
) -> Grid:
    """Runs all cells that the table has no row of. Cells that cannot be are said, and the others run.

    Args:
        folder: is made; ``cells.csv`` in it is the table, ``cells/`` holds the run folders.
        trains: whether the cells are trained, or measured as they begin.
        workers: how many run at a time.
        keep: whether to keep the checkpoints of finished cells.
        say: takes a line for people.

    Raises:
        UserError: the folder cannot be written, or another grid runs there.
    """
    with RunLock(folder) as lock:
        lock.take(is_new=False)
        rows = read_table(table_path(folder))
        write_table(table_path(folder), rows)  # a folder that cannot be written is found before hours have passed
        grid = Grid(folder, {})
        planned = plan_cells(cells, rows, grid, say)
        done = len(grid.rows)
        say(f"{len(cells)} cells: {done} in the table, {len(planned)} to run, {len(grid.problems)} that cannot")
        began = time.monotonic()
        for number, (one, row, problem) in enumerate(run_planned(planned, trains, workers), start=1):
            if row is None:
                grid.problems[one.cell.name] = problem
                say(f"[{done + number}/{len(cells)}] {one.cell.name}: {problem}")
                continue
            grid.rows[one.cell.name] = row
            write_table(table_path(folder), in_order(cells, grid.rows, rows))
            tidy(one.run, keep=keep)
            left = (time.monotonic() - began) / number * (len(planned) - number)
            say(f"[{done + number}/{len(cells)}] {one.cell.name}: {describe(row)}; about {left / 60:.0f} min left")
        grid.rows = {cell.name: grid.rows[cell.name] for cell in cells if cell.name in grid.rows}
        return grid


def plan_cells(
    cells: Iterable[Cell], rows: Iterable[Row], grid: Grid, say: Callable[[str], None] = print
) -> list[Planned]:
    """Those that have to run. Notes in ``grid`` which are done and which cannot be."""
    known, planned = {row.cell: row for row in rows}, []
    for cell in cells:
        run = grid.folder / "cells" / cell.folder
        try:
            config = cell.config(run)
            row = known.get(cell.name)
            if row is not None:
                check_row(row, digest_of(cell, config))
                grid.rows[cell.name] = row
                continue
            check_run(run, config)
        except UserError as error:
            grid.problems[cell.name] = str(error)
            say(f"{cell.name}: {error}")
            continue
        planned.append(Planned(cell, run, config))
    # One seed of every cell before the next of any: a grid that is cut short has something of all.
    return sorted(planned, key=lambda one: one.config.seed)


def check_row(row: Row, digest: str) -> None:
    """
    Raises:
        UserError: the row is of another configuration.
    """
    if row.digest != digest:
        raise UserError(
            f"the table has this cell with another configuration ({row.digest}, here {digest}); its row stays, and is "
            f"left out of the report: take another --out, or remove the row"
        )


def check_run(run: Path, config: TrainConfig) -> None:
    """
    Raises:
        UserError: there is a run of another configuration.
    """
    from scalelong.train.checks import keep_profiled

    if not config_path(run).is_file():
        return
    there = read_config(run)
    differences = config_differences(there, keep_profiled(there, config))
    if there.total_images != config.total_images:
        differences.append(f"--total-images {there.total_images} -> {config.total_images}")
    if differences:
        raise UserError(f"the run {run} disagrees: {', '.join(differences)}; take another --out, or remove it")


def run_planned(planned: Sequence[Planned], trains: bool, workers: int) -> Iterable[tuple[Planned, Row | None, str]]:
    """Each cell with its row as it ends, or without one and why."""
    waiting, running = list(planned), {}
    with started_processes(workers) as context:
        try:
            while waiting or running:
                while waiting and len(running) < workers:
                    one = waiting.pop(0)
                    running[start(context, one, trains)] = one
                ended = connection.wait([process.sentinel for process in running])
                for process in [process for process in running if process.sentinel in ended]:
                    process.join()
                    one = running.pop(process)
                    row = read_row(one.run, digest_of(one.cell, one.config))
                    yield one, row, "" if row is not None else why_it_ended(process, output_path(one.run))
        finally:
            stop(list(running))


@contextmanager
def started_processes(workers: int) -> Iterator[Any]:
    """What starts processes; while entered, SIGTERM ends the grid as Ctrl-C does."""
    import torch

    on_gpu = torch.cuda.is_available()
    if workers > 1 or not on_gpu:
        os.environ.setdefault("OMP_NUM_THREADS", "1" if workers > 1 else str(len(os.sched_getaffinity(0))))
    if not on_gpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    context = multiprocessing.get_context("spawn" if on_gpu else "forkserver")
    context.set_forkserver_preload(PRELOADED)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield context
    finally:
        signal.signal(signal.SIGTERM, before)


def start(context: Any, one: Planned, trains: bool) -> BaseProcess:
    from scalelong.bench.lab.cell import run_cell

    output = output_path(one.run)
    output.parent.mkdir(parents=True, exist_ok=True)
    process = context.Process(
        target=run_cell, args=(one.cell, one.run, output), kwargs={"trains": trains}, name=one.cell.folder
    )
    process.start()
    return process


def stop(processes: Sequence[BaseProcess]) -> None:
    """Lets runs save what they have, and ends them."""
    for process in processes:
        process.terminate()
    for process in processes:
        process.join(SECONDS_TO_SAVE)
        process.kill()
        process.join()


def output_path(run: Path) -> Path:
    """What a cell prints."""
    return run.with_name(f"{run.name}.log")


def read_row(run: Path, digest: str) -> Row | None:
    """What a cell of this configuration has left; None if it has not come to its end."""
    from scalelong.bench.lab.cell import row_path

    try:
        row = Row(**json.loads(row_path(run).read_text()))
    except (FileNotFoundError, NotADirectoryError):
        return None
    return row if row.digest == digest else None


def why_it_ended(process: BaseProcess, output: Path) -> str:
    """In a line: what it printed last, or the signal that killed it."""
    if process.exitcode is not None and process.exitcode < 0:
        return f"killed by {signal.Signals(-process.exitcode).name}; see {output}"
    text = output.read_text(errors="replace") if output.is_file() else ""
    lines = [line for line in text.splitlines() if line.strip()]
    return f"failed: {lines[-1] if lines else f'exit code {process.exitcode}'}; see {output}"


def in_order(cells: Iterable[Cell], rows: dict[str, Row], before: Iterable[Row]) -> list[Row]:
    """The rows of the grid in its order, however they came, then those of other cells that the table had."""
    mine = [rows[cell.name] for cell in cells if cell.name in rows]
    names = {row.cell for row in mine}
    return [*mine, *(row for row in before if row.cell not in names)]


def tidy(run: Path, *, keep: bool) -> None:
    """Removes what is large in the folder of a finished cell; its log, configuration and outcome stay."""
    if not keep:
        shutil.rmtree(checkpoints_folder(run), ignore_errors=True)
        shutil.rmtree(tensorboard_folder(run), ignore_errors=True)


def describe(row: Row) -> str:
    if row.state == "diverged":
        step = "" if math.isnan(row.diverged_step) else f" in step {row.diverged_step:.0f}"
        return f"diverged{step}: {row.reason}"
    if row.state == "start":
        return f"‖h_0‖²/‖x‖² {row.norm_ratio:.3g}, sum kappa² {row.kappa_squares:.3g}"
    return f"{row.final_is} loss {row.final_loss:.4g}, {row.seconds:.0f} s"
