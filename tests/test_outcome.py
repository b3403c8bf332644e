"""outcome.json: every way in which a run ends, as the folder tells it afterwards."""

import json
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("deepspeed")

from programs import start_python
from running import SMALL, log_rows, run_on_ranks, small_config

from scalelong.train import loop
from scalelong.train.config import GuardConfig
from scalelong.train.errors import DivergedError, RankError, UserError
from scalelong.train.hosts import heartbeat
from scalelong.train.outcome import Outcome, OutcomeFile, outcome_of_error, read_outcome
from scalelong.train.run_lock import RunLock, is_locked

STEP = 32
SO_FAR = Outcome(state="running", images_seen=320, step=10)


def train_as_program(run: Path, *arguments: object):
    return start_python("-m", "scalelong.train", "digits-uvit", *SMALL, "--run", run, "--images-per-log", 0, *arguments)


def wait_for_steps(run: Path, program, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not ((run / "log.jsonl").is_file() and len(log_rows(run)) > 2):
        assert program.poll() is None, program.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.slow
def test_a_run_that_ends_well_and_one_that_goes_on(tmp_path):
    config = small_config(tmp_path / "run", total_images=2 * STEP)
    assert read_outcome(config.run) is None
    assert loop.train(config) == 0
    finished = Outcome(state="finished", images_seen=2 * STEP, step=2, exit_code=0)
    assert read_outcome(config.run) == finished
    # Nothing is left to do, and a refused start leaves it too.
    assert loop.train(config) == 0
    with pytest.raises(UserError, match="another configuration"):
        loop.train(replace(config, seed=1))
    assert read_outcome(config.run) == finished
    assert loop.train(replace(config, total_images=3 * STEP)) == 0
    assert read_outcome(config.run) == replace(finished, images_seen=3 * STEP, step=3)


@pytest.mark.slow
def test_a_run_that_is_stopped_and_one_that_is_killed(tmp_path):
    run = tmp_path / "run"
    program = train_as_program(run, "--total-images", 10**7)
    wait_for_steps(run, program)
    running = read_outcome(run)
    assert running == Outcome(state="running", images_seen=0, step=0)
    program.send_signal(signal.SIGUSR1)
    assert program.wait(60) == 75
    stopped = read_outcome(run)
    assert stopped is not None
    assert (stopped.state, stopped.signal, stopped.exit_code) == ("stopped", "SIGUSR1", 75)
    assert (run / "checkpoints" / str(stopped.images_seen)).is_dir()
    assert stopped.images_seen == stopped.step * STEP > 0

    again = train_as_program(run, "--total-images", 10**7)
    while read_outcome(run) == stopped:
        assert again.poll() is None
        time.sleep(0.02)
    running = read_outcome(run)
    assert running == Outcome(state="running", images_seen=stopped.images_seen, step=stopped.step)
    again.kill()
    again.wait(60)
    died = read_outcome(run)
    assert died is not None
    assert (died.state, died.exit_code, died.images_seen) == ("died", None, stopped.images_seen)


@pytest.mark.slow
def test_a_run_that_diverges_says_where(tmp_path, monkeypatch):
    original, count = loop.train_step, 0

    def poisoned(run, **options):
        nonlocal count
        count += 1
        taken = original(run, **options)
        if count >= 3:
            run.unchecked_losses[-1] = run.unchecked_losses[-1] * torch.nan
        return taken

    monkeypatch.setattr(loop, "train_step", poisoned)
    config = small_config(tmp_path / "run", total_images=9 * STEP, guard=GuardConfig(skip_steps=1))
    with pytest.raises(DivergedError, match=f"--branch-from {config.run} "):
        loop.train(config)
    outcome = read_outcome(config.run)
    assert outcome is not None
    assert outcome.diverged is not None
    assert (outcome.state, outcome.exit_code, outcome.images_seen) == ("diverged", 2, 4 * STEP)
    assert vars(outcome.diverged) == {"step": 4, "images_seen": 4 * STEP, "what": "the loss is nan"}


@pytest.mark.slow
def test_any_other_end_is_a_failure_with_its_reason(tmp_path, monkeypatch):
    def fail(run):
        raise ZeroDivisionError("division by zero\nand more")

    monkeypatch.setattr(loop, "make_grid", fail)
    config = small_config(tmp_path / "run", total_images=2 * STEP)
    with pytest.raises(ZeroDivisionError):
        loop.train(config)
    outcome = read_outcome(config.run)
    expected = {"state": "failed", "exit_code": 1, "reason": "ZeroDivisionError: division by zero"}
    assert outcome == Outcome(**expected, images_seen=2 * STEP, step=2)


@pytest.mark.slow
def test_of_two_processes_the_main_one_writes(tmp_path):
    run = tmp_path / "run"
    run_on_ranks(2, "-m", "scalelong.train", "digits-uvit", *SMALL, "--run", run, "--total-images", 2 * STEP)
    assert read_outcome(run) == Outcome(state="finished", images_seen=2 * STEP, step=2, exit_code=0)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (UserError("the disk is full"), {"state": "failed", "exit_code": 2, "reason": "the disk is full"}),
        (KeyboardInterrupt(), {"state": "stopped", "exit_code": 130, "signal": "SIGINT"}),
        (MemoryError(), {"state": "failed", "exit_code": 1, "reason": "MemoryError"}),
        (RuntimeError("[gloo/x.cc] Connection closed by peer"), {"state": "failed", "exit_code": 2}),
        (RankError("no GPU"), {"state": "failed", "exit_code": 2, "reason": "no GPU"}),
    ],
)
def test_errors_become_outcomes(error, expected):
    outcome = outcome_of_error(error, SO_FAR)
    assert vars(outcome) | expected == vars(outcome)
    assert (outcome.images_seen, outcome.step) == (320, 10)


def test_a_host_that_is_lost_is_written_down_before_the_process_ends(tmp_path, monkeypatch):
    codes = []
    monkeypatch.setattr(heartbeat.os, "_exit", codes.append)
    with OutcomeFile(tmp_path, 64, 2, writes=True) as outcome:
        heartbeat.end_process("nodeb", 41.2, outcome.fail)
        written = json.loads((tmp_path / "outcome.json").read_text())
        outcome.finish()
    assert codes == [2]
    assert (written["state"], written["exit_code"], written["images_seen"]) == ("failed", 2, 64)
    assert "no sign of life from nodeb for 41 s" in written["reason"]


def test_a_disk_that_is_full_does_not_hide_what_ended_the_run(tmp_path, monkeypatch, capsys):
    def full(path, data):
        raise OSError(28, "No space left on device")

    outcome = OutcomeFile(tmp_path, 0, 0, writes=True)
    monkeypatch.setattr("scalelong.train.outcome.write_whole", full)
    with pytest.raises(UserError, match="cannot write the checkpoint"), outcome:
        raise UserError("cannot write the checkpoint")
    assert "outcome.json: No space left" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"cannot write .*outcome\.json: No space left"):
        OutcomeFile(tmp_path, 0, 0, writes=True)


def test_the_other_processes_write_nothing(tmp_path):
    with OutcomeFile(tmp_path, 0, 0, writes=False) as outcome:
        outcome.finish()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"state": "odd", "images_seen": 0, "step": 0}', "[" * 200_000])
def test_a_damaged_file_is_named(tmp_path, text):
    (tmp_path / "outcome.json").write_text(text)
    with pytest.raises(UserError, match=r"outcome\.json is damaged"):
        read_outcome(tmp_path)


def test_who_looks_whether_a_run_is_locked_keeps_nobody_out(tmp_path):
    assert is_locked(tmp_path) is False
    with RunLock(tmp_path) as lock:
        lock.take(is_new=True)
        assert is_locked(tmp_path) is True
        assert is_locked(tmp_path) is True
    assert is_locked(tmp_path) is False
    with RunLock(tmp_path) as lock:
        lock.take(is_new=True)
