"""The cores of this host: how many each process of a run takes, how its threads wait there, and who else is at work.

Imports no torch: how threads wait is read from the environment when torch is loaded.
"""

import math
import os
import time
from collections.abc import Mapping, MutableMapping, Set
from pathlib import Path
from typing import NamedTuple

SPINS = 1000
"""How often a thread of libgomp looks again before it sleeps, at some 50 ns each; its own default is 300,000.

Measured by bench/bench_busy.py (docs/log.md, 2026-11-26)."""
QUOTA = Path("/sys/fs/cgroup/cpu.max")
STAT = Path("/proc/stat")
SHARE_TO_SAY = 0.4
"""Of the cores, which others must keep busy to be worth a line."""


def bound_spinning(environ: MutableMapping[str, str]) -> None:
    """Lets threads that wait for each other sleep after some microseconds; call it before torch is loaded.

    At the end of each parallel region torch's threads spin for some 15 ms by default. Where there are more threads than
    cores, each spins through the time slices that the one it waits for would need. What the user has set stays.
    """
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & environ.keys():
        environ["GOMP_SPINCOUNT"] = str(SPINS)


def cores_per_process(environ: Mapping[str, str] = os.environ) -> int:
    """Cores of this host for each of its processes."""
    cores = min(len(os.sched_getaffinity(0)), quota_of(QUOTA))
    for name in ("LOCAL_SIZE", "LOCAL_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS"):
        if processes := _count(environ, name):
            return max(1, cores // processes)
    # Slurm may bind a task to its cores, or to those of the whole job.
    return max(1, min(cores, _count(environ, "SLURM_CPUS_PER_TASK") or cores))


def _count(environ: Mapping[str, str], name: str) -> int | None:
    text = environ.get(name, "")
    return int(text) or None if text.isdecimal() else None


def quota_of(path: Path) -> int:
    """Cores' worth of time that a container may take, rounded up; a very large number without a limit."""
    try:
        quota, period = path.read_text().split()
        return max(1, math.ceil(int(quota) / int(period)))
    except (OSError, ValueError):  # "max" is no number
        return 1 << 30


def threads_are_given(environ: Mapping[str, str]) -> bool:
    """Whether the user has said how many threads to take: OMP_NUM_THREADS, unless torchrun has put its 1 there."""
    if "OMP_NUM_THREADS" not in environ:
        return False
    if "TORCHELASTIC_RUN_ID" not in environ or environ["OMP_NUM_THREADS"] != "1":
        return True
    try:
        given_to_torchrun = Path(f"/proc/{os.getppid()}/environ").read_bytes()
    except OSError:
        return False
    return any(variable.startswith(b"OMP_NUM_THREADS=") for variable in given_to_torchrun.split(b"\0"))


class Work(NamedTuple):
    """What has been done until a moment, in seconds."""

    moment: float
    by_all: float
    """By all processes on the cores that this one may use."""
    by_us: float
    """By this process and the children that it has waited for."""


def work_so_far() -> Work | None:
    """None where the system does not say."""
    try:
        by_all = busy_seconds(STAT.read_text(), os.sched_getaffinity(0))
    except (OSError, ValueError):
        return None
    return Work(time.monotonic(), by_all, sum(os.times()[:4]))


def busy_seconds(stat: str, cores: Set[int]) -> float:
    """What the kernel has counted on these cores but for idling and waiting, the hypervisor's other guests included."""
    ticks = 0
    for line in stat.splitlines():
        name, *counts = line.split()
        if name.startswith("cpu") and name[3:].isdigit() and int(name[3:]) in cores:
            user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, counts[:8])
            ticks += user + nice + system + irq + softirq + steal
    return ticks / os.sysconf("SC_CLK_TCK")


BEGINNING = work_so_far()
"""When this program began, as good as: the command that trains imports this first."""


def describe_others(seconds: float, by_all: float, by_us: float, cores: int) -> str | None:
    """A line if others are at work on many of the cores; None if they are not."""
    by_others = max(0.0, by_all - by_us) / seconds
    if seconds < 1 or by_others < SHARE_TO_SAY * cores:
        return None
    return f"others are at work on {by_others:.1f} of the {cores} cores: steps take longer than they would alone"
