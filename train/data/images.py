"""Image files: which there are, how they are decoded, and every crop."""

import io
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageOps

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm"})
CELEBA_SIZE, CELEBA_FACE = (178, 218), (25, 57, 153, 185)


def decode_image(data: bytes, channels: int) -> Image.Image:
    """The image upright, as grey (1 channel) or RGB (3).

    Raises:
        stand_ins.IMAGE_ERRORS: what is no whole image.
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


def halve_and_crop(image: Image.Image, size: int) -> Image.Image:
    """ADM's square: halved by averaging while twice as large as needed, the rest bicubic, then the centre."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def crop_face(image: Image.Image, size: int) -> Image.Image:
    """The 128 x 128 pixels around the face in an aligned image of CelebA, as U-ViT takes them, resized.

    Raises:
        ValueError: an image of another size.
    """
    if image.size != CELEBA_SIZE:
        raise ValueError(f"{image.width} x {image.height} pixels; CelebA's aligned images have 178 x 218")
    return image.crop(CELEBA_FACE).resize((size, size), Image.Resampling.BILINEAR)


CROPS: dict[str, Callable[[Image.Image, int], Image.Image]] = {
    "plain": resize_and_crop,
    "adm": halve_and_crop,
    "celeba": crop_face,
}


def _round(x: float) -> int:
    # Halves up, as DALI's resize and crop round; Python's round would take the even neighbour.
    return int(np.floor(x + 0.5))
