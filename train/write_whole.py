"""Files that are whole or not there: written aside, synced, then renamed."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def write_whole(path: Path, data: bytes) -> None:
    """Writes a file so that readers, and whoever comes after a crash, find the new bytes or the old, never a part.

    Raises:
        OSError: it cannot be written; what stood there before stays.
    """
    with staged(path) as staging:
        staging.write_bytes(data)


@contextmanager
def staged(path: Path) -> Iterator[Path]:
    """The same for whoever writes the file bit by bit: gives the path to write to, which takes its place at the end.

    It bears the number of this process, so that two that write the same file do not write into each other's. After an
    error it is removed; if the writer has removed it, nothing takes a place.
    """
    staging = path.with_name(f".{path.name}.{os.getpid()}.writing")
    try:
        yield staging
        if not staging.exists():
            return
        sync(staging)
        staging.rename(path)
    except BaseException:
        staging.unlink(missing_ok=True)
        raise
    # The new name lasts once the folder is on the disk too.
    sync(path.parent)


def is_staging(path: Path, name: str) -> bool:
    """Whether a file is what a process that was killed while it wrote ``name`` has left behind."""
    return path.name.startswith(f".{name}.") and path.name.endswith(".writing")


def remove_left_over(folder: Path) -> None:
    """Removes what processes that were killed have left in a folder that nobody else writes to."""
    for path in folder.glob(".*.writing"):
        if path.is_file():
            path.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Waits until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
