"""Tar shards in the layout of WebDataset: a sample's files stand together and share the name up to the first dot.

Tar has no table of contents, so beside each shard lies an index (``SHARD.tar.index.npz``), which makes any image one
read at a known place. Labels come from ``NAME.cls`` or, where there is none, from a field of ``NAME.json``. Of members
that bear one name the last counts, as when the tar is unpacked. Names of classes, if any, stand in ``dataset.json``.
"""

import hashlib
import json
import os
import re
import tarfile
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from scalelong.train.data.archives import refuse_archives
from scalelong.train.data.images import IMAGE_SUFFIXES
from scalelong.train.errors import UserError
from scalelong.train.write_whole import staged

INDEX_SUFFIX = ".index.npz"
DESCRIPTION = "dataset.json"
NO_LABEL = -1
MAX_CLASSES = 1_000_000
# What NumPy and zipfile raise for a file that is no whole archive of arrays.
INDEX_ERRORS = (
    *(OSError, ValueError, KeyError, TypeError, EOFError, SyntaxError, ArithmeticError, MemoryError, RuntimeError),
    *(zipfile.BadZipFile, zlib.error),
)


@dataclass(frozen=True)
class ShardIndex:
    """Where the N images of a shard lie."""

    tar_bytes: int
    """Size of the shard, which says whether the index is of these bytes."""
    keys: np.ndarray
    """Names of the samples, UTF-8."""
    offsets: np.ndarray
    sizes: np.ndarray
    labels: np.ndarray
    """All NO_LABEL, or none."""
    label_field: str = "label"
    """Of the .json files, which labels came from."""

    def check(self) -> None:
        """Raises ValueError where the arrays cannot be the places of images in the shard."""
        numbers = (self.offsets, self.sizes, self.labels)
        if self.keys.dtype.kind != "S" or any(array.dtype.kind != "i" for array in numbers):
            raise ValueError("its arrays are of other kinds")
        if self.keys.ndim != 1 or any(array.shape != self.keys.shape for array in numbers):
            raise ValueError("its arrays differ in length")
        if not len(self.keys):
            return
        if min(self.offsets.min(), self.sizes.min()) < 0 or (self.offsets + self.sizes).max() > self.tar_bytes:
            raise ValueError("it names places outside the shard")
        if not NO_LABEL <= self.labels.min() <= self.labels.max() < MAX_CLASSES:
            raise ValueError("it holds labels out of range")

    def agrees_with(self, other: "ShardIndex") -> bool:
        """Whether both name the same images, places and labels."""
        return all(np.array_equal(mine, vars(other)[name]) for name, mine in vars(self).items())

    def save(self, shard: Path) -> None:
        with staged(index_path(shard)) as staging, staging.open("wb") as file:
            np.savez(file, **vars(self))


def index_path(shard: Path) -> Path:
    return shard.with_name(shard.name + INDEX_SUFFIX)


def find_shards(path: Path) -> list[Path]:
    """A tar itself, or those in a folder."""
    if path.is_file() and path.suffix == ".tar":
        return [path]
    return sorted(p for p in path.glob("*.tar") if not p.name.startswith(".")) if path.is_dir() else []


def is_webdataset(path: Path) -> bool:
    return bool(find_shards(path))


class WebDataset:
    """The images of all shards, in the order of the shards' names.

    Raises:
        UserError: a shard without an index or with one of another file, or labels for a part of the images alone.
    """

    holds: Literal["images"] = "images"

    def __init__(self, path: Path):
        self.path, self._shards = path, find_shards(path)
        refuse_archives(path)
        indices = [load_index(shard, path) for shard in self._shards]
        self._shard_of = np.repeat(np.arange(len(indices)), [len(index.keys) for index in indices])
        self._keys = np.concatenate([index.keys for index in indices])
        self._offsets, self._sizes, self._labels = (
            np.concatenate([getattr(index, name) for index in indices]) for name in ("offsets", "sizes", "labels")
        )
        if not len(self._keys):
            raise UserError(f"no images in the shards of {path}")
        self.class_names = self._class_names()

    def _class_names(self) -> list[str]:
        unlabelled = int((self._labels == NO_LABEL).sum())
        if unlabelled == len(self._labels):
            return []
        if unlabelled:
            raise UserError(f"{unlabelled:,} of the {len(self._labels):,} images in {self.path} have no label")
        names = read_class_names(self.path)
        count = int(self._labels.max()) + 1
        if names and count > len(names):
            raise UserError(f"{self.path} has labels up to {count - 1} and names for {len(names)} classes")
        return names or [str(label) for label in range(count)]

    def __len__(self) -> int:
        return len(self._keys)

    def read(self, index: int) -> bytes:
        size = int(self._sizes[index])
        # Opened each time: there may be more shards than a process may hold open, and threads share nothing.
        file = os.open(self._shards[self._shard_of[index]], os.O_RDONLY)
        try:
            data = os.pread(file, size, int(self._offsets[index]))
        finally:
            os.close(file)
        if len(data) < size:
            raise OSError("the shard ends within the image")
        return data

    def label(self, index: int) -> int:
        return max(int(self._labels[index]), 0)

    def key(self, index: int) -> str:
        return f"{self._shards[self._shard_of[index]]}: {self._keys[index].decode()}"

    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        for array in (self._shard_of, self._keys, self._sizes, self._labels):
            digest.update(f"{array.dtype}{array.shape}".encode() + array.tobytes())
        return digest.hexdigest()


def load_index(shard: Path, path: Path) -> ShardIndex:
    """Raises UserError, naming the command that makes it, where a shard has no index or one of other bytes."""
    remedy = f"make it with: scalelong prepare {path}"
    try:
        with np.load(index_path(shard), allow_pickle=False) as arrays:
            found: dict[str, Any] = dict(arrays)
        found["tar_bytes"] = int(found["tar_bytes"])
        found["label_field"] = str(found.get("label_field", "label"))
        index = ShardIndex(**found)
        index.check()
    except FileNotFoundError:
        raise UserError(f"{shard} has no index; {remedy}") from None
    except INDEX_ERRORS as error:
        raise UserError(f"the index of {shard} cannot be read ({error}); {remedy}") from error
    if index.tar_bytes != shard.stat().st_size:
        raise UserError(f"the index of {shard} is of another file; {remedy}")
    # A copy may be newer than the index that came with it, so the shard itself is asked.
    is_newer = shard.stat().st_mtime_ns > index_path(shard).stat().st_mtime_ns
    if is_newer and not make_index(shard, index.label_field).agrees_with(index):
        raise UserError(f"{shard} has changed since its index was made; {remedy}")
    return index


def make_index(shard: Path, label_field: str = "label") -> ShardIndex:
    """Reads the shard once from end to end.

    Raises:
        UserError: no whole tar, a label that is no whole number from 0 on, or images that would be left out.
    """
    images, labels = _list_members(shard)
    label_of = _read_labels(shard, labels, label_field)
    if left_over := sorted(label_of.keys() - images.keys()):
        raise UserError(f"{shard}: {left_over[0]} has a label and no image ({', '.join(sorted(IMAGE_SUFFIXES))})")
    size = shard.stat().st_size
    if any(offset + length > size for offset, length in images.values()):
        raise UserError(f"{shard} is no whole tar: it ends within an image")
    places = np.array(list(images.values()), dtype=np.int64).reshape(-1, 2)
    return ShardIndex(
        tar_bytes=size,
        keys=np.array([key.encode(errors="surrogateescape") for key in images], dtype=np.bytes_),
        offsets=places[:, 0],
        sizes=places[:, 1],
        labels=np.array([label_of.get(key, NO_LABEL) for key in images], dtype=np.int64),
        label_field=label_field,
    )


def _list_members(shard: Path) -> tuple[dict[str, tuple[int, int]], dict[str, bytes]]:
    """Place and size of each sample's image; and what each file with a label holds, by its name.

    Raises:
        UserError: no whole tar, a sample of two images, or an image whose name hides it.
    """
    places: dict[str, tuple[str, str, int, int]] = {}
    labels: dict[str, bytes] = {}
    try:
        with tarfile.open(shard, "r:") as tar:
            for member in tar:
                if not member.isfile():
                    continue
                key, suffix = _split_name(member.name)
                if Path(f"x{suffix}").suffix in IMAGE_SUFFIXES:
                    places[member.name] = key, suffix, member.offset_data, member.size
                elif suffix in (".cls", ".json"):
                    file = tar.extractfile(member)
                    assert file is not None, "it is a file"
                    labels[member.name] = file.read()
    except (tarfile.TarError, EOFError, OSError) as error:
        raise UserError(f"{shard} is no whole tar: {error}") from error
    named: dict[str, str] = {}
    images: dict[str, tuple[int, int]] = {}
    for name, (key, suffix, offset, size) in places.items():
        if suffix not in IMAGE_SUFFIXES:
            continue
        if key in named:
            raise UserError(f"{shard}: {named[key]} and {name} are two images of one sample; a sample has one")
        named[key], images[key] = name, (offset, size)
    for name, (key, _, _, _) in places.items():
        if key not in named:
            raise UserError(
                f"{shard}: the name of {name} has a dot before that of its suffix, where a sample's own name ends; "
                f"unpack it and make shards of the folder: scalelong prepare FOLDER OUT"
            )
    return images, labels


def _split_name(name: str) -> tuple[str, str]:
    """The sample that a member belongs to, and which of its files it is, in small letters."""
    folder, _, name = name.rpartition("/")
    stem, _, extension = name.partition(".")
    return f"{folder}/{stem}" if folder else stem, f".{extension.lower()}"


def _read_labels(shard: Path, files: dict[str, bytes], field: str) -> dict[str, int]:
    """Labels by sample; a .cls counts before a .json."""
    found: dict[str, int] = {}
    for name, data in sorted(files.items(), key=lambda item: _split_name(item[0])[1] == ".cls"):
        key, suffix = _split_name(name)
        label = _label(data, suffix, field, f"{shard}: {name}")
        if label is not None:
            found[key] = label
    return found


def _label(data: bytes, suffix: str, field: str, where: str) -> int | None:
    try:
        text = data.decode("utf-8-sig")
        value = text if suffix == ".cls" else json.loads(text)
        if isinstance(value, dict):
            if field not in value:
                return None
            value = value[field]
        label = whole_number(value)
    except (ValueError, RecursionError):
        label = NO_LABEL
    if not 0 <= label < MAX_CLASSES:
        raise UserError(f"{where} holds no label, a whole number from 0 on")
    return label


def whole_number(value: Any) -> int:
    """A number that is one, or its digits; 3.0 is 3.

    Raises:
        ValueError: something else, true and 3.7 among it.
    """
    if isinstance(value, str) and re.fullmatch(r"\s*[0-9]+\s*", value, re.ASCII):
        return int(value)
    if isinstance(value, bool) or not isinstance(value, int | float) or value != value // 1:
        raise ValueError(f"{value!r} is no whole number")
    return int(value)


def read_class_names(path: Path) -> list[str]:
    """Those in ``dataset.json``; none where there is no such file."""
    description = (path if path.is_dir() else path.parent) / DESCRIPTION
    try:
        names = json.loads(description.read_text()).get("class_names", [])
        if not isinstance(names, list):
            raise ValueError("class_names is no list")
        return [str(name) for name in names]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, AttributeError, TypeError, RecursionError) as error:
        raise UserError(f"{description} is damaged: {error}") from error


def unfinished_path(folder: Path) -> Path:
    """Stands in a folder that is being prepared."""
    return folder / ".preparing.json"


def check_is_finished(path: Path) -> None:
    """Raises UserError where the folder is not prepared to its end."""
    if path.is_dir() and unfinished_path(path).exists():
        raise UserError(f"{path} is not prepared to its end; run the same prepare command again")
