"""Reads run folders: the configuration, and the model of a checkpoint, without DeepSpeed."""

import json
from pathlib import Path

import torch

from scalelong.model.architectures import make_backbone
from scalelong.model.backbone import Backbone
from scalelong.train.checkpoint import checkpoints_folder, find_problem, newest_checkpoint, read_tensors
from scalelong.train.config import TrainConfig, config_from_dict
from scalelong.train.errors import UserError


def read_config(run: Path) -> TrainConfig:
    """The configuration a run was made with.

    Raises:
        UserError: no run folder, or one whose config.json cannot be read.
    """
    path = run / "config.json"
    if not path.is_file():
        raise UserError(f"{run} is no run folder: it has no config.json")
    try:
        return config_from_dict(json.loads(path.read_text()))
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is damaged: {error}") from error


def load_model(run: Path, *, checkpoint: int | None = None, weights: str = "ema") -> tuple[Backbone, TrainConfig]:
    """The model of a run in evaluation mode, on a GPU if there is one, and the run's configuration.

    The weights are those of a checkpoint that is whole.

    Args:
        checkpoint: its images_seen; the newest whole one if not given.
        weights: "ema" or "model".

    Raises:
        UserError: no such run or checkpoint, or a damaged one.
    """
    config = read_config(run)
    if checkpoint is None:
        folder = newest_checkpoint(run, warn=lambda message: print(f"warning: {message}"))
        if folder is None:
            raise UserError(f"{run} has no whole checkpoint yet")
    else:
        folder = checkpoints_folder(run) / str(checkpoint)
        problem = find_problem(folder) if folder.is_dir() else "there is no such folder"
        if problem:
            raise UserError(f"cannot use the checkpoint {folder}: {problem}")
    model = make_backbone(config.model, skip_scale=config.make_skip_scale())
    model.load_state_dict(read_tensors(folder, weights))
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval(), config
