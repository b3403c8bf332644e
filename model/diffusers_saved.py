"""What the configuration of a patched network says of its skips, and what would lose them.

The entry "scalelong" of ``config.json`` names the network's class and describes the policy. A class of diffusers that
reads it warns that it does not know the entry, and gives the plain network; ``PatchedUNet`` puts policy and gates back.
"""

import functools
import warnings
from collections.abc import Callable, Iterable, Sequence
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import nn

from scalelong.model.renamed import with_new_names
from scalelong.model.skip_scale import (
    SkipScale,
    SkipShape,
    Unscaled,
    make_skip_scale,
    skip_scale_from_dict,
    skip_scale_to_dict,
)
from scalelong.model.unet_config import SkipPosition, check_position

ENTRY = "scalelong"


class Scaling(NamedTuple):
    """How the skips of a patched network are scaled."""

    policy: SkipScale
    position: SkipPosition = "before-norm"

    def __str__(self) -> str:
        return f"{self.policy} after the norm" if self.position == "after-norm" else str(self.policy)


def saved_scaling(network: nn.Module) -> Scaling | None:
    """
    Raises:
        ValueError: the configuration's entry is of no known policy.
    """
    return scaling_in(dict(network.config)) if _has_config(network) else None  # type: ignore[arg-type]


def scaling_in(config: dict[str, Any]) -> Scaling | None:
    """What the configuration of a network says of its skips, in a file of an earlier version too.

    Raises:
        ValueError: the configuration's entry is of no known policy.
    """
    entry = config.get(ENTRY)
    if entry is None:
        return None
    if not isinstance(entry, dict) or "skip_scale" not in entry:
        raise ValueError(f"the entry {ENTRY!r} of the configuration describes no skip scale: {entry!r}")
    entry = with_new_names("patched network", entry)
    position = entry.get("position", "before-norm")
    check_position(position)
    return Scaling(skip_scale_from_dict(entry["skip_scale"]), position)


def scaling_in_place(network: nn.Module) -> Scaling | None:
    of_blocks = (vars(block).get("skips") for block in network.modules())
    found = (Scaling(skips.network.policy, skips.network.position) for skips in of_blocks if skips is not None)
    return next(found, None)


def scaling_of(networks: Iterable[nn.Module], given: Scaling | None) -> Scaling:
    """What is asked for, else what the configurations say, else what is in place, else "cs".

    Raises:
        ValueError: the networks were saved with different policies.
    """
    found = []
    for network in networks:
        in_place, saved = scaling_in_place(network), saved_scaling(network)
        found.append(saved if in_place is None else in_place)
        if given is not None and in_place is None and saved is not None and given != saved:
            warnings.warn(f"the network was saved with {saved}; patched with {given} it is another", stacklevel=3)
    if given is not None:
        return given
    if any(scaling != found[0] for scaling in found):
        raise ValueError(f"the networks were saved with {' and '.join(map(str, found))}: patch each by itself")
    return found[0] or Scaling(make_skip_scale("cs"))


def check_gates_are_not_forgotten(network: nn.Module, shapes: Sequence[SkipShape], *, is_saved: bool) -> None:
    """A network that was saved with learned gates is not itself with new ones.

    Raises:
        ValueError: the policy ``is_saved``, so its gates are as well.
    """
    saved = saved_scaling(network)
    if saved is None:
        return
    with torch.device("meta"):
        if saved.policy.make_gates(shapes) is None:
            return
    advice = "give gates_from=FOLDER, or load the network with scalelong.PatchedUNet.from_pretrained(FOLDER)"
    if is_saved:
        raise ValueError(f"the network was saved with the gates of {saved}, which are not read: {advice}")
    warnings.warn(
        f"the network was saved with the gates of {saved}; it gets new ones. To keep those, {advice}", stacklevel=4
    )


def write_scaling(network: nn.Module, scaling: Scaling) -> None:
    """Into the configuration, where there is one; warns of a policy that cannot be saved."""
    if not _has_config(network):
        return
    try:
        description = skip_scale_to_dict(scaling.policy)
    except ValueError as error:
        forget_scaling(network)
        warnings.warn(f"the configuration of the network will not say how its skips are scaled: {error}", stacklevel=3)
        return
    entry = {"network": type(network).__name__, "skip_scale": description, "position": scaling.position}
    network.register_to_config(**{ENTRY: entry})  # type: ignore[operator]


def forget_scaling(module: Any) -> None:
    if _has_config(module) and ENTRY in module.config:
        from diffusers.configuration_utils import FrozenDict

        module._internal_dict = FrozenDict({name: value for name, value in module.config.items() if name != ENTRY})


def _has_config(module: nn.Module) -> bool:
    from diffusers import ConfigMixin

    return isinstance(module, ConfigMixin)


# Networks that take over the weights of a UNet, and would not take over how its skips are scaled.
CONVERSIONS = (
    ("diffusers.models.unets.unet_motion_model", "UNetMotionModel", "from_unet2d"),
    ("diffusers.models.controlnets.controlnet_xs", "UNetControlNetXSModel", "from_unet"),
)


def refuse_conversions() -> None:
    """Makes them raise for a UNet with scaled skips, in this process; others convert as before."""
    for module, kind_name, name in CONVERSIONS:
        try:
            kind = getattr(import_module(module), kind_name)
        except (ImportError, AttributeError):  # a release that has none
            continue
        convert = vars(kind)[name].__func__
        if not hasattr(convert, "refuses_scaled_skips"):
            setattr(kind, name, classmethod(_refusing(convert)))


def _refusing(convert: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(convert)
    def refusing(cls: type, *args: Any, **kwargs: Any) -> Any:
        unet = args[0] if args else kwargs.get("unet")
        scaling = scaling_in_place(unet) if isinstance(unet, nn.Module) else None
        if scaling is not None and not isinstance(scaling.policy, Unscaled):
            raise ValueError(
                f"{cls.__name__}.{convert.__name__} would take over the weights of this UNet, but not that its skips "
                f"are scaled by {scaling}: call scalelong.unpatch_diffusers(unet) first, if you want that"
            )
        return convert(cls, *args, **kwargs)

    refusing.refuses_scaled_skips = True  # type: ignore[attr-defined]
    return refusing
