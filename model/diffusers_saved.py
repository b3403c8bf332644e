"""What the configuration of a patched network says of its skips, and what would lose them.

The entry "scalelong" of ``config.json`` names the network's class and describes the policy. A class of diffusers that
reads it warns that it does not know the entry, and gives the plain network; ``PatchedUNet`` puts policy and gates back.
"""

import functools
import warnings
from collections.abc import Callable, Iterable
from importlib import import_module
from typing import Any

from torch import nn

from scalelong.model.skip_scale import (
    LearnedScale,
    SkipScale,
    Unscaled,
    make_skip_scale,
    skip_scale_from_dict,
    skip_scale_to_dict,
)

ENTRY = "scalelong"


def saved_policy(network: nn.Module) -> SkipScale | None:
    """
    Raises:
        ValueError: the configuration's entry is of no known policy.
    """
    return policy_in(dict(network.config)) if _has_config(network) else None  # type: ignore[arg-type]


def policy_in(config: dict[str, Any]) -> SkipScale | None:
    """
    Raises:
        ValueError: the configuration's entry is of no known policy.
    """
    entry = config.get(ENTRY)
    if entry is None:
        return None
    if not isinstance(entry, dict) or "skip_scale" not in entry:
        raise ValueError(f"the entry {ENTRY!r} of the configuration describes no skip scale: {entry!r}")
    return skip_scale_from_dict(entry["skip_scale"])


def policy_in_place(network: nn.Module) -> SkipScale | None:
    of_blocks = (vars(block).get("skips") for block in network.modules())
    return next((skips.network.policy for skips in of_blocks if skips is not None), None)


def policy_of(networks: Iterable[nn.Module], given: SkipScale | None) -> SkipScale:
    """What is asked for, else what the configurations say, else what is in place, else "cs".

    Raises:
        ValueError: the networks were saved with different policies.
    """
    found = []
    for network in networks:
        in_place, saved = policy_in_place(network), saved_policy(network)
        found.append(saved if in_place is None else in_place)
        if given is not None and in_place is None and saved is not None and given != saved:
            warnings.warn(f"the network was saved with {saved}; patched with {given} it is another", stacklevel=3)
    if given is not None:
        return given
    if any(policy != found[0] for policy in found):
        raise ValueError(f"the networks were saved with {' and '.join(map(str, found))}: patch each by itself")
    return found[0] or make_skip_scale("cs")


def check_gates_are_not_forgotten(network: nn.Module, *, is_saved: bool) -> None:
    """A network that was saved with learned gates is not itself with new ones.

    Raises:
        ValueError: the policy ``is_saved``, so its gates are as well.
    """
    saved = saved_policy(network)
    if not isinstance(saved, LearnedScale):
        return
    advice = "give gates_from=FOLDER, or load the network with scalelong.PatchedUNet.from_pretrained(FOLDER)"
    if is_saved:
        raise ValueError(f"the network was saved with the gates of {saved}, which are not read: {advice}")
    warnings.warn(
        f"the network was saved with the gates of {saved}; it gets new ones. To keep those, {advice}", stacklevel=4
    )


def write_policy(network: nn.Module, policy: SkipScale) -> None:
    """Into the configuration, where there is one; warns of a policy that cannot be saved."""
    if not _has_config(network):
        return
    try:
        description = skip_scale_to_dict(policy)
    except ValueError as error:
        forget_policy(network)
        warnings.warn(f"the configuration of the network will not say how its skips are scaled: {error}", stacklevel=3)
        return
    network.register_to_config(**{ENTRY: {"network": type(network).__name__, "skip_scale": description}})  # type: ignore[operator]


def forget_policy(module: Any) -> None:
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
        policy = policy_in_place(unet) if isinstance(unet, nn.Module) else None
        if policy is not None and not isinstance(policy, Unscaled):
            raise ValueError(
                f"{cls.__name__}.{convert.__name__} would take over the weights of this UNet, but not that its skips "
                f"are scaled by {policy}: call scalelong.unpatch_diffusers(unet) first, if you want that"
            )
        return convert(cls, *args, **kwargs)

    refusing.refuses_scaled_skips = True  # type: ignore[attr-defined]
    return refusing
