"""What ``scalelong prepare`` writes: shards of images, of latents, or of latents with text features.

A shard is written aside and renamed when it is whole. Shapes: N images, C channels, H, W, K captions of L tokens of D
features.
"""

import io
import json
import tarfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from scalelong.model.checkpoint_file import write_tensors
from scalelong.train.data.images import CROPS, IMAGE_SUFFIXES, decode_image
from scalelong.train.data.latents import DESCRIPTION as LATENTS_DESCRIPTION
from scalelong.train.data.latents import EMPTY_CONTEXT
from scalelong.train.data.mscoco_features import FeatureFolder
from scalelong.train.data.source import ImageSource
from scalelong.train.data.stand_ins import IMAGE_ERRORS, BadImage, describe_image_error
from scalelong.train.data.tar_shards import DESCRIPTION, make_index
from scalelong.train.sampling.autoencoder import encode_moments, load_vae
from scalelong.train.write_whole import staged, write_whole

# Room for the header of safetensors, which is padded with spaces: shapes are known when all is written.
HEADER_BYTES = 512
DTYPES: dict[str, tuple[type[np.floating], str]] = {"fp16": (np.float16, "F16"), "fp32": (np.float32, "F32")}
Advance = Callable[[], None]


class ShardWriter(Protocol):
    """Makes shards of one kind, all in one folder."""

    suffix: str
    description_name: str
    """Of the JSON file that describes the folder."""

    def write(self, shard: Path, indices: range, advance: Advance) -> list[BadImage]:
        """Writes the shard of these images, with a call for each; returns those that cannot be read.

        There is no file where no image can be read, other than of images themselves.
        """
        ...

    def finish(self, folder: Path, shards: list[Path]) -> dict[str, Any]:
        """Writes what else belongs in the folder of these shards; returns what its description says besides."""
        ...


@dataclass(frozen=True)
class ImageWriter:
    """Tar shards of image files: as they are, or as squares of ``size`` pixels in PNG."""

    source: ImageSource
    num_threads: int
    size: int
    """0: files are kept as they are."""
    crop: str
    suffix = ".tar"
    description_name = DESCRIPTION

    def write(self, shard: Path, indices: range, advance: Advance) -> list[BadImage]:
        bad: list[BadImage] = []
        with staged(shard) as staging, tarfile.open(staging, "w") as tar:
            for index, (data, suffix) in _each(self, self.encoded, indices, bad):
                _add_file(tar, f"{index:09d}{suffix}", data)
                if self.source.class_names:
                    _add_file(tar, f"{index:09d}.cls", str(self.source.label(index)).encode())
                advance()
        make_index(shard).save(shard)
        return bad

    def finish(self, folder: Path, shards: list[Path]) -> dict[str, Any]:
        return {}

    def encoded(self, index: int) -> tuple[bytes, str]:
        """The bytes of an image file and its suffix."""
        data = _read(self.source, index)
        if self.size:
            encoded = io.BytesIO()
            is_grey = _mode_of(data) in ("1", "L", "I", "I;16")
            CROPS[self.crop](decode_image(data, 1 if is_grey else 3), self.size).save(encoded, "PNG")
            return encoded.getvalue(), ".png"
        with Image.open(io.BytesIO(data)) as image:
            image.load()
            suffix = {"JPEG": ".jpg", "MPO": ".jpg"}.get(str(image.format), f".{image.format}".lower())
        if suffix not in IMAGE_SUFFIXES:
            raise ValueError(f"{suffix[1:]} files are not read")
        return data, suffix


@dataclass(frozen=True)
class LatentWriter:
    """Shards of the latents that an autoencoder makes of images, of the mirrored ones too if wanted."""

    source: ImageSource
    num_threads: int
    size: int
    crop: str
    vae_folder: Path
    mirrored: bool
    dtype: str
    batch_size: int
    suffix = ".safetensors"
    description_name = LATENTS_DESCRIPTION

    def write(self, shard: Path, indices: range, advance: Advance) -> list[BadImage]:
        bad: list[BadImage] = []
        moments, labels, batch = [], [], []
        for index, pixels_CHW in _each(self, self.pixels, indices, bad):
            batch.append(pixels_CHW)
            labels.append(self.source.label(index))
            advance()
            if len(batch) == self.batch_size:
                moments.append(self.encode(torch.stack(batch)))
                batch.clear()
        if batch:
            moments.append(self.encode(torch.stack(batch)))
        if moments:
            tensors = {"moments": torch.cat(moments), "labels": torch.tensor(labels)}
            with staged(shard) as staging:
                write_tensors({name: tensor.contiguous() for name, tensor in tensors.items()}, staging)
        return bad

    def finish(self, folder: Path, shards: list[Path]) -> dict[str, Any]:
        names = [path.name for path in shards]
        return {"shards": names, "vae": str(self.vae_folder), "scale": self._vae.config.scaling_factor}

    def pixels(self, index: int) -> Tensor:
        """(3, H, W) in [-1, 1]."""
        image = CROPS[self.crop](decode_image(_read(self.source, index), 3), self.size)
        pixels = np.asarray(image, dtype=np.float32).transpose(2, 0, 1)
        return torch.from_numpy(pixels / np.float32(127.5) - 1)

    @torch.inference_mode()
    def encode(self, images_BCHW: Tensor) -> Tensor:
        """(B, views, 2, C, H, W)."""
        views = [images_BCHW, images_BCHW.flip(-1)] if self.mirrored else [images_BCHW]
        dtype = torch.float16 if self.dtype == "fp16" else torch.float32
        return torch.stack([encode_moments(self._vae, view) for view in views], dim=1).to(dtype)

    @cached_property
    def _vae(self) -> Any:
        return load_vae(self.vae_folder)


@dataclass(frozen=True)
class FeatureWriter:
    """Shards of U-ViT's features of MS-COCO: latents and the text features of their captions."""

    source: FeatureFolder
    num_threads: int
    dtype: str
    scale: float
    suffix = ".safetensors"
    description_name = LATENTS_DESCRIPTION

    def write(self, shard: Path, indices: range, advance: Advance) -> list[BadImage]:
        bad: list[BadImage] = []

        def features() -> Iterator[tuple[np.ndarray, list[np.ndarray]]]:
            for _, made in _each(self, self.source.features, indices, bad):
                yield made
                advance()

        write_shard(shard, features(), self.source.most_captions(indices), self.dtype)
        return bad

    def finish(self, folder: Path, shards: list[Path]) -> dict[str, Any]:
        data = io.BytesIO()
        np.save(data, self.source.empty_context.astype(DTYPES[self.dtype][0]))
        write_whole(folder / EMPTY_CONTEXT, data.getvalue())
        return {"shards": [path.name for path in shards], "scale": self.scale}


def _each(
    writer: ImageWriter | LatentWriter | FeatureWriter,
    make: Callable[[int], Any],
    indices: range,
    bad: list[BadImage],
) -> Iterator[tuple[int, Any]]:
    """What is made of each sound image, in order, a few of them ahead; the others are added to ``bad``."""
    threads = writer.num_threads
    with ThreadPoolExecutor(threads) as pool:
        for first in range(indices.start, indices.stop, 16 * threads):
            chunk = range(first, min(first + 16 * threads, indices.stop))
            for index, future in [(index, pool.submit(make, index)) for index in chunk]:
                try:
                    yield index, future.result()
                except IMAGE_ERRORS as error:
                    bad.append(BadImage(index, writer.source.key(index), describe_image_error(error)))


def _read(source: ImageSource, index: int) -> bytes:
    data = source.read(index)
    if not data:
        raise ValueError("the file is empty")
    return data


def _mode_of(data: bytes) -> str:
    with Image.open(io.BytesIO(data)) as image:
        return image.mode


def _add_file(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    # Without times and owners, so that equal images make equal shards.
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def write_shard(
    path: Path, features: Iterable[tuple[np.ndarray, list[np.ndarray]]], num_captions: int, dtype: str
) -> None:
    """``moments`` (N, 1, 2, C, H, W) and ``context`` (N, K, L, D) in safetensors; no file where there is no image.

    Texts are written as they come, because those of a shard are gigabytes.

    Args:
        features: of each image, mean and standard deviation (2, C, H, W), and the text (L, D) of each caption.
        num_captions: K; an image with fewer repeats its own in turn.
    """
    kind, name = DTYPES[dtype]
    moments, shapes = [], {}
    with staged(path) as staging, staging.open("wb") as file:
        file.write(bytes(HEADER_BYTES))
        for mean_and_std, texts in features:
            context = np.stack([texts[k % len(texts)] for k in range(num_captions)]).astype(kind)
            file.write(context.tobytes())
            moments.append(mean_and_std.astype(kind)[None])
            shapes = {"context": (len(moments), *context.shape), "moments": (len(moments), *moments[0].shape)}
        file.write(b"".join(array.tobytes() for array in moments))
        file.seek(0)
        file.write(_header(shapes, name, np.dtype(kind).itemsize))
        if not moments:
            staging.unlink()


def _header(shapes: dict[str, tuple[int, ...]], dtype: str, itemsize: int) -> bytes:
    """Of tensors that follow each other in this order."""
    tensors, end = {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + itemsize * int(np.prod(shape))
        tensors[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    text_bytes = HEADER_BYTES - 8
    return text_bytes.to_bytes(8, "little") + json.dumps(tensors).encode().ljust(text_bytes)
