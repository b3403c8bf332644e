"""Which process of a run this is, by what launchers put into the environment. Without an import of torch.

The deepspeed launcher and torchrun set five variables, Kubernetes operators four of them; srun and mpirun have names of
their own, and say neither an address nor a port.
"""

import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from scalelong.train.errors import RankError

RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
LARGEST = {"MASTER_PORT": 2**16 - 1}
SMALLEST = {"WORLD_SIZE": 1, "LOCAL_SIZE": 1, "LOCAL_WORLD_SIZE": 1, "MASTER_PORT": 1}
USUAL_PORT = 29500
"""torch's own, where nothing tells two runs apart."""
FIRST_PORT, NUM_PORTS = 20_000, 10_000
"""Below those that systems give out; one of these is drawn by the number of a job."""


@dataclass(frozen=True)
class Launcher:
    """The names that a launcher has for rank, world size, rank on the host, processes on it, and its job."""

    name: str
    rank: str
    world_size: tuple[str, ...]
    local_rank: str
    local_size: str
    job: tuple[str, ...]


LAUNCHERS = (
    # Before Slurm: inside its jobs mpirun starts one helper on each host through srun, whose names are inherited.
    Launcher(
        "mpirun",
        "OMPI_COMM_WORLD_RANK",
        ("OMPI_COMM_WORLD_SIZE",),
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
        ("PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid"),
    ),
    Launcher("mpirun", "PMI_RANK", ("PMI_SIZE",), "MPI_LOCALRANKID", "MPI_LOCALNRANKS", ("HYDRA_JOBID", "PMI_ID")),
    Launcher(
        "srun",
        "SLURM_PROCID",
        ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS", "SLURM_NPROCS"),
        "SLURM_LOCALID",
        "",
        ("SLURM_JOB_ID", "SLURM_JOBID"),
    ),
)


@dataclass(frozen=True)
class Place:
    """Of this process among those of its run."""

    rank: int
    world_size: int
    local_rank: int
    master_addr: str
    master_port: int | None
    """None: a free one, for a process alone."""

    def variables(self) -> dict[str, str]:
        """As torch and DeepSpeed read them."""
        values = (self.rank, self.world_size, self.local_rank, self.master_addr, self.master_port or USUAL_PORT)
        return dict(zip(RANK_VARIABLES, map(str, values), strict=True))


def find_place(environ: Mapping[str, str]) -> Place:
    """What the environment says: torch's five variables, completed from a launcher's; nothing of either is alone.

    Raises:
        UserError: a value that cannot be, or something that is missing and that nothing tells.
    """
    given = {name: _value(environ, name) for name in RANK_VARIABLES if name in environ}
    for name in ("LOCAL_SIZE", "LOCAL_WORLD_SIZE"):
        if name in environ:
            _number(environ, name)
    told = {} if len(given) == len(RANK_VARIABLES) else _of_launcher(environ)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        if name in given and name in told and given[name] != told[name]:
            raise RankError(f"the environment has {name}={given[name]}, but {told['launcher']} says {told[name]}")
    values: dict[str, Any] = {**told, **given}
    if not values or values.get("WORLD_SIZE") == 1:
        # The numbers of one process are known; where others would find it does not matter.
        values = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "MASTER_ADDR": "127.0.0.1", **values}
    elif {"RANK", "WORLD_SIZE", "MASTER_ADDR"} <= values.keys():
        # As operators of Kubernetes leave it, with one process in each pod.
        values = {"LOCAL_RANK": 0, "MASTER_PORT": USUAL_PORT, **values}
    missing = [name for name in RANK_VARIABLES[:4] if name not in values]
    if missing:
        origin = told.get("launcher") or "the environment"
        known = ", ".join(f"{name}={values[name]}" for name in RANK_VARIABLES if name in values)
        raise RankError(f"{origin} says {known}, but nothing says {', '.join(missing)}: set them, or start one process")
    if values["RANK"] >= values["WORLD_SIZE"]:
        raise RankError(f"RANK={values['RANK']} must be below WORLD_SIZE={values['WORLD_SIZE']}")
    if values["LOCAL_RANK"] > values["RANK"]:
        raise RankError(f"LOCAL_RANK={values['LOCAL_RANK']} must not be above RANK={values['RANK']}")
    return Place(
        rank=values["RANK"],
        world_size=values["WORLD_SIZE"],
        local_rank=values["LOCAL_RANK"],
        master_addr=values["MASTER_ADDR"],
        master_port=values.get("MASTER_PORT"),
    )


def _of_launcher(environ: Mapping[str, str]) -> dict[str, Any]:
    """The same variables as srun or mpirun gives them; none where neither has started this process."""
    for launcher in LAUNCHERS:
        world_size = next((name for name in launcher.world_size if name in environ), None)
        if launcher.rank not in environ or world_size is None:
            continue
        if launcher.name == "srun" and environ.get("ENVIRONMENT") == "BATCH" and "SLURM_STEP_ID" not in environ:
            return {}  # the script of a job itself, which srun has not started
        told: dict[str, Any] = {"launcher": launcher.name}
        told["RANK"], told["WORLD_SIZE"] = _number(environ, launcher.rank), _number(environ, world_size)
        local_rank = launcher.local_rank if launcher.local_rank in environ else "SLURM_LOCALID"
        if local_rank in environ:
            told["LOCAL_RANK"] = _number(environ, local_rank)
        if told["WORLD_SIZE"] > 1:
            told |= _address(environ, launcher, told["WORLD_SIZE"])
        return told
    return {}


def _address(environ: Mapping[str, str], launcher: Launcher, world_size: int) -> dict[str, Any]:
    """Where rank 0 is, if the launcher tells, and a port that another job will hardly have."""
    job = next((environ[name] for name in launcher.job if environ.get(name)), None)
    step = environ.get("SLURM_STEP_ID", "")
    port = USUAL_PORT if job is None else FIRST_PORT + zlib.crc32(f"{job}.{step}".encode()) % NUM_PORTS
    nodes = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST") or environ.get("SLURM_NODELIST")
    if launcher.local_size in environ and _number(environ, launcher.local_size) == world_size:
        return {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return {"MASTER_PORT": port, **({"MASTER_ADDR": first_host(nodes)} if nodes else {})}


def first_host(nodes: str) -> str:
    """The first of Slurm's list of hosts: ``a[03-05,9]-ib,b7`` begins with ``a03-ib``."""
    match = re.match(r"(?:[^,\[\]]|\[[^\]]*\])+", nodes)
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", match[0] if match else nodes)


def _value(environ: Mapping[str, str], name: str) -> int | str:
    if name != "MASTER_ADDR":
        return _number(environ, name)
    if not environ[name].strip():
        raise RankError(f"{name} is set in the environment, but empty")
    return environ[name].strip()


def _number(environ: Mapping[str, str], name: str) -> int:
    text, smallest, largest = environ[name].strip(), SMALLEST.get(name, 0), LARGEST.get(name, 2**31 - 1)
    if not re.fullmatch(r"[0-9]{1,10}", text) or not smallest <= int(text) <= largest:
        bounds = f"{smallest} to {largest}" if name in LARGEST else f"{smallest} or above"
        raise RankError(f"{name}={environ[name]!r} in the environment: expected a whole number, {bounds}")
    return int(text)
