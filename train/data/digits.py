"""The embedded default: scikit-learn's 1,797 handwritten digits of 8x8 pixels, written once as PNG files.

E. Alpaydin, C. Kaynak, Optical Recognition of Handwritten Digits (UCI, 1998). Every fifth image of a class is held out.
"""

import os
import shutil
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from scalelong.train.errors import UserError

VERSION = "digits-v1"
HELD_OUT_EVERY = 5


def cache_folder() -> Path:
    """$SCALELONG_CACHE, else scalelong/ in $XDG_CACHE_HOME or ~/.cache."""
    if os.environ.get("SCALELONG_CACHE"):
        return Path(os.environ["SCALELONG_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "scalelong"


def digits_folder() -> Path:
    """The folder with ``train/`` and ``test/``, each with class folders 0 to 9; written on the first call.

    Raises:
        UserError: the cache folder cannot be written.
    """
    folder = cache_folder() / VERSION
    if folder.is_dir():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{VERSION}-", dir=folder.parent))
    except OSError as error:
        raise UserError(f"cannot write the digits to {folder.parent}: {error.strerror}; set SCALELONG_CACHE") from error
    try:
        _write_digits(staging)
        staging.chmod(0o755)
        # Renamed whole, so that processes that start at the same moment never see half of it.
        staging.rename(folder)
    except OSError as error:
        shutil.rmtree(staging, ignore_errors=True)
        if not folder.is_dir():  # else another process was first
            raise UserError(f"cannot write the digits to {folder}: {error.strerror}; set SCALELONG_CACHE") from error
    return folder


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
