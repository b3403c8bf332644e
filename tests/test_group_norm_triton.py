"""Runs interpreted_group_norm.py: Triton reads TRITON_INTERPRET when it is imported, so that takes a new process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def run_interpreted(*flags: str) -> None:
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "tests/interpreted_group_norm.py",
        *flags,
    ]
    paths = [str(ROOT / "src"), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(paths)}
    result = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert result.returncode == 0, f"{' '.join(command)}\n{result.stdout[-8000:]}{result.stderr[-2000:]}"


@pytest.mark.slow
def test_the_kernels_are_right_in_the_interpreter():
    run_interpreted("-m", "not exhaustive")


@pytest.mark.exhaustive
def test_every_combination_is_right_in_the_interpreter():
    run_interpreted("-m", "exhaustive")
