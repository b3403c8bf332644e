"""Features of images for linear probes: pooled, of every block at every noise level, in 16 bits, computed once.

They lie in one file, which is mapped into memory and read a batch at a time: they are held once, and not in memory.
The protocol is that of DDAE (Xiang et al., arXiv:2303.09769): one pass of a frozen network over images with fresh
noise, the mean over positions of what a block puts out, as it is.

Shapes: B batch, C channels, H height, W width, N images, F all features of an image, side by side.
"""

import math
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from scalelong.model.backbone import Backbone
from scalelong.train.data.order import Stream, draw_noise
from scalelong.train.errors import UserError
from scalelong.train.objective import Objective
from scalelong.train.probing.images import ProbeImages, reader_pool
from scalelong.train.sampling.generate import to_uint8
from scalelong.train.scores.feature_spaces import EfficientNetSpace

BATCH = 64
"""Images at a time: one number, so that the same command gives the same bits."""
ROOM = 16
"""How many times larger than in the first images a feature may be and still fit."""


class Column(NamedTuple):
    """Features that a probe of their own reads."""

    source: str
    """The block, or "pixels" or "efficientnet"."""
    sigma: float | None
    """The noise level; None of features of plain images."""
    width: int


class Extractor(Protocol):
    """What makes features of images."""

    columns: list[Column]

    def __call__(self, images_BCHW: Tensor, first: int) -> list[Tensor]:
        """(B, width) for each column, of images (B, C, H, W) in [-1, 1] whose numbers begin at ``first``."""
        ...


class BlockFeatures:
    """Features of a network's blocks at noise levels. Noise is a function of (seed, the image's number)."""

    def __init__(
        self,
        model: Backbone,
        objective: Objective,
        blocks: Sequence[str],
        sigmas: Sequence[float],
        *,
        label: int | None = None,
        seed: int = 0,
    ):
        self.model, self.objective, self.blocks, self.sigmas = model, objective, tuple(blocks), tuple(sigmas)
        self.label, self.seed = label, seed
        names = [name for name, _ in model.named_blocks()]
        widths = [model.config.block_widths[names.index(block)] for block in blocks]
        self.columns = [
            Column(block, sigma, width) for sigma in sigmas for block, width in zip(blocks, widths, strict=True)
        ]

    @torch.inference_mode()
    def __call__(self, images_BCHW: Tensor, first: int) -> list[Tensor]:
        device = next(self.model.parameters()).device
        numbers = range(first, first + len(images_BCHW))
        noise = np.stack([draw_noise(self.seed, n, tuple(images_BCHW.shape[1:]), Stream.PROBE) for n in numbers])
        images_BCHW, noise_BCHW = images_BCHW.to(device), torch.from_numpy(noise).to(device)
        y_B = None if self.label is None else torch.full((len(numbers),), self.label, device=device)
        found = []
        for sigma in self.sigmas:
            x_BCHW, t_B = self.objective.shown_at(images_BCHW, noise_BCHW, sigma)
            features = self.model.features(x_BCHW, t_B, y_B, blocks=self.blocks)
            found += [self.model.pooled(features[block]) for block in self.blocks]
        return found


class PixelFeatures:
    """The pixels themselves."""

    def __init__(self, num_values: int):
        self.columns = [Column("pixels", None, num_values)]

    def __call__(self, images_BCHW: Tensor, first: int) -> list[Tensor]:
        return [images_BCHW.flatten(1)]


class EfficientNetFeatures:
    """Those of EfficientNet-Lite0, trained on ImageNet with labels: what supervision gives."""

    def __init__(self):
        self.space = EfficientNetSpace()
        self.columns = [Column("efficientnet", None, self.space.num_features)]

    def __call__(self, images_BCHW: Tensor, first: int) -> list[Tensor]:
        return [torch.from_numpy(self.space(to_uint8(images_BCHW)))]


class FeatureFile:
    """Features (N, F) in fp16 in a file, those of a column side by side, columns of one width beside each other.

    A column that is large in the first images written, as where a stream has no norm, lies there divided by a power of
    two; it is read as it was.
    """

    def __init__(self, path: Path, num_images: int, columns: Sequence[Column]):
        self.path, self.num_images = path, num_images
        self.order = sorted(range(len(columns)), key=lambda n: columns[n].width)
        """Places of the columns as they were given, in the order in which they lie in the file."""
        self.columns = [columns[n] for n in self.order]
        self.num_features = sum(column.width for column in columns)
        self._features_NF = np.memmap(path, np.float16, "w+", shape=(num_images, self.num_features))
        self._powers_F: Tensor | None = None
        """By which features are divided, from the first images on."""

    def write(self, first: int, parts: Sequence[Tensor]) -> None:
        """Features of the images from number ``first`` on, a part for each column as they were given.

        Raises:
            UserError: features that are not finite, or far larger than those of the first images.
        """
        ordered = [parts[place].float().cpu() for place in self.order]
        for column, part in zip(self.columns, ordered, strict=True):
            if not part.isfinite().all():
                raise UserError(f"features of {column.source} are not finite: their network has diverged")
        if self._powers_F is None:
            self._powers_F = torch.cat([torch.full((part.shape[1],), _power_of(part)) for part in ordered])
        rows_BF = (torch.cat(ordered, dim=1) / self._powers_F).half()
        for column, half in zip(self.columns, rows_BF.split([c.width for c in self.columns], dim=1), strict=True):
            if not half.isfinite().all():
                raise UserError(f"features of {column.source} are {ROOM} times as large as those of the first images")
        self._features_NF[first : first + len(rows_BF)] = rows_BF.numpy()

    def rows(self, numbers: np.ndarray | slice) -> Tensor:
        """(B, F), fp32, of these images."""
        assert self._powers_F is not None
        return torch.from_numpy(self._features_NF[numbers].astype(np.float32)) * self._powers_F

    def remove(self) -> None:
        """Gives up the file."""
        del self._features_NF
        with suppress(OSError):
            self.path.unlink()


def _power_of(part_BF: Tensor) -> float:
    """By which a column is divided so that it has room to grow; 1 unless it is large."""
    return 2.0 ** max(
        0, math.ceil(math.log2(max(1.0, float(part_BF.abs().max()) * ROOM / torch.finfo(torch.half).max)))
    )


def bytes_on_disk(num_images: int, columns: Sequence[Column]) -> int:
    """Of the features of so many images."""
    return 2 * num_images * sum(column.width for column in columns)


def bytes_in_memory(columns: Sequence[Column], num_classes: int, batch_size: int) -> int:
    """Of what is held beside the network: batches of features, with copies on their way, and the probes.

    Of each weight there are the gradient and Adam's two averages; mean and deviation of each feature are in fp64.
    """
    num_features = sum(column.width for column in columns)
    return 4 * num_features * (6 * max(BATCH, batch_size) + 5 * num_classes) + 16 * num_features


def extract(
    images: ProbeImages,
    extractors: Sequence[Extractor],
    file: FeatureFile,
    *,
    first_number: int = 0,
    timed: Callable[[float], None] | None = None,
) -> None:
    """Fills a file with the features of all images.

    Args:
        first_number: of the first image, by which noise is drawn: those held out come behind the others.
        timed: told how many seconds the first batch took.
    """
    with reader_pool() as pool:
        for first in range(0, len(images), BATCH):
            began = time.perf_counter()
            numbers = range(first, min(first + BATCH, len(images)))
            images_BCHW = images.read(numbers, pool)
            file.write(first, [part for e in extractors for part in e(images_BCHW, first_number + first)])
            if first == 0 and timed is not None:
                timed(time.perf_counter() - began)
