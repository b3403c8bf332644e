"""The real images that samples are compared with: those that the run trains on, and others that are held out."""

import hashlib
from dataclasses import dataclass

import numpy as np

from scalelong.train.config import LEAST_REAL_IMAGES, LEAST_SAMPLES, TrainConfig
from scalelong.train.data.images import resize_and_crop
from scalelong.train.data.order import Stream, generator
from scalelong.train.data.source import ImageSource, has_test_split, open_data
from scalelong.train.data.stand_ins import SoundImages, spread_indices
from scalelong.train.errors import UserError

HELD_OUT_EVERY = LEAST_REAL_IMAGES // LEAST_SAMPLES
"""Which images of data without a test split are held out: a fifth."""


@dataclass(frozen=True)
class RealImages:
    """Real images (N, H, W, C) in uint8, at the size of the model, and their labels (N,)."""

    train: np.ndarray
    train_labels: np.ndarray
    held_out: np.ndarray
    held_out_labels: np.ndarray
    held_out_from_training: bool
    """The data has no images of its own for testing: the held-out ones were trained on by the diffusion model."""

    def fingerprint(self) -> str:
        """Of the pixels, so that images that were changed in place are other ones too."""
        digest = hashlib.sha256()
        for images in (self.train, self.held_out):
            digest.update(f"{images.shape}".encode())
            digest.update(images.tobytes())
        return digest.hexdigest()


def read_real_images(config: TrainConfig, at_most: int) -> RealImages:
    """The run's training images, and held-out ones: those of a test split, or every fifth of another source.

    Args:
        at_most: so many of each split, spread evenly over it.

    Raises:
        UserError: latents, or fewer images than the distances need.
    """
    sources = check_real_images(config)
    train, train_labels = _read(config, sources[0], at_most)
    if len(sources) > 1:
        held_out, labels = _read(config, sources[1], at_most)
        return RealImages(train, train_labels, held_out, labels, held_out_from_training=False)
    shuffled = generator(0, Stream.ORDER, 0).permutation(len(train))
    cut = len(train) // HELD_OUT_EVERY
    out, kept = shuffled[:cut], shuffled[cut:]
    return RealImages(train[kept], train_labels[kept], train[out], train_labels[out], held_out_from_training=True)


def check_real_images(config: TrainConfig) -> list[ImageSource]:
    """The images to train on, and those for testing if the data has any.

    Raises:
        UserError: latents, or fewer images than the distances need.
    """
    path = config.data.path
    sources: list[ImageSource] = []
    for split in ("train", "test") if has_test_split(path) else ("train",):
        source = open_data(config, split=split)
        if source.holds == "latents":
            raise UserError(f"{path} holds latents; the scores are of images alone, not of latents or text")
        sources.append(source)
    count, least = len(sources[-1]), LEAST_SAMPLES if len(sources) > 1 else LEAST_REAL_IMAGES
    if count < least:
        which = "images for testing" if len(sources) > 1 else "images"
        why = "" if len(sources) > 1 else " (a fifth is held out)"
        raise UserError(f"{path} has {count} {which}, too few: the distances need at least {least}{why}")
    return sources


def _read(config: TrainConfig, source: ImageSource, at_most: int) -> tuple[np.ndarray, np.ndarray]:
    indices, size, channels = spread_indices(len(source), at_most), config.model.img_size, config.model.in_channels
    images = SoundImages(source, channels)
    pixels = [np.asarray(resize_and_crop(images.image(i), size)).reshape(size, size, channels) for i in indices]
    return np.stack(pixels), np.array([images.label(i) for i in indices])
