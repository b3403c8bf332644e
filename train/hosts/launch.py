"""``scalelong launch [--option value ...] RECIPE [--field value ...]``: training on several processes or hosts.

A front of the deepspeed launcher. It asks every host whether it can take part before training starts, passes signals on
to the training processes, which then save, and ends the whole job when a process or a host is lost.
"""

import os
import re
import secrets
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TextIO

from scalelong.train.command_line import parse_train_arguments
from scalelong.train.errors import EXIT_SAVED_AFTER_SIGNAL, EXIT_USER_ERROR, UserError, dropped_if_nobody_reads, warn
from scalelong.train.hosts.environment import USUAL_PORT
from scalelong.train.hosts.hostfile import (
    check_environment_files,
    read_hostfile,
    select_hosts,
    without_byte_order_mark,
)
from scalelong.train.hosts.preflight import check_hosts
from scalelong.train.hosts.signals import stop_signals
from scalelong.train.hosts.watcher import signal_everywhere, watched
from scalelong.train.hosts.workers import FLAG, GIVEN_COMMAND
from scalelong.train.parsing import parse
from scalelong.train.recipes import RECIPES
from scalelong.train.run_folder import config_path

PROGRAM = "scalelong launch"
SECONDS_TO_SAVE = 60.0
"""How long training processes that have lost their launcher may take to save."""
SECONDS_TO_END = 10.0
"""How long the other processes may go on after one has ended before its time."""
NOTICE_LOST_HOST = "-o ServerAliveInterval=4 -o ServerAliveCountMax=3"
OF_THE_LAUNCHER = re.compile(r"\[(?:launch|runner|multinode_runner)\.py:\d+:")
NO_GPU = "Setting accelerator to CPU."
ENDS_THE_OTHERS = "Killing subprocess"
EXIT_CODE = re.compile(r"exits with return code = (-?\d+)")
SSH_ENDED = re.compile(r"pdsh@[^:]+: ([^:]+): ssh exited with exit code (\d+)")


@dataclass(frozen=True, kw_only=True)
class LaunchConfig:
    """Training on several processes or hosts: scalelong launch [OPTIONS] RECIPE [--field value ...]

    The recipe and its fields are those of training."""

    hostfile: Path | None = None
    """A line 'NAME slots=NUMBER' for each host; without one, this machine alone."""
    num_accelerators: int = 0
    """Processes on each host; 0: the slots of the hostfile, or the GPUs of this machine."""
    include: str = ""
    """Of the hostfile, or of this machine (localhost), these alone: NAME or NAME:SLOT,SLOT, several joined by @."""
    exclude: str = ""
    """These not."""
    master_addr: str = ""
    """Address of the first host as the others see it; its name in the hostfile if not given."""
    master_port: int = 0
    """A port of the first host; 0: any that is free on this machine alone, 29500 for several hosts."""
    ssh_port: int | None = None
    """Of the hosts' ssh servers."""
    node_rank: int | None = None
    """Without ssh: the number of this host in the hostfile. The command is then started on every host by itself."""

    def __post_init__(self):
        if self.num_accelerators < 0:
            raise ValueError(f"num_accelerators must not be negative, got {self.num_accelerators}")
        if bool(self.include) + bool(self.exclude) + bool(self.num_accelerators) > 1:
            raise ValueError("of include, exclude and num_accelerators only one can be given")
        if not 0 <= self.master_port < 2**16:
            raise ValueError(f"master_port must be in 0 .. {2**16 - 1}, got {self.master_port}")
        if self.node_rank is not None and (self.hostfile is None or not self.master_addr):
            raise ValueError("node_rank needs a hostfile and a master_addr")


def main(argv: list[str] | None = None) -> None:
    """The command ``scalelong launch``."""
    options, training = split_arguments(sys.argv[1:] if argv is None else argv)
    config = parse(LaunchConfig, options, prog=PROGRAM)
    if "--print-config" in training:  # by the command that trains, which looks into the data too
        sys.exit(subprocess.call([sys.executable, "-m", "scalelong.train", *training]))
    # What is wrong with the training's own arguments is told once, before anything starts.
    parse_train_arguments(training)
    hosts = find_hosts(config)
    launch_id = secrets.token_hex(8)
    # A single name in the hostfile may be another machine all the same; DeepSpeed would train here.
    over_hosts = hosts if config.node_rank is None else []
    if over_hosts:
        check_environment_files(Path.cwd(), Path.home(), os.environ)
        check_hosts(over_hosts, config.ssh_port, warn)
    given = shlex.join([*PROGRAM.split(), *(sys.argv[1:] if argv is None else argv)])
    watching = watched(over_hosts, config.ssh_port, launch_id)
    with without_byte_order_mark(config.hostfile) as hostfile, watching, dropped_if_nobody_reads():
        job = Job(
            command_line(replace(config, hostfile=hostfile), hosts, launch_id, training),
            lambda number: signal_everywhere(over_hosts, config.ssh_port, number, launch_id),
            given=given,
        )
        exit_code = job.run()
    sys.exit(exit_code)


def split_arguments(argv: list[str]) -> tuple[list[str], list[str]]:
    """The options of the launch, and what follows from the recipe, the run or the ``--config`` on."""
    for position, argument in enumerate(argv):
        if argument in RECIPES or argument.startswith("--config") or config_path(Path(argument)).is_file():
            return argv[:position], argv[position:]
    return argv, []


def find_hosts(config: LaunchConfig) -> list[str]:
    """The hosts of the hostfile that take part; none for this machine alone.

    Raises:
        UserError: a hostfile that cannot be used, or hosts that are not in it.
    """
    if config.hostfile is None:
        # How many slots this machine has, DeepSpeed says.
        select_hosts({"localhost": 1 << 16}, config.include, config.exclude)
        return []
    slots = select_hosts(read_hostfile(config.hostfile), config.include, config.exclude)
    if config.node_rank is not None and not 0 <= config.node_rank < len(slots):
        raise UserError(f"--node-rank {config.node_rank}: hosts 0 to {len(slots) - 1} of {config.hostfile} take part")
    for host, count in slots.items():
        if config.num_accelerators > count:
            raise UserError(f"--num-accelerators {config.num_accelerators}: {host} has {count} slots")
    return list(slots)


def command_line(config: LaunchConfig, hosts: list[str], launch_id: str, training: list[str]) -> list[str]:
    """What starts DeepSpeed's launcher."""
    port = config.master_port or (USUAL_PORT if config.hostfile is not None else free_port())
    line = [sys.executable, "-u", "-m", "deepspeed.launcher.runner", "--master_port", str(port)]
    # Without a file of that name it would look for /job/hostfile.
    line += ["--hostfile", str(config.hostfile or os.devnull)]
    if config.num_accelerators:
        line += ["--num_accelerators", str(config.num_accelerators)]
    for name in ("include", "exclude"):
        if getattr(config, name):
            line += [f"--{name}", getattr(config, name)]
    if hosts:
        line += ["--master_addr", config.master_addr or hosts[0]]
    if config.node_rank is not None:
        line += ["--no_ssh", "--node_rank", str(config.node_rank)]
    elif hosts:
        line += ["--force_multi", "--no_ssh_check"]
    if config.ssh_port is not None:
        line += ["--ssh_port", str(config.ssh_port)]
    return [*line, "--module", "scalelong.train", FLAG + launch_id, *training]


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@dataclass
class Job:
    """DeepSpeed's launcher at work, watched by what it prints."""

    line: list[str]
    signal_workers: Callable[[int], int]
    """Sends a signal to the training processes; says how many there were."""
    given: str = PROGRAM
    """The command that started all this."""
    causes: list[str] = field(default_factory=list)
    """Why processes ended, the most telling first."""
    ending_since: float | None = None
    warned: bool = False
    """Whether DeepSpeed has said that it found no GPU, which each of its processes does."""
    wanted: int | None = None
    """A signal that has not been passed on yet."""
    received: int | None = None

    def run(self) -> int:
        """Trains to the end; returns the exit code."""
        append = " ".join(filter(None, [os.environ.get("PDSH_SSH_ARGS_APPEND"), NOTICE_LOST_HOST]))
        previous = {number: signal.signal(number, self._take_signal) for number in stop_signals()}
        try:
            with subprocess.Popen(
                self.line,
                env={**os.environ, GIVEN_COMMAND: self.given, "PDSH_SSH_ARGS_APPEND": append},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                errors="replace",
                # Ctrl-C on the terminal reaches the training processes through this program alone.
                start_new_session=True,
            ) as launcher:
                relays = [
                    threading.Thread(target=self._relay, args=streams)
                    for streams in ((launcher.stdout, sys.stdout), (launcher.stderr, sys.stderr))
                ]
                for relay in relays:
                    relay.start()
                self._watch(launcher)
                left_over = self._end_left_over()
                for relay in relays:
                    relay.join()
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
        return self._conclude(launcher.returncode, left_over)

    def _take_signal(self, number: int, _frame: object) -> None:
        self.wanted = self.received = number

    def _watch(self, launcher: subprocess.Popen) -> None:
        while launcher.poll() is None:
            number = self.wanted
            # Until the training processes exist there is nobody to tell.
            if number is not None and self.signal_workers(number) and self.wanted == number:
                self.wanted = None
            if self.ending_since is not None and time.monotonic() - self.ending_since > SECONDS_TO_END:
                self.signal_workers(signal.SIGKILL)
                self.ending_since = time.monotonic()
            time.sleep(0.2)

    def _end_left_over(self) -> int:
        """A launcher that was killed leaves its processes behind, which hold the pipes open: they save, then end.

        Returns:
            How many there were.
        """
        left_over = self.signal_workers(0 if self.ending_since is not None else signal.SIGTERM)
        deadline = time.monotonic() + (SECONDS_TO_SAVE if self.ending_since is None else 0.0)
        while left_over and self.signal_workers(0) and time.monotonic() < deadline:
            time.sleep(0.2)
        self.signal_workers(signal.SIGKILL)
        return left_over

    def _relay(self, source: TextIO, target: TextIO) -> None:
        for line in source:
            if not self._understands(line):
                print(line, end="", file=target, flush=True)

    def _understands(self, line: str) -> bool:
        """Takes notice of a line by the launcher itself, which is not shown."""
        ssh = SSH_ENDED.search(line)
        if ssh:
            self._begin_to_end()
            if int(ssh[2]) == 255:
                self.causes.insert(0, f"the connection to {ssh[1]} was lost")
            return True
        if NO_GPU in line:
            self.warned, again = True, self.warned
            return again
        if not OF_THE_LAUNCHER.search(line):
            return False
        if ENDS_THE_OTHERS in line:
            self._begin_to_end()
        code = EXIT_CODE.search(line)
        if code and int(code[1]) < 0:
            prefix = re.match(r"(\S+): \[", line)
            name = signal.Signals(-int(code[1])).name
            hint = ", as happens when memory runs out" if name == "SIGKILL" else ""
            self.causes.append(f"a process on {prefix[1] if prefix else 'this machine'} was killed by {name}{hint}")
        return True

    def _begin_to_end(self) -> None:
        if self.ending_since is None:
            self.ending_since = time.monotonic()

    def _conclude(self, code: int, left_over: int) -> int:
        """The exit code, after one line on what ended the job unless a training process has said it."""
        if left_over and not self.causes:
            self.causes.append("the deepspeed launcher was killed")
        if code == EXIT_SAVED_AFTER_SIGNAL or (code == 0 and not self.causes):
            return code
        if self.received is not None:
            self.causes.insert(0, f"{signal.Signals(self.received).name} came before training had begun or twice")
        if self.causes:
            print(f"error: {self.causes[0]}; the same command goes on from the last checkpoint", file=sys.stderr)
        elif code != EXIT_USER_ERROR:
            print(f"error: the deepspeed launcher ended with exit code {code}", file=sys.stderr)
        return code or 1
