"""Two hosts for real: network namespaces with an ssh server each, and the documented command over pdsh and ssh."""

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("deepspeed")

from programs import environment
from running import SMALL, losses, run_on_ranks, small_config

from scalelong.train.checkpoint import list_checkpoints
from scalelong.train.errors import EXIT_SAVED_AFTER_SIGNAL
from scalelong.train.loop import train

pytestmark = pytest.mark.slow

STEP, STEPS_ALONE = 32, 40
UNSHARE = ["unshare", "--mount", "--net", "--pid", "--fork", "--mount-proc", "--kill-child"]
SECONDS_TO_END = 60


def why_not() -> str | None:
    """What this machine lacks to make two hosts."""
    path = f"{os.environ.get('PATH', '')}:/usr/sbin"
    missing = [
        name for name in ("unshare", "ip", "ssh", "sshd", "ssh-keygen", "pdsh") if not shutil.which(name, path=path)
    ]
    if missing:
        return f"not installed: {', '.join(missing)}"
    done = subprocess.run([*UNSHARE, "ip", "netns", "list"], capture_output=True, text=True)
    return f"may not make namespaces: {done.stderr.strip()}" if done.returncode else None


@dataclass
class TwoNodes:
    """A folder that both hosts see, with a hostfile."""

    folder: Path

    def start(self, *line: object) -> subprocess.Popen[str]:
        """A command on nodea, in the folder."""
        script = Path(__file__).with_name("two_nodes.sh")
        command = [*UNSHARE, "bash", str(script), str(self.folder), *map(str, line)]
        return subprocess.Popen(
            command,
            cwd=self.folder,
            env=environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *line: object, seconds: float = 180) -> subprocess.CompletedProcess[str]:
        with self.start(*line) as process:
            try:
                out, err = process.communicate(timeout=seconds)
            finally:
                process.kill()
        return subprocess.CompletedProcess(list(map(str, line)), process.returncode, out, err)


@pytest.fixture
def nodes(tmp_path) -> TwoNodes:
    reason = why_not()
    if reason:
        pytest.skip(reason)
    (tmp_path / "hosts").write_text("nodea slots=1\nnodeb slots=1\n")
    (tmp_path / ".deepspeed_env").write_text("DS_ACCELERATOR=cpu\nGLOO_SOCKET_IFNAME=eth0\nOMP_NUM_THREADS=1\n")
    return TwoNodes(tmp_path)


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    """The first steps on one process."""
    run = tmp_path_factory.mktemp("alone") / "run"
    assert train(small_config(run, total_images=STEPS_ALONE * STEP)) == 0
    return run


def expect_losses_of(alone: Path, run: Path) -> None:
    found = losses(run)[:STEPS_ALONE]
    np.testing.assert_allclose(found, losses(alone)[: len(found)], rtol=0, atol=1e-4)


def training(run: Path, stage: int, steps: int) -> list[object]:
    return ["digits-uvit", *SMALL, "--run", run, "--zero-stage", stage, "--total-images", steps * STEP]


def launch_line(*arguments: object) -> list[object]:
    return [sys.executable, "-m", "scalelong", "launch", "--hostfile", "hosts", *arguments]


def deepspeed_line(*arguments: object) -> list[object]:
    deepspeed = [sys.executable, "-m", "deepspeed.launcher.runner", "--hostfile", "hosts", "--master_addr", "nodea"]
    return [*deepspeed, "--module", "scalelong.train", *arguments]


# A launch on two hosts takes a minute of computing: the tests of harm launch each stage, and one goes on by deepspeed.
@pytest.mark.exhaustive
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_two_hosts_give_the_losses_of_one_process(nodes, alone, stage):
    run = nodes.folder / "run"
    done = nodes.run(*launch_line(*training(run, stage, 10)))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 x cpu" in done.stdout
    assert len(losses(run)) == 10
    expect_losses_of(alone, run)


@pytest.mark.exhaustive
def test_the_deepspeed_command_itself_trains_on_two_hosts(nodes, alone):
    run = nodes.folder / "run"
    done = nodes.run(*deepspeed_line(*training(run, 1, 10)))
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(losses(run)) == 10
    expect_losses_of(alone, run)


SCENARIO = """
import re, signal, subprocess, sys, time
from pathlib import Path

what, run, *line = sys.argv[1:]
WORKERS = "[-]-local_rank=0 --launch-id"
launch = subprocess.Popen(line)
while not list(Path(run).glob("checkpoints/[0-9]*")):
    assert launch.poll() is None, "the run ended before its first checkpoint"
    time.sleep(0.1)
began = time.monotonic()
if what == "cut":
    subprocess.run(["ip", "link", "set", "eth0", "down"], check=True)
elif what == "kill":
    workers = subprocess.run(["pgrep", "-f", "--", WORKERS], capture_output=True, text=True)
    subprocess.run(["kill", "-9", workers.stdout.split()[-1]], check=True)
else:
    launch.send_signal(signal.SIGTERM)
code, seconds = launch.wait(), time.monotonic() - began
while time.monotonic() < began + 60:
    left = subprocess.run(["pgrep", "-c", "-f", "--", WORKERS], capture_output=True, text=True).stdout.strip()
    if left == "0":
        break
    time.sleep(0.5)
print(f"CODE {code} SECONDS {seconds:.1f} LEFT {left} AFTER {time.monotonic() - began:.1f}", flush=True)
"""
"""On nodea: starts the command, waits for a checkpoint, does the harm, and says how the command ended. (The pattern's
first bracket keeps it from finding this text itself, which stands on a command line too.)"""


@pytest.mark.parametrize(
    ("what", "cause", "stage"),
    [
        ("cut", "the connection to nodeb was lost", 1),
        ("kill", "was killed by SIGKILL", 2),
        ("term", "SIGTERM: saved at", 3),
    ],
)
def test_harm_ends_the_run_within_a_minute_and_its_flags_go_on_by_any_launcher(nodes, alone, what, cause, stage):
    run = nodes.folder / "run"
    often = ["--images-per-checkpoint", STEP]
    harmed = launch_line(*training(run, stage, 100_000), *often)
    done = nodes.run(sys.executable, "-c", SCENARIO, what, run, *harmed)
    told = re.search(r"CODE (-?\d+) SECONDS ([\d.]+) LEFT (\d+)", done.stdout)
    assert told is not None, done.stdout + done.stderr
    code, seconds, left = int(told[1]), float(told[2]), int(told[3])
    is_as_told = code == EXIT_SAVED_AFTER_SIGNAL if what == "term" else code not in (0, EXIT_SAVED_AFTER_SIGNAL)
    assert is_as_told, done.stdout + done.stderr
    assert seconds < SECONDS_TO_END
    assert "2 x cpu" in done.stdout
    assert cause in done.stdout + done.stderr
    # The host that was cut off cannot be told: its process ends by itself.
    assert left == 0, done.stdout + done.stderr
    saved = int(list_checkpoints(run)[0].name)
    further = [*training(run, stage, saved // STEP + 5), *often]
    if what == "cut":
        again = nodes.run(*deepspeed_line(*further))
        assert again.returncode == 0, again.stdout + again.stderr
        printed = again.stdout
    else:
        printed, _ = run_on_ranks(2, "-m", "scalelong.train", *further)
    assert f"resuming at {saved:,} images" in printed
    assert len(losses(run)) == saved // STEP + 5
    expect_losses_of(alone, run)


@pytest.mark.parametrize(
    ("hostfile", "words"),
    [
        ("nodea slots=1\nnodec slots=1\n", ["nodec cannot be reached over ssh"]),
        ("nodea slots=1\nnodeb slot=1\n", ["hosts, line 2", "nodeb slot=1"]),
    ],
)
def test_hosts_that_cannot_take_part_are_named_before_training_starts(nodes, hostfile, words):
    (nodes.folder / "hosts").write_text(hostfile)
    run = nodes.folder / "run"
    done = nodes.run(*launch_line(*training(run, 1, 10)))
    assert done.returncode == 2
    (line,) = done.stderr.strip().splitlines()
    assert all(word in line for word in ["error: ", *words])
    assert not run.exists()
