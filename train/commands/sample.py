"""``scalelong sample RUN``: samples of a run or an export, as one picture, or for numbers: single files, and an npz.

Under torchrun, the deepspeed launcher or srun the processes share the work.
"""

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from scalelong.train.command_line import without_local_rank
from scalelong.train.commands.load import Sampling, SamplingArguments, load_sampling, read_class_names
from scalelong.train.errors import UserError, speak_as
from scalelong.train.hosts.environment import find_place
from scalelong.train.hosts.processes import Processes, working_together
from scalelong.train.objective import make_objective
from scalelong.train.parsing import parse
from scalelong.train.sampling.conditions import spread_texts
from scalelong.train.sampling.generate import Conditions, generate, labels_in_turn
from scalelong.train.sampling.grid import FORMATS, grid_columns, picture_format, save_grid
from scalelong.train.sampling.sample_folder import fill_folder, fingerprint, write_npz

OTHER_PICTURES = (".svg", ".gif", ".pdf", ".eps", ".avif", ".heic")
"""Suffixes of pictures that no grid is written as: no name of a folder."""


@dataclass(frozen=True, kw_only=True)
class SampleArguments(SamplingArguments):
    """Draw samples from a run or an export, as one picture or as single files."""

    out: Path = Path("grid.png")
    """A picture to write, whose suffix says the format; or a folder, for single files, 000000.png and so on. The same
    command goes on with a folder where it was stopped."""
    num_images: int = 100
    """How many."""
    label: tuple[int, ...] = ()
    """Which classes, in turn; all of them if not given."""
    npz: bool = False
    """Of a folder: the images in one file as guided-diffusion's evaluations take them too."""
    batch_size: int = 64
    """Of a folder: images that the network is shown together. The last bits of an image may depend on it."""


def main(argv: list[str] | None = None) -> None:
    """The command ``scalelong sample``."""
    speak_as(find_place(os.environ).rank)
    argv = without_local_rank(sys.argv[1:] if argv is None else argv)
    arguments = parse(SampleArguments, argv, prog="scalelong sample")
    if arguments.num_images < 1 or arguments.batch_size < 1:
        raise UserError("--num-images and --batch-size must be at least 1")
    is_grid = is_picture(arguments.out)
    if is_grid and arguments.npz:
        raise UserError(f"--npz is of single files: --out names a folder, not {arguments.out}")
    if not is_grid and arguments.out.is_file():
        raise UserError(f"{arguments.out} is a file, and no picture by its name, which would end in .png or .jpg")
    with working_together() as processes:
        sampling = processes.agree(lambda: load_sampling(arguments))
        labels = processes.agree(lambda: chosen_labels(arguments, sampling))
        (draw_grid if is_grid else draw_files)(arguments, sampling, labels, processes)


def is_picture(out: Path) -> bool:
    """Whether a path names a picture, by its suffix.

    Raises:
        UserError: a picture of a format that is not written.
    """
    suffix = out.suffix.lower()
    if suffix in OTHER_PICTURES:
        picture_format(out)
    return suffix != "" and suffix in FORMATS


def chosen_labels(arguments: SampleArguments, sampling: Sampling) -> Sequence[int]:
    """The classes that the images take turns of; none of a model without labels.

    Raises:
        UserError: a label that the model does not have.
    """
    num_classes = sampling.config.num_data_classes
    unknown = [label for label in arguments.label if not 0 <= label < num_classes]
    if unknown:
        known = f"0 to {num_classes - 1}" if num_classes else "none: it was trained without labels"
        raise UserError(f"--label {unknown[0]}: the run's labels are {known}")
    return arguments.label or range(num_classes)


def conditions_of(arguments: SampleArguments, sampling: Sampling, labels: Sequence[int]) -> Conditions:
    if sampling.texts is not None:
        return spread_texts(sampling.texts, arguments.num_images)
    return labels_in_turn(labels)


def draw_grid(arguments: SampleArguments, sampling: Sampling, labels: Sequence[int], processes: Processes) -> None:
    """One picture with all images. Every process must call it."""
    captions, count = [], arguments.num_images
    if labels and sampling.texts is None:
        must_find = bool(arguments.data.path)
        names = sampling.class_names or processes.agree(lambda: read_class_names(sampling.config, must_find=must_find))
        captions = [names[labels[n % len(labels)]] for n in range(count)]
    conditions = conditions_of(arguments, sampling, labels)
    objective = make_objective(sampling.config.objective)
    drawn = generate(sampling.model, objective, conditions, range(count), **sampling.settings, processes=processes)
    images = np.stack(list(drawn))
    if not processes.is_main:
        return
    try:
        save_grid(images, arguments.out, columns=grid_columns(count, len(labels)), captions=captions)
    except OSError as error:
        raise UserError(f"cannot write {arguments.out}: {error}") from error
    print(f"{count} samples -> {arguments.out}")


def draw_files(arguments: SampleArguments, sampling: Sampling, labels: Sequence[int], processes: Processes) -> None:
    """Each image as a file of its own, and the npz. Every process must call it."""
    count = arguments.num_images
    conditions, objective = conditions_of(arguments, sampling, labels), make_objective(sampling.config.objective)

    def draw(numbers: Sequence[int]) -> list[np.ndarray]:
        how = {**sampling.settings, "batch_size": arguments.batch_size}
        return list(generate(sampling.model, objective, conditions, numbers, **how))

    about = describe(arguments, sampling, labels)
    fill_folder(arguments.out, draw, count, about, batch_size=arguments.batch_size, processes=processes)
    if processes.is_main:
        print(f"{count} samples -> {arguments.out}")
    if arguments.npz:
        of_each = None if sampling.texts is not None or not labels else [labels[n % len(labels)] for n in range(count)]
        written = processes.on_main(lambda: write_npz(arguments.out, count, of_each))
        if processes.is_main:
            print(f"-> {written}")


def describe(arguments: SampleArguments, sampling: Sampling, labels: Sequence[int]) -> dict[str, Any]:
    """What the images of a folder are of: with the same, image n is the same."""
    shown = ("sampler", "steps", "guidance", "guidance_interval", "seed")
    texts = sampling.texts
    # Said where they are set, so that folders of earlier versions go on.
    further = {name: value for name in ("skip_tuning", "path_drop") if (value := sampling.settings[name])}
    return {
        "weights": fingerprint(sampling.model),
        **{name: sampling.settings[name] for name in shown},
        **further,
        "labels": list(labels),
        "captions": None if texts is None else [texts.fingerprint(), arguments.num_images],
        "autoencoder": Path(sampling.config.data.vae).name or None,
        "batch_size": arguments.batch_size,
    }
