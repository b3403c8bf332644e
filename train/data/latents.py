"""Latents of an autoencoder, stored as mean and standard deviation and sampled anew each time an image is seen.

A folder of shards, ``*.safetensors``, each with ``moments`` (N, V, 2, C, H, W), the pair being mean and standard
deviation and V 1, or 2 with those of the mirrored image second, and ``labels`` (N,); ``latents.json`` describes them.
With text, ``context`` (N, K, L, D): L tokens of D features for each of K captions; labels may then be missing, and
``empty_context.npy`` (L, D) has the features of the empty caption. Plain arrays serve as well: ``moments.npy``,
``labels.npy``, ``context.npy``. Shards are mapped into memory, never read whole.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from tokenize import TokenError
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from scalelong.train.errors import UserError

DESCRIPTION = "latents.json"
CONTEXT_ARRAY, EMPTY_CONTEXT = "context.npy", "empty_context.npy"
NUMPY_OF = {"F16": np.float16, "F32": np.float32, "I64": np.int64}
# What NumPy raises for a file that is no whole array; flipped bits bring out all of these.
ARRAY_ERRORS = (OSError, ValueError, TypeError, SyntaxError, ArithmeticError, MemoryError, EOFError, TokenError)


@dataclass(frozen=True)
class Shard:
    """The arrays of one file, mapped."""

    path: Path
    moments: np.ndarray
    """(N, V, 2, C, H, W)."""
    labels: np.ndarray | None
    """(N,)."""
    context: np.ndarray | None
    """(N, K, L, D)."""

    def check(self, first: "Shard") -> None:
        """Raises UserError where the arrays do not fit each other, or those of the first shard."""
        path, moments, labels, context = self.path, self.moments, self.labels, self.context
        if moments.ndim != 6 or moments.shape[1] not in (1, 2) or moments.shape[2] != 2:
            raise UserError(f"{path}: moments must be (N, 1 or 2, 2, C, H, W), not {moments.shape}")
        if moments.shape[1:] != first.moments.shape[1:]:
            raise UserError(f"{path} holds {moments.shape[1:]}, the first shard {first.moments.shape[1:]}")
        for name, mine, others in (("labels", labels, first.labels), ("text features", context, first.context)):
            if (mine is None) != (others is None):
                raise UserError(f"{path} has {'no ' if mine is None else ''}{name}, unlike the first shard")
        if labels is not None and labels.shape != moments.shape[:1]:
            raise UserError(f"{path} has {labels.size} labels for {len(moments)} latents")
        if context is None or first.context is None:
            return
        path = path.parent / CONTEXT_ARRAY if path.suffix == ".npy" else path
        if context.ndim != 4 or not context.shape[1] or context.dtype not in (np.float16, np.float32):
            raise UserError(
                f"{path}: text features must be (N, K, L, D) in fp16 or fp32, not {context.shape} in {context.dtype}"
            )
        if len(context) != len(moments):
            raise UserError(f"{path} has the text features of {len(context)} images for {len(moments)} latents")
        if context.shape[2:] != first.context.shape[2:]:
            raise UserError(f"{path} holds text features of {context.shape[2:]}, the first {first.context.shape[2:]}")


class LatentFolder:
    """Latents by number.

    Raises:
        UserError: a file that is missing, cut off, or does not fit the others.
    """

    holds: Literal["latents"] = "latents"

    def __init__(self, root: Path):
        self.root = root
        description = _read_description(root)
        self.class_names: list[str] = description["class_names"]
        self.scale: float = description["scale"]
        self._shards = [_map_shard(root / name) for name in description["shards"]]
        for shard in self._shards:
            shard.check(self._shards[0])
        self._starts = np.cumsum([0, *(len(shard.moments) for shard in self._shards)])
        if not self._starts[-1]:
            raise UserError(f"no latents in {root}")
        # (N V, 2, C, H, W) and (N K, L, D) over the same memory.
        self._views = [_flat(shard.moments) for shard in self._shards]
        self._contexts = [_flat(shard.context) for shard in self._shards if shard.context is not None]
        self._num_captions = np.array([shard.context.shape[1] for shard in self._shards if shard.context is not None])
        labels = [shard.labels for shard in self._shards if shard.labels is not None]
        self._labels = np.concatenate(labels) if labels else np.zeros(len(self), dtype=np.int64)
        if self.class_names and not labels:
            raise UserError(f"{root} names classes and has no labels")
        if self.class_names and not 0 <= self._labels.min() <= self._labels.max() < len(self.class_names):
            raise UserError(f"{root} has labels that are not in 0 .. {len(self.class_names) - 1}")
        self.empty_context = self._read_empty_context()

    def _read_empty_context(self) -> Tensor | None:
        """(L, D), fp32; None where there is none, or no text."""
        path = self.root / EMPTY_CONTEXT
        if self.context_shape is None or not path.exists():
            return None
        found = _map_array(path)
        if found.shape != self.context_shape or found.dtype not in (np.float16, np.float32):
            raise UserError(f"{path} holds {found.shape} in {found.dtype}, the shards text of {self.context_shape}")
        return torch.from_numpy(found.astype(np.float32))

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        return self._shards[0].moments.shape[3:]

    @property
    def context_shape(self) -> tuple[int, int] | None:
        """(L, D) of the text features; None without text."""
        if not self._contexts:
            return None
        _, length, features = self._contexts[0].shape
        return length, features

    @property
    def has_mirrored(self) -> bool:
        return self._shards[0].moments.shape[1] == 2

    def moments(self, indices: np.ndarray, mirrored: np.ndarray) -> Tensor:
        """Mean and standard deviation (B, 2, C, H, W) of latents, or of those of the mirrored images, as stored."""
        shards = self._shards_of(indices)
        out = torch.empty(len(indices), 2, *self.shape, dtype=self._views[0].dtype)
        for shard in np.unique(shards):
            places = np.flatnonzero(shards == shard)
            rows = (indices[places] - self._starts[shard]) * self._shards[shard].moments.shape[1] + mirrored[places]
            # One call for all of them copies on several threads.
            if len(places) == len(indices):
                return torch.index_select(self._views[shard], 0, torch.from_numpy(rows), out=out)
            out[torch.from_numpy(places)] = self._views[shard][torch.from_numpy(rows)]
        return out

    def num_captions(self, indices: np.ndarray) -> np.ndarray:
        """How many captions each image has."""
        return self._num_captions[self._shards_of(indices)]

    def contexts(self, indices: np.ndarray, captions: np.ndarray) -> Tensor:
        """Text features (B, L, D), fp32, of the captions of these numbers, one for each image."""
        assert self.context_shape is not None, "prepare_source has asked for text"
        shards, counts = self._shards_of(indices), self.num_captions(indices)
        out = torch.empty(len(indices), *self.context_shape)
        for shard in np.unique(shards):
            places = np.flatnonzero(shards == shard)
            rows = (indices[places] - self._starts[shard]) * counts[places] + captions[places]
            out[torch.from_numpy(places)] = self._contexts[shard].index_select(0, torch.from_numpy(rows)).float()
        return out

    def _shards_of(self, indices: np.ndarray) -> np.ndarray:
        return np.searchsorted(self._starts, indices, side="right") - 1

    def label(self, index: int) -> int:
        return int(self._labels[index])

    def key(self, index: int) -> str:
        return f"{self.root}: latent {index}"

    def fingerprint(self) -> str:
        shapes = [shard.moments.shape for shard in self._shards]
        digest = hashlib.sha256(f"{shapes} {self.scale}".encode() + self._labels.tobytes())
        contexts = [shard.context for shard in self._shards if shard.context is not None]
        # A hash of everything would read it all; of each shard's ends, other latents of equal shapes are noticed.
        for array in [*(shard.moments for shard in self._shards), *contexts]:
            digest.update(array[0].tobytes() + array[-1].tobytes())
        if contexts:
            empty = b"" if self.empty_context is None else self.empty_context.numpy().tobytes()
            digest.update(f"{[context.shape for context in contexts]}".encode() + empty)
        return digest.hexdigest()


def _flat(array: np.ndarray) -> Tensor:
    """(N, V, ...) as (N V, ...), over the same memory."""
    return torch.from_numpy(array.reshape(-1, *array.shape[2:]))


def is_latent_folder(path: Path) -> bool:
    return (path / DESCRIPTION).is_file() or (path / "moments.npy").is_file()


def _read_description(root: Path) -> dict[str, Any]:
    path = root / DESCRIPTION
    if not path.is_file():
        labels = _map_labels(root)
        if labels is None:
            return {"class_names": [], "scale": 1.0, "shards": ["moments.npy"]}
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


def _map_shard(path: Path) -> Shard:
    if path.suffix == ".npy":
        moments, with_text = _map_array(path), (path.parent / CONTEXT_ARRAY).exists()
        moments = moments[:, None] if moments.ndim == 5 else moments
        context = _map_array(path.parent / CONTEXT_ARRAY) if with_text else None
        context = context[:, None] if context is not None and context.ndim == 3 else context
        return Shard(path, moments, _map_labels(path.parent), context)
    tensors = map_safetensors(path)
    if "moments" not in tensors or not tensors.keys() & {"labels", "context"}:
        raise UserError(f"{path} holds no moments and labels, or context")
    return Shard(path, tensors["moments"], tensors.get("labels"), tensors.get("context"))


def _map_labels(root: Path) -> np.ndarray | None:
    """Those of plain arrays, which may be missing only where there is text."""
    path = root / "labels.npy"
    return None if (root / CONTEXT_ARRAY).exists() and not path.exists() else _map_array(path)


def _map_array(path: Path) -> np.ndarray:
    try:
        return np.load(path, mmap_mode="c", allow_pickle=False)
    except ARRAY_ERRORS as error:
        raise UserError(f"cannot read {path}: {describe_array_error(error)}") from error


def describe_array_error(error: BaseException) -> str:
    return getattr(error, "strerror", None) or " ".join(str(error).split())


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
