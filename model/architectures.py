"""The backbones by name and by configuration."""

from dataclasses import asdict
from typing import Any

from scalelong.model.backbone import Backbone
from scalelong.model.checkpointing import Checkpointing
from scalelong.model.skip_scale import SkipScale
from scalelong.model.unet import UNet, UNetConfig
from scalelong.model.uvit import UViT, UViTConfig

BackboneConfig = UViTConfig | UNetConfig
ARCHITECTURES: dict[str, type[Backbone]] = {"UViT": UViT, "UNet": UNet}


def make_backbone(
    config: BackboneConfig, *, skip_scale: SkipScale | None = None, checkpointing: Checkpointing = "none"
) -> Backbone:
    """The network that a configuration describes."""
    network: Any = backbone_of(config)
    return network(config, skip_scale=skip_scale, checkpointing=checkpointing)


def backbone_of(config: BackboneConfig) -> type[Backbone]:
    return ARCHITECTURES[architecture_of(config)]


def architecture_of(config: BackboneConfig) -> str:
    return next(name for name, network in ARCHITECTURES.items() if network.config_class is type(config))


def backbone_config_to_dict(config: BackboneConfig) -> dict[str, Any]:
    return {"architecture": architecture_of(config), **asdict(config)}


def backbone_config_from_dict(values: dict[str, Any]) -> BackboneConfig:
    """What ``backbone_config_to_dict`` wrote; without a name it is a U-ViT.

    Raises:
        ValueError: an architecture that this version does not know, or sizes that do not fit.
        TypeError: a field that this version does not know.
    """
    values = dict(values)
    name = values.pop("architecture", "UViT")
    if name not in ARCHITECTURES:
        raise ValueError(f"unknown architecture {name!r}; there are {', '.join(ARCHITECTURES)}")
    return ARCHITECTURES[name].config_class(**values)
