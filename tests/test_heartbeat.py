"""Hosts that give no sign of life any more, in one process: threads that beat, or stop, over a real store."""

import threading
import time
from dataclasses import dataclass

import pytest
import torch
from torch.distributed import TCPStore

from scalelong.train.hosts import heartbeat
from scalelong.train.hosts.heartbeat import Heartbeat
from scalelong.train.hosts.processes import Processes

pytestmark = [pytest.mark.slow, pytest.mark.alone]

BEAT, LOST = 0.05, 0.5


@dataclass(frozen=True)
class FourRanks(Processes):
    """One of four ranks on two hosts."""

    hosts: tuple[str, ...] = ("nodea", "nodea", "nodeb", "nodeb")

    def gather(self, value: object) -> list[tuple[int, str]]:
        return [(rank % 2, host) for rank, host in enumerate(self.hosts)]


def rank_of_four(rank: int, **options) -> FourRanks:
    cpu = torch.device("cpu")
    return FourRanks(rank=rank, world_size=4, local_rank=rank % 2, device=cpu, control_group=None, **options)


@pytest.fixture
def store(monkeypatch) -> TCPStore:
    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setattr(
        heartbeat,
        "connect_to_store",
        lambda: TCPStore("127.0.0.1", server.port, is_master=False, wait_for_workers=False),
    )
    return server


@pytest.fixture
def losses() -> list[str]:
    return []


@pytest.fixture
def beat(store, losses):
    """Makes the heartbeat of a rank."""

    def make(rank: int, **options) -> Heartbeat:
        times = {"beat_seconds": BEAT, "lost_seconds": LOST, **options}
        return Heartbeat(
            rank_of_four(rank), on_loss=lambda host, seconds: losses.append(f"{rank} lost {host}"), **times
        )

    return make


def test_hosts_that_beat_are_not_lost(beat, losses):
    with beat(0), beat(2):
        time.sleep(3 * LOST)
    assert losses == []


def test_rank_0_notices_a_host_that_stops(beat, losses):
    with beat(0), beat(2, beat_seconds=3600.0):
        time.sleep(3 * LOST)
    assert losses == ["0 lost nodeb"]


def test_a_host_notices_that_rank_0_stops(beat, losses):
    with beat(0, beat_seconds=3600.0), beat(2):
        time.sleep(3 * LOST)
    assert losses == ["2 lost nodea"]


def test_a_store_that_does_not_answer_is_a_host_that_is_lost(beat, losses, monkeypatch):
    class Silent:
        def add(self, key: str, amount: int) -> int:
            threading.Event().wait()
            raise AssertionError

    monkeypatch.setattr(heartbeat, "connect_to_store", Silent)
    with beat(2):
        time.sleep(3 * LOST)
    assert losses == ["2 lost nodea"]


def test_after_the_end_nobody_is_lost(beat, losses):
    with beat(0, beat_seconds=3600.0):
        with beat(2):
            time.sleep(LOST / 2)
        time.sleep(2 * LOST)
    assert losses == []


def test_a_process_that_stood_still_itself_blames_nobody(beat, losses, monkeypatch):
    """As when a laptop slept, or one call held the interpreter for long."""
    with beat(0) as own, beat(2):
        time.sleep(4 * BEAT)
        jump = 100 * LOST
        clock = time.monotonic
        monkeypatch.setattr(heartbeat.time, "monotonic", lambda: clock() + jump)
        time.sleep(10 * BEAT)
        assert own.watched == {2: "nodeb"}
    assert losses == []


@pytest.mark.parametrize("rank", [1, 3])
def test_other_processes_of_a_host_leave_it_to_their_launcher(beat, rank):
    assert beat(rank).watched == {}


def test_one_host_has_nobody_to_watch():
    assert Heartbeat(rank_of_four(0, hosts=("nodea", "nodea"))).watched == {}


def test_the_end_is_told_in_one_line(capfd, monkeypatch):
    codes = []
    monkeypatch.setattr(heartbeat.os, "_exit", codes.append)
    heartbeat.end_process("nodeb", 41.2)
    assert codes == [2]
    told = capfd.readouterr().err
    assert told.startswith("error: no sign of life from nodeb for 41 s")
    assert told.count("\n") == 1
