"""What must hold on every host of a run, asked before training starts.

``python -m scalelong.train.hosts.preflight`` answers, without an import of torch or DeepSpeed: within a second.
"""

import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import scalelong
from scalelong.train.errors import UserError

MARK = "scalelong-preflight "
"""Before the answer, so that a host's greeting is told from it."""
LOCK_SECONDS = 1800
SSH_SECONDS = 20
INSTALLED = ("torch", "deepspeed")
COMPILERS = ("gcc", "clang", "cc")
NVIDIA_DRIVER = Path("/proc/driver/nvidia")


def check_hosts(hosts: list[str], ssh_port: int | None, warn: Callable[[str], None]) -> None:
    """Every host answers over ssh, from the same folder with the same Python, with the same versions as here.

    Raises:
        UserError: pdsh is not installed here, or what is wrong with which host.
    """
    for program in ("ssh", "pdsh"):
        if shutil.which(program) is None:
            raise UserError(f"{program} is not installed on this machine; or start each host by itself: --node-rank")
    with ThreadPoolExecutor(min(len(hosts), 32)) as pool:
        answers = list(pool.map(lambda host: ask(host, ssh_port), hosts))
    versions = [(host, answer["versions"]) for host, answer in zip(hosts, answers, strict=True)]
    check_versions([("this machine", installed_versions()), *versions])
    for host, answer in zip(hosts, answers, strict=True):
        if answer["lacks_compiler"]:
            raise UserError(f"{host} has GPUs and no C compiler, which Triton needs: install gcc or clang, or set CC")
        for lock in answer["stale_locks"]:
            warn(f"{host}: {lock} is left from a build that was killed; whoever needs that extension waits for ever")


def check_versions(versions_of_hosts: list[tuple[str, dict[str, str]]]) -> None:
    """Every host has what the first has.

    Raises:
        UserError: the first that has something else.
    """
    (first, expected), *others = versions_of_hosts
    for host, versions in others:
        for what, version_there in expected.items():
            if versions.get(what) != version_there:
                raise UserError(f"{host} has {what} {versions.get(what)}, {first} has {version_there}")


def ask(host: str, ssh_port: int | None) -> dict:
    """What ``describe_host`` says on another host.

    Raises:
        UserError: it cannot be reached, has no such folder, or no such Python.
    """
    done = over_ssh(host, ssh_port, "scalelong.train.hosts.preflight")
    for answer in done.stdout.splitlines():
        if answer.startswith(MARK):
            return json.loads(answer.removeprefix(MARK))
    cause = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
    what = "cannot be reached over ssh" if done.returncode == 255 else f"cannot run {sys.executable} in {Path.cwd()}"
    raise UserError(f"{host} {what}: {cause}")


def over_ssh(host: str, ssh_port: int | None, module: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs a module of ours on another host, in this folder with this Python, as DeepSpeed starts the run there.

    Raises:
        UserError: no answer in time.
    """
    port = ["-p", str(ssh_port)] if ssh_port is not None else []
    line = ["ssh", "-o", "BatchMode=yes", "-o", f"ConnectTimeout={SSH_SECONDS // 2}", *port, "--", host]
    path = ":".join(filter(None, [str(Path.cwd()), os.environ.get("PYTHONPATH")]))
    python = shlex.join([f"PYTHONPATH={path}", sys.executable, "-m", module, *arguments])
    line.append(f"cd {shlex.quote(str(Path.cwd()))} && env {python}")
    try:
        return subprocess.run(line, capture_output=True, text=True, timeout=SSH_SECONDS, stdin=subprocess.DEVNULL)
    except subprocess.TimeoutExpired:
        raise UserError(f"{host} did not answer over ssh within {SSH_SECONDS} s") from None


def describe_host() -> dict:
    """Versions that must agree, whether kernels can be compiled, and locks that killed builds have left behind."""
    return {
        "versions": installed_versions(),
        "lacks_compiler": NVIDIA_DRIVER.exists() and not has_compiler(),
        "stale_locks": [str(path) for path in stale_locks(Path.home(), time.time())],
    }


def installed_versions() -> dict[str, str]:
    """What must be the same on all hosts."""
    versions = {"python": platform.python_version(), "scalelong": scalelong.__version__}
    return versions | {package: installed_version(package) for package in INSTALLED}


def has_compiler() -> bool:
    """Whether Triton finds a C compiler, which it needs for each kernel's launcher."""
    return any(shutil.which(name) for name in (os.environ.get("CC", ""), *COMPILERS) if name)


def installed_version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def stale_locks(home: Path, now: float) -> Iterator[Path]:
    """Locks older than any build takes: torch waits for ever for the process that has left one."""
    for path in home.glob(".cache/torch_extensions/*/*/lock"):
        if now - path.stat().st_mtime > LOCK_SECONDS:
            yield path


if __name__ == "__main__":
    print(MARK + json.dumps(describe_host()))
