"""Training runs that are cheap to kill (killable_run.py), what may be done to them, and what must be left of them."""

import json
import random
import re
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from programs import start_python
from running import log_rows, rank_variables, small_config

from scalelong.train.checkpoint import MANIFEST, find_problem, list_checkpoints
from scalelong.train.config import DataConfig, TrainConfig
from scalelong.train.config_json import config_to_dict
from scalelong.train.run_folder import checkpoints_folder

STEP = 8
SECONDS_OF_A_RUN = 120
SECONDS_TO_NOTICE_A_DEAD_RANK = 3


def make_images(folder: Path) -> Path:
    """Two small images for each of ten classes."""
    rng = np.random.default_rng(0)
    for label in range(10):
        (folder / str(label)).mkdir(parents=True)
        for number in range(2):
            pixels = rng.integers(0, 256, (8, 8), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / str(label) / f"{number}.png")
    return folder


def killable_config(run: Path, images: Path, *, steps: int, **changes) -> TrainConfig:
    """A run of a few milliseconds a step that saves every second one."""
    config = small_config(
        run,
        total_images=steps * STEP,
        images_per_step=STEP,
        images_per_checkpoint=2 * STEP,
        images_per_grid=0,
        data=DataConfig(path=str(images), reader="pillow", num_threads=1),
    )
    config = replace(config, sample=replace(config.sample, num_images=2, steps=1))
    return replace(config, **changes)


@dataclass(frozen=True)
class Kill:
    """When a process is killed: after a time, or at a file operation of its own (the half-written file included)."""

    seconds: float | None = None
    operation: int | None = None

    @property
    def kind(self) -> str:
        return "at a file operation" if self.operation is not None else "after a time"


def start(
    config: TrainConfig,
    *,
    world_size: int = 1,
    kill: Kill | None = None,
    victim: int = 0,
    mounts_of: int | None = None,
) -> list[Any]:
    """One process for each rank; ``victim`` is the rank that ``kill`` is for."""
    output = output_of(config)
    output.parent.mkdir(parents=True, exist_ok=True)
    processes = []
    for rank, variables in enumerate(rank_variables(world_size)):
        options = {"mounts_of": mounts_of, "dies_at": kill.operation if kill and rank == victim else None}
        line = ("killable_run.py", json.dumps(config_to_dict(config)), json.dumps(options))
        processes.append(start_python(*line, variables=variables, output=output))
    return processes


def finish(processes: list[Any], seconds: float = SECONDS_OF_A_RUN) -> list[int]:
    """Waits for all of them and gives their exit codes; none may take longer."""
    deadline = time.monotonic() + seconds
    try:
        return [process.wait(max(0.0, deadline - time.monotonic())) for process in processes]
    finally:
        for process in processes:
            process.kill()


def train_to_the_end(config: TrainConfig, world_size: int = 1) -> None:
    codes = finish(start(config, world_size=world_size))
    assert codes == [0] * world_size, output_of(config).read_text()


def train_until_killed(config: TrainConfig, kill: Kill, *, world_size: int = 1, victim: int = 0) -> bool:
    """Whether the kill came before the end of the run. The other ranks are then ended, as launchers do."""
    processes = start(config, world_size=world_size, kill=kill, victim=victim)
    if kill.seconds is not None:
        wait_or_kill(processes[victim], kill.seconds)
    if processes[victim].wait(SECONDS_OF_A_RUN) == -signal.SIGKILL:
        for process in processes:
            wait_or_kill(process, SECONDS_TO_NOTICE_A_DEAD_RANK)
        return True
    codes = finish(processes)
    assert codes == [0] * world_size, output_of(config).read_text()
    return False


def wait_or_kill(process: Any, seconds: float) -> None:
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def output_of(config: TrainConfig) -> Path:
    """What the processes of the run print."""
    return config.run.with_name(f"{config.run.name}.txt")


def expect_same_run(run: Path, reference: Path) -> None:
    """The same tensors bit for bit, and the same losses at every step."""
    left, right = (list_checkpoints(r)[0] for r in (run, reference))
    assert left.name == right.name
    assert find_problem(left) is None
    assert (left / MANIFEST).read_text() == (right / MANIFEST).read_text()
    assert [row["loss"] for row in log_rows(run)] == [row["loss"] for row in log_rows(reference)]


def expect_whole_checkpoints(run: Path) -> int:
    """Images seen at the newest checkpoint; a folder that bears its final name has to be whole."""
    found = list_checkpoints(run) if checkpoints_folder(run).is_dir() else []
    if not found:
        return 0
    assert find_problem(found[0]) is None, f"{found[0]}: {find_problem(found[0])}"
    return int(found[0].name)


def last_start(output: Path) -> int | None:
    """Images seen at the start that ``output`` tells of; None if it did not come so far."""
    told = re.search(r"^(?:starting|(?:resuming at|already trained to) ([\d,]+) images)", output.read_text(), re.M)
    return int((told[1] or "0").replace(",", "")) if told else None


def draw_kill(rng: random.Random, *, world_size: int, seconds: float, operations: int) -> tuple[Kill, int]:
    """A kill and the rank it is for: half after a time, half at a file operation, which rank 0 alone does."""
    if rng.random() < 0.5:
        return Kill(seconds=rng.uniform(0, seconds)), rng.randrange(world_size)
    return Kill(operation=rng.randint(1, operations)), 0


def kill_again_and_again(config: TrainConfig, draw: Callable[[], tuple[Kill, int]], world_size: int) -> Counter[str]:
    """Kills every start of a run until one comes to its end first; returns how many kills of each kind there were.

    Every start must go on at the newest checkpoint, which must be whole: no step before it is lost.
    """
    kills: Counter[str] = Counter()
    output = output_of(config)
    output.parent.mkdir(parents=True, exist_ok=True)
    while True:
        position = expect_whole_checkpoints(config.run)
        output.write_text("")
        kill, victim = draw()
        killed = train_until_killed(config, kill, world_size=world_size, victim=victim)
        assert last_start(output) in (None, position), output.read_text()
        if not killed:
            return kills
        kills[kill.kind] += 1
