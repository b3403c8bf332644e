"""The backbones by name, and the one description of a model: in exports, and in the configuration of a run.

Imports no torch until a network is made.
"""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scalelong import __version__
from scalelong.model.backbone_config import BackboneConfig, Recompute
from scalelong.model.dit_config import DiTConfig as DiTConfig
from scalelong.model.edm2_unet_config import EDM2UNetConfig as EDM2UNetConfig
from scalelong.model.renamed import with_new_names
from scalelong.model.skip_scale import SkipScale, skip_scale_from_dict, skip_scale_to_dict
from scalelong.model.unet_config import UNetConfig as UNetConfig
from scalelong.model.uvit_config import UViTConfig as UViTConfig

if TYPE_CHECKING:
    from scalelong.model.backbone import Backbone

FORMAT = 2
"""Of ``config.json`` in exports: 1, which it does not say, has the model alone; 2 may have ``pipeline`` beside it."""


def make_backbone(
    config: BackboneConfig, *, skip_scale: SkipScale | None = None, recompute: Recompute = "none"
) -> "Backbone":
    """The network that a configuration describes.

    Raises:
        ValueError: a way of recomputing that the network does not have.
    """
    network: Any = config.network()
    return network(config, skip_scale=skip_scale, recompute=recompute)


def load_backbone(folder: str | Path) -> "Backbone":
    """The network of any architecture that ``save_pretrained`` or ``scalelong export`` wrote, in evaluation mode.

    Raises:
        FileNotFoundError: the folder lacks ``config.json`` or ``model.safetensors``.
        ValueError: one of them is damaged, or the architecture is not known; says what it found.
    """
    config, _ = read_description(Path(folder) / "config.json")
    return config.network().from_pretrained(folder)


def model_to_dict(config: BackboneConfig, skip_scale: SkipScale) -> dict[str, Any]:
    """The description of a model that ``model_from_dict`` reads.

    Raises:
        ValueError: a policy of one's own that would not be the same when it is read again.
    """
    return {
        "architecture": config.architecture,
        "config": asdict(config),
        "skip_scale": skip_scale_to_dict(skip_scale),
    }


def model_from_dict(values: dict[str, Any]) -> tuple[BackboneConfig, SkipScale]:
    """What ``model_to_dict`` wrote, in an earlier version too.

    Raises:
        ValueError: an architecture, a policy or a field that is missing or that this version does not know, or sizes
            that do not fit.
    """
    values = with_new_names("model", values)
    if missing := [name for name in ("architecture", "config", "skip_scale") if name not in values]:
        raise ValueError(f"it has no {missing[0]!r}")
    if unknown := values.keys() - {"architecture", "config", "skip_scale"}:
        raise ValueError(f"it has the unknown {', '.join(sorted(unknown))}")
    name = values["architecture"]
    if name not in BackboneConfig.known:
        raise ValueError(
            f"unknown architecture {name!r}; there are {', '.join(BackboneConfig.known)}. "
            "One of your own must be defined before it is read"
        )
    kind, sizes = BackboneConfig.known[name], values["config"]
    if not hasattr(kind, "skip_position") and sizes.get("skip_position") == "before-norm":
        del sizes["skip_position"]  # policies of any network had one
    try:
        config = kind(**sizes)
    except TypeError as error:
        raise ValueError(f"{name} of this version cannot be made of {sizes}: {error}") from error
    return config, skip_scale_from_dict(values["skip_scale"])


def read_description(path: Path, *, architecture: str | None = None) -> tuple[BackboneConfig, SkipScale]:
    """The model that a ``config.json`` describes.

    Args:
        architecture: the one that it must be of; None: any.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it describes no model, another one, or none of this version; says what it found.
    """
    description = read_export(path)
    if architecture not in (None, description["architecture"]):
        raise ValueError(f"{path} describes {description['architecture']!r}, not {architecture!r}")
    of_model = {name: value for name, value in description.items() if name not in ("format", "pipeline")}
    try:
        return model_from_dict(of_model)
    except ValueError as error:
        raise ValueError(f"{path} describes no {description['architecture']} of this version: {error}") from error


def read_export(path: Path) -> dict[str, Any]:
    """All that the ``config.json`` of an export says.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it describes no model, or is of a format that a newer version writes.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path.parent} has no {path.name}: not an exported model")
    try:
        description = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from None
    if isinstance(description, dict) and "optimizer" in description:
        raise ValueError(f"{path.parent} is a run, not an export: scalelong export {path.parent} --out DIR makes one")
    if not isinstance(description, dict) or not isinstance(description.get("architecture"), str):
        raise ValueError(f"{path} describes no model: it holds {str(description)[:60]!r}")
    version = description.get("format", 1)
    if type(version) is not int or version < 1:
        raise ValueError(f"{path} is of no format of exports: {version!r}")
    if version > FORMAT:
        raise ValueError(
            f"{path} is of format {version}, which a newer scalelong writes; this one, {__version__}, reads up to "
            f"{FORMAT}: pip install --upgrade scalelong"
        )
    return description
