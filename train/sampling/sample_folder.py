"""Samples as single PNG files, exactly so many, drawn by all processes together; and guided-diffusion's npz of them.

The images of a folder are drawn in batches that their numbers alone say: batch b of size B begins with number b B,
whatever is there already and however many processes share the work. A folder says in ``samples.json`` what it is of;
the same command goes on where it was stopped.
"""

import hashlib
import json
import os
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import nn

from scalelong.train.errors import UserError
from scalelong.train.hosts.processes import Processes
from scalelong.train.write_whole import remove_left_over, staged, write_whole

ABOUT = "samples.json"
END_OF_PNG = b"\0\0\0\0IEND\xaeB`\x82"
SECONDS_BETWEEN_LINES = 20.0
Draw = Callable[[Sequence[int]], Sequence[np.ndarray]]
"""Images (H, W, C) in uint8 of these numbers, of one batch."""


def fill_folder(
    folder: Path, draw: Draw, num_images: int, about: Mapping[str, Any], *, batch_size: int, processes: Processes
) -> None:
    """Draws what the folder lacks of so many PNGs, ``000000.png`` and so on. Every process must call it.

    Args:
        draw: gives the images of a batch.
        about: JSON-able; what the images are of. A folder that says something else is refused.
        batch_size: images of a batch.

    Raises:
        UserError: a folder of other images, or one that cannot be written; on every process.
    """
    processes.on_main(lambda: begin(folder, num_images, about))
    missing = processes.on_main(lambda: [n for n in range(num_images) if not is_whole(picture_path(folder, n))])
    batches = sorted({number // batch_size for number in missing})
    mine = batches[processes.rank :: processes.world_size]
    processes.agree(lambda: _draw_batches(folder, draw, num_images, set(missing), mine, batch_size, processes))


def _draw_batches(
    folder: Path,
    draw: Draw,
    num_images: int,
    missing: set[int],
    batches: Sequence[int],
    batch_size: int,
    processes: Processes,
) -> None:
    begun = said = time.monotonic()
    for done, batch in enumerate(batches):
        numbers = range(batch * batch_size, min((batch + 1) * batch_size, num_images))
        for number, image in zip(numbers, draw(numbers), strict=True):
            if number in missing:
                _write_picture(picture_path(folder, number), image)
        now = time.monotonic()
        if processes.is_main and now - said > SECONDS_BETWEEN_LINES:
            left, said = (len(batches) - done - 1) * (now - begun) / (done + 1), now
            print(f"{(done + 1) / len(batches):.0%} of the images that were missing, {left:,.0f} s left", flush=True)


def begin(folder: Path, num_images: int, about: Mapping[str, Any]) -> None:
    """Makes the folder, or checks that it holds what the same command has begun.

    Raises:
        UserError: it is a file, holds something else, or more images than are asked for; or it cannot be written.
    """
    about = json.loads(json.dumps(about))
    try:
        if folder.exists() and not folder.is_dir():
            raise UserError(f"{folder} is a file: --out names a folder, or a picture that ends in .png or .jpg")
        folder.mkdir(parents=True, exist_ok=True)
        remove_left_over(folder)
        if not (folder / ABOUT).exists():
            if any(folder.iterdir()):
                raise UserError(f"{folder} is not empty, and holds no samples of this command")
            write_whole(folder / ABOUT, (json.dumps(about, indent=2) + "\n").encode())
        before = _read_about(folder / ABOUT)
        if before != about:
            names = [name for name in {**before, **about} if before.get(name) != about.get(name)]
            changes = ", ".join(f"{name} {_short(before.get(name))} -> {_short(about.get(name))}" for name in names)
            raise UserError(f"{folder} holds samples of other settings ({changes}): choose another --out")
        expected = {picture_path(folder, number).name for number in range(num_images)}
        others = sorted(path.name for path in folder.glob("*.png") if path.name not in expected)
        if others:
            raise UserError(
                f"{folder} holds {others[-1]}, which is none of {num_images} samples: choose another --out, or more "
                f"--num-images"
            )
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror}") from error


def _read_about(path: Path) -> dict[str, Any]:
    try:
        about = json.loads(path.read_text())
    except ValueError:
        about = None
    if not isinstance(about, dict):
        raise UserError(f"{path} is damaged: choose another --out")
    return about


def _short(value: Any) -> str:
    text = "none" if value is None else str(value)
    return text if len(text) <= 24 else f"{text[:20]}..."


def picture_path(folder: Path, number: int) -> Path:
    return folder / f"{number:06d}.png"


def _write_picture(path: Path, image_HWC: np.ndarray) -> None:
    """Writes it aside and renames it: no sync, since what a crash leaves of it is drawn again."""
    staging = path.with_name(f".{path.name}.writing")
    try:
        picture = Image.fromarray(image_HWC.squeeze(-1) if image_HWC.shape[-1] == 1 else image_HWC)
        picture.save(staging, "PNG")
        staging.rename(path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error


def is_whole(path: Path) -> bool:
    """Whether a picture is there, to its end and with the checksums that PNG has."""
    try:
        with path.open("rb") as file, Image.open(file) as picture:
            picture.verify()
            file.seek(-len(END_OF_PNG), os.SEEK_END)  # the last checksum is not looked at
            return file.read() == END_OF_PNG
    except (OSError, SyntaxError, ValueError, UnidentifiedImageError):
        return False


def write_npz(folder: Path, num_images: int, labels: Sequence[int] | None) -> Path:
    """The images of a folder in guided-diffusion's npz: ``arr_0`` (N, H, W, C) in uint8, ``arr_1`` (N,) the labels.

    Args:
        labels: of each image; None: no ``arr_1``.

    Returns:
        ``samples_NxHxWxC.npz`` in the folder.

    Raises:
        UserError: it cannot be written.
    """
    pictures = _read_pictures(folder, num_images)
    first = next(pictures)
    shape = (num_images, *first.shape)
    path = folder / f"samples_{'x'.join(map(str, shape))}.npz"
    try:
        # One image at a time, so that their number is not bounded by this machine's memory.
        with staged(path) as staging, zipfile.ZipFile(staging, "w", zipfile.ZIP_STORED) as archive:
            with archive.open("arr_0.npy", "w", force_zip64=True) as file:
                header = {"descr": "|u1", "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(file, header)  # pyright: ignore[reportArgumentType]
                for image in chain([first], pictures):
                    file.write(image.tobytes())
            if labels is not None:
                with archive.open("arr_1.npy", "w") as file:
                    np.lib.format.write_array(file, np.array(labels, dtype=np.int64))  # pyright: ignore[reportArgumentType]
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error
    return path


def _read_pictures(folder: Path, num_images: int) -> Iterator[np.ndarray]:
    for number in range(num_images):
        with Image.open(picture_path(folder, number)) as picture:
            pixels = np.asarray(picture)
        yield pixels[:, :, None] if pixels.ndim == 2 else pixels


def fingerprint(model: nn.Module) -> str:
    """Of a network's weights, by their names."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
