"""Embedded real pictures: photographs that ship with scikit-image and scikit-learn, in crops, written once as JPEG.

Only files inside the two packages are read, and neither is imported: nothing is ever downloaded. Their sources and
licences are listed in docs/data.md. Whole photographs are held out, so that no crop of the test split continues one of
the training split.
"""

import hashlib
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from scalelong.train.data.cache import written_once
from scalelong.train.data.image_folder import ImageFolder
from scalelong.train.errors import UserError

VERSION = "photos-v1"
CROP_SIZES = (32, 64)
# Of 32 x 32 pixels a crop takes 1.3 kB, and no level of the hardest of these photographs is 9 of 255 away.
JPEG_QUALITY = 98
BLACKEST = 12
"""A crop without a level above this shows nothing: the surround of the retina, mostly. The next ones reach 16."""


class Photograph(NamedTuple):
    """A file of a package that is installed."""

    name: str
    """Of its class folder."""
    package: str
    file: str
    """Inside the package."""
    sha256: str
    """Its first 16 digits."""
    held_out: bool = False

    @property
    def split(self) -> str:
        return "test" if self.held_out else "train"


# fmt: off
# Held out are those that resemble the rest most in colour, contrast and detail, one of each sort: grey, colour, dusk.
PHOTOGRAPHS = (
    Photograph("astronaut", "skimage", "data/astronaut.png", "88431cd9653ccd53"),
    Photograph("brick", "skimage", "data/brick.png", "7966caf324f6ba84"),
    Photograph("camera", "skimage", "data/camera.png", "b0793d2adda0fa6a", held_out=True),
    Photograph("chelsea", "skimage", "data/chelsea.png", "596aa1e7cb875eb7", held_out=True),
    Photograph("china", "sklearn", "datasets/images/china.jpg", "8378025ad2519d64"),
    Photograph("clock", "skimage", "data/clock_motion.png", "f029226b28b642e8"),
    Photograph("coffee", "skimage", "data/coffee.png", "cc02f8ca188b167c", held_out=True),
    Photograph("flower", "sklearn", "datasets/images/flower.jpg", "a77f6ec41e353afd"),
    Photograph("grass", "skimage", "data/grass.png", "b6b6022426b38936"),
    Photograph("gravel", "skimage", "data/gravel.png", "c48615b451bf1e60"),
    Photograph("hubble", "skimage", "data/hubble_deep_field.jpg", "3a19c5dd8a927a93"),
    Photograph("retina", "skimage", "data/retina.jpg", "38a07f36f27f095e"),
    Photograph("rocket", "skimage", "data/rocket.jpg", "c2dd0de7c538df8d", held_out=True),
)
# fmt: on


class Photos(ImageFolder):
    """Crops of the photographs of one split, the photographs being the classes where labels are wanted.

    Args:
        crop_size: side of the crops, in pixels; one of ``CROP_SIZES``.
        split: "train" or "test".

    Raises:
        UserError: another size, a package or a file of it that is missing, or a cache folder that cannot be written.
    """

    def __init__(self, crop_size: int | None, split: str, *, labelled: bool = True):
        super().__init__(photos_folder(crop_size) / split, labelled=labelled)

    def fingerprint(self) -> str:
        """Of the photographs and the crops by name; the files are of other sizes where JPEG is encoded otherwise."""
        digest = hashlib.sha256(f"{VERSION} {self.root.name}\n".encode())
        for photograph in PHOTOGRAPHS:
            digest.update(f"{photograph.sha256}\n".encode())
        for path in self._paths:
            digest.update(f"{path.relative_to(self.root).as_posix()}\n".encode())
        return digest.hexdigest()


def photos_folder(crop_size: int | None) -> Path:
    """The folder with ``train/`` and ``test/``, each with a folder for each photograph; written on the first call."""
    if crop_size not in CROP_SIZES:
        asked = "the size of the crops is not given" if crop_size is None else f"not of {crop_size}"
        raise UserError(f"the photographs are cut into crops of {' or '.join(map(str, CROP_SIZES))} pixels, {asked}")

    def write(folder: Path) -> None:
        for photograph in PHOTOGRAPHS:
            place = folder / photograph.split / photograph.name
            place.mkdir(parents=True)
            for name, crop in cut(open_photograph(photograph), crop_size):
                crop.save(place / f"{name}.jpg", quality=JPEG_QUALITY, subsampling=0)

    return written_once(f"{VERSION}-{crop_size}", write, what="the photographs")


def open_photograph(photograph: Photograph) -> Image.Image:
    """The photograph in RGB, a grey one too.

    Raises:
        UserError: its package is not installed, or has no such file or another one.
    """
    project = {"skimage": "scikit-image", "sklearn": "scikit-learn"}[photograph.package]
    package = importlib.util.find_spec(photograph.package)  # found, not imported
    if package is None or package.origin is None:
        raise UserError(f"--data.path photos reads files of {project}, which is not installed: pip install {project}")
    path = Path(package.origin).parent / photograph.file
    if not path.is_file() or not hashlib.sha256(path.read_bytes()).hexdigest().startswith(photograph.sha256):
        what = "another" if path.is_file() else "no"
        raise UserError(f"--data.path photos: this version of {project} has {what} {path}; see constraints.txt for one")
    return Image.open(path).convert("RGB")


def cut(image: Image.Image, size: int) -> Iterator[tuple[str, Image.Image]]:
    """Disjoint square crops from the upper left corner on, called by row and column; black ones are left out."""
    for row in range(image.height // size):
        for column in range(image.width // size):
            left, top = column * size, row * size
            crop = image.crop((left, top, left + size, top + size))
            if max(high for _, high in crop.getextrema()) > BLACKEST:  # pyright: ignore[reportGeneralTypeIssues]
                yield f"{row:02d}-{column:02d}", crop
