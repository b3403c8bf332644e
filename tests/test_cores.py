"""The cores of a host: threads for each process, how they wait, and who else is at work."""

import os
from pathlib import Path

import pytest
import torch

pytest.importorskip("deepspeed")

from programs import start_own_process
from running import rank_variables, run_on_ranks

from scalelong.train.hosts import cores, processes
from scalelong.train.hosts.cores import (
    Work,
    bound_spinning,
    busy_seconds,
    cores_per_process,
    describe_others,
    quota_of,
    threads_are_given,
)
from scalelong.train.hosts.processes import Processes

STAT = """\
cpu  600 0 0 400 0 0 0 0 0 0
cpu0 100 20 30 400 50 6 7 8 9 9
cpu1 300 0 0 0 0 0 0 0 0 0
cpu11 1 0 0 0 0 0 0 0 0 0
intr 1 2 3
"""
TICK = 1 / os.sysconf("SC_CLK_TCK")
AT_TORCH = """
import os, runpy, sys
class Watch:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name == "torch":
            print("torch finds", os.environ.get("GOMP_SPINCOUNT"), flush=True)
            sys.exit(0)
sys.meta_path.insert(0, Watch)
sys.argv = ["train", "digits-uvit"]
runpy.run_module("scalelong.train", run_name="__main__")
"""
NUM_THREADS = """
import torch
from scalelong.train.hosts.processes import join_processes, leave_processes
join_processes()
print(torch.get_num_threads())
leave_processes()
"""


@pytest.mark.parametrize("given", [{}, {"OMP_WAIT_POLICY": "active"}, {"GOMP_SPINCOUNT": "7"}])
def test_spinning_is_bounded_unless_the_user_has_said_how_to_wait(given):
    environ = dict(given)
    bound_spinning(environ)
    assert environ == (given or {"GOMP_SPINCOUNT": str(cores.SPINS)})


def test_it_is_bounded_before_torch_is_loaded():
    program = start_own_process("-c", AT_TORCH)
    out, err = program.communicate(timeout=60)
    assert out == f"torch finds {cores.SPINS}\n", err


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, 8),
        ({"LOCAL_SIZE": "2"}, 4),
        ({"LOCAL_WORLD_SIZE": "16"}, 1),
        ({"OMPI_COMM_WORLD_LOCAL_SIZE": "4"}, 2),
        ({"MPI_LOCALNRANKS": "2"}, 4),
        ({"SLURM_CPUS_PER_TASK": "3"}, 3),
        ({"SLURM_CPUS_PER_TASK": "64"}, 8),
        ({"SLURM_CPUS_PER_TASK": "many", "MPI_LOCALNRANKS": "0"}, 8),
    ],
)
def test_cores_are_shared_among_the_processes_of_a_host(monkeypatch, environ, expected):
    monkeypatch.setattr(cores.os, "sched_getaffinity", lambda pid: set(range(8)))
    monkeypatch.setattr(cores, "quota_of", lambda path: 1 << 30)
    assert cores_per_process(environ) == expected


@pytest.mark.parametrize(
    ("text", "expected"), [("max 100000\n", 1 << 30), ("150000 100000\n", 2), ("1000 100000\n", 1), ("", 1 << 30)]
)
def test_the_limit_of_a_container_counts(tmp_path, monkeypatch, text, expected):
    (tmp_path / "cpu.max").write_text(text)
    assert quota_of(tmp_path / "cpu.max") == expected
    assert quota_of(tmp_path / "none") == 1 << 30
    monkeypatch.setattr(cores, "QUOTA", tmp_path / "cpu.max")
    assert cores_per_process({}) == min(expected, len(os.sched_getaffinity(0)))


def test_threads_are_the_users_unless_torchrun_has_put_them_there(monkeypatch):
    assert not threads_are_given({})
    assert threads_are_given({"OMP_NUM_THREADS": "1"})
    started = {"TORCHELASTIC_RUN_ID": "none", "OMP_NUM_THREADS": "1"}
    assert threads_are_given({**started, "OMP_NUM_THREADS": "3"})
    for environ_of_torchrun, expected in ((b"A=1\0OMP_NUM_THREADS=1\0", True), (b"A=1\0", False)):
        monkeypatch.setattr(Path, "read_bytes", lambda path, environ=environ_of_torchrun: environ)
        assert threads_are_given(started) is expected


@pytest.mark.slow
def test_several_processes_take_the_threads_that_the_user_has_set(monkeypatch):
    variables = [{**rank, "OMP_NUM_THREADS": 3} for rank in rank_variables(2)]
    monkeypatch.setattr("running.rank_variables", lambda num_ranks: variables)
    assert run_on_ranks(2, "-c", NUM_THREADS) == ["3\n", "3\n"]


def test_what_the_kernel_counts_on_our_cores_is_work_but_for_idling_and_waiting():
    assert busy_seconds(STAT, {0}) == pytest.approx(171 * TICK)
    assert busy_seconds(STAT, {1}) == pytest.approx(300 * TICK)
    assert busy_seconds(STAT, {0, 1, 11}) == pytest.approx(472 * TICK)


@pytest.mark.parametrize(
    ("by_all", "by_us", "shown"),
    [(20.0, 4.0, "1.6 of the 2 cores"), (20.0, 13.0, None), (4.0, 4.5, None)],
)
def test_others_are_told_of_if_they_keep_many_cores_busy(by_all, by_us, shown):
    line = describe_others(10.0, by_all, by_us, 2)
    assert (line is None) == (shown is None)
    assert shown is None or shown in str(line)


def test_ranks_of_the_run_are_no_others(monkeypatch):
    alone = Processes(rank=0, world_size=1, local_rank=0, device=torch.device("cpu"), control_group=None)
    num_cores = len(os.sched_getaffinity(0))
    monkeypatch.setattr(processes, "BEGINNING", Work(0.0, 0.0, 0.0))
    monkeypatch.setattr(processes, "work_so_far", lambda: Work(10.0, 10.0 * num_cores, 0.5))
    assert "others are at work" in str(processes.others_at_work(alone))
    host = processes.socket.gethostname()
    monkeypatch.setattr(Processes, "gather", lambda self, value: [value, (host, 9.5 * num_cores)])
    assert processes.others_at_work(alone) is None
    monkeypatch.setattr(Processes, "gather", lambda self, value: [value, ("another host", 9.5 * num_cores)])
    assert "others are at work" in str(processes.others_at_work(alone))
