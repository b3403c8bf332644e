"""Latents of an autoencoder, stored as mean and standard deviation and sampled anew each time an image is seen.

A folder of shards, ``*.safetensors``, each with ``moments`` (N, V, 2, C, H, W), the pair being mean and standard
deviation and V 1, or 2 with those of the mirrored image second, and ``labels`` (N,); ``latents.json`` describes them.
Plain arrays serve as well: ``moments.npy`` and ``labels.npy``. Shards are mapped into memory, never read whole.
"""

import hashlib
import json
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
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
        # (N V, 2, C, H, W) over the same memory.
        self._views = [torch.from_numpy(moments.reshape(-1, *moments.shape[2:])) for moments in self._shards]
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

    def moments(self, indices: np.ndarray, mirrored: np.ndarray) -> Tensor:
        """Mean and standard deviation (B, 2, C, H, W) of latents, or of those of the mirrored images, as stored."""
        shards = np.searchsorted(self._starts, indices, side="right") - 1
        out = torch.empty(len(indices), 2, *self.shape, dtype=self._views[0].dtype)
        for shard in np.unique(shards):
            places = np.flatnonzero(shards == shard)
            rows = (indices[places] - self._starts[shard]) * self._shards[shard].shape[1] + mirrored[places]
            # One call for all of them copies on several threads.
            if len(places) == len(indices):
                return torch.index_select(self._views[shard], 0, torch.from_numpy(rows), out=out)
            out[torch.from_numpy(places)] = self._views[shard][torch.from_numpy(rows)]
        return out

    def read(self, index: int) -> bytes:
        return self.moments(np.array([index]), np.array([False])).numpy().tobytes()

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

    with ThreadPoolExecutor(num_threads) as pool:

        def noise(position: int) -> np.ndarray:
            return draw_noise(order.seed, position, source.shape, Stream.LATENT)

        def submit(batch: int) -> tuple[Future, list[Future]]:
            positions = plan.positions(batch)
            indices = np.array([order.index(p) for p in positions])
            mirrored = draw_samples(order.seed, positions).flips(flip)
            return pool.submit(source.moments, indices, mirrored), [pool.submit(noise, p) for p in positions]

        batch, ahead = 0, submit(0)
        while True:
            (moments, draws), ahead = ahead, submit(batch + 1)
            mean, std = moments.result().float().unbind(1)
            yield source.scale * (mean + std * torch.from_numpy(np.stack([draw.result() for draw in draws])))
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
        return np.load(path, mmap_mode="c", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from error


def map_safetensors(path: Path) -> dict[str, np.ndarray]:
    """The tensors of a file as arrays over the mapped file; the library's own slices are copies.

    Raises:
        UserError: no whole file, or another dtype than fp16, fp32 and int64.
    """
    try:
        data = np.memmap(path, dtype=np.uint8, mode="c")
        begin = 8 + int.from_bytes(data[:8].tobytes(), "little")
        header = json.loads(data[8:begin].tobytes())
        header.pop("__metadata__", None)
        return {name: _array_in(data[begin:], **tensor) for name, tensor in header.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is no whole file of latents: {getattr(error, 'strerror', None) or error}") from error


def _array_in(data: np.ndarray, dtype: str, shape: list[int], data_offsets: list[int]) -> np.ndarray:
    first, last = data_offsets
    return data[first:last].view(NUMPY_OF[dtype]).reshape(shape)
