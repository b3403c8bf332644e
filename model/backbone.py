"""What the backbones have in common: sizes, long skips to watch, and a folder of safetensors and JSON."""

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar, Self

from safetensors.torch import load_file, save_file
from torch import nn

from scalelong.model.checkpointing import Checkpointing
from scalelong.model.skip_scale import SkipScale, skip_scale_from_dict, skip_scale_to_dict


class Backbone(nn.Module):
    """A network that predicts the noise in an image, with scaled long skips: ``Model(config, skip_scale=...)``."""

    config_class: ClassVar[Callable[..., Any]]
    config: Any
    skip_scale: SkipScale
    checkpointing: Checkpointing
    __call__: Callable[..., Any]

    @classmethod
    def check_options(cls, skip_scale: SkipScale, checkpointing: Checkpointing) -> None:
        """
        Raises:
            ValueError: what this architecture cannot do.
        """
        raise NotImplementedError

    def skip_blocks(self) -> list[tuple[int, nn.Module]]:
        """(i, the module that is called with (..., skip, scale)) for each long skip, i = 1 the outermost."""
        raise NotImplementedError

    def flops(self, batch_size: int = 1) -> int:
        """Floating-point operations of one forward pass, two per multiply-add; a training step costs three times that.

        Matrix products, convolutions and attention are counted; norms, activations and the gates are not.
        """
        raise NotImplementedError

    def num_params(self) -> int:
        return sum(p.numel() for p in self.parameters())

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes ``config.json`` and ``model.safetensors`` into ``folder``, made if need be."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        description = {
            "architecture": type(self).__name__,
            "config": asdict(self.config),
            "skip_scale": skip_scale_to_dict(self.skip_scale),
        }
        (folder / "config.json").write_text(json.dumps(description, indent=2) + "\n")
        save_file({k: v.contiguous() for k, v in self.state_dict().items()}, folder / "model.safetensors")

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Self:
        """Reads what ``save_pretrained`` or ``python -m scalelong.train.export`` wrote.

        Raises:
            FileNotFoundError: the folder lacks one of the two files.
            ValueError: the description is of another architecture.
        """
        folder = Path(folder)
        for name in ("config.json", "model.safetensors"):
            if not (folder / name).is_file():
                raise FileNotFoundError(f"{folder} has no {name}: not an exported model")
        description = json.loads((folder / "config.json").read_text())
        if description.get("architecture") != cls.__name__:
            found = description.get("architecture")
            raise ValueError(f"{folder / 'config.json'} describes {found!r}, not {cls.__name__!r}")
        model = cls(
            cls.config_class(**description["config"]),  # type: ignore[call-arg]
            skip_scale=skip_scale_from_dict(description["skip_scale"]),
        )
        state = load_file(folder / "model.safetensors")
        model.to(next(iter(state.values())).dtype).load_state_dict(state)
        return model.eval()
