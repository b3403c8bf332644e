"""Training runs that are cheap to kill: each is a fork of a server that has imported torch and DeepSpeed already."""

import ctypes
import multiprocessing
import os
import random
import re
import signal
import socket
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
from PIL import Image
from running import log_rows, small_config

from scalelong.train import checkpoint
from scalelong.train.checkpoint import MANIFEST, checkpoints_folder, find_problem, list_checkpoints
from scalelong.train.command_line import run_command
from scalelong.train.config import DataConfig, TrainConfig

STEP = 8
SECONDS_OF_A_RUN = 120
SECONDS_TO_NOTICE_A_DEAD_RANK = 3
FILE_OPERATIONS = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree"}
SAVING = "survival.save_file"
CLONE_NEWNS = 0x20000
IMPORTED_BY_RUNS = (
    "deepspeed.module_inject.auto_ep_layer",
    "deepspeed.ops.op_builder.all_ops",
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "diffusers.schedulers.scheduling_dpmsolver_multistep",
    "PIL.PngImagePlugin",
    "scalelong.train.loop",
    "torch._inductor.compiler_bisector",
    "torch._inductor.metrics",
    "torch.utils.tensorboard",
)
"""Modules on the way of a run; one that another version does not have is passed over."""

_server = multiprocessing.get_context("forkserver")


def start_server() -> None:
    """Imports once what every run needs; the environment of the runs is that of this moment."""
    os.environ.update(OMP_NUM_THREADS="1", DS_ACCELERATOR="cpu")
    _server.set_forkserver_preload(list(IMPORTED_BY_RUNS))


def warm_server() -> None:
    """Waits for the imports, so that the first run takes no longer than the others."""
    process = _server.Process(target=int)
    process.start()
    process.join()


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


def _train(
    config: TrainConfig, variables: dict[str, str], kill: Kill | None, output: Path, mounts_of: int | None
) -> None:
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    if mounts_of is not None:
        enter_mounts(mounts_of)
    os.environ.update(variables)
    if kill is not None and kill.operation is not None:
        die_at_file_operation(config.run, kill.operation)

    from scalelong.train.loop import train

    run_command(lambda: sys.exit(train(config)))


def die_at_file_operation(run: Path, number: int) -> None:
    """Lets this process kill itself at its ``number``-th operation on files of the run, half-written ones included."""
    count = 0

    def dies(event: str, arguments: tuple) -> bool:
        nonlocal count
        path = str(arguments[0]) if arguments else ""
        counts = event in FILE_OPERATIONS or (event in ("open", SAVING) and path.startswith(str(run)))
        count += counts
        return counts and count == number

    def hook(event: str, arguments: tuple) -> None:
        if event != SAVING and dies(event, arguments):
            os.kill(os.getpid(), signal.SIGKILL)

    original = checkpoint.save_file

    def save_and_perhaps_die_half_way(tensors, path: Path) -> None:
        # The library writes files without telling Python, so a write that is cut short is made by hand.
        original(tensors, path)
        if dies(SAVING, (path,)):
            os.truncate(path, path.stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    checkpoint.save_file = save_and_perhaps_die_half_way
    sys.addaudithook(hook)


def enter_mounts(pid: int) -> None:
    """Sees the files that another process sees from now on."""
    with Path(f"/proc/{pid}/ns/mnt").open() as namespace:
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.setns(namespace.fileno(), CLONE_NEWNS):
            raise OSError(ctypes.get_errno(), "setns")


def start(
    config: TrainConfig,
    *,
    world_size: int = 1,
    kill: Kill | None = None,
    victim: int = 0,
    mounts_of: int | None = None,
) -> list[BaseProcess]:
    """One process for each rank; ``victim`` is the rank that ``kill`` is for."""
    output = output_of(config)
    output.parent.mkdir(parents=True, exist_ok=True)
    port = str(free_port())
    processes = []
    for rank in range(world_size):
        variables = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
        variables |= {"LOCAL_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        own_kill = kill if rank == victim else None
        process = _server.Process(target=_train, args=(config, variables, own_kill, output, mounts_of))
        process.start()
        processes.append(process)
    return processes


def finish(processes: list[BaseProcess], seconds: float = SECONDS_OF_A_RUN) -> list[int]:
    """Waits for all of them and gives their exit codes; none may take longer."""
    deadline = time.monotonic() + seconds
    try:
        for process in processes:
            process.join(max(0.0, deadline - time.monotonic()))
            assert process.exitcode is not None, f"a process still runs after {seconds} s"
    finally:
        for process in processes:
            process.kill()
    return [process.exitcode or 0 for process in processes]


def train_to_the_end(config: TrainConfig, world_size: int = 1) -> None:
    codes = finish(start(config, world_size=world_size))
    assert codes == [0] * world_size, output_of(config).read_text()


def train_until_killed(config: TrainConfig, kill: Kill, *, world_size: int = 1, victim: int = 0) -> bool:
    """Whether the kill came before the end of the run. The other ranks are then ended, as launchers do."""
    processes = start(config, world_size=world_size, kill=kill, victim=victim)
    if kill.seconds is not None:
        processes[victim].join(kill.seconds)
        processes[victim].kill()
    processes[victim].join(SECONDS_OF_A_RUN)
    if processes[victim].exitcode == -signal.SIGKILL:
        for process in processes:
            process.join(SECONDS_TO_NOTICE_A_DEAD_RANK)
            process.kill()
            process.join()
        return True
    codes = finish(processes)
    assert codes == [0] * world_size, output_of(config).read_text()
    return False


def output_of(config: TrainConfig) -> Path:
    """What the processes of the run print."""
    return config.run.with_name(f"{config.run.name}.txt")


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


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
