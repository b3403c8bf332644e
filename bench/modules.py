"""A module of this project run as a user runs it, for benches that train and score."""

import os
import subprocess
import sys
from collections.abc import Sequence


def run_module(arguments: Sequence[object], processes: int = 1) -> str:
    """Runs ``python -m`` with these arguments, one thread a process, and returns what it printed.

    Args:
        arguments: the module first.
        processes: more than one are started by torchrun.

    Raises:
        RuntimeError: it failed; says the command and what it printed.
    """
    words = [str(argument) for argument in arguments]
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "-m"]
    command = [sys.executable, "-m", *(launcher if processes > 1 else []), *words]
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command[1:])}: {(done.stderr or done.stdout).strip()}")
    return done.stdout
