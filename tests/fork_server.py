"""Forks of a process that has imported what commands need: they start in a tenth of a second instead of seven.

``running.Forked`` starts this program and asks it for others. Each has its own arguments, environment, folder and
output, may be killed at any moment, and ends as a process of its own does: the interpreter is finalised, the exit code
is that of the program. What it cannot show: how it imports, and an environment that libraries read as they are loaded.
"""

import contextlib
import gc
import importlib
import json
import os
import runpy
import selectors
import signal
import socket
import sys
import warnings
from pathlib import Path

PRELOADED = (
    "deepspeed.module_inject.auto_ep_layer",
    "deepspeed.ops.op_builder.all_ops",
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "diffusers.models.unets.unet_2d",
    "nvidia.dali.fn",
    "PIL.PngImagePlugin",
    "scalelong.train.commands.evaluate",
    "scalelong.train.hosts.launch",
    "scalelong.train.loop",
    "sklearn.datasets",
    "torch._inductor.compiler_bisector",
    "torch._inductor.metrics",
    "torch.utils.tensorboard",
)
"""Modules on the way of training and of the other commands; a package that is not installed is passed over."""
MAX_BYTES_OF_A_REQUEST = 1 << 20


def preload() -> None:
    for name in PRELOADED:
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            if (error.name or "").startswith("scalelong"):
                raise
    # Collections in the forks would copy every page that they look at.
    gc.collect()
    gc.freeze()


def serve(requests: socket.socket) -> tuple[dict, list[int]]:
    """Forks for each request and reports its process id and its exit code; returns in the forks alone.

    A request is JSON (``line``, ``env``, ``cwd``) with three descriptors: standard output, standard error, and the
    socket that is reported to. When there is nobody to ask any more, the programs that still run are killed.
    """
    with requests, selectors.DefaultSelector() as ready:
        ready.register(requests, selectors.EVENT_READ)
        while True:
            for key, _ in ready.select():
                if key.data:
                    ready.unregister(key.fd)
                    report_end(key.fd, *key.data)
                    continue
                request, descriptors, _, _ = socket.recv_fds(requests, MAX_BYTES_OF_A_REQUEST, 3)
                if not request:
                    for program in filter(None, (key.data for key in ready.get_map().values())):
                        os.kill(program[0], signal.SIGKILL)
                    sys.exit()
                assert len(os.listdir("/proc/self/task")) == 1, "threads do not survive a fork"  # noqa: PTH208
                pid = os.fork()
                if pid == 0:
                    return json.loads(request), descriptors
                *outputs, reports = descriptors
                report(reports, pid)
                for descriptor in outputs:
                    os.close(descriptor)
                ready.register(os.pidfd_open(pid), selectors.EVENT_READ, (pid, reports))


def report_end(pidfd: int, pid: int, reports: int) -> None:
    _, status = os.waitpid(pid, 0)
    report(reports, os.waitstatus_to_exitcode(status))
    os.close(pidfd)
    os.close(reports)


def report(reports: int, number: int) -> None:
    # Whoever has started the program need not wait for it.
    with contextlib.suppress(BrokenPipeError):
        os.write(reports, str(number).encode())


def become(request: dict, descriptors: list[int]) -> None:
    """Takes on the output, environment and folder that were asked for."""
    for standard, descriptor in zip((1, 2), descriptors, strict=False):
        os.dup2(descriptor, standard)
    os.closerange(3, os.sysconf("SC_OPEN_MAX"))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    import torch

    # Libraries read it when they are loaded, which they are already.
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", len(os.sched_getaffinity(0)))))


def run(line: list[str]) -> None:
    """``-m MODULE``, ``-c CODE`` or a file, with arguments, as the interpreter runs them."""
    if line[0] == "-m":
        _, module, *arguments = line
        sys.path.insert(0, str(Path.cwd()))
        sys.argv = ["-m", *arguments]
        # It says that the module has been imported before, which is what this process is for.
        warnings.filterwarnings("ignore", category=RuntimeWarning, module="runpy")
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    elif line[0] == "-c":
        _, code, *arguments = line
        sys.path.insert(0, "")
        sys.argv = ["-c", *arguments]
        exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.path.insert(0, str(Path(line[0]).parent))
        sys.argv = list(line)
        runpy.run_path(line[0], run_name="__main__")


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    preload()
    asked = serve(socket.socket(fileno=int(sys.argv[1])))
    become(*asked)
    run(asked[0]["line"])
