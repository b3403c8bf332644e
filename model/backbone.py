"""What the backbones have in common: sizes, long skips to watch, and a folder of safetensors and JSON."""

import json
from collections.abc import Callable
from dataclasses import asdict, fields
from numbers import Integral
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Self

from torch import nn

from scalelong.model.checkpoint_file import check_keys, read_state_dict, with_one_dtype, write_tensors
from scalelong.model.checkpointing import Checkpointing
from scalelong.model.skip_scale import SkipScale, skip_scale_from_dict, skip_scale_to_dict


class ParameterGroup(NamedTuple):
    """Parameters that an optimizer updates alike."""

    names: tuple[str, ...]
    """As in ``named_parameters()``."""
    learning_rate_factor: float = 1.0
    """Multiplies the run's learning rate."""
    weight_decay_factor: float = 1.0
    """Multiplies the run's weight decay."""


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

    def parameter_groups(self) -> list[ParameterGroup]:
        """Every parameter in one group each, under its first name in ``named_parameters()`` and in their order.

        One group, in the order of ``parameters()``, where all are updated alike.
        """
        return [ParameterGroup(tuple(name for name, _ in self.named_parameters()))]

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
        write_tensors({k: v.contiguous() for k, v in self.state_dict().items()}, folder / "model.safetensors")

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Self:
        """Reads what ``save_pretrained`` or ``scalelong export`` wrote.

        Raises:
            FileNotFoundError: the folder lacks one of the two files.
            ValueError: the description is of another architecture, or one of the files is damaged; says what it found.
        """
        folder = Path(folder)
        for name in ("config.json", "model.safetensors"):
            if not (folder / name).is_file():
                raise FileNotFoundError(f"{folder} has no {name}: not an exported model")
        model = cls._from_description(folder / "config.json")
        state = with_one_dtype(read_state_dict(folder / "model.safetensors"))
        check_keys(state, model.state_dict(), cls.__name__)
        model.to(next(iter(state.values())).dtype).load_state_dict(state)
        return model.eval()

    @classmethod
    def _from_description(cls, path: Path) -> Self:
        """The network that ``save_pretrained`` described, with new weights."""
        try:
            description = json.loads(path.read_text())
        except ValueError as error:
            raise ValueError(f"{path} is no JSON: {error}") from None
        if not isinstance(description, dict) or "architecture" not in description:
            raise ValueError(f"{path} describes no model: it holds {str(description)[:60]!r}")
        if description["architecture"] != cls.__name__:
            raise ValueError(f"{path} describes {description['architecture']!r}, not {cls.__name__!r}")
        try:
            config = cls.config_class(**description["config"])
            return cls(config, skip_scale=skip_scale_from_dict(description["skip_scale"]))  # type: ignore[call-arg]
        except (ValueError, TypeError, KeyError) as error:
            what = f"it has no {error}" if isinstance(error, KeyError) else error
            raise ValueError(f"{path} describes no {cls.__name__} of this version: {what}") from error


def check_whole_numbers(config: Any) -> None:
    """
    Raises:
        ValueError: a field that is declared an integer and holds something else.
    """
    for field in fields(config):
        value = getattr(config, field.name)
        if field.type is int and (not isinstance(value, Integral) or isinstance(value, bool)):
            what = ", the side of a square image" if field.name == "img_size" else ""
            raise ValueError(f"{field.name} is a whole number{what}, got {value!r}")
