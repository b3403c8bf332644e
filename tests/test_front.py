"""The front of a launch over stand-ins for launcher and ranks: signals, deaths, and output that nobody reads."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("deepspeed")

from programs import environment, start_python

from scalelong.train.hosts.signals import STOP_SIGNALS

FRONT = """
import sys
from scalelong.train.errors import dropped_if_nobody_reads
from scalelong.train.hosts.launch import Job
from scalelong.train.hosts.watcher import signal_everywhere, watched
launch_id, *line = sys.argv[1:]
job = Job(line, lambda number: signal_everywhere([], None, number, launch_id))
with watched([], None, launch_id), dropped_if_nobody_reads():
    code = job.run()
sys.exit(code)
"""
RANK = """
import pathlib, signal, sys, time
def save(number, _):
    pathlib.Path(sys.argv[1]).write_text(signal.Signals(number).name)
    sys.exit(75)
for name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2"):
    signal.signal(getattr(signal, name), save)
pathlib.Path(sys.argv[1] + ".ready").touch()
time.sleep(60)
"""


def launcher_of_one_rank(folder: Path, launch_id: str) -> list[object]:
    """A shell in the place of the launcher, which passes on how its rank ends."""
    # The flags are no words of the shell's own line, or it would be taken for a rank.
    rank = f'"$1" -c "$2" {folder}/saved --launch-id={launch_id} --local_rank=0'
    return ["sh", "-c", f"echo $$ > {folder}/launcher; {rank} & wait $!", "sh", sys.executable, RANK]


@pytest.fixture
def front(tmp_path) -> Any:
    launch_id = f"test-{os.getpid()}-{time.monotonic_ns()}"
    program = start_python("-c", FRONT, launch_id, *launcher_of_one_rank(tmp_path, launch_id))
    wait_for(tmp_path / "saved.ready")
    time.sleep(0.3)  # the front listens before the rank stands; its watcher takes a moment more
    yield program
    program.kill()


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 30
    while not path.exists() or (path.suffix != ".ready" and not path.read_text()):
        assert time.monotonic() < deadline, f"no {path.name}"
        time.sleep(0.02)


@pytest.mark.parametrize("number", STOP_SIGNALS, ids=lambda number: number.name)
def test_every_signal_to_the_front_lets_the_ranks_save(front, tmp_path, number):
    front.send_signal(number)
    assert front.wait(30) == 75
    assert (tmp_path / "saved").read_text() == number.name


def test_when_the_front_is_killed_the_ranks_save(front, tmp_path):
    front.kill()
    wait_for(tmp_path / "saved")
    assert (tmp_path / "saved").read_text() == "SIGTERM"


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGHUP], ids=lambda number: number.name)
def test_when_the_launcher_is_killed_the_ranks_save(front, tmp_path, number):
    os.kill(int((tmp_path / "launcher").read_text()), number)
    assert front.wait(30) not in (0, 75)
    assert (tmp_path / "saved").read_text() == "SIGTERM"


def test_output_that_nobody_reads_is_dropped_and_the_job_goes_on(tmp_path):
    # More than all the buffers on the way hold.
    lines = f"yes line | head -100000; echo x > {tmp_path}/end; exit 7"
    reader, writer = os.pipe()
    front = subprocess.Popen(
        [sys.executable, "-c", FRONT, "test-nobody-reads", "sh", "-c", lines],
        env=environment(),
        stdout=writer,
        stderr=subprocess.PIPE,
        text=True,
    )
    os.close(writer)
    assert os.read(reader, 4) == b"line"
    os.close(reader)
    _, err = front.communicate(timeout=60)
    assert front.returncode == 7
    assert (tmp_path / "end").exists()
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("code", "exit_code"),
    [
        ("run_command(lambda: print('said'))", 2),
        ("run_command(lambda: print('said', flush=True))", 2),
        ("run_command(dropped_if_nobody_reads()(lambda: print('said', flush=True)))", 0),
    ],
)
def test_output_that_cannot_be_written_is_no_traceback(code, exit_code):
    line = [sys.executable, "-c", f"from scalelong.train.errors import *; {code}"]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(line, env=environment(), stdout=full, stderr=subprocess.PIPE, text=True, timeout=30)
    assert done.returncode == exit_code
    expected = "error: standard output cannot be written: No space left on device\n" if exit_code else ""
    assert done.stderr == expected


def test_a_name_in_another_script_than_the_terminals():
    code = "from scalelong.train.errors import run_command; run_command(lambda: print('run folder: runs/тест'))"
    env = {**environment(), "PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "run folder: runs/\\u0442\\u0435\\u0441\\u0442\n"
