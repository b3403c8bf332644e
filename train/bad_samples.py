"""``bad_samples.jsonl``: the images that were left out, each once with its reason."""

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import BinaryIO

from scalelong.train.data_sound import BadImage
from scalelong.train.errors import UserError

FILE_NAME = "bad_samples.jsonl"


class BadSamples:
    """The bad images of a run, all ranks together; the count stops the run that has too many.

    Args:
        known: those that were found before the run was resumed.
        max_share: of the source's images.
    """

    def __init__(self, num_images: int, max_share: float, known: Iterable[BadImage] = ()):
        self.num_images, self.max_share = num_images, max_share
        self._by_index = {bad.index: bad for bad in known}

    def __len__(self) -> int:
        return len(self._by_index)

    def __iter__(self) -> Iterator[BadImage]:
        return iter(self._by_index.values())

    def add(self, found: Iterable[BadImage]) -> list[BadImage]:
        """Takes them up; returns those that were not known yet."""
        new = {bad.index: bad for bad in sorted(found) if bad.index not in self._by_index}
        self._by_index |= new
        return list(new.values())

    def check_share(self) -> None:
        """Raises UserError where more than ``max_share`` of the images are bad."""
        if len(self) <= self.max_share * self.num_images:
            return
        bad = list(self)
        named = ", ".join(map(str, bad[:3])) + (f" and {len(bad) - 3} more" if len(bad) > 3 else "")
        raise UserError(
            f"{len(bad):,} of {self.num_images:,} images cannot be decoded, more than --data.max-bad-share "
            f"{self.max_share:g} allows: {named}"
        )


def _ends_a_line(file: BinaryIO) -> bool:
    file.seek(-1, os.SEEK_END)
    return file.read(1) == b"\n"


def read_bad_samples(folder: Path) -> list[BadImage]:
    """What ``append_bad_samples`` wrote; a last line that was cut off is left out."""
    path = folder / FILE_NAME
    found = []
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            found.append(BadImage(**json.loads(line)))
        except (json.JSONDecodeError, TypeError):
            continue
    return found


def append_bad_samples(folder: Path, bad: Iterable[BadImage]) -> None:
    """Raises UserError where the file cannot be written."""
    lines = "".join(json.dumps(asdict(image)) + "\n" for image in bad)
    if not lines:
        return
    try:
        with (folder / FILE_NAME).open("a+b") as file:
            if file.tell() and not _ends_a_line(file):
                file.write(b"\n")
            file.write(lines.encode())
    except OSError as error:
        raise UserError(f"cannot write {folder / FILE_NAME}: {error.strerror}") from error
