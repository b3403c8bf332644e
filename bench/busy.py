"""Training runs that share their cores: how fast each is, alone and two at a time, by how its threads wait.

    python -m scalelong.bench.busy [RECIPE]      three minutes; SCALELONG_RECORD=1 appends the rows

A row is a step of the trainer, measured by the run itself; "alone" and "two at once" are measured in turns. Providers:
  ours         as the trainer sets it: threads that wait sleep after a bounded spin (train/hosts/cores.py)
  libgomp      what libgomp does by itself: it spins for milliseconds
  passive      threads that wait sleep at once
  one-thread   nobody waits
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import psutil

from scalelong.bench.record import Row, append_rows, environment, print_table
from scalelong.train.hosts.cores import STAT, busy_seconds
from scalelong.train.recipes import RECIPES
from scalelong.train.run_folder import log_path

WAYS = {
    "ours": {},
    "libgomp": {"GOMP_SPINCOUNT": "300000"},
    "passive": {"OMP_WAIT_POLICY": "passive"},
    "one-thread": {"OMP_NUM_THREADS": "1"},
}
GIVEN_UP = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "OMP_NUM_THREADS")
"""What the surroundings may have set."""
STEPS_TO_WARM_UP = 30
SECONDS = 8.0
SECONDS_TO_START = 120.0


def step_times(run: Path) -> list[float]:
    """Seconds of each step that a run has logged."""
    path = log_path(run)
    lines = path.read_bytes().splitlines(keepends=True) if path.is_file() else []
    rows = [json.loads(line) for line in lines if line.endswith(b"\n")]
    images = [0, *(row["images_seen"] for row in rows)]
    return [(b - a) / row["images_per_second"] for a, b, row in zip(images, images[1:], rows, strict=False)]


@contextmanager
def training(preset: str, runs: list[Path], variables: dict[str, str]) -> Iterator[list[subprocess.Popen]]:
    """Runs that train beside each other, without an end, until they are killed."""
    env = {**{k: v for k, v in os.environ.items() if k not in GIVEN_UP}, **variables}
    never = ["--total-images", 10**9, "--images-per-checkpoint", 10**9, "--images-per-grid", 0, "--images-per-log", 0]
    programs = [
        subprocess.Popen(
            [sys.executable, "-m", "scalelong.train", preset, "--run", str(run), *map(str, never)],
            env=env,
            stdout=subprocess.DEVNULL,
        )
        for run in runs
    ]
    try:
        yield programs
    finally:
        for program in programs:
            program.kill()
            program.wait()


def measure(preset: str, number: int, variables: dict[str, str]) -> tuple[list[float], float]:
    """So many runs at once, all of them warm.

    Returns:
        Seconds of each step of all of them, none if they do not get warm in time, and how many cores other programs
        kept busy meanwhile.

    Raises:
        RuntimeError: a run ends.
    """
    with tempfile.TemporaryDirectory() as folder:
        runs = [Path(folder) / str(n) for n in range(number)]
        with training(preset, runs, variables) as programs:
            deadline = time.monotonic() + SECONDS_TO_START
            while min(len(step_times(run)) for run in runs) < STEPS_TO_WARM_UP:
                if any(program.poll() is not None for program in programs):
                    raise RuntimeError(f"a run of {preset} has ended")
                if time.monotonic() > deadline:
                    return [], math.nan
                time.sleep(0.2)
            before, by_all, by_us = [len(step_times(run)) for run in runs], busy(), cpu_seconds(programs)
            time.sleep(SECONDS)
            steps = [seconds for run, n in zip(runs, before, strict=True) for seconds in step_times(run)[n:]]
            by_others = busy() - by_all - (cpu_seconds(programs) - by_us)
            return steps, max(0.0, by_others / SECONDS)


def busy() -> float:
    return busy_seconds(STAT.read_text(), os.sched_getaffinity(0))


def cpu_seconds(programs: list[subprocess.Popen]) -> float:
    return sum(sum(psutil.Process(program.pid).cpu_times()[:2]) for program in programs)


def row_of(preset: str, number: int, way: str, seconds: list[float]) -> Row:
    p20, median, p80 = (1e3 * np.percentile(seconds, p) for p in (20, 50, 80)) if seconds else [math.nan] * 3
    return Row(
        **environment("cpu"),
        op="train",
        shape=f"{preset} B={RECIPES[preset].images_per_step}, {number} at once",
        dtype=RECIPES[preset].precision,
        layout="contiguous",
        direction="step",
        provider=way,
        ms_median=median,
        ms_p20=p20,
        ms_p80=p80,
        error="" if seconds else f"not {STEPS_TO_WARM_UP} steps in {SECONDS_TO_START:g} s",
    )


def percent(part: float, whole: float) -> str:
    return f"{100 * part / whole:.0f} %" if whole else "-"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("preset", nargs="?", default="digits-uvit")
    preset = parser.parse_args().preset
    images, rows, speeds, others = RECIPES[preset].images_per_step, [], {}, {}
    for way, variables in WAYS.items():
        for number in (1, 2):
            seconds, by_others = measure(preset, number, variables)
            others[way] = max(by_others, others.get(way, 0.0))
            # Of all runs together: the mean, because a step that waits for a time slice takes many times the median.
            speeds[way, number] = number * images * len(seconds) / sum(seconds) if seconds else 0.0
            rows.append(row_of(preset, number, way, seconds))
    print_table(rows)
    usual = speeds["libgomp", 1]
    for way in WAYS:
        alone, together = speeds[way, 1], speeds[way, 2]
        print(
            f"{way}: {alone:,.0f} images/s alone ({percent(alone, usual)} of libgomp's), "
            f"{together:,.0f} of two together ({percent(together, alone)} of one alone); "
            f"others kept up to {others[way]:.1f} cores busy"
        )
    if os.environ.get("SCALELONG_RECORD") == "1":
        append_rows(rows)


if __name__ == "__main__":
    main()
