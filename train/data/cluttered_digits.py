"""Embedded digits under nuisance: each at a random place, of random contrast, among pieces of others (12 x 12 pixels).

Pixels say more of place, contrast and clutter than of what digit it is, so that linear readings of them do poorly,
unlike those of the plain digits. Everything random about an image is a function of (seed, its number). After the
cluttered MNIST of Mnih et al. (arXiv:1406.6247).
"""

from pathlib import Path

import numpy as np
from PIL import Image

from scalelong.train.data.cache import written_once
from scalelong.train.data.digits import digits_folder
from scalelong.train.data.order import Stream, generator

VERSION = "cluttered-digits-v1"
SIDE, SIDE_OF_DIGIT, SIDE_OF_PIECE = 12, 8, 3
NUM_PIECES = 2
VIEWS = {"train": 4, "test": 2}
"""Images made of each digit of a split."""
LEAST_CONTRAST = 0.5
SEED = 0


def cluttered_digits_folder() -> Path:
    """The folder with ``train/`` and ``test/``, each with class folders 0 to 9; written on the first call.

    Raises:
        UserError: the cache folder cannot be written.
    """
    return written_once(VERSION, _write, what="the cluttered digits")


def _write(folder: Path) -> None:
    first = 0
    for split, num_views in VIEWS.items():
        paths = sorted((digits_folder() / split).glob("*/*.png"))
        digits_NHW = np.stack([np.asarray(Image.open(path), dtype=np.float32) for path in paths])
        for number in range(len(paths) * num_views):
            path = paths[number // num_views]
            image_HW = cluttered(digits_NHW[number // num_views], digits_NHW, SEED, first + number)
            place = folder / split / path.parent.name / f"{path.stem}-{number % num_views}.png"
            place.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image_HW).save(place)
        first += len(paths) * num_views


def cluttered(digit_HW: np.ndarray, others_NHW: np.ndarray, seed: int, number: int) -> np.ndarray:
    """Image ``number`` of a seed: (12, 12) in uint8.

    Args:
        digit_HW: (8, 8) in [0, 255].
        others_NHW: digits of which pieces lie about.
    """
    draws = generator(seed, Stream.NUISANCE, number)
    canvas_HW = np.zeros((SIDE, SIDE), dtype=np.float32)
    for _ in range(NUM_PIECES):
        other_HW = others_NHW[draws.integers(len(others_NHW))]
        top, left = draws.integers(SIDE_OF_DIGIT - SIDE_OF_PIECE + 1, size=2)
        _lay(canvas_HW, other_HW[top : top + SIDE_OF_PIECE, left : left + SIDE_OF_PIECE], draws)
    _lay(canvas_HW, digit_HW, draws)
    contrast, brightness = LEAST_CONTRAST + (1 - LEAST_CONTRAST) * draws.random(), draws.random()
    # Of less contrast, between black and as bright as that leaves room for.
    return np.round(contrast * canvas_HW + brightness * (1 - contrast) * 255).astype(np.uint8)


def _lay(canvas_HW: np.ndarray, piece_HW: np.ndarray, draws: np.random.Generator) -> None:
    """Onto the canvas at a random place, where it is the brighter."""
    side = len(piece_HW)
    top, left = draws.integers(SIDE - side + 1, size=2)
    window = canvas_HW[top : top + side, left : left + side]
    np.maximum(window, piece_HW, out=window)
