"""The folder in which embedded data lies once it has been written."""

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from scalelong.train.errors import UserError


def cache_folder() -> Path:
    """$SCALELONG_CACHE, else scalelong/ in $XDG_CACHE_HOME or ~/.cache."""
    if os.environ.get("SCALELONG_CACHE"):
        return Path(os.environ["SCALELONG_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "scalelong"


def written_once(name: str, write: Callable[[Path], None], *, what: str) -> Path:
    """The folder of that name in the cache, which ``write`` fills on the first call of any process.

    Args:
        write: fills an empty folder.
        what: what it writes, for messages.

    Raises:
        UserError: the cache folder cannot be written.
    """
    folder = cache_folder() / name
    if folder.is_dir():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=folder.parent))
    except OSError as error:
        raise UserError(f"cannot write {what} to {folder.parent}: {error.strerror}; set SCALELONG_CACHE") from error
    try:
        write(staging)
        staging.chmod(0o755)
        # Renamed whole, so that processes that start at the same moment never see half of it.
        staging.rename(folder)
    except OSError as error:
        if not folder.is_dir():  # else another process was first
            raise UserError(f"cannot write {what} to {folder}: {error.strerror}; set SCALELONG_CACHE") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return folder
