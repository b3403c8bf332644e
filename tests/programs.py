"""Python programs that tests start: forks of a server that has imported what they need, or processes of their own.

The server (fork_server.py) belongs to the process that runs the tests; it starts with the first program.
"""

import atexit
import functools
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import torch

from scalelong.train.hosts.environment import RANK_VARIABLES

Variables = Mapping[str, object]


def environment(variables: Variables | None = None) -> dict[str, str]:
    """That of this process, with variables set or changed."""
    source = str(Path(__file__).parent.parent / "src")
    path = os.pathsep.join(p for p in (source, os.environ.get("PYTHONPATH")) if p)
    # A run in this process has left its rank and port behind.
    inherited = {name: value for name, value in os.environ.items() if name not in RANK_VARIABLES}
    changed = {name: str(value) for name, value in (variables or {}).items()}
    return {**inherited, "PYTHONPATH": path, "COLUMNS": "80", **changed}


def start_python(*line: object, variables: Variables | None = None, output: Path | None = None) -> Any:
    """Starts a Python program: a module (``-m``), code (``-c``), or a file of this folder, with its arguments.

    It is a fork of the server, or a process of its own where there is a GPU: CUDA does not survive a fork.
    """
    words = [str(word) for word in line]
    if words[0].endswith(".py"):
        words[0] = str(Path(__file__).parent / words[0])
    env = environment(variables)
    if not torch.cuda.is_available():
        return Forked(words, env, output)
    streams: Any = subprocess.PIPE if output is None else output.open("a")
    return subprocess.Popen([sys.executable, *words], env=env, stdout=streams, stderr=streams, text=True)


def start_own_process(*line: object, variables: Variables | None = None) -> subprocess.Popen[str]:
    """The same as a process of its own."""
    words, pipe = [sys.executable, *map(str, line)], subprocess.PIPE
    return subprocess.Popen(words, env=environment(variables), stdout=pipe, stderr=pipe, text=True)


class Forked:
    """A Python program as a fork of the server (fork_server.py), with what tests use of ``subprocess.Popen``.

    ``line`` is what would follow the interpreter's name. Its output goes to ``output``, or is what ``communicate``
    returns.
    """

    def __init__(self, line: list[str], env: dict[str, str], output: Path | None = None):
        self.args, self.returncode = line, None
        # Standard output and standard error; read when the program has ended.
        files = [tempfile.TemporaryFile("w+") if output is None else output.open("a+") for _ in range(2)]  # noqa: SIM115
        self._files: Sequence[IO[str]] = files
        self._reports, reports = socket.socketpair(type=socket.SOCK_SEQPACKET)
        request = json.dumps({"line": line, "env": env, "cwd": str(Path.cwd())})
        with reports:
            socket.send_fds(_fork_server(), [request.encode()], [*(file.fileno() for file in files), reports.fileno()])
        self.pid = self._receive()

    def poll(self) -> int | None:
        return self._wait(0)

    def wait(self, timeout: float | None = None) -> int:
        code = self._wait(timeout)
        if code is None:
            raise subprocess.TimeoutExpired(self.args, timeout or 0)
        return code

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        self.wait(timeout)
        for file in self._files:
            file.seek(0)
        out, err = (file.read() for file in self._files)
        return out, err

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def _wait(self, timeout: float | None) -> int | None:
        if self.returncode is None and select.select([self._reports], [], [], timeout)[0]:
            self.returncode = self._receive()
            self._reports.close()
        return self.returncode

    def _receive(self) -> int:
        reported = self._reports.recv(32)
        assert reported, "the fork server has ended"
        return int(reported)


@functools.cache
def _fork_server() -> socket.socket:
    """The connection to this process's server, which starts with the first program and ends with this process."""
    ours, theirs = socket.socketpair(type=socket.SOCK_SEQPACKET)
    with theirs:
        server = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("fork_server.py")), str(theirs.fileno())],
            env=environment({"OMP_NUM_THREADS": 1, "DS_ACCELERATOR": "cpu"}),
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            start_new_session=True,
        )
    atexit.register(server.wait)
    atexit.register(ours.close)
    return ours
