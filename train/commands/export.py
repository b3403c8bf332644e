"""``scalelong export RUN --out DIR``: a model that others load in one line.

``scalelong.Pipeline.from_pretrained(DIR)`` draws images from the folder, ``scalelong.load_backbone(DIR)`` gives the
network. With ``--format diffusers``, a UNet as diffusers' UNet2DModel.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from scalelong.model.backbone import Backbone
from scalelong.model.diffusers_export import save_as_unet2d
from scalelong.train.checkpoint import find_checkpoint, load_weights
from scalelong.train.command_line import RunArguments
from scalelong.train.commands.load import is_export, load_export, open_texts, read_class_names
from scalelong.train.config import TrainConfig
from scalelong.train.errors import UserError, warn
from scalelong.train.parsing import parse
from scalelong.train.run_folder import read_config
from scalelong.train.sampling.hub import NAME, make_repository, upload
from scalelong.train.sampling.model_card import read_scores
from scalelong.train.sampling.pipeline import Pipeline
from scalelong.train.sampling.pipeline_config import PipelineConfig

PARTS_OF_DATASETS = ("train", "val", "test", "images")
"""Folders that are called by what they hold of a dataset, whose name the folder above has."""


@dataclass(frozen=True, kw_only=True)
class ExportArguments(RunArguments):
    """Export the model of a run: weights, how to draw images from it, and a model card."""

    out: Path
    """Folder to write; must be new or empty."""
    format: Literal["scalelong", "diffusers"] = "scalelong"
    """For scalelong.Pipeline and load_backbone, or a UNet as diffusers' UNet2DModel."""
    push_to_hub: str = ""
    """OWNER/NAME: put it onto the Hugging Face hub too, with the token of HF_TOKEN or of hf auth login."""
    private: bool = False
    """A new repository on the hub is for its owner alone."""


class Saved(Protocol):
    """A model, or a pipeline, that goes into a folder."""

    def save_pretrained(self, folder: Path, /) -> None: ...


class AsDiffusers:
    """A UNet that goes into a folder as diffusers' UNet2DModel."""

    def __init__(self, model: Backbone):
        self.model = model

    def save_pretrained(self, folder: Path, /) -> None:
        save_as_unet2d(self.model, folder)


def main(argv: list[str] | None = None) -> None:
    """The command ``scalelong export``."""
    arguments = parse(ExportArguments, argv, prog="scalelong export")
    if arguments.push_to_hub and not NAME.fullmatch(arguments.push_to_hub):
        raise UserError(f"--push-to-hub {arguments.push_to_hub}: a model on the hub is called OWNER/NAME")
    pipeline = load_export(arguments) if is_export(arguments.run) else pipeline_of_run(arguments)
    check_empty(arguments.out)
    if arguments.push_to_hub:
        try:
            make_repository(arguments.push_to_hub, private=arguments.private)
        except (OSError, ImportError) as error:
            raise UserError(f"{error}; nothing is written") from error
    saved: Saved = AsDiffusers(pipeline.model) if arguments.format == "diffusers" else pipeline
    write_export(saved, arguments.out)
    print(f"{pipeline.model.num_params():,} parameters -> {arguments.out}")
    if arguments.push_to_hub:
        try:
            message = f"Export of {arguments.run.resolve().name}"
            print(f"-> {upload(saved.save_pretrained, arguments.push_to_hub, message=message)}")
        except (OSError, ImportError) as error:
            raise UserError(f"{error}; {arguments.out} is written") from error


def pipeline_of_run(arguments: RunArguments) -> Pipeline:
    """How images are drawn from a run.

    Raises:
        UserError: no such run or checkpoint, or a damaged one.
    """
    config = read_config(arguments.run)
    checkpoint = find_checkpoint(arguments.run, arguments.checkpoint)
    model = load_weights(config, checkpoint, arguments.weights)
    return make_pipeline(config, model, images_seen=int(checkpoint.name), weights=arguments.weights)


def make_pipeline(config: TrainConfig, model: Backbone, *, images_seen: int, weights: str) -> Pipeline:
    """How images are drawn from weights of a run.

    Args:
        images_seen: of the checkpoint.
        weights: which of its weights they are.
    """
    sample, empty = config.sample, None
    try:
        texts = open_texts(config) if config.label_drop else None
        empty = None if texts is None else texts.empty_context
    except UserError as error:
        warn(f"the export cannot be guided: {error}")
    names = read_class_names(config, must_find=False) if config.num_data_classes else []
    about = PipelineConfig(
        objective=config.objective,
        null_label=config.null_label,
        class_names=tuple(names),
        sampler=sample.sampler,
        steps=sample.steps,
        guidance=sample.guidance if config.null_label is not None or empty is not None else 0.0,
        guidance_interval=sample.guidance_interval,
        skip_tuning=sample.skip_tuning,
        path_drop=sample.path_drop,
        training=describe_training(config, images_seen=images_seen, weights=weights),
    )
    return Pipeline(model, about, autoencoder=config.data.vae or None, empty_context=empty)


def describe_training(config: TrainConfig, *, images_seen: int, weights: str) -> dict[str, Any]:
    """What the model card says of a run: its recipe, the data's name, the scores if they are of these weights.

    Paths of this machine are left out.
    """
    path = Path(config.data.path)
    scores = read_scores(config.run)
    is_of_these = scores is not None and (scores.get("images_seen"), scores.get("weights")) == (images_seen, weights)
    return {
        "name": config.run.resolve().name,
        "data": path.resolve().parent.name if path.name in PARTS_OF_DATASETS else path.name,
        "flip": config.data.flip,
        "images_seen": images_seen,
        "weights": weights,
        "images_per_step": config.images_per_step,
        "precision": config.precision,
        "label_drop": config.label_drop,
        "seed": config.seed,
        "optimizer": asdict(config.optimizer),
        **({"scores": scores} if is_of_these else {}),
    }


def check_empty(out: Path) -> None:
    """
    Raises:
        UserError: the folder is not empty, or no folder.
    """
    try:
        if out.exists() and any(out.iterdir()):
            raise UserError(f"{out} is not empty")
    except OSError as error:
        raise UserError(f"cannot write {out}: {error}") from error


def write_export(saved: Saved, out: Path) -> None:
    """
    Raises:
        UserError: the folder is not empty, or cannot be written; or a network that the format cannot say.
    """
    check_empty(out)
    try:
        saved.save_pretrained(out)
    except OSError as error:
        raise UserError(f"cannot write {out}: {error}") from error
    except ValueError as error:
        raise UserError(str(error)) from error
