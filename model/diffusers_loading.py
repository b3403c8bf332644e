"""Loads what was saved of a patched network: policy, gates and weights in one call."""

from pathlib import Path
from typing import Any

from torch import nn

from scalelong.model.diffusers_gates import GATES
from scalelong.model.diffusers_patch import patch_diffusers
from scalelong.model.diffusers_saved import ENTRY, scaling_in

# Which of from_pretrained's options say where the files are.
_WHERE = ("subfolder", "revision", "cache_dir", "token", "proxies", "force_download", "local_files_only")


class PatchedUNet:
    """Stands where a class of diffusers is named to load or make a network, one that was patched.

    ``PatchedUNet.from_pretrained(folder)`` gives the UNet2DModel or UNet2DConditionModel that was saved there, patched
    as it was, its learned gates included. So do ``EMAModel(..., model_cls=PatchedUNet, model_config=unet.config)`` and
    ``EMAModel.from_pretrained(folder, PatchedUNet)``, whose averages then hold the gates.
    """

    @classmethod
    def from_pretrained(cls, folder: str | Path, *, output_loading_info: bool = False, **options: Any) -> Any:
        """As a class of diffusers has it, with the same options.

        Raises:
            ValueError: the configuration says nothing of scaled skips, the policy is not known, or gates are missing.
        """
        config = _read_config(folder, options)
        network, info = _restoring(_kind(config)).from_pretrained(folder, output_loading_info=True, **options)
        if missing := [name for name in info["missing_keys"] if name.startswith(f"{GATES}.")]:
            raise ValueError(
                f"{folder} was saved without the learned gates of its skips: it lacks {', '.join(missing[:3])}"
            )
        return (network, info) if output_loading_info else network

    @classmethod
    def from_config(cls, config: Any, **options: Any) -> Any:
        """As a class of diffusers has it: a new network, patched as the configuration says, its gates new.

        Raises:
            ValueError: the configuration says nothing of scaled skips, or the policy is not known.
        """
        if not isinstance(config, dict):
            config = _read_config(config, options)
        return _restoring(_kind(config)).from_config(config, **options)


def _read_config(folder: str | Path, options: dict[str, Any]) -> dict[str, Any]:
    from diffusers import UNet2DModel

    where = {name: options[name] for name in _WHERE if name in options}
    return UNet2DModel.load_config(folder, **where)  # type: ignore[return-value]


def _kind(config: dict[str, Any]) -> Any:
    """The class of diffusers that the configuration is of."""
    import diffusers

    if scaling_in(config) is None:
        raise ValueError(
            "the configuration says nothing of scaled skips: the network was not patched when it was saved, or its "
            "configuration was taken before that"
        )
    name = config[ENTRY].get("network")
    if not hasattr(diffusers, str(name)):
        raise ValueError(f"the configuration is of a {name}, which is no class of diffusers {diffusers.__version__}")
    return getattr(diffusers, str(name))


def _restoring(kind: Any) -> Any:
    """That class, making patched networks; they are of the class itself."""

    def from_config(_: type, config: dict[str, Any], **options: Any) -> Any:
        scaling = scaling_in(config)
        assert scaling is not None
        made = kind.from_config({name: value for name, value in config.items() if name != ENTRY}, **options)
        network: nn.Module = made[0] if isinstance(made, tuple) else made
        patch_diffusers(network, skip_scale=scaling.policy, position=scaling.position)
        return made

    return type(kind.__name__, (kind,), {"from_config": classmethod(from_config), "__module__": kind.__module__})
