"""What stands where in a run folder, and its configuration, which is written first."""

import json
import re
from pathlib import Path

from scalelong.train.config import TrainConfig
from scalelong.train.config_json import config_from_dict, config_to_dict
from scalelong.train.errors import UserError
from scalelong.train.write_whole import is_staging, remove_left_over, sync, write_whole

LOG_NAME = re.compile(
    r".*\.(log|out|err)(\.\d+)?|(log|nohup|output|slurm|stdout|stderr|train)([-_.].*)?\.txt", re.IGNORECASE
)


def config_path(run: Path) -> Path:
    return run / "config.json"


def lock_path(run: Path) -> Path:
    """Locked by the start that trains there; the file stays when none does."""
    return run / "lock"


def outcome_path(run: Path) -> Path:
    """How the run stands, or has ended (outcome.py)."""
    return run / "outcome.json"


def log_path(run: Path) -> Path:
    return run / "log.jsonl"


def spikes_path(run: Path) -> Path:
    """What happened where the run spiked or diverged, an object a line (spikes.py)."""
    return run / "spikes.jsonl"


def tensorboard_folder(run: Path) -> Path:
    return run / "tensorboard"


def profile_path(run: Path) -> Path:
    """What torch.profiler has seen of some steps (profiling.py)."""
    return run / "profile.json.gz"


def wandb_path(run: Path) -> Path:
    """Which run of Weights & Biases this is, and how far it has got there (wandb_sink.py)."""
    return run / "wandb.json"


def grid_path(run: Path, images_seen: int) -> Path:
    """The samples that were drawn then, one picture."""
    return run / "samples" / f"{images_seen}.png"


def checkpoints_folder(run: Path) -> Path:
    """Checkpoints, one folder each, called by their images_seen."""
    return run / "checkpoints"


def averages_folder(run: Path) -> Path:
    """The power-function averages that were kept, one folder for each moment, called by its images_seen."""
    return run / "averages"


def holds_something_else(run: Path) -> bool:
    """Whether a folder without a configuration holds more than whoever was killed while starting has left in it.

    What a batch system or a shell writes of the run there, its standard output say, is no stranger.
    """
    return not all(
        is_staging(path, "config.json") or path == lock_path(run) or (path.is_file() and LOG_NAME.fullmatch(path.name))
        for path in run.iterdir()
    )


def read_config(run: Path) -> TrainConfig:
    """The configuration a run was made with.

    Raises:
        UserError: no run folder, or one whose config.json cannot be read.
    """
    path = config_path(run)
    if not path.is_file():
        raise UserError(f"{run} is no run folder: it has no config.json")
    try:
        return config_from_dict(json.loads(path.read_text()))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged: {error}") from error


def write_config(config: TrainConfig) -> None:
    """Makes the run folder, if it is not there, with this configuration.

    Raises:
        UserError: it cannot be written.
    """
    try:
        config.run.mkdir(parents=True, exist_ok=True)
        write_whole(config_path(config.run), (json.dumps(config_to_dict(config), indent=2) + "\n").encode())
        remove_left_over(config.run)
        sync(config.run.parent)
    except OSError as error:
        raise UserError(f"cannot write to the run folder {config.run}: {error.strerror}") from error
