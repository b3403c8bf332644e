"""``python -m scalelong.train.prepare SOURCE OUT``: shards of images, or of latents, with their indices.

Of a folder with the features of MS-COCO as U-ViT publishes them (data_features.py), shards of latents with text.

Each shard is written aside and renamed, so that an interrupted command, run again, goes on after the last whole one.
Without OUT, the tar shards in SOURCE are given their indices.
"""

import io
import json
import tarfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import tyro
from PIL import Image
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from scalelong.model.checkpoint_file import write_tensors
from scalelong.train.bad_samples import FILE_NAME as BAD_SAMPLES
from scalelong.train.command_line import parse, run_command
from scalelong.train.data import IMAGE_SUFFIXES, Source, decode_image, recognise_source, resize_and_crop
from scalelong.train.data_features import FeatureFolder
from scalelong.train.data_latents import DESCRIPTION as LATENTS_DESCRIPTION
from scalelong.train.data_latents import EMPTY_CONTEXT, LatentFolder
from scalelong.train.data_sound import IMAGE_ERRORS, BadImage, describe_image_error
from scalelong.train.data_webdataset import DESCRIPTION, find_shards, make_index, unfinished_path
from scalelong.train.errors import UserError
from scalelong.train.latents import encode_moments, load_vae
from scalelong.train.prepare_features import DTYPES, write_shard
from scalelong.train.processes import cores_per_process

CELEBA_SIZE, CELEBA_FACE = (178, 218), (25, 57, 153, 185)
Crop = Literal["plain", "adm", "celeba"]


@dataclass(frozen=True, kw_only=True)
class PrepareArguments:
    """Make shards of images, or of latents, with their indices."""

    source: Annotated[str, tyro.conf.Positional]
    """What is read: as --data.path of a run, "digits" included; or features of MS-COCO as U-ViT publishes them."""
    out: Annotated[Path | None, tyro.conf.Positional] = None
    """Folder to write. Without it, the tar shards in SOURCE get their indices."""
    split: Literal["train", "test"] = "train"
    """Of CIFAR-10 and the digits."""
    labels: bool = True
    """Whether the folders of SOURCE are classes."""
    size: int = 0
    """Side of the square that images are resized and cropped to; 0: the files are kept as they are."""
    crop: Crop = "plain"
    """Shorter side to the size and the centre (bilinear), as ADM did (halved, then bicubic), or CelebA's faces."""
    images_per_shard: int = 10_000
    """At most."""
    latents: Path | None = None
    """Folder of an AutoencoderKL of diffusers: latents are stored instead of images."""
    mirrored: bool = False
    """Store the latents of the mirrored images too, for --data.flip."""
    dtype: Literal["fp16", "fp32"] = "fp16"
    """Of latents and text features."""
    scale: float = 0.2301
    """Scaling factor of the latents that U-ViT's features of MS-COCO hold, which are stored without it."""
    batch_size: int = 32
    """Images encoded at a time."""
    num_threads: int = 0
    """0: as many as there are cores."""
    label_field: str = "label"
    """Of the .json files in tar shards that have no .cls."""

    def __post_init__(self):
        for name in ("images_per_shard", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not self.scale > 0:
            raise ValueError(f"scale must be positive, got {self.scale}")
        if self.size < 0 or self.num_threads < 0:
            raise ValueError("size and num_threads must not be negative")
        if self.crop != "plain" and not self.size:
            raise ValueError(f"crop {self.crop} needs a size")
        if self.latents is not None and not self.size:
            raise ValueError("latents need a size, that of the images to encode")
        if self.mirrored and self.latents is None:
            raise ValueError("mirrored is for latents; images are mirrored when they are read")


def prepare(arguments: PrepareArguments) -> Path:
    """Makes the shards that are not there yet; returns the folder.

    Raises:
        UserError: nothing to read, a folder that holds something else, or not a single sound image.
    """
    if arguments.out is None:
        return index_shards(Path(arguments.source), arguments.label_field)
    source = recognise_source(arguments.source, arguments.split, labelled=arguments.labels)
    if isinstance(source, LatentFolder):
        raise UserError(f"{arguments.source} holds latents already")
    if isinstance(source, FeatureFolder) and arguments.size:
        raise UserError(f"{arguments.source} holds features, not images: --size and --latents are not for it")
    work = Work.begin(arguments, source)
    write = work.choose_writer()
    shards = list(work.shards())
    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("images", total=len(source))
        for path, indices in shards:
            if not work.is_whole(path):
                write(path, indices, lambda: progress.advance(task))
            progress.update(task, completed=indices.stop)
            work.list_bad_samples()
    work.finish([path for path, _ in shards])
    return arguments.out


def index_shards(path: Path, label_field: str) -> Path:
    """Raises UserError where there are no tar shards, or one that is not whole."""
    shards = find_shards(path)
    if not shards:
        raise UserError(f"no tar shards in {path}; to make some: scalelong prepare SOURCE OUT")
    with Progress(console=Console(stderr=True)) as progress:
        for shard in progress.track(shards, description="shards"):
            make_index(shard, label_field).save(shard)
    return path


@dataclass(frozen=True)
class Work:
    """A folder in the making: how it was asked for stands in it until it is finished."""

    arguments: PrepareArguments
    source: Source
    out: Path

    @classmethod
    def begin(cls, arguments: PrepareArguments, source: Source) -> "Work":
        """Raises UserError where the folder holds something else, or shards that were asked for otherwise."""
        assert arguments.out is not None
        settings = {**asdict(arguments), "fingerprint": source.fingerprint()}
        for name in ("out", "num_threads", "batch_size"):
            del settings[name]
        settings = json.loads(json.dumps(settings, default=str))
        out, marker = arguments.out, unfinished_path(arguments.out)
        try:
            out.mkdir(parents=True, exist_ok=True)
            if marker.exists():
                before = _read_json(marker)
                changed = [name for name, value in settings.items() if before.get(name) != value]
                if changed:
                    raise UserError(f"{out} was begun with another {', '.join(changed)}; take another folder")
            elif any(out.iterdir()):
                raise UserError(f"{out} is not empty")
            else:
                _write_aside(marker, json.dumps(settings, indent=2).encode())
        except OSError as error:
            raise UserError(f"cannot write to {out}: {error.strerror}") from error
        return cls(arguments, source, out)

    def shards(self) -> Iterator[tuple[Path, range]]:
        """Each shard and the images that go into it."""
        step, suffix = self.arguments.images_per_shard, ".safetensors" if self._makes_latents else ".tar"
        for number, first in enumerate(range(0, len(self.source), step)):
            yield self.out / f"shard-{number:05d}{suffix}", range(first, min(first + step, len(self.source)))

    def choose_writer(self) -> Callable[[Path, range, Callable[[], None]], None]:
        if isinstance(self.source, FeatureFolder):
            return self.write_features
        return self.write_latents if self._makes_latents else self.write_images

    def is_whole(self, shard: Path) -> bool:
        """What is written last is there: the list of the shard's bad images."""
        return self._bad_path(shard).exists()

    def write_images(self, shard: Path, indices: range, advance: Callable[[], None]) -> None:
        bad: list[BadImage] = []
        staging = shard.with_name(f".{shard.name}.writing")
        with tarfile.open(staging, "w") as tar:
            for index, made in self._each(self._encoded, indices, bad):
                data, suffix = made
                _add_file(tar, f"{index:09d}{suffix}", data)
                if self.source.class_names:
                    _add_file(tar, f"{index:09d}.cls", str(self.source.label(index)).encode())
                advance()
        staging.rename(shard)
        make_index(shard).save(shard)
        self._save_bad(shard, bad)

    def write_latents(self, shard: Path, indices: range, advance: Callable[[], None]) -> None:
        bad: list[BadImage] = []
        moments, labels, batch = [], [], []
        for index, pixels_CHW in self._each(self._pixels, indices, bad):
            batch.append(pixels_CHW)
            labels.append(self.source.label(index))
            advance()
            if len(batch) == self.arguments.batch_size:
                moments.append(self._encode(torch.stack(batch)))
                batch.clear()
        if batch:
            moments.append(self._encode(torch.stack(batch)))
        if moments:
            staging = shard.with_name(f".{shard.name}.writing")
            tensors = {"moments": torch.cat(moments), "labels": torch.tensor(labels)}
            write_tensors({name: tensor.contiguous() for name, tensor in tensors.items()}, staging)
            staging.rename(shard)
        self._save_bad(shard, bad)

    def write_features(self, shard: Path, indices: range, advance: Callable[[], None]) -> None:
        source = self.source
        assert isinstance(source, FeatureFolder), "choose_writer has looked"
        bad: list[BadImage] = []

        def features() -> Iterator[tuple[np.ndarray, list[np.ndarray]]]:
            for _, made in self._each(source.features, indices, bad):
                yield made
                advance()

        write_shard(shard, features(), source.most_captions(indices), self.arguments.dtype)
        self._save_bad(shard, bad)

    def list_bad_samples(self) -> None:
        """``bad_samples.jsonl``: those of all shards so far."""
        lists = [self._bad_path(shard).read_text() for shard, _ in self.shards() if self.is_whole(shard)]
        _write_aside(self.out / BAD_SAMPLES, "".join(lists).encode())

    def finish(self, shards: list[Path]) -> None:
        """Raises UserError where no image was sound."""
        made = [path for path in shards if path.exists()]
        num_bad = len((self.out / BAD_SAMPLES).read_text().splitlines())
        if num_bad == len(self.source):
            raise UserError(f"not one of the {num_bad:,} images can be read: see {self.out / BAD_SAMPLES}")
        description: dict[str, Any] = {
            "class_names": self.source.class_names,
            "num_images": len(self.source) - num_bad,
            "made_from": self.arguments.source,
            "size": self.arguments.size,
            "crop": self.arguments.crop,
        }
        name = DESCRIPTION
        if self._makes_latents:
            name = LATENTS_DESCRIPTION
            description |= {"shards": [path.name for path in made]}
        if isinstance(self.source, FeatureFolder):
            description |= {"scale": self.arguments.scale}
            self._write_empty_context(self.source.empty_context)
        elif self._makes_latents:
            description |= {"vae": str(self.arguments.latents), "scale": self._vae.config.scaling_factor}
        _write_aside(self.out / name, (json.dumps(description, indent=2) + "\n").encode())
        for shard in shards:
            self._bad_path(shard).unlink()
        unfinished_path(self.out).unlink()

    @property
    def _makes_latents(self) -> bool:
        return self.arguments.latents is not None or isinstance(self.source, FeatureFolder)

    @property
    def _vae(self) -> Any:
        assert self.arguments.latents is not None
        return _load_vae_once(self.arguments.latents)

    def _each(self, make: Callable[[int], Any], indices: range, bad: list[BadImage]) -> Iterator[tuple[int, Any]]:
        """What is made of each sound image, in order, a few of them ahead; the others are added to ``bad``."""
        threads = self.arguments.num_threads or cores_per_process()
        with ThreadPoolExecutor(threads) as pool:
            for first in range(indices.start, indices.stop, 16 * threads):
                chunk = range(first, min(first + 16 * threads, indices.stop))
                for index, future in [(index, pool.submit(make, index)) for index in chunk]:
                    try:
                        yield index, future.result()
                    except IMAGE_ERRORS as error:
                        bad.append(BadImage(index, self.source.key(index), describe_image_error(error)))

    def _read(self, index: int) -> bytes:
        data = self.source.read(index)
        if not data:
            raise ValueError("the file is empty")
        return data

    def _encoded(self, index: int) -> tuple[bytes, str]:
        """The bytes of an image file and its suffix."""
        data = self._read(index)
        if self.arguments.size:
            encoded = io.BytesIO()
            self._square(data).save(encoded, "PNG")
            return encoded.getvalue(), ".png"
        with Image.open(io.BytesIO(data)) as image:
            image.load()
            suffix = {"JPEG": ".jpg", "MPO": ".jpg"}.get(str(image.format), f".{image.format}".lower())
        if suffix not in IMAGE_SUFFIXES:
            raise ValueError(f"{suffix[1:]} files are not read")
        return data, suffix

    def _square(self, data: bytes) -> Image.Image:
        with Image.open(io.BytesIO(data)) as image:
            channels = 1 if image.mode in ("1", "L", "I", "I;16") and self.arguments.latents is None else 3
        return CROPS[self.arguments.crop](decode_image(data, channels), self.arguments.size)

    def _pixels(self, index: int) -> Tensor:
        """(3, H, W) in [-1, 1]."""
        pixels = np.asarray(self._square(self._read(index)), dtype=np.float32).transpose(2, 0, 1)
        return torch.from_numpy(pixels / np.float32(127.5) - 1)

    @torch.inference_mode()
    def _encode(self, images_BCHW: Tensor) -> Tensor:
        """(B, views, 2, C, H, W)."""
        views = [images_BCHW, images_BCHW.flip(-1)] if self.arguments.mirrored else [images_BCHW]
        dtype = torch.float16 if self.arguments.dtype == "fp16" else torch.float32
        return torch.stack([encode_moments(self._vae, view) for view in views], dim=1).to(dtype)

    def _write_empty_context(self, empty_context: np.ndarray) -> None:
        data = io.BytesIO()
        np.save(data, empty_context.astype(DTYPES[self.arguments.dtype][0]))
        _write_aside(self.out / EMPTY_CONTEXT, data.getvalue())

    def _bad_path(self, shard: Path) -> Path:
        return shard.with_name(f".{shard.name}.bad.jsonl")

    def _save_bad(self, shard: Path, bad: Iterable[BadImage]) -> None:
        _write_aside(self._bad_path(shard), "".join(json.dumps(asdict(image)) + "\n" for image in bad).encode())


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
_load_vae_once = cache(load_vae)


def _add_file(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    # Without times and owners, so that equal images make equal shards.
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def _write_aside(path: Path, data: bytes) -> None:
    staging = path.with_name(f".{path.name}.writing")
    staging.write_bytes(data)
    staging.rename(path)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text()))
    except ValueError as error:
        raise UserError(f"{path} is damaged: {error}; take another folder") from error


def main(argv: list[str] | None = None) -> None:
    """The command ``scalelong prepare``."""
    arguments = parse(PrepareArguments, argv, prog="scalelong prepare")
    try:
        folder = prepare(arguments)
    except OSError as error:
        raise UserError(f"cannot write to {arguments.out or arguments.source}: {error}") from error
    bad = folder / BAD_SAMPLES
    num_bad = len(bad.read_text().splitlines()) if arguments.out is not None else 0
    print(f"shards and indices in {folder}")
    if num_bad:
        print(f"{num_bad:,} images left out: {bad}")


if __name__ == "__main__":
    run_command(main)
