"""Where images come from: a ``Source`` gives the bytes, label and key of image number i.

Everything random about a run's sample is decided elsewhere, by (seed, position) alone: see data_order.py.
"""

import hashlib
import io
from functools import cached_property
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image, ImageOps

from scalelong.train.errors import UserError

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm"})


class Source(Protocol):
    """Images by number, 0 to len - 1, in an order that does not depend on the machine."""

    def __len__(self) -> int: ...

    @property
    def class_names(self) -> list[str]:
        """Names of the classes, the label of each its place; empty when the source has no labels."""
        ...

    def read(self, index: int) -> bytes:
        """The encoded image (PNG, JPEG, ...)."""
        ...

    def label(self, index: int) -> int: ...

    def key(self, index: int) -> str:
        """What to call the image in a message: its path."""
        ...

    def fingerprint(self) -> str:
        """Changes when images are added, taken away, renamed or replaced by files of another size."""
        ...


class ImageFolder:
    """Image files in class folders: ``root/<class>/**/*.png``, classes numbered in sorted order.

    Without labels, every image below ``root``.

    Raises:
        UserError: no such folder, no images in it, or class folders missing although labels are wanted.
    """

    def __init__(self, root: str | Path, *, labelled: bool = True):
        self.root = Path(root)
        if not self.root.is_dir():
            raise UserError(f"no such folder of images: {self.root}")
        if labelled:
            folders = sorted(p for p in self.root.iterdir() if p.is_dir() and not p.name.startswith("."))
            found = [(folder.name, _image_files(folder)) for folder in folders]
            found = [(name, paths) for name, paths in found if paths]
            if not found and _image_files(self.root):
                raise UserError(f"{self.root} has images but no class folders; a model with labels needs one per class")
            self.class_names = [name for name, _ in found]
            self._paths = [path for _, paths in found for path in paths]
            self._labels = [label for label, (_, paths) in enumerate(found) for _ in paths]
        else:
            self.class_names = []
            self._paths = _image_files(self.root)
            self._labels = [0] * len(self._paths)
        if not self._paths:
            raise UserError(f"no images in {self.root} (looked for {', '.join(sorted(IMAGE_SUFFIXES))})")

    def __len__(self) -> int:
        return len(self._paths)

    def read(self, index: int) -> bytes:
        return self._paths[index].read_bytes()

    def label(self, index: int) -> int:
        return self._labels[index]

    def key(self, index: int) -> str:
        return str(self._paths[index])

    def fingerprint(self) -> str:
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        digest = hashlib.sha256()
        for path in self._paths:
            digest.update(f"{path.relative_to(self.root).as_posix()}\0{path.stat().st_size}\n".encode())
        return digest.hexdigest()


def _image_files(folder: Path) -> list[Path]:
    def counts(path: Path) -> bool:
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        return path.suffix.lower() in IMAGE_SUFFIXES and not hidden and path.is_file()

    return sorted(path for path in folder.rglob("*") if counts(path))


def open_source(path: str, num_classes: int, *, split: str = "train") -> Source:
    """The source of a configuration; what the path holds says which.

    Args:
        path: "digits"; CIFAR-10 as published; a folder of tar shards, of latents, or of images.
        num_classes: how many classes the model knows besides the null label; 0: labels are not used.
        split: "train" or "test", which the digits and CIFAR-10 have.

    Raises:
        UserError: nothing to read there, or another number of classes than the model's.
    """
    if not path:
        raise UserError("this preset needs data to train on: --data.path FOLDER")
    from scalelong.train.data_features import FeatureFolder

    source = recognise_source(path, split, labelled=num_classes > 0)
    if isinstance(source, FeatureFolder):
        raise UserError(f"{path} holds features, one a file; make shards of them: scalelong prepare {path} OUT")
    if num_classes and not source.class_names:
        raise UserError(f"{path} has no labels; a model with labels needs them")
    if num_classes and len(source.class_names) != num_classes:
        raise UserError(
            f"{path} has {len(source.class_names)} classes, the model {num_classes} (the null label not counted): "
            f"set --model.num-classes to the classes of the data, plus 1 where --label-drop is above 0"
        )
    return source


def recognise_source(path: str, split: str = "train", *, labelled: bool = True) -> Source:
    """As ``open_source``, whatever the classes. ``labelled``: whether folders of images are classes."""
    from scalelong.train.data_cifar10 import Cifar10, is_cifar10
    from scalelong.train.data_features import FeatureFolder, is_feature_folder
    from scalelong.train.data_latents import LatentFolder, is_latent_folder
    from scalelong.train.data_webdataset import WebDataset, check_is_finished, is_webdataset

    if path == "digits":
        from scalelong.train.data_digits import digits_folder

        return ImageFolder(digits_folder() / split, labelled=labelled)
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


def decode_image(data: bytes, channels: int) -> Image.Image:
    """The image upright, as grey (1 channel) or RGB (3).

    Raises:
        data_sound.IMAGE_ERRORS: what is no whole image.
    """
    image = Image.open(io.BytesIO(data))
    image.load()
    if image.mode.startswith("I"):
        # 16 bits to 8, as DALI does; Pillow's convert would cut off at 255.
        image = Image.fromarray((np.asarray(image) / 257).round().clip(0, 255).astype(np.uint8))
    return ImageOps.exif_transpose(image).convert("L" if channels == 1 else "RGB")


def resize_and_crop(image: Image.Image, size: int) -> Image.Image:
    """The shorter side to ``size`` pixels (antialiased, linear), then the centre square."""
    width, height = image.size
    scale = size / min(width, height)
    if scale != 1:
        image = image.resize((_round(width * scale), _round(height * scale)), Image.Resampling.BILINEAR)
    left, top = _round((image.width - size) / 2), _round((image.height - size) / 2)
    return image.crop((left, top, left + size, top + size))


def _round(x: float) -> int:
    # Halves up, as DALI's resize and crop round; Python's round would take the even neighbour.
    return int(np.floor(x + 0.5))
