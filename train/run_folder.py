"""What stands where in a run folder, and its configuration, which is written first."""

import json
from pathlib import Path

from scalelong.train.config import TrainConfig, config_from_dict, config_to_dict
from scalelong.train.errors import UserError

CONFIG_STAGING = ".config.json.writing"


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


def write_config(config: TrainConfig) -> None:
    try:
        config.run.mkdir(parents=True, exist_ok=True)
        staging = config.run / CONFIG_STAGING
        staging.write_text(json.dumps(config_to_dict(config), indent=2) + "\n")
        staging.rename(config.run / "config.json")
    except OSError as error:
        raise UserError(f"cannot write to the run folder {config.run}: {error.strerror}") from error


def checkpoints_folder(run: Path) -> Path:
    return run / "checkpoints"


def averages_folder(run: Path) -> Path:
    return run / "averages"
