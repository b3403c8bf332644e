"""Image files for the tests that read some."""

import io
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from scalelong.train.data.source import ImageSource, open_source


def open_images(path: Path, num_classes: int, **how: Any) -> ImageSource:
    source = open_source(str(path), num_classes, **how)
    assert source.holds == "images"
    return source


def random_pixels(height: int, width: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    shape = (height, width) if channels == 1 else (height, width, channels)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def encode(pixels: np.ndarray | Image.Image, kind: str = "PNG", **options) -> bytes:
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    data = io.BytesIO()
    image.save(data, kind, **options)
    return data.getvalue()


def write_image(path: Path, pixels: np.ndarray | None = None) -> Path:
    """A PNG, whatever the suffix; 8x8 grey noise if no pixels are given."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encode(random_pixels(8, 8, 1) if pixels is None else pixels))
    return path


def truncated_png() -> bytes:
    data = encode(random_pixels(32, 32))
    return data[: len(data) // 2]


# What stands in a broken image file, by the name it is given.
BROKEN = {"empty.png": b"", "garbage.png": b"no image at all " * 20, "truncated.png": truncated_png()}
