"""Outlives the front of a launch: when that has died, whatever way, the training processes are told to save and stop.

``python -m scalelong.train.hosts.watcher LAUNCH_ID SSH_PORT [HOST ...]`` waits for the end of its standard input.
"""

import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

from scalelong.train.errors import UserError
from scalelong.train.hosts.preflight import over_ssh
from scalelong.train.hosts.signals import STOP_SIGNALS
from scalelong.train.hosts.workers import signal_workers


@contextmanager
def watched(hosts: list[str], ssh_port: int | None, launch_id: str) -> Iterator[None]:
    """While entered, a watcher waits for the end of this process."""
    line = [sys.executable, "-m", __spec__.name, launch_id, str(ssh_port or ""), *hosts]
    quiet = subprocess.DEVNULL
    with subprocess.Popen(line, stdin=subprocess.PIPE, stdout=quiet, stderr=quiet, start_new_session=True) as watcher:
        try:
            yield
        finally:
            watcher.kill()


def signal_everywhere(hosts: list[str], ssh_port: int | None, number: int, launch_id: str) -> int:
    """Signals the training processes on every host that can be reached; returns how many there were."""
    if not hosts:
        return signal_workers(number, launch_id)

    def on(host: str) -> int:
        try:
            done = over_ssh(host, ssh_port, "scalelong.train.hosts.workers", str(int(number)), launch_id)
            return int(done.stdout.split()[-1])
        except (UserError, ValueError, IndexError):
            return 0

    with ThreadPoolExecutor(len(hosts)) as pool:
        return sum(pool.map(on, hosts))


if __name__ == "__main__":
    for each in STOP_SIGNALS:
        signal.signal(each, signal.SIG_IGN)
    sys.stdin.read()
    launch, port, *others = sys.argv[1:]
    signal_everywhere(others, int(port) if port else None, signal.SIGTERM, launch)
