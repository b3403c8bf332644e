"""What Triton's launcher for NVIDIA GPUs makes of the arguments of plans: the bytes that it makes of Triton's own."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from triton.backends.nvidia import driver as nvidia

TESTS = Path(__file__).parent
NOTED = ("cuLaunchKernelEx", "cuPointerGetAttribute")

pytestmark = [
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter launches nothing"),
    pytest.mark.skipif(shutil.which("gcc") is None, reason="Triton builds its launcher with gcc"),
]


@pytest.mark.slow
def test_a_repeated_launch_hands_over_what_triton_does(tmp_path):
    names = set(re.findall(r"\b(cu[A-Z]\w+)\s*\(", Path(nvidia.__file__).with_suffix(".c").read_text()))
    idle = [f"int {name}(void) {{ return 0; }}" for name in sorted({*names, "cuGetErrorString"} - {*NOTED})]
    source, library = tmp_path / "libcuda.c", tmp_path / "libcuda.so.1"
    source.write_text("\n".join([(TESTS / "libcuda_that_notes.c").read_text(), *idle]))
    subprocess.run(["gcc", "-shared", "-fPIC", "-w", "-o", str(library), str(source)], check=True)
    (tmp_path / "libcuda.so").symlink_to(library)
    done = subprocess.run(
        [sys.executable, str(TESTS / "launching_by_nvidia.py"), str(library)],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(TESTS.parent / "src"), os.environ.get("PYTHONPATH", "")]),
            "TRITON_LIBCUDA_PATH": str(tmp_path),
            "LD_LIBRARY_PATH": str(tmp_path),
            "TRITON_CACHE_DIR": str(tmp_path / "cache"),  # a launcher is linked with its libcuda
        },
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout.split()[-1]) >= 40
