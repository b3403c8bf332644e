"""How the tests run the trainer: a network small enough for seconds, on a few images, as a command or in-process."""

import json
import socket
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from programs import start_own_process, start_python

from scalelong.train.config import TrainConfig
from scalelong.train.recipes import RECIPES

SMALL = [
    *("--model.width", "32"),
    *("--model.depth", "2"),
    *("--images-per-step", "32"),
    *("--optimizer.warmup-images", "64"),
    *("--sample.num-images", "10"),
    *("--sample.steps", "3"),
    *("--images-per-log", "0"),
]


def small_config(run: Path, **changes) -> TrainConfig:
    """What the flags in SMALL make of the embedded default."""
    base = RECIPES["digits-uvit"]
    small = replace(
        base,
        run=run,
        images_per_step=32,
        images_per_log=0,
        deterministic=torch.cuda.is_available(),  # these tests compare bits
        model=replace(base.model, width=32, depth=2),
        optimizer=replace(base.optimizer, warmup_images=64),
        sample=replace(base.sample, num_images=10, steps=3),
    )
    return replace(small, **changes)


def run_command(
    *arguments: object, module: str = "scalelong.train", timeout: float = 120
) -> subprocess.CompletedProcess[str]:
    """A command as ``python -m MODULE`` runs it, but for its imports: ``run_as_own_process`` has those too."""
    return _finish(start_python("-m", module, *arguments), timeout)


def run_as_own_process(
    *arguments: object, module: str = "scalelong.train", timeout: float = 120
) -> subprocess.CompletedProcess[str]:
    return _finish(start_own_process("-m", module, *arguments), timeout)


def _finish(program: Any, timeout: float) -> subprocess.CompletedProcess[str]:
    try:
        out, err = program.communicate(timeout=timeout)
    finally:
        program.kill()
    return subprocess.CompletedProcess(program.args, program.returncode, out, err)


def launch(num_processes: int, *arguments: object, timeout: float = 180) -> None:
    """Trains under the deepspeed launcher."""
    options = ["--num_accelerators", num_processes, "--master_port", free_port(), "--module", "scalelong.train"]
    started = start_own_process(
        "-m", "deepspeed.launcher.runner", *options, *arguments, variables={"DS_ACCELERATOR": "cpu"}
    )
    done = _finish(started, timeout)
    assert done.returncode == 0, done.stdout + done.stderr


def rank_variables(num_ranks: int) -> list[dict[str, int | str]]:
    """What a launcher on this machine sets for each rank, of one thread."""
    shared = {"WORLD_SIZE": num_ranks, "LOCAL_SIZE": num_ranks, "OMP_NUM_THREADS": 1}
    shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    return [{"RANK": rank, "LOCAL_RANK": rank, **shared} for rank in range(num_ranks)]


def run_on_ranks(num_ranks: int, *line: object, timeout: float = 180) -> list[str]:
    """A Python program on several ranks of this machine, without a launcher: what each has printed."""
    ranks = [start_python(*line, variables=variables) for variables in rank_variables(num_ranks)]
    try:
        outputs = [rank.communicate(timeout=timeout) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert all(rank.returncode == 0 for rank in ranks), "\n".join(out + err for out, err in outputs)
    return [out for out, _ in outputs]


def train_on_ranks(num_ranks: int, *arguments: object) -> None:
    """Trains on several ranks of this machine, without a launcher."""
    run_on_ranks(num_ranks, "-m", "scalelong.train", *arguments)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def log_rows(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def losses(run: Path) -> list[float]:
    return [row["loss"] for row in log_rows(run)]
