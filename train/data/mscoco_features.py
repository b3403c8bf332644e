"""The features of MS-COCO as U-ViT publishes them, one array a file, of which ``scalelong prepare`` makes shards.

``{i}.npy`` (2C, H, W) has mean and log variance of image i's latent, unscaled, ``{i}_{k}.npy`` (L, D) the text features
of its caption k, and ``empty_context.npy`` (L, D), in the folder or the one above, those of the empty caption.
"""

import hashlib
import os
import re
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np

from scalelong.train.data.latents import ARRAY_ERRORS, EMPTY_CONTEXT, describe_array_error
from scalelong.train.errors import UserError

NUMBER = "(0|[1-9][0-9]*)"
IMAGE_NAME, CAPTION_NAME = (re.compile(pattern) for pattern in (rf"{NUMBER}\.npy", rf"{NUMBER}_{NUMBER}\.npy"))


class FeatureFolder:
    """Features by number, in the order of the images' own numbers, which may have gaps.

    Raises:
        UserError: no empty context, or no image that can be read.
    """

    holds: Literal["features"] = "features"

    def __init__(self, root: Path):
        self.root = root
        self.class_names: list[str] = []
        self._sizes: dict[str, int] = {}
        captions: dict[int, list[int]] = {}
        for entry in os.scandir(root):
            if match := IMAGE_NAME.fullmatch(entry.name):
                captions.setdefault(int(match[1]), [])
            elif match := CAPTION_NAME.fullmatch(entry.name):
                captions.setdefault(int(match[1]), []).append(int(match[2]))
            else:
                continue
            self._sizes[entry.name] = entry.stat().st_size
        self._numbers = sorted(captions)
        self._captions = [sorted(captions[number]) for number in self._numbers]
        self.empty_context = self._read_empty_context()

    def __len__(self) -> int:
        return len(self._numbers)

    def features(self, index: int) -> tuple[np.ndarray, list[np.ndarray]]:
        """Mean and standard deviation (2, C, H, W) of the latent, and the text (L, D) of each caption, fp32.

        Raises:
            ValueError: one of the image's files is missing or broken, naming it.
        """
        number, captions = self._numbers[index], self._captions[index]
        if not captions:
            raise ValueError(f"no caption: there is no {number}_0.npy")
        mean, log_variance = np.split(self._read(f"{number}.npy", self._moments_shape), 2)
        texts = [self._read(f"{number}_{k}.npy", self.empty_context.shape) for k in captions]
        return np.stack([mean, np.exp(0.5 * log_variance.clip(-30, 20))]), texts

    def most_captions(self, indices: range) -> int:
        """The largest number of captions that any of the images has."""
        return max(len(self._captions[index]) for index in indices)

    def label(self, index: int) -> int:
        return 0

    def key(self, index: int) -> str:
        return str(self.root / f"{self._numbers[index]}.npy")

    def fingerprint(self) -> str:
        digest = hashlib.sha256(self.empty_context.tobytes())
        for name in sorted(self._sizes):
            digest.update(f"{name}\0{self._sizes[name]}\n".encode())
        return digest.hexdigest()

    def _read(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        array = read_array(self.root / name)
        if array.shape != shape:
            raise ValueError(f"{name} holds {array.shape}, not {shape}")
        return array

    @cached_property
    def _moments_shape(self) -> tuple[int, ...]:
        """(2C, H, W) of the first image that can be read."""
        for number in self._numbers:
            try:
                shape = read_array(self.root / f"{number}.npy").shape
            except ValueError:
                continue
            if len(shape) == 3 and shape[0] % 2 == 0:
                return shape
        raise UserError(f"not one of the {len(self):,} images in {self.root} has moments (2C, H, W) that can be read")

    def _read_empty_context(self) -> np.ndarray:
        """(L, D), fp32."""
        for folder in (self.root, self.root.absolute().parent):
            if (folder / EMPTY_CONTEXT).exists():
                try:
                    found = read_array(folder / EMPTY_CONTEXT)
                except ValueError as error:
                    raise UserError(f"cannot read {folder}: {error}") from error
                if found.ndim != 2:
                    raise UserError(f"{folder / EMPTY_CONTEXT} holds {found.shape}, not (L, D)")
                return found
        raise UserError(f"{self.root} holds text features, and there is no {EMPTY_CONTEXT} in it or above it")


def is_feature_folder(path: Path) -> bool:
    return path.is_dir() and any(CAPTION_NAME.fullmatch(entry.name) for entry in os.scandir(path))


def read_array(path: Path) -> np.ndarray:
    """A whole array of finite numbers, in fp32.

    Raises:
        ValueError: there is none, naming the file.
    """
    try:
        with path.open("rb") as file:
            array = np.lib.format.read_array(file, allow_pickle=False)
    except ARRAY_ERRORS as error:
        raise ValueError(f"{path.name}: {describe_array_error(error)}") from error
    if array.dtype.kind != "f":
        raise ValueError(f"{path.name} holds {array.dtype}")
    if not np.isfinite(array).all():
        raise ValueError(f"{path.name} has values that are not finite")
    return array.astype(np.float32)
