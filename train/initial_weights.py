"""``--init-from``: a new run that starts from weights, of this project, of another, or of a run, and from nothing else.

Optimizer, averages, schedule and data begin as in any new run. What the weights are fitted to is in
model/fitted_weights.py; here is what the flag may name, and how it is read. Every rank reads it.
"""

import hashlib
import json
import socket
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scalelong.model.architectures import make_backbone, read_description
from scalelong.model.backbone import Backbone
from scalelong.model.checkpoint_file import read_state_dict, with_one_dtype
from scalelong.model.diffusers_unet import weights_of_diffusers
from scalelong.model.fitted_weights import Weights, fit
from scalelong.train.branch import Origin, checkpoint_of, parse_origin
from scalelong.train.checkpoint import read_tensors
from scalelong.train.config import TrainConfig
from scalelong.train.errors import UserError
from scalelong.train.run_folder import config_path, read_config

FLAG = "--init-from"
OF_DIFFUSERS = "diffusion_pytorch_model"
PARTS_OF_PIPELINES = ("unet", "transformer")


@dataclass
class InitialWeights:
    """Weights that a run starts from, once it is known that they fit."""

    weights: Weights
    sha256: str
    lines: list[str]
    """What was taken, interpolated and made new."""

    def put_into(self, model: Backbone, config: TrainConfig) -> None:
        """Gives a new network the weights, and gives them up here."""
        state, _ = _fit(self.weights, config, model)
        model.load_state_dict(state)
        self.weights.state.clear()


def find_weights(config: TrainConfig) -> str:
    """What ``config.init_from`` names, as it is found from everywhere: a path, or RUN@IMAGES.

    Raises:
        UserError: there are no weights.
    """
    assert config.init_from is not None
    path = Path(config.init_from)
    if path.is_file():
        return str(path.resolve())
    origin = parse_origin(config.init_from)
    folder = path if path.is_dir() else origin.run
    if _is_run(folder):
        if folder.resolve() == config.run.resolve():
            raise UserError(f"{FLAG} {config.init_from} is the run folder itself; take another --run")
        checkpoint = checkpoint_of(Origin(folder, None) if path.is_dir() else origin, flag=FLAG)
        return str(Origin(folder.resolve(), int(checkpoint.name)))
    if not path.is_dir():
        raise UserError(f"{FLAG} {config.init_from}: no such file or folder")
    return str(path.resolve())


def keep_weights(there: TrainConfig, config: TrainConfig) -> TrainConfig:
    """The configuration of a start that goes on with a run: what that started from is on record.

    Raises:
        UserError: other weights are given.
    """
    if config.init_from is not None:
        given, known = config.init_from, there.init_from
        named = None if known is None else parse_origin(known)
        same = known is not None and str(_resolved(parse_origin(given))) in (known, str(named.run) if named else known)
        if not same:
            came = "was not started from weights" if known is None else f"was started from the weights of {known}"
            raise UserError(f"{config.run} {came}, not of {given}: take another --run")
    if config.init_sha256 not in (None, there.init_sha256):
        raise UserError(
            f"{config.run} was started from weights of SHA-256 {there.init_sha256}, not {config.init_sha256}"
        )
    return replace(config, init_from=there.init_from, init_sha256=there.init_sha256)


def _resolved(origin: Origin) -> Origin:
    return origin._replace(run=origin.run.resolve())


def read_weights(config: TrainConfig) -> InitialWeights:
    """The weights that a new run starts from.

    Raises:
        UserError: they cannot be read, are not those of ``config.init_sha256``, or fit another network.
    """
    assert config.init_from is not None
    try:
        weights, sha256, what = _read(config.init_from)
        if config.init_sha256 not in (None, sha256):
            raise UserError(f"{FLAG} {config.init_from} has the SHA-256 {sha256}, not {config.init_sha256}")
        with torch.device("meta"):
            network = make_backbone(config.model, skip_scale=config.skip_scale)
        _, lines = _fit(weights, config, network)
    except (OSError, ValueError) as error:
        raise UserError(f"{FLAG} {config.init_from}: {error}") from error
    return InitialWeights(weights, sha256, [f"weights of {what}, SHA-256 {sha256}", *(f"  {line}" for line in lines)])


def _fit(weights: Weights, config: TrainConfig, network: Backbone) -> tuple[dict[str, Tensor], list[str]]:
    has_null = config.null_label is not None
    return fit(weights, config.model, config.skip_scale, network.state_dict(), has_null_label=has_null)


def _read(text: str) -> tuple[Weights, str, str]:
    """Weights, their SHA-256, and what they are of."""
    path = Path(text)
    if path.is_file():
        return Weights(_read_tensors(path)), _sha256(path), text
    origin = parse_origin(text)
    if not path.is_dir() and not origin.run.is_dir():
        raise ValueError(f"{socket.gethostname()} does not see it: all hosts must share it")
    if not path.is_dir():
        return _read_run(origin)
    folder = next((path / part for part in PARTS_OF_PIPELINES if (path / part / "config.json").is_file()), path)
    description = _read_json(folder / "config.json")
    if "_class_name" in description:
        files = _files_of_diffusers(folder)
        return weights_of_diffusers(description, _read_tensors(*files)), _sha256(*files), f"{text} (diffusers)"
    model, skip_scale = read_description(folder / "config.json")
    file = folder / "model.safetensors"
    return Weights(_read_tensors(file), model, skip_scale), _sha256(file), f"{text} (an export)"


def _read_run(origin: Origin) -> tuple[Weights, str, str]:
    """The averages of a checkpoint."""
    config, checkpoint = read_config(origin.run), checkpoint_of(origin, flag=FLAG)
    state = read_tensors(checkpoint, "ema")
    weights = Weights(state, config.model, config.skip_scale, has_null_label=config.null_label is not None)
    what = f"{origin.run}, the averages at {int(checkpoint.name):,} images"
    return weights, _sha256(checkpoint / "ema.safetensors"), what


def _read_tensors(*files: Path) -> dict[str, Tensor]:
    state = {name: tensor for file in files for name, tensor in read_state_dict(file).items()}
    if not state:
        raise ValueError(f"{files[0]} holds no tensors")
    return with_one_dtype(state)


def _is_run(folder: Path) -> bool:
    try:
        return "optimizer" in _read_json(config_path(folder))
    except (OSError, ValueError):
        return False


def _read_json(path: Path) -> dict[str, Any]:
    """
    Raises:
        ValueError: no such file, or it holds something else.
    """
    if not path.is_file():
        raise ValueError(f"{path.parent} has no {path.name}: it is no export, no run and no folder of diffusers")
    found = json.loads(path.read_text())
    if not isinstance(found, dict):
        raise ValueError(f"{path} describes no model")
    return found


def _files_of_diffusers(folder: Path) -> list[Path]:
    """The file of the weights, or those that an index names."""
    for suffix in ("safetensors", "bin"):
        whole, index = folder / f"{OF_DIFFUSERS}.{suffix}", folder / f"{OF_DIFFUSERS}.{suffix}.index.json"
        if whole.is_file():
            return [whole]
        if index.is_file():
            return [folder / name for name in sorted(set(_read_json(index)["weight_map"].values()))]
    raise ValueError(f"{folder} has no {OF_DIFFUSERS}.safetensors")


def _sha256(*files: Path) -> str:
    """Of the files, one after the other."""
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()
