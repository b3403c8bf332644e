"""The embedded default: scikit-learn's 1,797 handwritten digits of 8x8 pixels, written once as PNG files.

E. Alpaydin, C. Kaynak, Optical Recognition of Handwritten Digits (UCI, 1998). Every fifth image of a class is held out.
"""

from pathlib import Path

import numpy as np
from PIL import Image

from scalelong.train.data.cache import written_once

VERSION = "digits-v1"
HELD_OUT_EVERY = 5


def digits_folder() -> Path:
    """The folder with ``train/`` and ``test/``, each with class folders 0 to 9; written on the first call.

    Raises:
        UserError: the cache folder cannot be written.
    """
    return written_once(VERSION, _write_digits, what="the digits")


def _write_digits(folder: Path) -> None:
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    pixels = np.round(images.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    seen_of_class = [0] * 10
    for image, label in zip(pixels, labels, strict=True):
        number = seen_of_class[label]
        seen_of_class[label] += 1
        split = "test" if number % HELD_OUT_EVERY == HELD_OUT_EVERY - 1 else "train"
        path = folder / split / str(label) / f"{number:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
