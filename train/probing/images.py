"""Labelled images for a linear probe: those to fit it to, and held-out ones of the same classes."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from scalelong.model.backbone_config import BackboneConfig
from scalelong.train.data.images import resize_and_crop
from scalelong.train.data.order import Stream, generator
from scalelong.train.data.source import ImageSource, LatentSource, has_test_split, recognise_source
from scalelong.train.data.stand_ins import SoundImages, spread_indices
from scalelong.train.errors import UserError
from scalelong.train.hosts.cores import cores_per_process

HELD_OUT_EVERY = 5
"""Which images of data without a test split of the same classes are held out: a fifth."""
ORDER_OF_ALL = 2**63
"""The counter at which that choice is drawn, above those of images."""


@dataclass(frozen=True)
class ProbeImages:
    """Some images of a source as a network is shown them, which are read when they are asked for."""

    source: SoundImages | LatentSource
    indices: np.ndarray
    """(N,): which ones."""
    model: BackboneConfig
    """The network, whose size they have."""

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def labels(self) -> np.ndarray:
        """(N,)."""
        return np.array([self.source.label(int(index)) for index in self.indices])

    def read(self, numbers: range, pool: ThreadPoolExecutor) -> Tensor:
        """(B, C, H, W), fp32 in [-1, 1]; of latents their means, scaled."""
        indices = self.indices[numbers.start : numbers.stop]
        if self.source.holds == "latents":
            mean_BCHW = self.source.moments(indices, np.zeros(len(indices), dtype=bool))[:, 0].float()
            return self.source.scale * mean_BCHW
        source, size = self.source, self.model.img_size

        def pixels(index: np.integer) -> np.ndarray:
            image = resize_and_crop(source.image(int(index)), size)
            return np.asarray(image, dtype=np.float32).reshape(size, size, source.channels).transpose(2, 0, 1)

        return torch.from_numpy(np.stack(list(pool.map(pixels, indices)))) / 127.5 - 1


def open_probe_images(
    path: str, model: BackboneConfig, at_most: int
) -> tuple[ProbeImages, ProbeImages, tuple[str, ...]]:
    """Images to fit a probe to, held-out ones, and the names of the classes.

    Held out is the test split where the data has one of the same classes, or a fifth.

    Args:
        path: as ``--data.path``.
        at_most: so many of each, spread evenly.

    Raises:
        UserError: nothing to read there, data without labels or with one class, or of another shape than the network
            takes.
    """
    if not path:
        raise UserError("a probe needs labelled images: --data.path FOLDER")
    train = _recognise(path, model, "train")
    names = tuple(train.class_names)
    if not names:
        raise UserError(f"{path} has no labels, which a probe reads from features")
    if len(names) < 2:
        raise UserError(f"{path} has one class, {train.class_names[0]!r}; a probe tells classes apart")
    splits = [train]
    if has_test_split(path):
        test = _recognise(path, model, "test")
        # Of the photographs, the test split has others: other classes.
        splits += [test] if tuple(test.class_names) == names else []
    prepared = [_prepare(source, model, path) for source in splits]
    if len(prepared) == 2:
        chosen = [np.array(spread_indices(len(source), min(at_most, len(source)))) for source in prepared]
        first, second = (ProbeImages(s, i, model) for s, i in zip(prepared, chosen, strict=True))
        return first, second, names
    shuffled = generator(0, Stream.PROBE, ORDER_OF_ALL).permutation(len(train))[: at_most + at_most // 4]
    cut = len(shuffled) // HELD_OUT_EVERY
    if cut == 0:
        raise UserError(f"{path} has {len(train)} images, too few: a fifth of them is held out")
    fitted, held_out = (ProbeImages(prepared[0], np.sort(part), model) for part in (shuffled[cut:], shuffled[:cut]))
    return fitted, held_out, names


def _recognise(path: str, model: BackboneConfig, split: str) -> ImageSource | LatentSource:
    source = recognise_source(path, split, img_size=model.img_size)
    if source.holds == "features":
        raise UserError(f"{path} holds features of captions, which are no classes")
    return source


def _prepare(source: ImageSource | LatentSource, model: BackboneConfig, path: str) -> SoundImages | LatentSource:
    if source.holds == "images":
        return SoundImages(source, model.in_channels)
    expected = (model.in_channels, model.img_size, model.img_size)
    if source.shape != expected:
        raise UserError(f"{path} holds latents of {source.shape}, the model takes {expected}")
    return source


def reader_pool() -> ThreadPoolExecutor:
    """Threads that read images."""
    return ThreadPoolExecutor(min(4, cores_per_process()))
