"""A linear probe from images to a table: features once, all probes trained together, accuracies on held-out images."""

import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from scalelong.train.errors import UserError
from scalelong.train.probing.features import (
    BATCH,
    Column,
    Extractor,
    FeatureFile,
    bytes_in_memory,
    bytes_on_disk,
    extract,
)
from scalelong.train.probing.heads import HeadsConfig, accuracies, seconds_of_training, train_heads
from scalelong.train.probing.images import ProbeImages


class ProbeRow(NamedTuple):
    """What the probe of one column came to."""

    source: str
    """The block, or "pixels" or "efficientnet"."""
    sigma: float | None
    """The noise level; None of features of plain images."""
    width: int
    """Features."""
    accuracy: float
    """On held-out images."""
    train_accuracy: float
    """On those that it was fitted to."""


@dataclass(frozen=True)
class ProbePlan:
    """What a probe will take."""

    num_train: int
    num_test: int
    num_classes: int
    columns: tuple[Column, ...]
    batch_size: int

    @property
    def bytes_on_disk(self) -> int:
        """Of the features of all images, which lie there once."""
        return bytes_on_disk(self.num_train + self.num_test, self.columns)

    @property
    def bytes_in_memory(self) -> int:
        """Beside the network."""
        return bytes_in_memory(self.columns, self.num_classes, self.batch_size)

    def lines(self) -> list[str]:
        """For people, before anything is computed."""
        num_features = sum(column.width for column in self.columns)
        return [
            f"{self.num_train:,} images of {self.num_classes} classes and {self.num_test:,} held out; "
            f"{len(self.columns)} probes on {num_features:,} features of each",
            f"features: {self.bytes_on_disk / 1e9:.3g} GB on disk; beside the network "
            f"{self.bytes_in_memory / 1e6:.3g} MB of memory",
        ]


def plan_probe(
    train: ProbeImages, test: ProbeImages, num_classes: int, extractors: Sequence[Extractor], heads: HeadsConfig
) -> ProbePlan:
    columns = tuple(column for extractor in extractors for column in extractor.columns)
    return ProbePlan(len(train), len(test), num_classes, columns, heads.batch_size)


def run_probe(
    train: ProbeImages,
    test: ProbeImages,
    num_classes: int,
    extractors: Sequence[Extractor],
    heads: HeadsConfig,
    *,
    folder: Path,
    say: Callable[[str], None],
) -> list[ProbeRow]:
    """The accuracies of linear probes of every column, in the order of the extractors.

    The same images, network and configuration give the same bits on the same machine.

    Args:
        folder: where the features lie while it runs.
        say: takes a line for people: what it will take, first.

    Raises:
        UserError: too little room in the folder, or features that are not finite.
    """
    plan = plan_probe(train, test, num_classes, extractors, heads)
    for line in plan.lines():
        say(line)
    free = shutil.disk_usage(folder).free
    if plan.bytes_on_disk > free:
        raise UserError(
            f"the features take {plan.bytes_on_disk / 1e9:.3g} GB, {folder} has {free / 1e9:.3g} GB left; take "
            f"--work FOLDER, or fewer --blocks, --times or --max-images"
        )

    def tell_time(seconds: float) -> None:
        of_features = seconds * (plan.num_train + plan.num_test) / min(BATCH, plan.num_train)
        of_heads = seconds_of_training(plan.columns, plan.num_train, num_classes, heads)
        say(f"about {_in_words(of_features)} for features and {_in_words(of_heads)} for probes, by the first batch")

    files: list[FeatureFile] = []
    try:
        for name, images in (("train", train), ("test", test)):
            path = folder / f".probe-{name}.{os.getpid()}.features"
            files.append(FeatureFile(path, len(images), plan.columns))
        extract(train, extractors, files[0], timed=tell_time)
        extract(test, extractors, files[1], first_number=len(train))
        fitted = train_heads(files[0], train.labels, num_classes, heads)
        shares = zip(
            files[0].order,
            accuracies(fitted, files[1], test.labels),
            accuracies(fitted, files[0], train.labels),
            strict=True,
        )
    except OSError as error:
        raise UserError(f"cannot write features to {folder}: {error.strerror}") from error
    finally:
        for file in files:
            file.remove()
    return [ProbeRow(*plan.columns[place], held_out, known) for place, held_out, known in sorted(shares)]


def _in_words(seconds: float) -> str:
    return (
        f"{seconds:.0f} s"
        if seconds < 120
        else f"{seconds / 60:.0f} min"
        if seconds < 7200
        else f"{seconds / 3600:.1f} h"
    )
