"""Latents of an autoencoder, stored as mean and standard deviation and sampled anew each time an image is seen.

A folder of shards, ``*.safetensors``, each with ``moments`` (N, V, 2, C, H, W), the pair being mean and standard
deviation and V 1, or 2 with those of the mirrored image second, and ``labels`` (N,); ``latents.json`` describes them.
Plain arrays serve as well: ``moments.npy`` and ``labels.npy``. Shards are mapped into memory, never read whole.
"""

import hashlib
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from scalelong.train.data_order import BatchPlan, Order, Stream, draw_noise, draw_samples
from scalelong.train.errors import UserError

DESCRIPTION = "latents.json"
NUMPY_OF = {"F16": np.float16, "F32": np.float32, "I64": np.int64}


class LatentFolder:
    """Latents by number.

    Raises:
        UserError: a file that is missing, cut off, or does not fit the others.
    """

    def __init__(self, root: Path):
        self.root = root
        description = _read_description(root)
        self.class_names: list[str] = description["class_names"]
        self.scale: float = description["scale"]
        arrays = [_map_shard(root / name) for name in description["shards"]]
        self._shards = [moments for moments, _ in arrays]
        for name, moments, labels in ((n, *a) for n, a in zip(description["shards"], arrays, strict=True)):
            if moments.ndim != 6 or moments.shape[1] not in (1, 2) or moments.shape[2] != 2:
                raise UserError(f"{root / name}: moments must be (N, 1 or 2, 2, C, H, W), not {moments.shape}")
            if moments.shape[1:] != self._shards[0].shape[1:]:
                raise UserError(f"{root / name} holds {moments.shape[1:]}, the first shard {self._shards[0].shape[1:]}")
            if labels.shape != moments.shape[:1]:
                raise UserError(f"{root / name} has {len(labels)} labels for {len(moments)} latents")
        self._starts = np.cumsum([0, *map(len, self._shards)])
        self._labels = np.concatenate([labels for _, labels in arrays])
        if not len(self._labels):
            raise UserError(f"no latents in {root}")
        if self.class_names and not 0 <= self._labels.min() <= self._labels.max() < len(self.class_names):
            raise UserError(f"{root} has labels that are not in 0 .. {len(self.class_names) - 1}")

    def __len__(self) -> int:
        return len(self._labels)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        return self._shards[0].shape[3:]

    @property
    def has_mirrored(self) -> bool:
        return self._shards[0].shape[1] == 2

    def moments(self, index: int, mirrored: bool = False) -> np.ndarray:
        """Mean and standard deviation (2, C, H, W), a view into the file."""
        shard = int(np.searchsorted(self._starts, index, side="right")) - 1
        return self._shards[shard][index - self._starts[shard], int(mirrored)]

    def read(self, index: int) -> bytes:
        return self.moments(index).tobytes()

    def label(self, index: int) -> int:
        return int(self._labels[index])

    def key(self, index: int) -> str:
        return f"{self.root}: latent {index}"

    def fingerprint(self) -> str:
        digest = hashlib.sha256(f"{[s.shape for s in self._shards]} {self.scale}".encode() + self._labels.tobytes())
        # A hash of everything would read it all; of each shard's ends, other latents of equal shapes are noticed.
        for shard in self._shards:
            digest.update(shard[0].tobytes() + shard[-1].tobytes())
        return digest.hexdigest()


def is_latent_folder(path: Path) -> bool:
    return (path / DESCRIPTION).is_file() or (path / "moments.npy").is_file()


def read_latents(
    source: LatentFolder, order: Order, plan: BatchPlan, *, flip: bool, num_threads: int
) -> Iterator[Tensor]:
    """Endless micro-batches (B, C, H, W), fp32: scale (mean + std ε), with ε of (seed, position)."""

    def latent(position: int, mirrored: bool) -> np.ndarray:
        mean, std = source.moments(order.index(position), mirrored).astype(np.float32)
        noise = draw_noise(order.seed, position, source.shape, Stream.LATENT)
        return np.float32(source.scale) * (mean + std * noise)

    with ThreadPoolExecutor(num_threads) as pool:

        def submit(batch: int) -> list:
            positions = plan.positions(batch)
            return [
                pool.submit(latent, p, m)
                for p, m in zip(positions, draw_samples(order.seed, positions).flips(flip), strict=True)
            ]

        batch, ahead = 0, submit(0)
        while True:
            current, ahead = ahead, submit(batch + 1)
            yield torch.from_numpy(np.stack([future.result() for future in current]))
            batch += 1


def _read_description(root: Path) -> dict[str, Any]:
    path = root / DESCRIPTION
    if not path.is_file():
        labels = _map_array(root / "labels.npy")
        count = int(labels.max()) + 1 if labels.size else 0
        return {"class_names": [str(n) for n in range(count)], "scale": 1.0, "shards": ["moments.npy"]}
    try:
        found = json.loads(path.read_text())
        return {
            "class_names": list(map(str, found["class_names"])),
            "scale": float(found["scale"]),
            "shards": [str(name) for name in found["shards"]],
        }
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged: {error!r}") from error


def _map_shard(path: Path) -> tuple[np.ndarray, np.ndarray]:
    if path.suffix == ".npy":
        moments = _map_array(path)
        return (moments[:, None] if moments.ndim == 5 else moments), _map_array(path.with_name("labels.npy"))
    tensors = map_safetensors(path)
    if not tensors.keys() >= {"moments", "labels"}:
        raise UserError(f"{path} holds no moments and labels")
    return tensors["moments"], tensors["labels"]


def _map_array(path: Path) -> np.ndarray:
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from error


def map_safetensors(path: Path) -> dict[str, np.ndarray]:
    """The tensors of a file as arrays over the mapped file; the library's own slices are copies.

    Raises:
        UserError: no whole file, or another dtype than fp16, fp32 and int64.
    """
    try:
        data = np.memmap(path, dtype=np.uint8, mode="r")
        begin = 8 + int.from_bytes(data[:8].tobytes(), "little")
        header = json.loads(data[8:begin].tobytes())
        header.pop("__metadata__", None)
        return {name: _array_in(data[begin:], **tensor) for name, tensor in header.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is no whole file of latents: {getattr(error, 'strerror', None) or error}") from error


def _array_in(data: np.ndarray, dtype: str, shape: list[int], data_offsets: list[int]) -> np.ndarray:
    first, last = data_offsets
    return data[first:last].view(NUMPY_OF[dtype]).reshape(shape)
