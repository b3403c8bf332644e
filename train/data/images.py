"""Image files: which there are, how they are decoded, and every crop."""

import io
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageOps

IMAGE_SUFFIXES = frozenset(
    {".png", ".jpg", ".jpeg", ".jfif", ".webp", ".avif", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm"}
)
# Images that Pillow does not read: told, not passed over.
UNREAD_SUFFIXES = frozenset({".heic", ".heif", ".jxl"})
CELEBA_SIZE, CELEBA_FACE = (178, 218), (25, 57, 153, 185)


def decode_image(data: bytes, channels: int) -> Image.Image:
    """The image upright, as grey (1 channel) or RGB (3).

    Raises:
        stand_ins.IMAGE_ERRORS: what is no whole image.
    """
    image = Image.open(io.BytesIO(data))
    image.load()
    image = to_eight_bits(image)
    return ImageOps.exif_transpose(image).convert("L" if channels == 1 else "RGB")


def to_eight_bits(image: Image.Image) -> Image.Image:
    """An image of more bits with 0 .. 255 for what it holds; others as they are.

    16 bits become 8 as DALI does it. A TIFF does not say what its white is: its values tell, 1, 255 or 65,535.

    Raises:
        ValueError: values of a TIFF that are none of these.
    """
    if not image.mode.startswith(("I", "F")):
        return image
    values = np.asarray(image)
    divisor = 257.0
    if image.format == "TIFF" or image.mode == "F":
        low, high = float(values.min()), float(values.max())
        if not 0 <= low <= high <= 65_535:
            raise ValueError(f"values from {low:g} to {high:g}, not in 0 .. 1, 0 .. 255 or 0 .. 65,535")
        divisor = next(divisor for white, divisor in ((1, 1 / 255), (255, 1.0), (65_535, 257.0)) if high <= white)
    return Image.fromarray((values / divisor).round().clip(0, 255).astype(np.uint8))


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
