"""How the tests run the trainer: a network small enough for seconds, on a few images, as a command or in-process."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

from scalelong.train.config import TrainConfig
from scalelong.train.presets import PRESETS
from scalelong.train.processes import RANK_VARIABLES

SMALL = [
    *("--model.width", "32"),
    *("--model.depth", "2"),
    *("--images-per-step", "32"),
    *("--optimizer.warmup-images", "64"),
    *("--sample.num-images", "10"),
    *("--sample.steps", "3"),
]


def small_config(run: Path, **changes) -> TrainConfig:
    """What the flags in SMALL make of the embedded default."""
    base = PRESETS["digits-uvit"]
    small = replace(
        base,
        run=run,
        images_per_step=32,
        model=replace(base.model, width=32, depth=2),
        optimizer=replace(base.optimizer, warmup_images=64),
        sample=replace(base.sample, num_images=10, steps=3),
    )
    return replace(small, **changes)


def environment() -> dict[str, str]:
    source = str(Path(__file__).parent.parent / "src")
    path = os.pathsep.join(p for p in (source, os.environ.get("PYTHONPATH")) if p)
    # A run in this process has left its rank and port behind.
    inherited = {name: value for name, value in os.environ.items() if name not in RANK_VARIABLES}
    return {**inherited, "PYTHONPATH": path, "COLUMNS": "80"}


def command(*arguments: object, module: str = "scalelong.train") -> list[str]:
    return [sys.executable, "-m", module, *map(str, arguments)]


def run_command(
    *arguments: object, module: str = "scalelong.train", timeout: float = 120, **options
) -> subprocess.CompletedProcess[str]:
    line = command(*arguments, module=module)
    return subprocess.run(line, env=environment(), capture_output=True, text=True, timeout=timeout, **options)


def launch(num_processes: int, *arguments: object, port: int, timeout: float = 180) -> subprocess.CompletedProcess[str]:
    """The same command under the deepspeed launcher."""
    line = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_accelerators", str(num_processes)]
    line += ["--master_port", str(port), "--module", "scalelong.train", *map(str, arguments)]
    return subprocess.run(
        line, env={**environment(), "DS_ACCELERATOR": "cpu"}, capture_output=True, text=True, timeout=timeout
    )


def log_rows(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def losses(run: Path) -> list[float]:
    return [row["loss"] for row in log_rows(run)]


def run_on_ranks(num_ranks: int, script: str, *arguments: object, port: int, timeout: float = 180) -> list[str]:
    """A script of this folder on several ranks of this machine, without a launcher: what each has printed."""
    line = [sys.executable, str(Path(__file__).with_name(script)), *map(str, arguments)]
    ranks = []
    for rank in range(num_ranks):
        variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": num_ranks, "LOCAL_SIZE": num_ranks}
        variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": 1}
        env = {**environment(), **{name: str(value) for name, value in variables.items()}}
        ranks.append(subprocess.Popen(line, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
    try:
        outputs = [rank.communicate(timeout=timeout) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert all(rank.returncode == 0 for rank in ranks), "\n".join(out + err for out, err in outputs)
    return [out for out, _ in outputs]
