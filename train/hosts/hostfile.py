"""The files that name the hosts of a launch and carry variables to them, and which of the hosts take part.

DeepSpeed's launcher reads them too, and ends on a mistake in a traceback: here each is one line.
"""

import codecs
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from scalelong.train.errors import UserError

# A name that begins with a hyphen would be an option of ssh, and of pdsh an exclusion.
LINE = re.compile(r"([^\s-]\S*)\s+slots=(\d+)\s*(#.*)?")
SELECTED = re.compile(r"([^@:\s-][^@:\s]*)(?::(\d+(?:,\d+)*))?")


def read_hostfile(path: Path) -> dict[str, int]:
    """Slots of each host, in the order of the file.

    Raises:
        UserError: no such file, or a line that is not ``NAME slots=NUMBER``, naming it.
    """
    slots: dict[str, int] = {}
    for number, line in enumerate(map(str.strip, _lines(path, "hostfile")), start=1):
        if not line or line.startswith("#"):
            continue
        match = LINE.fullmatch(line)
        if match is None:
            raise UserError(f"{path}, line {number}: expected 'NAME slots=NUMBER', got {line!r}")
        host, count = match[1], int(match[2])
        if host in slots:
            raise UserError(f"{path}, line {number}: {host} stands there twice")
        if count < 1:
            raise UserError(f"{path}, line {number}: {host} needs at least one slot")
        slots[host] = count
    if not slots:
        raise UserError(f"the hostfile {path} names no host")
    return slots


@contextmanager
def without_byte_order_mark(path: Path | None) -> Iterator[Path | None]:
    """The hostfile as DeepSpeed can read it: a copy without the mark that editors of other systems put first."""
    if path is None or not path.read_bytes().startswith(codecs.BOM_UTF8):
        yield path
        return
    with tempfile.NamedTemporaryFile("wb", prefix="hostfile-") as copy:
        copy.write(path.read_bytes().removeprefix(codecs.BOM_UTF8))
        copy.flush()
        yield Path(copy.name)


def select_hosts(slots: Mapping[str, int], include: str, exclude: str) -> dict[str, int]:
    """How many slots of which hosts take part, in the order of the hostfile.

    Args:
        slots: of each host.
        include: as DeepSpeed takes it, ``NAME[:SLOT,SLOT...]@NAME...``: these alone. Empty: all.
        exclude: these not. Empty: none.

    Raises:
        UserError: a part that is not of this form, a host or a slot that is not there, or nothing that is left.
    """
    flag, text = ("--include", include) if include else ("--exclude", exclude)
    if not text:
        return dict(slots)
    named: dict[str, set[int]] = {}
    for part in text.split("@"):
        match = SELECTED.fullmatch(part)
        if match is None:
            raise UserError(f"{flag} {text}: expected NAME or NAME:SLOT,SLOT, several joined by @; got {part!r}")
        host, numbers = match[1], match[2]
        if host not in slots:
            raise UserError(f"{flag} {text}: {host} is none of the hosts {', '.join(slots)}")
        chosen = set(map(int, numbers.split(","))) if numbers else set(range(slots[host]))
        if max(chosen) >= slots[host]:
            raise UserError(f"{flag} {text}: {host} has slots 0 to {slots[host] - 1}")
        named.setdefault(host, set()).update(chosen)
    taken = {host: len(named.get(host, ())) for host in slots}
    left = taken if include else {host: count - taken[host] for host, count in slots.items()}
    left = {host: count for host, count in left.items() if count}
    if not left:
        raise UserError(f"{flag} {text} leaves no host")
    return left


def check_environment_files(folder: Path, home: Path, environ: Mapping[str, str]) -> None:
    """DeepSpeed sends the variables in ``.deepspeed_env`` to all hosts, and stops on a line that is no assignment.

    The file lies at home or in the folder of the launch, or in both; DS_ENV_FILE gives it another name, or its path.

    Raises:
        UserError: such a line; or a file that DS_ENV_FILE names and that is not there.
    """
    name = environ.get("DS_ENV_FILE", ".deepspeed_env")
    paths = [path for path in dict.fromkeys((home / name, folder / name)) if path.is_file()]
    if not paths and "DS_ENV_FILE" in environ:
        raise UserError(f"DS_ENV_FILE={name}: there is no such file in {home} or {folder}")
    for path in paths:
        for number, line in enumerate(_lines(path, "variables", encoding="utf-8"), start=1):
            if not re.fullmatch(r"\s*\w+\s*=.*", line):
                raise UserError(
                    f"{path}, line {number}: expected NAME=value, no comment and no empty line; got {line!r}"
                )


def _lines(path: Path, what: str, encoding: str = "utf-8-sig") -> list[str]:
    try:
        return path.read_text(encoding=encoding).splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the {what} {path}: {getattr(error, 'strerror', error)}") from error
