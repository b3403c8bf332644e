"""The processes of a run: who we are, on which device, and how ranks agree.

Works under the deepspeed launcher, torchrun, srun, mpirun and Kubernetes (environment.py), and alone.
"""

import logging
import os
import re
import socket
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist

from scalelong.train.errors import RankError, UserError, speak_as
from scalelong.train.hosts.cores import BEGINNING, cores_per_process, describe_others, threads_are_given, work_so_far
from scalelong.train.hosts.environment import Place, find_place
from scalelong.train.hosts.meeting import meet

T = TypeVar("T")
LOST_CONNECTION = re.compile(
    r"connection (closed|reset|refused)|broken pipe|socket closed|remote (process|peer)|timed? ?out|unhandled system"
    r"|no route to host|network is unreachable|failed to (recv|send)|connect\w* .*fail|heartbeat",
    re.IGNORECASE,
)
"""How gloo, NCCL and torch's store speak of a process that has gone; they raise one kind of error for everything."""


@dataclass(frozen=True)
class Processes:
    """This process among the others of the run."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device
    control_group: Any
    """A gloo group, so that ranks can agree without waiting for their GPUs."""

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank; every rank gets the same answer."""
        if self.world_size == 1:
            return flag
        flags = torch.tensor([int(flag)])
        dist.all_reduce(flags, op=dist.ReduceOp.MAX, group=self.control_group)
        return bool(flags.item())

    def gather(self, value: Any) -> list[Any]:
        """The value of every rank, in order of rank, on every rank."""
        if self.world_size == 1:
            return [value]
        values = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.control_group)
        return values

    def from_main(self, value: Any) -> Any:
        """Rank 0's value, on every rank."""
        return self.gather(value)[0]

    def on_main(self, action: Callable[[], T]) -> T:
        """Runs an action on rank 0 alone; every rank gets its result.

        Raises:
            UserError: what rank 0 met, on every rank.
        """
        result = self.agree(lambda: action() if self.is_main else None)
        return cast(T, self.from_main(result))

    def agree(self, action: Callable[[], T]) -> T:
        """Runs an action on every rank; an error that any of them meets is raised on all, so that none waits.

        Raises:
            UserError: the first rank's.
        """
        result, problem = None, None
        try:
            result = action()
        except UserError as error:
            problem = str(error)
        problems = [p for p in self.gather(problem) if p is not None]
        if problems:
            raise UserError(problems[0])
        return cast(T, result)


@contextmanager
def subnormals_flushed() -> Iterator[None]:
    """Within it, and in threads that begin within it, a CPU takes numbers below 1.2e-38 (of fp32) for zero.

    It takes ten times as long over each of them, and a network whose features die is full of them.
    """
    were_flushed = float(torch.tensor(1e-30) * 1e-10) == 0.0
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(were_flushed)


@contextmanager
def same_bits_each_time(wanted: bool) -> Iterator[None]:
    """If ``wanted``, PyTorch takes deterministic algorithms on a GPU within it, and warns where it has none."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    options: Any = torch.utils.deterministic
    filled = options.fill_uninitialized_memory
    if wanted:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it when it first computes
        torch.use_deterministic_algorithms(True, warn_only=True)
        options.fill_uninitialized_memory = False  # nothing here reads what it has not written
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        options.fill_uninitialized_memory = filled


def join_processes() -> Processes:
    """Sets up DeepSpeed's communication, if that has not been done, and returns who we are."""
    place = find_place(os.environ)
    speak_as(place.rank)
    # DeepSpeed reads them too; without it looks for mpi4py and fails.
    os.environ.update(place.variables())
    on_gpu = torch.cuda.is_available()
    if not on_gpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        if not threads_are_given(os.environ):
            torch.set_num_threads(cores_per_process())
    # DeepSpeed 0.19.8 calls functions that torch 2.13 has renamed.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")

    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    if not on_gpu:
        # Its shared-memory collectives are compiled on first use: that needs a compiler, takes half a minute,
        # and hangs behind a stale lock for ever if the build was once killed. Gloo serves.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if not dist.is_initialized():
        join_group(place, "nccl" if on_gpu else "gloo")
    if on_gpu and place.local_rank >= torch.cuda.device_count():
        raise RankError(f"LOCAL_RANK={place.local_rank}, but this process sees {torch.cuda.device_count()} GPUs")
    device = torch.device("cuda", place.local_rank) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    return Processes(
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        local_rank=place.local_rank,
        device=device,
        control_group=dist.new_group(backend="gloo") if on_gpu else dist.group.WORLD,
    )


def join_if_several() -> Processes:
    """The processes that a launcher has started for a command together; this one alone if none has, without a group.

    Raises:
        UserError: an environment that says it in part, or in contradictions.
    """
    if find_place(os.environ).world_size > 1:
        return join_processes()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return Processes(rank=0, world_size=1, local_rank=0, device=device, control_group=None)


@contextmanager
def working_together() -> Iterator[Processes]:
    """``join_if_several`` for the work of a command, which all processes leave at its end.

    Raises:
        UserError: as ``join_if_several`` does, or a connection that was lost during the work, in one line.
    """
    processes = join_if_several()
    try:
        yield processes
    except RuntimeError as error:
        told = to_user_error(error)
        if told is None:
            raise
        raise told from None
    if processes.world_size > 1:
        leave_processes()


def others_at_work(processes: Processes) -> str | None:
    """A line on the main process if programs other than this run keep many cores of its host busy."""
    now = work_so_far()
    works = processes.gather((socket.gethostname(), now.by_us if now is not None else 0.0))
    if now is None or BEGINNING is None or not processes.is_main:
        return None
    ours = sum(seconds for host, seconds in works if host == works[0][0])
    cores = len(os.sched_getaffinity(0))
    return describe_others(now.moment - BEGINNING.moment, now.by_all - BEGINNING.by_all, ours - BEGINNING.by_us, cores)


def join_group(place: Place, backend: str) -> None:
    """Meets the other ranks and makes the process group of all, which DeepSpeed then takes as its own."""
    import deepspeed

    store = dist.HashStore() if place.world_size == 1 else meet(place)
    dist.init_process_group(backend, store=store, rank=place.rank, world_size=place.world_size)
    deepspeed.init_distributed(dist_backend=backend, verbose=False)


def to_user_error(error: RuntimeError) -> UserError | None:
    """An error of torch.distributed in one line, by its cause; None for others. Gloo says so in words alone."""
    text = str(error).strip()
    if not isinstance(error, dist.DistError) and "gloo" not in text:
        return None
    cause = text.splitlines()[0] if text else type(error).__name__
    if LOST_CONNECTION.search(text):
        return RankError(f"lost contact with another process of the run: it, or its machine, has died ({cause})")
    return RankError(f"the processes of the run cannot work together: {cause}")


def leave_processes() -> None:
    """At the end of the program: DeepSpeed cannot be set up a second time in one process."""
    if dist.is_initialized():
        dist.destroy_process_group()
