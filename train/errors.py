"""Errors and warnings that a user can act on, shown as one line, never as a traceback; and how commands end on them.

Without an import, so that ``--help`` costs nothing.
"""

import os
import sys
from collections.abc import Callable

EXIT_USER_ERROR = 2
EXIT_SAVED_AFTER_SIGNAL = 75
"""EX_TEMPFAIL of sysexits.h: the run was saved and wants to be started again."""


class UserError(Exception):
    """What went wrong and what to do about it, in one line. Commands print it and exit with code 2."""


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


def run_command(main: Callable[[], None]) -> None:
    """Runs a command's main function; errors that a user can act on become one line and exit code 2."""
    try:
        main()
    except UserError as error:
        if is_main_process() or isinstance(error, RankError):
            print(f"error: {error}", file=sys.stderr)
        sys.exit(EXIT_USER_ERROR)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        # Whoever read our output, `| head` say, has seen enough; nothing may be flushed to them at exit either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
