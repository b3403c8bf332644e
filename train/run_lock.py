"""One start at a time in a run folder: a lock that the main process holds for as long as it lives."""

import contextlib
import errno
import fcntl
import os
import socket
import time
from pathlib import Path

from scalelong.train.errors import UserError, warn
from scalelong.train.run_folder import config_path, lock_path

NO_LOCKS_HERE = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)

TRIES, SECONDS_BETWEEN_TRIES = 3, 0.05

_held: set[int] = set()


def _let_go_in_a_child() -> None:
    """A forked child would hold locks on for as long as it lives; programs that are started do not inherit them."""
    while _held:  # forgotten as well: a child of the child may have other files by these numbers
        os.close(_held.pop())


os.register_at_fork(after_in_child=_let_go_in_a_child)


def is_locked(run: Path) -> bool | None:
    """Whether a start trains in a run folder now, on whatever host; None where its file system cannot say."""
    try:
        descriptor = os.open(lock_path(run), os.O_RDONLY)
    except FileNotFoundError:
        return False
    except OSError:
        return None
    try:
        # Shared, so that readers do not take each other for a start, and let go at once.
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return None
    finally:
        os.close(descriptor)
    return False


def _lock(descriptor: int) -> None:
    """Raises BlockingIOError if another start holds the lock, for longer than ``is_locked`` looks at it."""
    for _ in range(TRIES):
        try:
            return fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(SECONDS_BETWEEN_TRIES)
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


class RunLock:
    """While entered, and once taken, keeps other starts out of a run folder; whoever only reads there needs none.

    The kernel gives it up with the process, however that ends: what a dead start leaves behind is no lock.
    """

    def __init__(self, run: Path):
        self.run = run
        self._descriptor: int | None = None

    def __enter__(self) -> "RunLock":
        return self

    def __exit__(self, *_: object) -> None:
        if self._descriptor in _held:
            _held.remove(self._descriptor)
            os.close(self._descriptor)
        self._descriptor = None

    def take_if_there(self) -> None:
        """Takes the lock of a run that has been started before; nothing is written elsewhere.

        Raises:
            UserError: another start has it.
        """
        # A finished run may stand where nobody may write; whoever goes on with one will meet the error.
        if config_path(self.run).is_file():
            with contextlib.suppress(OSError):
                self._take()

    def take(self, *, is_new: bool) -> None:
        """Takes it if that has not been done, and makes the run folder.

        Args:
            is_new: whether there was no run when this start looked.

        Raises:
            UserError: another start has it, or has been here meanwhile; or the folder cannot be written.
        """
        try:
            if self._descriptor is not None:
                return
            self.run.mkdir(parents=True, exist_ok=True)
            self._take()
        except OSError as error:
            raise UserError(f"cannot write to the run folder {self.run}: {error.strerror}") from error
        if is_new and config_path(self.run).is_file():
            raise UserError(f"{self.run} has just been made by another start; start again to go on with it")

    def _take(self) -> None:
        descriptor = os.open(lock_path(self.run), os.O_RDWR | os.O_CREAT, 0o666)
        try:
            _lock(descriptor)
        except BlockingIOError:
            holder = os.pread(descriptor, 1000, 0).decode(errors="replace").strip() or "another process"
            os.close(descriptor)
            raise UserError(f"{self.run} is in use: {holder} trains there; stop it, or take another --run") from None
        except OSError as error:
            if error.errno not in NO_LOCKS_HERE:
                os.close(descriptor)
                raise
            warn(f"the file system of {self.run} has no locks: see to it that nothing else trains there")
        self._descriptor = descriptor
        _held.add(descriptor)
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
