"""CIFAR-10 as published: the Python or the binary version, as its archive or unpacked.

A. Krizhevsky, Learning Multiple Layers of Features from Tiny Images (2009). The batches of the Python version are
pickles, and reading a pickle may run any code that it names: here only what builds an array of numbers can be named.
"""

import hashlib
import io
import pickle
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np

from scalelong.train.errors import UserError

CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
FOLDERS = ("cifar-10-batches-py", "cifar-10-batches-bin")
ARCHIVES = ("cifar-10-python.tar.gz", "cifar-10-binary.tar.gz")
BATCHES = {"train": [f"data_batch_{n}" for n in range(1, 6)], "test": ["test_batch"]}
SIZE, PIXEL_BYTES = 32, 3 * 32 * 32
# As every pickle of NumPy 1 and 2 names them.
ARRAY_PARTS = {
    **dict.fromkeys([("numpy.core.multiarray", "_reconstruct"), ("numpy._core.multiarray", "_reconstruct")]),
    **dict.fromkeys([("numpy", "ndarray"), ("numpy", "dtype")]),
}


class Cifar10:
    """The 50,000 images for training or the 10,000 for testing, held in memory.

    Raises:
        UserError: files are missing or are not what they should be.
    """

    holds: Literal["images"] = "images"

    def __init__(self, path: Path, split: str = "train"):
        self.path, self.split, self.class_names = path, split, list(CLASSES)
        batches = _read_batches(path, BATCHES[split])
        self._pixels = np.concatenate([pixels for pixels, _ in batches])
        self._labels = np.concatenate([labels for _, labels in batches])

    def __len__(self) -> int:
        return len(self._pixels)

    def read(self, index: int) -> bytes:
        """A portable pixmap: the pixels themselves behind a short header."""
        planes = self._pixels[index].reshape(3, SIZE, SIZE)
        return f"P6 {SIZE} {SIZE} 255\n".encode() + planes.transpose(1, 2, 0).tobytes()

    def label(self, index: int) -> int:
        return int(self._labels[index])

    def key(self, index: int) -> str:
        return f"{self.path}: {self.split} image {index}"

    def fingerprint(self) -> str:
        return hashlib.sha256(self._pixels.tobytes() + self._labels.tobytes()).hexdigest()


def is_cifar10(path: Path) -> bool:
    """Whether it is an archive of CIFAR-10, its folder, or a folder with either in it."""
    return _find(path) is not None


def _find(path: Path) -> Path | None:
    candidates = [path, *(path / name for name in (*FOLDERS, *ARCHIVES))]
    return next((p for p in candidates if (p.is_file() and p.name in ARCHIVES) or _has_a_batch(p)), None)


def _has_a_batch(folder: Path) -> bool:
    return any((folder / f"{name}{suffix}").is_file() for name in BATCHES["train"] for suffix in ("", ".bin"))


def _read_batches(path: Path, names: list[str]) -> list[tuple[np.ndarray, np.ndarray]]:
    """(N, 3072) bytes and (N,) labels of each batch."""
    found = _find(path)
    assert found is not None, "is_cifar10 says so first"
    if found.is_dir():
        return [_parse(found / name, Path.read_bytes) for name in map(_suffixed(found), names)]
    try:
        with tarfile.open(found) as archive:
            members = {Path(member.name).name: member for member in archive if member.isfile()}

            def read(member: Path) -> bytes:
                file = archive.extractfile(members[member.name])
                assert file is not None, "it is a file"
                return file.read()

            names = names if names[0] in members else [f"{name}.bin" for name in names]
            return [_parse(found / name, read) for name in names]
    except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
        raise UserError(f"{found} is no whole archive: {error}") from error


def _suffixed(folder: Path) -> Callable[[str], str]:
    is_binary = any(folder.glob("data_batch_*.bin"))
    return lambda name: f"{name}.bin" if is_binary else name


def _parse(path: Path, read: Callable[[Path], bytes]) -> tuple[np.ndarray, np.ndarray]:
    try:
        data = read(path)
    except (FileNotFoundError, KeyError) as error:
        raise UserError(f"{path} is missing: CIFAR-10 is not whole") from error
    return _parse_binary(path, data) if path.suffix == ".bin" else _parse_pickle(path, data)


def _parse_binary(path: Path, data: bytes) -> tuple[np.ndarray, np.ndarray]:
    rows, rest = divmod(len(data), 1 + PIXEL_BYTES)
    if rest or not rows:
        raise UserError(f"{path} has {len(data)} bytes, no whole number of images of {1 + PIXEL_BYTES}")
    table = np.frombuffer(data, dtype=np.uint8).reshape(rows, 1 + PIXEL_BYTES)
    return _checked(path, table[:, 1:], table[:, 0].tolist())


def _parse_pickle(path: Path, data: bytes) -> tuple[np.ndarray, np.ndarray]:
    try:
        batch = ArrayUnpickler(io.BytesIO(data), encoding="bytes").load()
    except Exception as error:  # a damaged pickle raises anything
        raise UserError(f"{path} is no batch of CIFAR-10: {error}") from error
    if not isinstance(batch, dict):
        raise UserError(f"{path} is no batch of CIFAR-10: it holds no table")
    return _checked(path, batch.get(b"data"), batch.get(b"labels"))


def _checked(path: Path, pixels: Any, labels: Any) -> tuple[np.ndarray, np.ndarray]:
    if not isinstance(pixels, np.ndarray) or pixels.dtype != np.uint8 or pixels.shape[1:] != (PIXEL_BYTES,):
        raise UserError(f"{path} is no batch of CIFAR-10: its images are not rows of {PIXEL_BYTES} bytes")
    if not isinstance(labels, list) or len(labels) != len(pixels):
        number = len(labels) if isinstance(labels, list) else "no"
        raise UserError(f"{path} has {number} labels for {len(pixels)} images")
    if not all(type(label) is int and 0 <= label < len(CLASSES) for label in labels):
        raise UserError(f"{path} has labels that are not in 0 .. {len(CLASSES) - 1}")
    return pixels, np.array(labels, dtype=np.int64)


class ArrayUnpickler(pickle.Unpickler):
    """Builds arrays of numbers and plain containers, and calls nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in ARRAY_PARTS:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which a batch does not need")
        return super().find_class(module.replace("numpy.core", "numpy._core"), name)
