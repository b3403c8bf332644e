"""Under torchrun: its own --run, restarts, and the command that is shown to go on."""

import os
import signal
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("deepspeed")

from programs import start_own_process
from running import SMALL, log_rows

from scalelong.train.checkpoint import list_checkpoints
from scalelong.train.command_line import parse_train_arguments

SCRIPT = """
import os, pathlib, signal, sys, threading, time
from scalelong.train.__main__ import main
from scalelong.train.checkpoint import list_checkpoints
from scalelong.train.errors import run_command
run = pathlib.Path(sys.argv[sys.argv.index("--run-folder") + 1])
def die():
    while not list_checkpoints(run):
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGKILL)
if os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
    threading.Thread(target=die, daemon=True).start()
run_command(main)
"""


def test_the_run_folder_has_a_second_name():
    assert parse_train_arguments(["digits-uvit", "--run-folder", "a/b"]).run == Path("a/b")
    assert parse_train_arguments(["digits-uvit", "--run_folder=a/b"]).run == Path("a/b")


PARENT = """
import subprocess, sys
code = "from scalelong.train.hosts.workers import command_of_launcher as c; print(c())"
print(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout)
"""


def test_the_command_that_a_launcher_was_given_is_found(tmp_path):
    torchrun = tmp_path / "torchrun"
    torchrun.write_text(PARENT)
    program = start_own_process(torchrun, "--nproc-per-node", 2, "-m", "scalelong.train", "digits-uvit")
    out, err = program.communicate(timeout=60)
    assert out.strip() == "torchrun --nproc-per-node 2 -m scalelong.train digits-uvit", err


@pytest.mark.slow
@pytest.mark.exhaustive
def test_ranks_join_again_after_a_restart_and_the_given_command_is_shown(tmp_path):
    run, script = tmp_path / "run", tmp_path / "train.py"
    script.write_text(SCRIPT)
    options = ["--standalone", "--nproc-per-node", 2, "--max-restarts", 1, script]
    training = ["digits-uvit", *SMALL, "--run-folder", run, "--images-per-checkpoint", 32, "--images-per-log", 32]
    torchrun = Path(sys.executable).with_name("torchrun")
    given = [torchrun, *options, *training, "--total-images", 10**7]
    program = start_own_process(*given, variables={"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": 1})
    try:
        deadline = time.monotonic() + 150
        first = None
        while first is None or int(list_checkpoints(run)[0].name) <= first + 320:
            assert program.poll() is None, program.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.1)
            if first is None and run.exists() and list_checkpoints(run):
                first = int(list_checkpoints(run)[0].name)
        os.kill(program.pid, signal.SIGTERM)
        out, err = program.communicate(timeout=60)
    finally:
        program.kill()
    assert "resuming at" in out, out + err
    assert f"  torchrun {' '.join(map(str, [*options, *training]))} --total-images 10000000" in out
    assert len(log_rows(run)) > 10
