"""The training processes of a launch on this host.

``python -m scalelong.train.hosts.workers NUMBER LAUNCH_ID`` signals them. They are found by the launch's own identifier
on their command line, so that other runs of this host are left alone.
"""

import shlex
import sys
from pathlib import Path

import psutil

FLAG = "--launch-id="
GIVEN_COMMAND = "SCALELONG_COMMAND"
"""The variable in which ``scalelong launch`` passes on the command that was given."""
LAUNCHERS = ("torchrun", "torch.distributed.run", "torch.distributed.launch", "deepspeed", "deepspeed.launcher.runner")


def workers_of(launch_id: str) -> list[psutil.Process]:
    """The processes that train; the launchers that started them bear the identifier too, but no rank."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        line = process.info["cmdline"] or []
        if FLAG + launch_id in line and any(argument.startswith("--local_rank=") for argument in line):
            found.append(process)
    return found


def command_of_launcher() -> str | None:
    """What a launcher above this process was told, the outermost if one has started another; None if none is known."""
    found = None
    for process in psutil.Process().parents():
        try:
            line = process.cmdline()
        except psutil.Error:
            continue
        words = {Path(word).name for word in line[:4]}
        if words & set(LAUNCHERS):
            # "python /path/bin/torchrun ..." was given as "torchrun ..."
            is_script = len(line) > 1 and Path(line[1]).name in LAUNCHERS
            found = shlex.join([Path(line[1]).name, *line[2:]] if is_script else ["python", *line[1:]])
    return found


def signal_workers(number: int, launch_id: str) -> int:
    """Sends a signal to them, 0 for none; returns how many there were."""
    workers = workers_of(launch_id)
    for worker in workers:
        try:
            worker.send_signal(number)
        except psutil.NoSuchProcess:
            continue
    return len(workers)


if __name__ == "__main__":
    print(signal_workers(int(sys.argv[1]), sys.argv[2]))
