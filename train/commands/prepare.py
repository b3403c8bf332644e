"""``scalelong prepare SOURCE OUT``: shards of images, or of latents, with their indices.

Of a folder with the features of MS-COCO as U-ViT publishes them (data/mscoco_features.py), shards of latents with text.

Each shard is written aside and renamed, so that an interrupted command, run again, goes on after the last whole one;
one that is finished does nothing more.
Without OUT, the tar shards in SOURCE are given their indices.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich.console import Console
from rich.progress import Progress

from scalelong.train.commands.shard_writers import (
    FeatureWriter,
    ImageWriter,
    LatentWriter,
    ShardWriter,
)
from scalelong.train.data.mscoco_features import FeatureFolder
from scalelong.train.data.source import ImageSource, recognise_source
from scalelong.train.data.stand_ins import FILE_NAME as BAD_SAMPLES
from scalelong.train.data.stand_ins import BadImage
from scalelong.train.data.tar_shards import find_shards, make_index, unfinished_path
from scalelong.train.errors import UserError
from scalelong.train.hosts.cores import cores_per_process
from scalelong.train.parsing import parse
from scalelong.train.write_whole import is_staging, remove_left_over, write_whole

PREPARED_WITH = "prepared_with"
Crop = Literal["plain", "adm", "celeba"]


@dataclass(frozen=True, kw_only=True)
class PrepareArguments:
    """Make shards of images, or of latents, with their indices."""

    source: Annotated[str, tyro.conf.Positional]
    """What is read: as --data.path of a run, "digits" too; or features of MS-COCO as U-ViT publishes them."""
    out: Annotated[Path | None, tyro.conf.Positional] = None
    """Folder to write. Without it, the tar shards in SOURCE get their indices."""
    split: Literal["train", "test"] = "train"
    """Of CIFAR-10, the digits and the photographs."""
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
    size = arguments.size or None
    source = recognise_source(arguments.source, arguments.split, labelled=arguments.labels, img_size=size)
    if source.holds == "latents":
        raise UserError(f"{arguments.source} holds latents already")
    if source.holds == "features" and arguments.size:
        raise UserError(f"{arguments.source} holds features, not images: --size and --latents are not for it")
    if is_prepared(arguments, source):
        return arguments.out
    work = Work.begin(arguments, source)
    shards = list(work.shards())
    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("images", total=len(source))
        for path, indices in shards:
            if not work.is_whole(path):
                work.save_bad(path, work.writer.write(path, indices, lambda: progress.advance(task)))
            progress.update(task, completed=indices.stop)
            work.list_bad_samples()
    work.finish([path for path, _ in shards])
    return arguments.out


def is_prepared(arguments: PrepareArguments, source: ImageSource | FeatureFolder) -> bool:
    """Whether the folder has been prepared to its end by the same command.

    Raises:
        UserError: it was prepared by another.
    """
    assert arguments.out is not None
    path = arguments.out / choose_writer(arguments, source).description_name
    if unfinished_path(arguments.out).exists() or not path.is_file():
        return False
    before = _read_json(path).get(PREPARED_WITH)
    if not isinstance(before, dict):
        return False
    check_settings(arguments.out, "prepared", before, settings_of(arguments, source))
    return True


def settings_of(arguments: PrepareArguments, source: ImageSource | FeatureFolder) -> dict[str, Any]:
    """All that decides what is in the shards."""
    settings = {**asdict(arguments), "fingerprint": source.fingerprint()}
    for name in ("out", "num_threads", "batch_size"):
        del settings[name]
    return json.loads(json.dumps(settings, default=str))


def check_settings(out: Path, what: str, before: dict[str, Any], settings: dict[str, Any]) -> None:
    """Raises UserError where they differ."""
    changed = [name for name, value in settings.items() if before.get(name) != value]
    if changed:
        raise UserError(f"{out} was {what} with another {', '.join(changed)}; take another folder")


def choose_writer(arguments: PrepareArguments, source: ImageSource | FeatureFolder) -> ShardWriter:
    a, threads = arguments, arguments.num_threads or cores_per_process()
    if source.holds == "features":
        return FeatureWriter(source, threads, a.dtype, a.scale)
    if a.latents is not None:
        return LatentWriter(source, threads, a.size, a.crop, a.latents, a.mirrored, a.dtype, a.batch_size)
    return ImageWriter(source, threads, a.size, a.crop)


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
    source: ImageSource | FeatureFolder
    writer: ShardWriter
    out: Path

    @classmethod
    def begin(cls, arguments: PrepareArguments, source: ImageSource | FeatureFolder) -> "Work":
        """Raises UserError where the folder holds something else, or shards that were asked for otherwise."""
        assert arguments.out is not None
        settings = settings_of(arguments, source)
        out, marker = arguments.out, unfinished_path(arguments.out)
        try:
            out.mkdir(parents=True, exist_ok=True)
            if marker.exists():
                check_settings(out, "begun", _read_json(marker), settings)
            elif not all(is_staging(path, marker.name) for path in out.iterdir()):
                raise UserError(f"{out} is not empty")
            else:
                write_whole(marker, json.dumps(settings, indent=2).encode())
            remove_left_over(out)
        except OSError as error:
            raise UserError(f"cannot write to {out}: {error.strerror}") from error
        return cls(arguments, source, choose_writer(arguments, source), out)

    def shards(self) -> Iterator[tuple[Path, range]]:
        """Each shard and the images that go into it."""
        step, suffix = self.arguments.images_per_shard, self.writer.suffix
        for number, first in enumerate(range(0, len(self.source), step)):
            yield self.out / f"shard-{number:05d}{suffix}", range(first, min(first + step, len(self.source)))

    def is_whole(self, shard: Path) -> bool:
        """What is written last is there: the list of the shard's bad images."""
        return self._bad_path(shard).exists()

    def list_bad_samples(self) -> None:
        """``bad_samples.jsonl``: those of all shards so far."""
        lists = [self._bad_path(shard).read_text() for shard, _ in self.shards() if self.is_whole(shard)]
        write_whole(self.out / BAD_SAMPLES, "".join(lists).encode())

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
            PREPARED_WITH: settings_of(self.arguments, self.source),
        }
        description |= self.writer.finish(self.out, made)
        write_whole(self.out / self.writer.description_name, (json.dumps(description, indent=2) + "\n").encode())
        for shard in shards:
            self._bad_path(shard).unlink()
        unfinished_path(self.out).unlink()

    def _bad_path(self, shard: Path) -> Path:
        return shard.with_name(f".{shard.name}.bad.jsonl")

    def save_bad(self, shard: Path, bad: Iterable[BadImage]) -> None:
        write_whole(self._bad_path(shard), "".join(json.dumps(asdict(image)) + "\n" for image in bad).encode())


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text()))
    except (ValueError, TypeError, RecursionError) as error:
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
