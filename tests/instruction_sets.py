"""Runs code of tests on an instruction set of the native library, which reads it once: in a process for each."""

from pathlib import Path

import pytest
from programs import start_python

FLAGS = {"baseline": None, "avx2": "avx2", "avx512": "avx512bw", "avx512_bf16": "avx512_bf16"}
"""What /proc/cpuinfo calls them."""
TESTS = Path(__file__).parent


def run_on(isa: str, code: str) -> None:
    """Runs it on one thread, with this folder's modules; skips where the processor has no such instructions."""
    flag = FLAGS[isa]
    if flag is not None and flag not in Path("/proc/cpuinfo").read_text().split():
        pytest.skip(f"this processor has no {isa}")
    status, err = outcome_on(isa, code)
    assert status == 0, err


def outcome_on(isa: str, code: str) -> tuple[int, str]:
    """The exit status, and what it says on standard error."""
    found = f"import sys\nsys.path.insert(0, {str(TESTS)!r})\n"
    program = start_python("-c", found + code, variables={"SCALELONG_ISA": isa, "OMP_NUM_THREADS": 1})
    try:
        _, err = program.communicate(timeout=120)
    finally:
        program.kill()
    return program.returncode, err
