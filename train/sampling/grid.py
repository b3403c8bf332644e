"""Samples as one picture, row by row."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from scalelong.train.errors import UserError
from scalelong.train.write_whole import staged

CAPTION_HEIGHT = 12
FORMATS = {
    **{"": "PNG", ".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"},
    **{".bmp": "BMP", ".tif": "TIFF", ".tiff": "TIFF"},
}


def picture_format(path: Path) -> str:
    """What Pillow calls the format of a picture's suffix; PNG where there is none.

    Raises:
        UserError: a suffix that is not written.
    """
    suffix = path.suffix.lower()
    if suffix not in FORMATS:
        raise UserError(f"{path}: pictures are written as {', '.join(filter(None, FORMATS))}, not {suffix}")
    return FORMATS[suffix]


def save_grid(
    images_NHWC: np.ndarray, path: Path, *, columns: int, tile: int = 64, captions: Sequence[str] = ()
) -> None:
    """A picture with the images row by row, small ones enlarged by a whole factor to about ``tile`` pixels.

    Args:
        path: its suffix says the format.
        captions: of each image, written below it, cut to its width.
    """
    count, height, width, channels = images_NHWC.shape
    factor, gap = max(1, tile // height), 2
    rows = math.ceil(count / columns)
    below = CAPTION_HEIGHT if captions else 0
    cell_h, cell_w = height * factor + gap + below, width * factor + gap
    canvas = np.full((rows * cell_h + gap, columns * cell_w + gap, channels), 255, dtype=np.uint8)
    corners = [(n // columns * cell_h + gap, n % columns * cell_w + gap) for n in range(count)]
    for image, (top, left) in zip(images_NHWC, corners, strict=True):
        enlarged = image.repeat(factor, axis=0).repeat(factor, axis=1)
        canvas[top : top + enlarged.shape[0], left : left + enlarged.shape[1]] = enlarged
    picture = Image.fromarray(canvas.squeeze(-1) if channels == 1 else canvas)
    for caption, (top, left) in zip(captions, corners, strict=False):
        strip = Image.new(picture.mode, (cell_w - gap, below), "white")
        ImageDraw.Draw(strip).text((0, 0), caption, fill="black")
        picture.paste(strip, (left, top + cell_h - gap - below))
    path.parent.mkdir(parents=True, exist_ok=True)
    with staged(path) as staging:  # so that a viewer never meets half a picture
        picture.save(staging, picture_format(path), quality=95)


def grid_columns(num_images: int, num_classes: int) -> int:
    """Near a square; of such grids one with the same number of columns for each class, where there is one."""
    square = math.ceil(math.sqrt(num_images))
    near = []
    for columns in range(num_classes, num_images + 1, num_classes) if num_classes else ():
        short, long = sorted((columns, math.ceil(num_images / columns)))
        if long <= 1.5 * short:
            near.append(columns)
    return min(near, key=lambda columns: abs(columns - square), default=square)
