"""Archives that are not read as they are, and how each is unpacked."""

import shlex
from pathlib import Path

from scalelong.train.errors import UserError

UNPACK = {
    ".zip": "unzip -q {archive} -d {folder}",
    **dict.fromkeys(
        (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst"),
        "mkdir -p {folder} && tar -xf {archive} -C {folder}",
    ),
}


def refuse_archives(path: Path) -> None:
    """Raises UserError, naming the commands that make a source of it, for an archive, or a folder with one in it.

    Tars as they are belong to shards.
    """
    found = [path] if path.is_file() else sorted(path.iterdir()) if path.is_dir() else []
    for archive in found:
        suffix = archive_suffix(archive.name)
        if suffix and suffix != ".tar" and archive.is_file():
            folder = archive.with_name(archive.name[: -len(suffix)])
            unpack = UNPACK[suffix].format(archive=shlex.quote(str(archive)), folder=shlex.quote(str(folder)))
            raise UserError(
                f"{archive} is an archive, which cannot be read by number; make shards of it: {unpack} && "
                f"scalelong prepare {shlex.quote(str(folder))} OUT"
            )


def archive_suffix(name: str) -> str:
    """Which of UNPACK's it bears; "" if none."""
    hidden = name.startswith(".")
    return next((suffix for suffix in UNPACK if name.lower().endswith(suffix)), "") if not hidden else ""
