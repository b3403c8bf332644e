"""``--profile N``: what torch.profiler sees of some steps, as a file that https://ui.perfetto.dev opens."""

import gzip
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from scalelong.train.errors import warn
from scalelong.train.write_whole import staged

STEPS_BEFORE = 3
"""Of a start, that are left out: they allocate and compile."""


@contextmanager
def tracing(path: Path, num_steps: int | None, device: torch.device) -> Iterator[Callable[[], None]]:
    """What is to be called after each step while entered. A trace that is there already is not written again.

    Where fewer steps follow than were asked for, the trace has those. A file that cannot be written is warned of.

    Args:
        path: of the trace, a .json.gz.
        num_steps: how many steps are traced; None: none are.
    """
    if num_steps is None or path.exists():
        yield lambda: None
        return

    def write(profiler: profile) -> None:
        try:
            with staged(path) as staging, tempfile.TemporaryDirectory() as folder:
                plain = Path(folder, "trace.json")
                profiler.export_chrome_trace(str(plain))
                with plain.open("rb") as source, gzip.open(staging, "wb", compresslevel=6) as packed:
                    shutil.copyfileobj(source, packed)
        except OSError as error:
            warn(f"cannot write {path}: {error.strerror}")

    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    # One step more to warm up the profiler itself.
    traced = schedule(wait=STEPS_BEFORE - 1, warmup=1, active=num_steps, repeat=1)
    with profile(activities=activities, schedule=traced, on_trace_ready=write) as profiler:
        yield profiler.step
