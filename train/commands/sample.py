"""``scalelong sample RUN``: samples of a run as one picture."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from scalelong.train.command_line import parse
from scalelong.train.commands.load import SamplingArguments, load_sampling, read_class_names
from scalelong.train.errors import UserError
from scalelong.train.objective import make_objective
from scalelong.train.sampling.conditions import spread_texts
from scalelong.train.sampling.generate import generate, labels_in_turn
from scalelong.train.sampling.grid import grid_columns, picture_format, save_grid


@dataclass(frozen=True, kw_only=True)
class SampleArguments(SamplingArguments):
    """Draw samples from a run and save them as one picture."""

    out: Path = Path("grid.png")
    """The picture to write; its suffix says the format."""
    num_images: int = 100
    """How many."""
    label: tuple[int, ...] = ()
    """Which classes, in turn; all of them if not given."""


def main(argv: list[str] | None = None) -> None:
    """The command ``scalelong sample``."""
    arguments = parse(SampleArguments, argv, prog="scalelong sample")
    if arguments.num_images < 1:
        raise UserError("--num-images must be at least 1")
    picture_format(arguments.out)
    sampling = load_sampling(arguments)
    config = sampling.config
    num_classes = config.num_data_classes
    unknown = [label for label in arguments.label if not 0 <= label < num_classes]
    if unknown:
        known = f"0 to {num_classes - 1}" if num_classes else "none: it was trained without labels"
        raise UserError(f"--label {unknown[0]}: the run's labels are {known}")
    in_turn = arguments.label or range(num_classes)
    texts, numbers = sampling.texts, range(arguments.num_images)
    conditions = labels_in_turn(in_turn) if texts is None else spread_texts(texts, arguments.num_images)
    captions = []
    if in_turn and texts is None:
        names = read_class_names(config, must_find=bool(arguments.data.path))
        captions = [names[in_turn[n % len(in_turn)]] for n in numbers]
    objective = make_objective(config.objective)
    images = np.stack(list(generate(sampling.model, objective, conditions, numbers, **sampling.settings)))
    columns = grid_columns(arguments.num_images, len(in_turn))
    try:
        save_grid(images, arguments.out, columns=columns, captions=captions)
    except OSError as error:
        raise UserError(f"cannot write {arguments.out}: {error}") from error
    print(f"{arguments.num_images} samples -> {arguments.out}")
