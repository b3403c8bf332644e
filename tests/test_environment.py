"""What launchers put into the environment: who a process is, and what is refused in one line."""

import re
import socket

import pytest
import torch
import torch.distributed as dist

pytest.importorskip("deepspeed")

from programs import start_python
from running import SMALL, free_port, small_config

from scalelong.train.errors import UserError
from scalelong.train.hosts.environment import Place, find_place, first_host
from scalelong.train.hosts.processes import to_user_error
from scalelong.train.loop import train

SLURM = {
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "5",
    "SLURM_NTASKS": "8",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
}
OPEN_MPI = {
    "PMIX_NAMESPACE": "prterun-a-1@1",
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}
MPICH = {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}
KUBERNETES = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "job-master-0", "MASTER_PORT": "23456"}
TORCHRUN = {**KUBERNETES, "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}


def numbers(place: Place) -> tuple[int, int, int, str]:
    return place.rank, place.world_size, place.local_rank, place.master_addr


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, (0, 1, 0, "127.0.0.1")),
        (TORCHRUN, (1, 2, 1, "job-master-0")),
        ({**SLURM, **TORCHRUN}, (1, 2, 1, "job-master-0")),
        (KUBERNETES, (1, 2, 0, "job-master-0")),
        (SLURM, (5, 8, 1, "gpu07")),
        ({**SLURM, "MASTER_ADDR": "10.0.0.1"}, (5, 8, 1, "10.0.0.1")),
        ({**SLURM, "PMI_RANK": "5", "PMI_SIZE": "8"}, (5, 8, 1, "gpu07")),
        (OPEN_MPI, (1, 2, 1, "127.0.0.1")),
        ({**SLURM, **OPEN_MPI, "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"}, (1, 2, 1, "127.0.0.1")),
        (MPICH, (1, 2, 1, "127.0.0.1")),
        ({**MPICH, "MPI_LOCALNRANKS": "1", "MPI_LOCALRANKID": "0", "MASTER_ADDR": "a"}, (1, 2, 0, "a")),
        ({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "8"}, (0, 1, 0, "127.0.0.1")),  # salloc's shell
        (
            {"ENVIRONMENT": "BATCH", "SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_LOCALID": "0"},
            (0, 1, 0, "127.0.0.1"),
        ),
        ({"WORLD_SIZE": "1"}, (0, 1, 0, "127.0.0.1")),
        ({"RANK": "0", "WORLD_SIZE": "1"}, (0, 1, 0, "127.0.0.1")),
    ],
)
def test_who_a_process_is(environ, expected):
    assert numbers(find_place(environ)) == expected


def test_ranks_of_a_job_have_one_port_and_steps_of_it_others():
    ports = [find_place({**SLURM, "SLURM_PROCID": str(rank)}).master_port for rank in (1, 5, 7)]
    assert len(set(ports)) == 1
    assert find_place({**SLURM, "SLURM_STEP_ID": "1"}).master_port not in ports
    assert find_place({**SLURM, "MASTER_PORT": "1234"}).master_port == 1234


@pytest.mark.parametrize(
    ("environ", "words"),
    [
        ({"RANK": "1"}, ["RANK=1", "WORLD_SIZE", "MASTER_ADDR"]),
        ({"MASTER_ADDR": "a", "MASTER_PORT": "1"}, ["MASTER_ADDR=a", "RANK", "WORLD_SIZE"]),
        ({"RANK": "0", "WORLD_SIZE": "2"}, ["MASTER_ADDR"]),
        ({**TORCHRUN, "RANK": "2"}, ["RANK=2", "WORLD_SIZE=2"]),
        ({**TORCHRUN, "LOCAL_RANK": "2"}, ["LOCAL_RANK=2"]),
        ({**TORCHRUN, "RANK": ""}, ["RANK=''"]),
        ({**TORCHRUN, "RANK": "-1"}, ["RANK='-1'"]),
        ({**TORCHRUN, "WORLD_SIZE": "0"}, ["WORLD_SIZE='0'"]),
        ({**TORCHRUN, "WORLD_SIZE": "two"}, ["WORLD_SIZE='two'"]),
        ({**TORCHRUN, "MASTER_PORT": "70000"}, ["MASTER_PORT", "65535"]),
        ({**TORCHRUN, "MASTER_ADDR": " "}, ["MASTER_ADDR", "empty"]),
        ({**TORCHRUN, "LOCAL_WORLD_SIZE": "0"}, ["LOCAL_WORLD_SIZE"]),
        ({**SLURM, "WORLD_SIZE": "4"}, ["WORLD_SIZE=4", "srun says 8"]),
        ({**SLURM, "SLURM_PROCID": ""}, ["SLURM_PROCID"]),
        ({**OPEN_MPI, "OMPI_COMM_WORLD_LOCAL_SIZE": "1"}, ["mpirun", "MASTER_ADDR"]),
    ],
)
def test_what_cannot_be_is_one_line(environ, words):
    with pytest.raises(UserError) as caught:
        find_place(environ)
    assert all(word in str(caught.value) for word in words)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("nodes", "host"),
    [("node1", "node1"), ("a,b", "a"), ("a[03-05,9]-ib,b7", "a03-ib"), ("r[1-2]n[3,5]", "r1n3"), ("x-[10,12]", "x-10")],
)
def test_the_first_host_of_a_list(nodes, host):
    assert first_host(nodes) == host


def test_a_rank_in_the_environment_mutes_no_command(tmp_path):
    lines = [
        ["scalelong", "export", tmp_path / "none", "--out", tmp_path / "out"],
        ["scalelong", "train", "digits-uvit", "--run", tmp_path / "run"],
    ]
    for module, *arguments in lines:
        program = start_python("-m", module, *arguments, variables={"RANK": 1})
        _, err = program.communicate(timeout=60)
        assert program.returncode == 2
        assert err.startswith("error: ")
        assert len(err.splitlines()) == 1


MEETING = """
import sys
from scalelong.train.errors import run_command
from scalelong.train.hosts import meeting
from scalelong.train.hosts.environment import Place
meeting.SECONDS_TO_SAY, meeting.SECONDS_TO_MEET = 0.2, float(sys.argv[4])
rank, world_size, port = map(int, sys.argv[1:4])
run_command(lambda: print(meeting.meet(Place(rank, world_size, 0, "127.0.0.1", port)) is not None))
"""


def test_it_is_said_for_whom_rank_0_waits_and_who_never_came():
    port = free_port()
    program = start_python("-c", MEETING, 0, 3, port, 2)
    other = start_python("-c", MEETING, 1, 3, port, 60)
    try:
        _, err = program.communicate(timeout=30)
    finally:
        other.kill()
    assert f"waiting for 1 of 3 ranks (2) at 127.0.0.1:{port}" in err
    assert "error: 1 of 3 ranks (2)" in err
    assert program.returncode == 2


def test_a_port_in_use_is_named_as_such():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        program = start_python("-c", MEETING, 0, 2, port, 2)
        _, err = program.communicate(timeout=30)
    assert err.startswith(f"error: port {port} of")
    assert "in use" in err


def is_flushed() -> bool:
    """Of a product and of a gradient."""
    small = torch.full((4096, 64), 1e-30, requires_grad=True)
    (small * 1e-10).sum().backward(torch.tensor(1e-30))
    assert small.grad is not None
    return float((small * 1e-10).max()) == 0.0 == float(small.grad.max())


@pytest.mark.parametrize("before", [False, True])
def test_subnormal_numbers_are_flushed_while_a_network_trains_and_as_before_behind_it(tmp_path, monkeypatch, before):
    """They take a CPU ten times as long, and a network whose features die is full of them."""
    found = []
    monkeypatch.setattr("scalelong.train.loop.join_processes", lambda: found.append(is_flushed()) or 1 / 0)
    torch.set_flush_denormal(before)
    try:
        with pytest.raises(ZeroDivisionError):
            train(small_config(tmp_path / "run"))
        assert found == [True]
        assert is_flushed() is before
    finally:
        torch.set_flush_denormal(False)


@pytest.mark.slow
def test_tasks_of_srun_train_together(tmp_path):
    shared = {"SLURM_JOB_ID": free_port(), "SLURM_STEP_ID": 0, "SLURM_STEP_NUM_TASKS": 2, "OMP_NUM_THREADS": 1}
    shared |= {"SLURM_STEP_NODELIST": "localhost"}
    line = ["-m", "scalelong.train", "digits-uvit", *SMALL, "--run", tmp_path / "run", "--total-images", 64]
    tasks = [
        start_python(*line, variables={**shared, "SLURM_PROCID": rank, "SLURM_LOCALID": rank}) for rank in range(2)
    ]
    outputs = [task.communicate(timeout=100) for task in tasks]
    assert [task.returncode for task in tasks] == [0, 0], outputs
    assert "2 x cpu" in outputs[0][0]
    assert outputs[1][0] == ""


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (dist.DistNetworkError("Connection reset by peer\nmore"), "lost contact .*(Connection reset by peer)"),
        (
            RuntimeError("[/pytorch/third_party/gloo/transport/tcp/pair.cc:547] Connection closed by peer"),
            "lost contact",
        ),
        (
            dist.DistNetworkError("The server socket has failed to listen: EADDRINUSE\nmore"),
            "^the processes .*EADDRINUSE$",
        ),
        (dist.DistBackendError("Duplicate GPU detected\nmore"), "^the processes .*Duplicate GPU detected$"),
    ],
)
def test_an_error_between_ranks_is_told_by_its_cause(error, words):
    told = str(to_user_error(error))
    assert re.search(words, told)
    assert "\n" not in told
    assert to_user_error(RuntimeError("mat1 and mat2 shapes cannot be multiplied")) is None
