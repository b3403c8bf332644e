"""The processes of a run: who we are, on which device, and how ranks agree.

Works under the deepspeed launcher, torchrun or srun (they set the variables) and without any (one process).
"""

import logging
import os
import socket
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist

from scalelong.train.errors import UserError

T = TypeVar("T")
RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


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


def cores_per_process() -> int:
    """Cores of this host for each of its processes."""
    cores = len(os.sched_getaffinity(0))
    return max(1, cores // int(os.environ.get("LOCAL_SIZE", os.environ.get("LOCAL_WORLD_SIZE", "1"))))


def join_processes() -> Processes:
    """Sets up DeepSpeed's communication, if that has not been done, and returns who we are."""
    if not all(name in os.environ for name in RANK_VARIABLES):
        # Without these DeepSpeed looks for mpi4py and fails.
        alone = ("0", "1", "0", "127.0.0.1", str(_free_port()))
        for name, value in zip(RANK_VARIABLES, alone, strict=True):
            os.environ[name] = value
    on_gpu = torch.cuda.is_available()
    if not on_gpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        if "OMP_NUM_THREADS" not in os.environ or int(os.environ["WORLD_SIZE"]) > 1:
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
        deepspeed.init_distributed(dist_backend="nccl" if on_gpu else "gloo", verbose=False)
    local_rank = int(os.environ["LOCAL_RANK"])
    device = torch.device("cuda", local_rank) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    return Processes(
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        local_rank=local_rank,
        device=device,
        control_group=dist.new_group(backend="gloo") if on_gpu else dist.group.WORLD,
    )


def has_lost_contact(error: RuntimeError) -> bool:
    """Whether a collective failed because another process has gone; gloo says so in words alone."""
    return isinstance(error, dist.DistError) or "gloo/transport" in str(error)


def leave_processes() -> None:
    """At the end of the program: DeepSpeed cannot be set up a second time in one process."""
    if dist.is_initialized():
        dist.destroy_process_group()


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]
