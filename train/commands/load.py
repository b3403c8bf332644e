"""The model of a run or an export, and how to draw samples from it."""

import json
import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import tyro

from scalelong.model.backbone import Backbone
from scalelong.train.checkpoint import find_checkpoint, load_weights
from scalelong.train.command_line import RunArguments
from scalelong.train.config import DataConfig, SampleConfig, TrainConfig
from scalelong.train.data.batches import prepare_source
from scalelong.train.data.source import EMBEDDED, LatentSource, open_data
from scalelong.train.errors import UserError
from scalelong.train.objective_config import NUM_TIMES, SamplerName, check_guidance_interval, check_sampler
from scalelong.train.run_folder import config_path, read_config
from scalelong.train.sampling.autoencoder import to_pictures
from scalelong.train.sampling.conditions import null_condition_of, texts_of
from scalelong.train.sampling.pipeline import Pipeline


@dataclass(frozen=True, kw_only=True)
class DataArguments:
    """Where the run's data is now."""

    path: str = ""
    """If it has moved since the run was made."""


@dataclass(frozen=True, kw_only=True)
class SamplingArguments(RunArguments):
    """What every command that draws samples takes."""

    run: Annotated[Path, tyro.conf.Positional]
    """Run folder, or an export."""
    data: DataArguments = field(default_factory=DataArguments)
    guidance: float | None = None
    """s in eps_c + s (eps_c - eps_u); 0: none. The run's own if not given."""
    guidance_interval: tuple[float, float] | None = None
    """LOW HIGH: guidance only at noise levels sigma in (LOW, HIGH]. The run's own if not given."""
    skip_tuning: tuple[float, float] | None = None
    """BOTTOM TOP: factors of the innermost and of the outermost long skip, those between on a line (docs/methods.md).
    The run's own if not given."""
    path_drop: bool | None = None
    """Guidance by a pass that leaves out the sparse middle. The run's own if not given."""
    sampler: SamplerName | None = None
    """The run's own if not given."""
    steps: int | None = None
    """Network evaluations for each image. The run's own if not given."""
    seed: int = 0
    """Of the noise."""


@dataclass(frozen=True)
class Sampling:
    """The model of a run or an export, and how to sample from it."""

    model: Backbone
    config: TrainConfig
    """Of an export, what of its run's configuration it says."""
    settings: dict[str, Any]
    """Keyword arguments of ``generate``: null_condition, sampler, steps, guidance, its interval, skip_tuning,
    path_drop, seed, to_pictures."""
    texts: LatentSource | None
    """Where the captions are, of a run with text."""
    class_names: tuple[str, ...] | None
    """Of an export; those of a run are the data's."""
    images_seen: int | None
    """How many images the weights are of; None where an export does not say."""


def load_sampling(arguments: SamplingArguments) -> Sampling:
    """The model of a run or an export, and its own settings where the command line gives no others.

    Raises:
        UserError: no such run, export or checkpoint, or settings that do not fit it, naming the flag.
    """
    if arguments.steps is not None and not 1 <= arguments.steps <= NUM_TIMES:
        raise UserError(f"--steps must be in 1 .. {NUM_TIMES}, got {arguments.steps}")
    if not 0 <= arguments.seed < 2**63:
        raise UserError(f"--seed must be in 0 .. 2^63 - 1, got {arguments.seed}")
    if arguments.guidance is not None and not 0 <= arguments.guidance < math.inf:
        raise UserError(f"--guidance must be a number from 0 on, got {arguments.guidance}")
    if is_export(arguments.run):
        pipeline = load_export(arguments)
        model, config, names = pipeline.model, config_of(pipeline, arguments.run), tuple(pipeline.class_names)
        images_seen = pipeline.config.training.get("images_seen")
    else:
        config, names = read_config(arguments.run), None
        checkpoint = find_checkpoint(arguments.run, arguments.checkpoint)
        model, images_seen = load_weights(config, checkpoint, arguments.weights), int(checkpoint.name)
    if arguments.data.path:
        config = replace(config, data=replace(config.data, path=arguments.data.path))
    guidance = config.sample.guidance if arguments.guidance is None else arguments.guidance
    if guidance and not config.label_drop:
        raise UserError("--guidance needs a run that was trained with --label-drop above 0")
    sampler = arguments.sampler or config.sample.sampler
    try:
        check_sampler(sampler, config.objective)
        check_guidance_interval(arguments.guidance_interval)
        config.model.check_skip_tuning(arguments.skip_tuning)
        config.model.check_path_drop(bool(arguments.path_drop))
    except ValueError as error:
        raise UserError(str(error)) from error
    texts = open_texts(config)
    settings = {
        "null_condition": null_condition_of(config, texts),
        "sampler": sampler,
        "steps": arguments.steps or config.sample.steps,
        "guidance": guidance,
        "guidance_interval": arguments.guidance_interval or config.sample.guidance_interval,
        "skip_tuning": arguments.skip_tuning or config.sample.skip_tuning,
        "path_drop": config.sample.path_drop if arguments.path_drop is None else arguments.path_drop,
        "seed": arguments.seed,
        "to_pictures": to_pictures(config),
    }
    return Sampling(model, config, settings, texts, names, images_seen)


def is_export(folder: Path) -> bool:
    """Whether a folder holds what ``scalelong export`` writes, of any version."""
    try:
        description = json.loads(config_path(folder).read_text())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(description, dict) and not {"architecture", "format"}.isdisjoint(description)


def load_export(arguments: RunArguments) -> Pipeline:
    """The pipeline of an export.

    Raises:
        UserError: it is damaged or of a newer version, or the command line names a checkpoint of it.
    """
    if arguments.checkpoint is not None or arguments.weights != "ema":
        raise UserError(f"{arguments.run} is an export, of one checkpoint: leave out --checkpoint and --weights")
    try:
        return Pipeline.from_pretrained(arguments.run)
    except (OSError, ValueError) as error:
        raise UserError(str(error)) from error


def config_of(pipeline: Pipeline, folder: Path) -> TrainConfig:
    """What of a run's configuration an export says, for those who read a run's.

    Raises:
        UserError: it contradicts itself.
    """
    model, config = pipeline.model, pipeline.config
    is_guided = config.null_label is not None or pipeline.empty_context is not None
    settings = ("sampler", "steps", "guidance", "guidance_interval", "skip_tuning", "path_drop")
    sample = {name: getattr(config, name) for name in settings}
    # Only the embedded data is where its name says.
    data = config.training.get("data")
    try:
        return TrainConfig(
            run=folder,
            model=model.config,
            skip_scale=model.skip_scale,
            objective=config.objective,
            label_drop=0.1 if is_guided else 0.0,  # how often does not matter once it is trained
            sample=SampleConfig(**sample),
            data=DataConfig(path=data if data in EMBEDDED else "", vae=str(pipeline.autoencoder or "")),
        )
    except ValueError as error:
        raise UserError(f"{folder}: {error}") from error


def open_texts(config: TrainConfig) -> LatentSource | None:
    """The source of a run whose model takes text; None for other runs.

    Raises:
        UserError: it is gone, or no longer what the model takes.
    """
    if config.context_shape is None:
        return None
    if not Path(config.data.path).is_dir() or not config.data.path:
        raise UserError(
            f"samples are drawn for captions of the run's data, and {config.data.path or 'it'} is gone; "
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
