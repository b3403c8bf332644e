"""A run's model, and how to draw samples from it."""

import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from scalelong.model.backbone import Backbone
from scalelong.train.checkpoint import load_model
from scalelong.train.command_line import RunArguments
from scalelong.train.config import TrainConfig
from scalelong.train.data.batches import prepare_source
from scalelong.train.data.source import LatentSource, open_data
from scalelong.train.errors import UserError
from scalelong.train.objective_config import NUM_TIMES, SamplerName, check_guidance_interval, check_sampler
from scalelong.train.sampling.autoencoder import to_pictures
from scalelong.train.sampling.conditions import null_condition_of, texts_of


@dataclass(frozen=True, kw_only=True)
class DataArguments:
    """Where the run's data is now."""

    path: str = ""
    """If it has moved since the run was made."""


@dataclass(frozen=True, kw_only=True)
class SamplingArguments(RunArguments):
    """What every command that draws samples takes."""

    data: DataArguments = field(default_factory=DataArguments)
    guidance: float | None = None
    """s in eps_c + s (eps_c - eps_u); 0: none. The run's own if not given."""
    guidance_interval: tuple[float, float] | None = None
    """LOW HIGH: guidance only at noise levels sigma in (LOW, HIGH]. The run's own if not given."""
    sampler: SamplerName | None = None
    """The run's own if not given."""
    steps: int | None = None
    """Network evaluations for each image. The run's own if not given."""
    seed: int = 0
    """Of the noise."""


@dataclass(frozen=True)
class Sampling:
    """A run's model and how to sample from it."""

    model: Backbone
    config: TrainConfig
    settings: dict[str, Any]
    """Keyword arguments of ``generate``: null_condition, sampler, steps, guidance, its interval, seed, to_pictures."""
    texts: LatentSource | None
    """Where the captions are, of a run with text."""


def load_sampling(arguments: SamplingArguments) -> Sampling:
    """The model of a run, and its own settings where the command line gives no others.

    Raises:
        UserError: no such run or checkpoint, or settings that do not fit it, naming the flag.
    """
    if arguments.steps is not None and not 1 <= arguments.steps <= NUM_TIMES:
        raise UserError(f"--steps must be in 1 .. {NUM_TIMES}, got {arguments.steps}")
    if not 0 <= arguments.seed < 2**63:
        raise UserError(f"--seed must be in 0 .. 2^63 - 1, got {arguments.seed}")
    if arguments.guidance is not None and not 0 <= arguments.guidance < math.inf:
        raise UserError(f"--guidance must be a number from 0 on, got {arguments.guidance}")
    model, config = load_model(arguments.run, checkpoint=arguments.checkpoint, weights=arguments.weights)
    if arguments.data.path:
        config = replace(config, data=replace(config.data, path=arguments.data.path))
    guidance = config.sample.guidance if arguments.guidance is None else arguments.guidance
    if guidance and not config.label_drop:
        raise UserError("--guidance needs a run that was trained with --label-drop above 0")
    sampler = arguments.sampler or config.sample.sampler
    try:
        check_sampler(sampler, config.objective)
        check_guidance_interval(arguments.guidance_interval)
    except ValueError as error:
        raise UserError(str(error)) from error
    texts = open_texts(config)
    settings = {
        "null_condition": null_condition_of(config, texts),
        "sampler": sampler,
        "steps": arguments.steps or config.sample.steps,
        "guidance": guidance,
        "guidance_interval": arguments.guidance_interval or config.sample.guidance_interval,
        "seed": arguments.seed,
        "to_pictures": to_pictures(config),
    }
    return Sampling(model, config, settings, texts)


def open_texts(config: TrainConfig) -> LatentSource | None:
    """The source of a run whose model takes text; None for other runs.

    Raises:
        UserError: it is gone, or no longer what the model takes.
    """
    if config.context_shape is None:
        return None
    if not Path(config.data.path).is_dir():
        raise UserError(
            f"samples are drawn for captions of the run's data, and {config.data.path} is gone; "
            f"where is it now? --data.path FOLDER"
        )
    return texts_of(config, prepare_source(config, open_data(config)))


def read_class_names(config: TrainConfig, *, must_find: bool) -> list[str]:
    """Of the run's data; their numbers where it is gone.

    Raises:
        UserError: it is gone, if it must be found.
    """
    try:
        names = open_data(config).class_names
    except UserError:
        if must_find:
            raise
        names = []
    return names or [str(label) for label in range(config.num_data_classes)]
