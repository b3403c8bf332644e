"""Where a run's images or latents come from; what the path holds says which source it is.

Everything random about a run's sample is decided elsewhere, by (seed, position) alone: see order.py.
"""

from pathlib import Path
from typing import Literal, Protocol

import numpy as np
from torch import Tensor

from scalelong.train.config import TrainConfig
from scalelong.train.data.cifar10 import Cifar10, is_cifar10
from scalelong.train.data.cluttered_digits import cluttered_digits_folder
from scalelong.train.data.digits import digits_folder
from scalelong.train.data.image_folder import ImageFolder
from scalelong.train.data.latents import LatentFolder, is_latent_folder
from scalelong.train.data.mscoco_features import FeatureFolder, is_feature_folder
from scalelong.train.data.photos import Photos
from scalelong.train.data.tar_shards import WebDataset, check_is_finished, is_webdataset
from scalelong.train.errors import UserError

EMBEDDED = ("digits", "cluttered-digits", "photos")
"""Data that is found by its name wherever the trainer is installed."""


class Source(Protocol):
    """Something by number, 0 to len - 1, in an order that does not depend on the machine."""

    def __len__(self) -> int: ...

    @property
    def class_names(self) -> list[str]:
        """Names of the classes, the label of each its place; empty when the source has no labels."""
        ...

    def label(self, index: int) -> int: ...

    def key(self, index: int) -> str:
        """What to call it in a message: its path."""
        ...

    def fingerprint(self) -> str:
        """Changes when something is added, taken away, renamed or replaced by a file of another size."""
        ...


class ImageSource(Source, Protocol):
    """Images."""

    holds: Literal["images"]

    def read(self, index: int) -> bytes:
        """The encoded image (PNG, JPEG, ...)."""
        ...


class LatentSource(Source, Protocol):
    """Latents of an autoencoder, mean and standard deviation of each, with text features of captions or without."""

    holds: Literal["latents"]
    scale: float
    """What a latent is multiplied by once it is drawn."""
    empty_context: Tensor | None
    """(L, D), fp32: features of the empty text; None where there is none, or no text."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        ...

    @property
    def has_mirrored(self) -> bool:
        """Whether it has the latents of the mirrored images too."""
        ...

    @property
    def context_shape(self) -> tuple[int, int] | None:
        """(L, D) of the text features; None without text."""
        ...

    def moments(self, indices: np.ndarray, mirrored: np.ndarray) -> Tensor:
        """Mean and standard deviation (B, 2, C, H, W) of latents, or of those of the mirrored images."""
        ...

    def num_captions(self, indices: np.ndarray) -> np.ndarray:
        """How many captions each image has."""
        ...

    def contexts(self, indices: np.ndarray, captions: np.ndarray) -> Tensor:
        """Text features (B, L, D), fp32, of the captions of these numbers, one for each image."""
        ...


def open_source(
    path: str, num_classes: int, *, split: str = "train", img_size: int | None = None
) -> ImageSource | LatentSource:
    """The source of a configuration; what the path holds says which.

    Args:
        path: one of ``EMBEDDED``; CIFAR-10 as published; a folder of tar shards, of latents, or of images.
        num_classes: how many classes the model knows besides the null label; 0: labels are not used.
        split: "train" or "test", which embedded data and CIFAR-10 have.
        img_size: side of the images that the model takes, in pixels, which the photographs are cut to.

    Raises:
        UserError: nothing to read there, or another number of classes than the model's.
    """
    if not path:
        raise UserError("this recipe needs data to train on: --data.path FOLDER")
    source = recognise_source(path, split, labelled=num_classes > 0, img_size=img_size)
    if source.holds == "features":
        raise UserError(f"{path} holds features, one a file; make shards of them: scalelong prepare {path} OUT")
    if num_classes and not source.class_names:
        raise UserError(f"{path} has no labels; a model with labels needs them")
    if num_classes and len(source.class_names) != num_classes:
        raise UserError(
            f"{path} has {len(source.class_names)} classes, the model {num_classes} (the null label not counted): "
            f"set --model.num-classes to the classes of the data, plus 1 where --label-drop is above 0"
        )
    return source


def open_data(config: TrainConfig, *, split: str = "train") -> ImageSource | LatentSource:
    """The source of a run's configuration; raises as ``open_source``."""
    return open_source(config.data.path, config.num_data_classes, split=split, img_size=config.model.img_size)


def has_test_split(path: str) -> bool:
    """Whether the data brings images for testing, which no run trains on."""
    return path in EMBEDDED or is_cifar10(Path(path))


def recognise_source(
    path: str, split: str = "train", *, labelled: bool = True, img_size: int | None = None
) -> ImageSource | LatentSource | FeatureFolder:
    """As ``open_source``, whatever the classes. ``labelled``: whether folders of images are classes."""
    if path == "digits":
        return ImageFolder(digits_folder() / split, labelled=labelled)
    if path == "cluttered-digits":
        return ImageFolder(cluttered_digits_folder() / split, labelled=labelled)
    if path == "photos":
        if Path(path).is_dir():
            raise UserError(
                "photos are the embedded photographs, and a folder here is called so too: ./photos names that"
            )
        return Photos(img_size, split, labelled=labelled)
    root = Path(path)
    check_is_finished(root)
    if is_cifar10(root):
        return Cifar10(root, split)
    if is_latent_folder(root):
        return LatentFolder(root)
    if is_feature_folder(root):
        return FeatureFolder(root)
    if is_webdataset(root):
        return WebDataset(root)
    return ImageFolder(root, labelled=labelled)
