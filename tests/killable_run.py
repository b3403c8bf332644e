"""Run on every rank: a training run that may see another process's mounts, and may kill itself.

Arguments, as JSON: the configuration (``config_to_dict``), and which options it takes (``killing.start``).
"""

import ctypes
import json
import os
import signal
import sys
from pathlib import Path

from scalelong.train import checkpoint
from scalelong.train.config_json import config_from_dict
from scalelong.train.errors import run_command
from scalelong.train.loop import train

FILE_OPERATIONS = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree"}
SAVING = "survival.save_file"
CLONE_NEWNS = 0x20000


def die_at_file_operation(run: Path, number: int) -> None:
    """Lets this process kill itself at its ``number``-th operation on files of the run, half-written ones included."""
    count = 0

    def dies(event: str, arguments: tuple) -> bool:
        nonlocal count
        path = str(arguments[0]) if arguments else ""
        counts = event in FILE_OPERATIONS or (event in ("open", SAVING) and path.startswith(str(run)))
        count += counts
        return counts and count == number

    def hook(event: str, arguments: tuple) -> None:
        if event != SAVING and dies(event, arguments):
            os.kill(os.getpid(), signal.SIGKILL)

    original = checkpoint.write_tensors

    def save_and_perhaps_die_half_way(tensors, path: Path) -> None:
        # The library writes files without telling Python, so a write that is cut short is made by hand.
        original(tensors, path)
        if dies(SAVING, (path,)):
            os.truncate(path, path.stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    checkpoint.write_tensors = save_and_perhaps_die_half_way
    sys.addaudithook(hook)


def enter_mounts(pid: int) -> None:
    """Sees the files that another process sees from now on."""
    with Path(f"/proc/{pid}/ns/mnt").open() as namespace:
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.setns(namespace.fileno(), CLONE_NEWNS):
            raise OSError(ctypes.get_errno(), "setns")


config, options = config_from_dict(json.loads(sys.argv[1])), json.loads(sys.argv[2])
if options["mounts_of"] is not None:
    enter_mounts(options["mounts_of"])
if options["dies_at"] is not None:
    die_at_file_operation(config.run, options["dies_at"])
run_command(lambda: sys.exit(train(config)))
