"""Runs interpreted_group_norm.py."""

import pytest
from interpreting import run_interpreted

FILE = "interpreted_group_norm.py"


@pytest.mark.slow
def test_the_kernels_are_right_in_the_interpreter():
    run_interpreted(FILE, "-m", "not exhaustive")


@pytest.mark.exhaustive
def test_every_combination_is_right_in_the_interpreter():
    run_interpreted(FILE, "-m", "exhaustive")
