"""Checkpoints that are whole or do not count, and that load on any number of processes and any ZeRO stage.

A checkpoint is a folder ``checkpoints/<images_seen>/`` of whole (unsharded) tensors: model.safetensors,
ema.safetensors, optimizer.safetensors, loss_weighting.safetensors and contrast_heads.safetensors where the loss learns
those, state.json and, written last, manifest.json with a SHA-256 of each. It is written aside, synced and renamed; a
folder without a manifest that matches is passed over. Nothing in it can run code.
Averages of the weights that are kept for later, ``averages/<images_seen>/``, are written in the same way.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from scalelong.model.architectures import make_backbone
from scalelong.model.backbone import Backbone
from scalelong.model.checkpoint_file import write_tensors
from scalelong.train.config import TrainConfig
from scalelong.train.errors import UserError
from scalelong.train.hosts.processes import Processes
from scalelong.train.run_folder import averages_folder, checkpoints_folder, read_config
from scalelong.train.write_whole import sync
from scalelong.train.zero import engine as zero
from scalelong.train.zero import shards
from scalelong.train.zero.averages import Ema
from scalelong.train.zero.learned_loss import learned_by_loss, whole_parameters

MANIFEST = "manifest.json"
Tensors = Iterator[tuple[str, Tensor]]
FILES = ("ema.safetensors", "model.safetensors", "optimizer.safetensors", "state.json")
"""What every checkpoint has, whatever else it has."""


@dataclass(frozen=True)
class TrainState:
    """What a run is, besides its tensors."""

    images_seen: int
    step: int
    optimizer_steps: int
    data_fingerprint: str
    grad_scaler: dict[str, Any] | None = None
    averaged_steps: int | None = None
    """Steps that the averages have taken in; None in checkpoints from before this was counted."""
    clipping: dict[str, Any] | None = None
    """What clipping that follows the gradients remembers of them; None without it."""

    @property
    def num_averaged(self) -> int:
        return self.step if self.averaged_steps is None else self.averaged_steps


def list_checkpoints(run: Path) -> list[Path]:
    """The folders of checkpoints, whole or not, newest first."""
    return numbered_folders(checkpoints_folder(run))


def numbered_folders(folder: Path) -> list[Path]:
    """Those that are called by their images_seen, the largest first."""
    if not folder.is_dir():
        return []
    return sorted((p for p in folder.iterdir() if p.name.isdigit() and p.is_dir()), key=lambda p: -int(p.name))


def find_problem(checkpoint: Path, files: Iterable[str] = FILES) -> str | None:
    """Why a checkpoint, or another folder that must have these files, does not count; None if it is whole."""
    manifest = checkpoint / MANIFEST
    if not manifest.is_file():
        return f"{MANIFEST} is missing"
    try:
        hashes = json.loads(manifest.read_text())["sha256"]
        for name in files:
            if name not in hashes:
                return f"{MANIFEST} does not name {name}"
        for name, expected in hashes.items():
            if _sha256(checkpoint / name) != expected:
                return f"{name} is not what was written"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} is damaged"
    return None


def newest_checkpoint(run: Path, warn: Callable[[str], None]) -> Path | None:
    """The newest checkpoint that is whole; those passed over are reported."""
    for checkpoint in list_checkpoints(run):
        problem = find_problem(checkpoint)
        if problem is None:
            return checkpoint
        warn(f"passing over the checkpoint {checkpoint}: {problem}")
    return None


def read_state(checkpoint: Path) -> TrainState:
    """What the checkpoint says of the run.

    Raises:
        UserError: the file is missing or damaged, or of another version.
    """
    path = checkpoint / "state.json"
    try:
        return TrainState(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"cannot read {path}: {error}") from error


def read_tensors(checkpoint: Path, name: str) -> dict[str, Tensor]:
    """The tensors of "model", "ema", "optimizer", or what the loss learns.

    Raises:
        UserError: the file is missing or damaged.
    """
    path = checkpoint / f"{name}.safetensors"
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot read {path}: {error}") from error


def save_checkpoint(run: Path, state: TrainState, engine, ema: Ema, processes: Processes, *, keep: int) -> Path:
    """Writes a checkpoint of the run as it stands, and removes the oldest beyond ``keep``. All ranks must call it.

    Raises:
        UserError: it cannot be written, on a full disk say; earlier checkpoints stay as they are.
    """
    averages = {name: shards.whole_tensors(engine, parts) for name, parts in ema.averages.items()}
    tensors = {"model": shards.whole_weights(engine), **averages, "optimizer": zero.optimizer_state(engine)}
    tensors |= {name: whole_parameters(engine, learned) for name, learned in learned_by_loss(engine).items()}
    final = checkpoints_folder(run) / str(state.images_seen)
    problem = _write_on_main(final, asdict(state), tensors, processes)
    if problem:
        kept = processes.from_main(_last_good(run) if processes.is_main else None)
        raise UserError(f"cannot write the checkpoint {final}: {problem}; {kept}")
    if processes.is_main:
        _prune(final, keep)
    return final


def save_averages(run: Path, images_seen: int, step: int, engine, ema: Ema, processes: Processes) -> None:
    """Keeps the power-function averages as they stand, for ``ema_posthoc``. All ranks must call it.

    Args:
        step: how many steps they have taken in.

    Raises:
        UserError: they cannot be written.
    """
    tensors = {name: shards.whole_tensors(engine, ema.averages[name]) for name in ema.exponents}
    final = averages_folder(run) / str(images_seen)
    state = {"images_seen": images_seen, "step": step, "exponents": ema.exponents}
    problem = _write_on_main(final, state, tensors, processes)
    if problem:
        raise UserError(f"cannot write the averages {final}: {problem}")


def remove_averages(run: Path, *, after: int) -> None:
    """Removes the averages that were kept past a checkpoint, on the way that a run has given up.

    Args:
        after: images_seen of the checkpoint.

    Raises:
        UserError: they cannot be removed.
    """
    for folder in numbered_folders(averages_folder(run)):
        if int(folder.name) > after:
            try:
                _remove(folder)
            except OSError as error:
                raise UserError(f"cannot remove {folder}: {error.strerror}") from error


def _write_on_main(final: Path, state: dict[str, Any], tensors: dict[str, Tensors], processes: Processes) -> str | None:
    """Rank 0 writes what all ranks gather; every rank learns of what went wrong."""
    problem = None
    if processes.is_main:
        problem = _write(final, state, tensors)
    else:
        for iterator in tensors.values():
            _exhaust(iterator)
    return processes.from_main(problem)


def _last_good(run: Path) -> str:
    whole = [c for c in list_checkpoints(run) if find_problem(c) is None]
    return f"the last good checkpoint is {whole[0]}" if whole else "there is no earlier checkpoint"


def _write(final: Path, state: dict[str, Any], tensors: dict[str, Tensors]) -> str | None:
    staging = final.with_name(f".{final.name}.writing")
    remaining = iter(tensors.items())
    try:
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
        for name, iterator in remaining:
            # Gathered before anything can fail on this rank alone: the others are in the same collectives.
            whole = dict(iterator)
            write_tensors(whole, staging / f"{name}.safetensors")
        _write_json(staging / "state.json", state)
        hashes = {path.name: _sha256(path) for path in sorted(staging.iterdir())}
        for name in hashes:
            sync(staging / name)
        _write_json(staging / MANIFEST, {"sha256": hashes})
        sync(staging / MANIFEST)
        sync(staging)
        if final.exists():
            shutil.rmtree(final)
        staging.rename(final)
        sync(final.parent)
    except (OSError, SafetensorError) as error:
        for _, iterator in remaining:
            _exhaust(iterator)
        shutil.rmtree(staging, ignore_errors=True)
        return str(error)
    return None


def _prune(newest: Path, keep: int) -> None:
    """Removes all but the ``keep`` checkpoints up to ``newest``, the one just written."""
    run = newest.parent.parent
    # Those with a higher number were passed over as damaged when the run resumed: they must not push out whole ones.
    counted = [c for c in list_checkpoints(run) if int(c.name) <= int(newest.name)]
    for old in counted[keep:]:
        _remove(old)
    for left_over in checkpoints_folder(run).glob(".*.writing"):
        shutil.rmtree(left_over, ignore_errors=True)


def _remove(folder: Path) -> None:
    # The manifest goes first, so that half a removal never looks whole.
    (folder / MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def _exhaust(iterator: Iterable) -> None:
    for _ in iterator:
        pass


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def find_checkpoint(run: Path, checkpoint: int | None = None) -> Path:
    """The folder of a checkpoint that is whole.

    Args:
        checkpoint: its images_seen; the newest whole one if not given.

    Raises:
        UserError: no such checkpoint, or a damaged one.
    """
    if checkpoint is None:
        folder = newest_checkpoint(run, warn=lambda message: print(f"warning: {message}"))
        if folder is None:
            raise UserError(f"{run} has no whole checkpoint yet")
        return folder
    folder = checkpoints_folder(run) / str(checkpoint)
    problem = find_problem(folder) if folder.is_dir() else "there is no such folder"
    if problem:
        raise UserError(f"cannot use the checkpoint {folder}: {problem}")
    return folder


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
    return load_weights(config, find_checkpoint(run, checkpoint), weights), config


def load_weights(config: TrainConfig, checkpoint: Path, weights: str) -> Backbone:
    """The network of a configuration with the weights "ema" or "model" of a checkpoint, as ``load_model`` gives it.

    Raises:
        UserError: the file is missing or damaged.
    """
    model = make_backbone(config.model, skip_scale=config.skip_scale)
    model.load_state_dict(read_tensors(checkpoint, weights))
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
