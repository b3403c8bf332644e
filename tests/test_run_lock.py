"""Two starts in one run folder: one trains, the other says so in one line; a dead one is in nobody's way."""

import errno
import fcntl
import os
import re
import time
from dataclasses import replace
from typing import Any

import pytest

pytest.importorskip("deepspeed")

from programs import start_python
from running import SMALL, log_rows, rank_variables, small_config

from scalelong.train.checks import OF_ONE_HOST, check_same_data, values_of
from scalelong.train.errors import UserError
from scalelong.train.run_folder import config_path
from scalelong.train.run_lock import RunLock


def ended(programs: list[Any], seconds: float = 60) -> list[Any]:
    deadline = time.monotonic() + seconds
    while not any(program.poll() is not None for program in programs):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return [program for program in programs if program.poll() is not None]


@pytest.mark.slow
def test_of_two_starts_at_once_one_trains_and_a_dead_one_is_in_nobodys_way(tmp_path):
    run = tmp_path / "run"
    line = ["-m", "scalelong.train", "digits-uvit", *SMALL, "--run", run, "--images-per-log", 32, "--total-images"]
    starts = [start_python(*line, 10**7) for _ in range(2)]
    try:
        (second,) = ended(starts)
        (first,) = [start for start in starts if start is not second]
        out, err = second.communicate()
        assert second.returncode == 2
        assert out == ""
        assert re.fullmatch(rf"error: {re.escape(str(run))} .*(in use|just been made).*\n", err)
        third = start_python(*line, 10**7)
        _, err = third.communicate(timeout=60)
        assert f"in use: process {first.pid} on" in err
        assert first.poll() is None
    finally:
        for start in starts:
            start.kill()
    first.wait()
    again = start_python(*line, 64)
    out, err = again.communicate(timeout=60)
    assert again.returncode == 0, out + err
    assert [row["images_seen"] for row in log_rows(run)] == [32, 64]


def test_a_lock_ends_with_its_holder_though_a_child_lives_on(tmp_path):
    with RunLock(tmp_path) as lock:
        lock.take(is_new=True)
        child = os.fork()
        if child == 0:
            time.sleep(60)
            os._exit(0)
        with RunLock(tmp_path) as other, pytest.raises(UserError, match=f"in use: process {os.getpid()} on"):
            other.take(is_new=True)
    time.sleep(0.1)
    try:
        with RunLock(tmp_path) as other:
            other.take(is_new=True)
    finally:
        os.kill(child, 9)
        os.waitpid(child, 0)


def test_a_start_that_made_the_run_meanwhile_is_noticed(tmp_path):
    with RunLock(tmp_path) as lock:
        lock.take_if_there()
        config_path(tmp_path).write_text("{}")
        with pytest.raises(UserError, match="another start"):
            lock.take(is_new=True)


def test_a_file_system_without_locks_is_said(tmp_path, monkeypatch, capsys):
    def flock(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    with RunLock(tmp_path) as lock:
        lock.take(is_new=True)
    assert "has no locks" in capsys.readouterr().err


@pytest.mark.parametrize("change", [{"seed": 1}, {"total_images": 5}, {"zero_stage": 2}, {"label_drop": 0.2}])
def test_ranks_compare_what_they_train(tmp_path, change):
    config = small_config(tmp_path)
    (flag,) = (f"--{name.replace('_', '-')}" for name in change)
    mine, others = values_of(config), values_of(replace(config, **change))
    assert {name for name in mine if mine[name] != others[name]} == {flag}


def test_where_the_data_lies_may_differ_from_host_to_host_but_not_what_it_is(tmp_path):
    config = small_config(tmp_path)
    elsewhere = replace(config, data=replace(config.data, path="/scratch/digits", num_threads=3))
    assert values_of(config) == values_of(elsewhere)
    assert OF_ONE_HOST.isdisjoint(values_of(config))
    check_same_data(config, [("a", "f"), ("b", "f")])
    with pytest.raises(UserError, match="rank 1 on b has other images in digits than rank 0 on a"):
        check_same_data(config, [("a", "f"), ("b", "g")])


@pytest.mark.slow
def test_ranks_of_two_seeds_do_not_train(tmp_path):
    line = ["-m", "scalelong.train", "digits-uvit", *SMALL, "--run", tmp_path / "run"]
    ranks = [
        start_python(*line, "--seed", seed, variables=variables) for seed, variables in enumerate(rank_variables(2))
    ]
    (_, first), (_, second) = [rank.communicate(timeout=60) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [2, 2]
    assert re.fullmatch(r"error: rank 1 on \S+ has --seed 1, rank 0 on \S+ has 0\n", first)
    assert second == ""
    assert not (tmp_path / "run").exists()
