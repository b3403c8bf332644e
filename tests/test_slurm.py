"""The batch script of docs/slurm.md, run by bash with programs in the place of Slurm's."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

pytest.importorskip("deepspeed")

from programs import environment
from running import SMALL, free_port, log_rows

from scalelong.train.outcome import read_outcome

PAGE = Path(__file__).parents[1] / "docs" / "slurm.md"
STEP = 32

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")


def script_of_page() -> str:
    return re.findall(r"```bash\n(.*?)```", PAGE.read_text(), re.DOTALL)[0]


def options_of_page() -> dict[str, str]:
    return dict(re.findall(r"^#SBATCH --([\w-]+)(?:=(.*))?$", script_of_page(), re.MULTILINE))


@pytest.fixture
def cluster(tmp_path) -> Path:
    """A folder with the script, and with programs called srun, scontrol and python."""
    programs = tmp_path / "bin"
    programs.mkdir()
    (tmp_path / "train.sbatch").write_text(script_of_page())
    srun = Path(__file__).with_name("srun.py")
    for name, line in (
        ("srun", f'exec {sys.executable} {srun} "$@"'),
        ("scontrol", f'echo "$@" >> {tmp_path / "scontrol"}'),
        ("python", f'exec {sys.executable} "$@"'),
    ):
        (programs / name).write_text(f"#!/bin/sh\n{line}\n")
        (programs / name).chmod(0o755)
    return tmp_path


def submit(cluster: Path, *arguments: object) -> subprocess.Popen[str]:
    """As sbatch starts the script: on the first node, with its arguments and the variables of the job."""
    variables = {
        "PATH": f"{cluster / 'bin'}{os.pathsep}{os.environ['PATH']}",
        "DS_ACCELERATOR": "cpu",
        "ENVIRONMENT": "BATCH",
        "SLURM_JOB_ID": free_port(),
        "SLURM_NTASKS": 2,
        "SLURM_PROCID": 0,
        "SLURM_LOCALID": 0,
        "SLURM_JOB_NODELIST": "localhost",
        "SLURM_CPUS_PER_TASK": 1,
    }
    pipe = subprocess.PIPE
    line = ["bash", "train.sbatch", "digits-uvit", *SMALL, *arguments]
    env = environment(variables)
    env.pop("OMP_NUM_THREADS", None)
    return subprocess.Popen(list(map(str, line)), cwd=cluster, env=env, stdout=pipe, stderr=pipe, text=True)


def test_the_options_of_the_page_fit_each_other():
    options = options_of_page()
    assert options["ntasks-per-node"] == options["gpus-per-node"]
    name, seconds = re.fullmatch(r"(\w+)@(\d+)", options["signal"]).groups()  # type: ignore[union-attr]
    assert getattr(signal, f"SIG{name}") in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM)
    assert int(seconds) >= 60
    assert "requeue" in options


@pytest.mark.slow
def test_the_script_trains_saves_when_the_time_is_up_and_asks_for_another_go(cluster):
    run = cluster / "run"
    job = submit(cluster, "--run", run, "--images-per-log", 0, "--total-images", 10**7)
    deadline = time.monotonic() + 120
    while not ((run / "log.jsonl").is_file() and len(log_rows(run)) > 2):
        assert job.poll() is None, job.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.1)
    (srun,) = psutil.Process(job.pid).children()
    srun.send_signal(signal.SIGUSR1)
    out, err = job.communicate(timeout=60)
    assert job.returncode == 75, out + err
    assert "2 x cpu" in out
    assert re.fullmatch(r"requeue \d+\n", (cluster / "scontrol").read_text())
    stopped = read_outcome(run)
    assert stopped is not None
    assert (stopped.state, stopped.images_seen) == ("stopped", log_rows(run)[-1]["images_seen"])

    again = submit(cluster, "--run", run, "--total-images", stopped.images_seen + STEP)
    out, err = again.communicate(timeout=120)
    assert again.returncode == 0, out + err
    assert f"resuming at {stopped.images_seen:,} images" in out
    assert len((cluster / "scontrol").read_text().splitlines()) == 1


@pytest.mark.slow
def test_bad_input_is_one_line_and_ends_the_job(cluster):
    job = submit(cluster, "--run", cluster / "run", "--kappa", 7)
    _, err = job.communicate(timeout=60)
    # The tasks that the first one's end has killed count too.
    assert job.returncode in (2, 128 + signal.SIGKILL)
    assert err.count("error:") == 1
    assert "kappa" in err
    assert not (cluster / "scontrol").exists()
