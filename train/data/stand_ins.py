"""Bad images never stop a run: each is replaced by a sound one, by a rule that depends on the image's number alone.

Whether an image is sound is decided by its bytes and by Pillow, whoever decodes it later, so that every reader on every
rank, of any number, shows the same image at the same position.
"""

import errno
import io
import json
import os
import struct
import threading
import zlib
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np
from PIL import Image, ImageOps

from scalelong.train.data.images import decode_image
from scalelong.train.data.order import Stream, generator
from scalelong.train.data.source import ImageSource
from scalelong.train.errors import RankError, UserError

# What Pillow raises for a file that is no whole image, or too large a one; mutated files bring out all of these.
IMAGE_ERRORS = (
    *(OSError, ValueError, SyntaxError, TypeError, ArithmeticError, LookupError, EOFError, MemoryError),
    *(struct.error, zlib.error, Image.DecompressionBombError),
)
# What reading a file gives when its folder, disk or server has gone since the files were listed.
VANISHED = frozenset(
    {errno.ENOENT, errno.ENOTDIR, errno.ENODEV, errno.ENXIO, errno.ENOTCONN, errno.ESTALE, errno.EHOSTDOWN}
)
# Among so many images drawn at random, one is sound unless hardly any are.
MAX_STAND_INS = 100

ORIENTATION = 0x0112

UNKNOWN, BAD, SOUND, UNUSUAL = range(4)

FILE_NAME = "bad_samples.jsonl"


@dataclass(frozen=True, order=True)
class BadImage:
    """An image that cannot be decoded."""

    index: int
    key: str
    reason: str

    def __str__(self) -> str:
        return f"{self.key} ({self.reason})"


class SoundImages:
    """A source whose bad images are replaced: image i by the first sound one of a fixed random walk that starts at i.

    Each image is checked when it is first read. Label and bytes are always those of the same image. An image that has
    vanished is not bad: the run has to stop, because it could not go on as it was once the data is back.

    Args:
        channels: 1 or 3, of the decoded images.
    """

    holds: Literal["images"] = "images"

    def __init__(self, source: ImageSource, channels: int):
        self.source, self.channels = source, channels
        self.class_names = source.class_names
        self._verdicts = np.full(len(source), UNKNOWN, dtype=np.uint8)
        self._found: list[BadImage] = []
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self.source)

    def fingerprint(self) -> str:
        return self.source.fingerprint()

    def key(self, index: int) -> str:
        return self.source.key(self.shown(index))

    def label(self, index: int) -> int:
        return self.source.label(self.shown(index))

    def read(self, index: int) -> bytes:
        return self._find(index)[1]

    def shown(self, index: int) -> int:
        """The number of the image that stands at ``index``: its own, unless it is bad."""
        return index if self._verdicts[index] >= SOUND else self._find(index)[0]

    def read_for_decoder(self, index: int) -> bytes:
        """As ``read``, but decoded already if decoders read its kind differently: 16 bits, palette, alpha, CMYK, ..."""
        shown, data = self._find(index)
        if self._verdicts[shown] == SOUND:
            return data
        # A portable anymap: pixels behind a short header, which every decoder takes.
        image = self.image(shown)
        header = f"P{5 if self.channels == 1 else 6} {image.width} {image.height} 255\n"
        return header.encode() + image.tobytes()

    def decode_with_pillow(self, index: int) -> None:
        """From now on ``read_for_decoder`` gives the image at ``index`` decoded: another decoder refuses it."""
        self._verdicts[self.shown(index)] = UNUSUAL

    def image(self, index: int) -> Image.Image:
        """Decoded, upright, grey or RGB.

        Raises:
            RankError: as good as all images are bad, or one has vanished.
        """
        while True:
            shown, data = self._find(index)
            try:
                return decode_image(data, self.channels)
            except IMAGE_ERRORS as error:  # it was sound when it was checked
                self._condemn(shown, error)

    def check(self, indices: Iterable[int], num_threads: int) -> list[BadImage]:
        """Checks images ahead of reading them; returns the bad ones, which ``take_found`` gives as well."""
        with ThreadPoolExecutor(max(num_threads, 1)) as pool:
            list(pool.map(self._read_if_sound, indices))
        return list(self._found)

    def take_found(self) -> list[BadImage]:
        """The bad images found since the last call."""
        with self._lock:
            found, self._found = self._found, []
        return found

    def _find(self, index: int) -> tuple[int, bytes]:
        for candidate in _walk(index, len(self)):
            data = self._read_if_sound(candidate)
            if data is not None:
                return candidate, data
        raise RankError(f"{MAX_STAND_INS} images in a row cannot be decoded, {self.source.key(index)} the first")

    def _read_if_sound(self, index: int) -> bytes | None:
        if self._verdicts[index] == BAD:
            return None
        try:
            data = self.source.read(index)
            if self._verdicts[index] == UNKNOWN:
                self._verdicts[index] = SOUND if check_image(data) else UNUSUAL
            return data
        except IMAGE_ERRORS as error:
            if isinstance(error, OSError) and error.errno in VANISHED:
                key = self.source.key(index)
                raise RankError(
                    f"{key} has vanished ({error.strerror}); with it back, the same command goes on"
                ) from error
            self._condemn(index, error)
            return None

    def _condemn(self, index: int, error: Exception) -> None:
        with self._lock:
            if self._verdicts[index] != BAD:
                self._verdicts[index] = BAD
                self._found.append(BadImage(index, self.source.key(index), describe_image_error(error)))


def _walk(index: int, num_images: int) -> Iterator[int]:
    yield index
    # Not the neighbours: what broke one file of a folder has often broken the next ones too.
    yield from map(int, generator(0, Stream.STAND_IN, index).integers(num_images, size=MAX_STAND_INS))


def check_image(data: bytes) -> bool:
    """Whether any decoder reads these bytes alike: grey or RGB in 8 bits, upright, as a JPEG or a PNG.

    A JPEG is read to its end but made at an eighth of its size, which takes 60 % of the time of decoding it.

    Raises:
        IMAGE_ERRORS: no whole image.
    """
    if not data:
        raise ValueError("the file is empty")
    image = Image.open(io.BytesIO(data))
    is_usual = image.format in ("JPEG", "PNG") and image.mode in ("L", "RGB") and "transparency" not in image.info
    if image.format == "JPEG":
        image.draft("L", (1, 1))
    image.load()
    orientation = image.getexif().get(ORIENTATION, 1)
    ImageOps.exif_transpose(image)
    return is_usual and orientation == 1


def describe_image_error(error: Exception) -> str:
    # Pillow names the in-memory file it read, which tells nobody anything.
    if "cannot identify image file" in str(error):
        return "no image format that Pillow knows"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split()) or type(error).__name__


def spread_indices(num_images: int, at_most: int, *, rank: int = 0, world_size: int = 1) -> list[int]:
    """Up to ``at_most`` numbers of images, spread evenly, each rank its share."""
    return np.linspace(0, num_images - 1, min(at_most, num_images)).astype(int)[rank::world_size].tolist()


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
