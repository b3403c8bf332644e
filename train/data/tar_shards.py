"""Tar shards in the layout of WebDataset: a sample's files stand together and share the name up to the first dot.

Tar has no table of contents, so beside each shard lies an index (``SHARD.tar.index.npz``), which makes any image one
read at a known place. Labels come from ``NAME.cls`` or from a field of ``NAME.json``. Names of classes, if any, stand
in ``dataset.json``.
"""

import hashlib
import json
import os
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from scalelong.train.data.images import IMAGE_SUFFIXES
from scalelong.train.errors import UserError
from scalelong.train.write_whole import staged

INDEX_SUFFIX = ".index.npz"
DESCRIPTION = "dataset.json"
NO_LABEL = -1
MAX_CLASSES = 1_000_000


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
            index = ShardIndex(tar_bytes=int(arrays["tar_bytes"]), **{n: arrays[n] for n in arrays if n != "tar_bytes"})
    except FileNotFoundError:
        raise UserError(f"{shard} has no index; {remedy}") from None
    except (OSError, ValueError, KeyError, TypeError, EOFError) as error:
        raise UserError(f"the index of {shard} cannot be read ({error}); {remedy}") from error
    if index.tar_bytes != shard.stat().st_size:
        raise UserError(f"the index of {shard} is of another file; {remedy}")
    return index


def make_index(shard: Path, label_field: str = "label") -> ShardIndex:
    """Reads the shard once from end to end.

    Raises:
        UserError: no whole tar, or a label that is no whole number from 0 on.
    """
    images: dict[str, tuple[int, int]] = {}
    labels: dict[str, int] = {}
    try:
        with tarfile.open(shard, "r:") as tar:
            for member in tar:
                folder, _, name = member.name.rpartition("/")
                stem, _, extension = name.partition(".")
                key, suffix = f"{folder}/{stem}" if folder else stem, f".{extension.lower()}"
                if not member.isfile():
                    continue
                if suffix in IMAGE_SUFFIXES:
                    images.setdefault(key, (member.offset_data, member.size))
                elif suffix in (".cls", ".json"):
                    file = tar.extractfile(member)
                    assert file is not None, "it is a file"
                    label = _label(file.read(), suffix, label_field, f"{shard}: {member.name}")
                    if label is not None:
                        labels[key] = label
    except (tarfile.TarError, EOFError, OSError) as error:
        raise UserError(f"{shard} is no whole tar: {error}") from error
    size = shard.stat().st_size
    if any(offset + length > size for offset, length in images.values()):
        raise UserError(f"{shard} is no whole tar: it ends within an image")
    places = np.array(list(images.values()), dtype=np.int64).reshape(-1, 2)
    return ShardIndex(
        tar_bytes=size,
        keys=np.array([key.encode() for key in images], dtype=np.bytes_),
        offsets=places[:, 0],
        sizes=places[:, 1],
        labels=np.array([labels.get(key, NO_LABEL) for key in images], dtype=np.int64),
    )


def _label(data: bytes, suffix: str, field: str, where: str) -> int | None:
    try:
        value = data.decode() if suffix == ".cls" else json.loads(data)
        if isinstance(value, dict):
            if field not in value:
                return None
            value = value[field]
        label = int(value)
    except (ValueError, TypeError):
        label = NO_LABEL
    if not 0 <= label < MAX_CLASSES:
        raise UserError(f"{where} holds no label, a whole number from 0 on")
    return label


def read_class_names(path: Path) -> list[str]:
    """Those in ``dataset.json``; none where there is no such file."""
    description = (path if path.is_dir() else path.parent) / DESCRIPTION
    try:
        return [str(name) for name in json.loads(description.read_text()).get("class_names", [])]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise UserError(f"{description} is damaged: {error}") from error


def unfinished_path(folder: Path) -> Path:
    """Stands in a folder that is being prepared."""
    return folder / ".preparing.json"


def check_is_finished(path: Path) -> None:
    """Raises UserError where the folder is not prepared to its end."""
    if path.is_dir() and unfinished_path(path).exists():
        raise UserError(f"{path} is not prepared to its end; run the same prepare command again")
