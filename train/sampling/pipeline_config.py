"""What an export says beside its network: how that was trained, and how it is asked for images.

It stands under ``pipeline`` in the export's ``config.json``, of the format that model/architectures.py counts.
Imports no torch.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from scalelong.model.skip_tuning import SkipTuning
from scalelong.train.objective_config import (
    NUM_TIMES,
    SAMPLER_NAMES,
    ObjectiveConfig,
    check_guidance_interval,
    check_sampler,
)


@dataclass(frozen=True, kw_only=True)
class PipelineConfig:
    """How a network was trained, and how it is asked for images where the caller does not say.

    Raises:
        ValueError: a value that does not fit, naming it.
    """

    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    """What the network predicts, under which noise, at which times."""
    null_label: int | None = None
    """The label that stands for no label; None where the network was not trained for guidance, or takes no labels."""
    class_names: tuple[str, ...] = ()
    """Names of the labels from 0 on, the null label not counted; empty without labels."""
    sampler: str = "dpm-solver++"
    """Who solves the reverse process: docs/objectives.md."""
    steps: int = 50
    """Network evaluations for each image (two each with guidance)."""
    guidance: float = 0.0
    """s in eps_c + s (eps_c - eps_u); 0: no guidance."""
    guidance_interval: tuple[float, float] | None = None
    """Guidance only at noise levels sigma in (low, high]; None: at all of them."""
    skip_tuning: tuple[float, float] | None = None
    """Factors of the innermost and of the outermost long skip while sampling; None: as trained."""
    path_drop: bool = False
    """Guidance by a pass that leaves out the sparse middle."""
    autoencoder: str | None = None
    """Folder of the AutoencoderKL in the export; None: the network draws pictures, or none was given."""
    empty_context: str | None = None
    """File in the export with the features of the empty text; None without text, or where they are not known."""
    training: dict[str, Any] = field(default_factory=dict)
    """What else is known of the training, for readers: the data's name, images seen, which weights, the recipe."""

    def __post_init__(self):
        _check(self.null_label is None or (_is_whole(self.null_label) and self.null_label >= 0), "null_label", self)
        names = self.class_names
        _check(isinstance(names, list | tuple) and all(isinstance(name, str) for name in names), "class_names", self)
        object.__setattr__(self, "class_names", tuple(names))  # JSON has lists
        for name in ("autoencoder", "empty_context"):
            value = getattr(self, name)
            # A plain name: nothing outside of the export is read.
            is_name = isinstance(value, str) and value not in ("", ".", "..") and not {"/", "\\"} & set(value)
            _check(value is None or is_name, name, self)
        _check(isinstance(self.training, dict), "training", self)
        _check(isinstance(self.path_drop, bool), "path_drop", self)
        if self.sampler not in SAMPLER_NAMES:
            raise ValueError(f"unknown sampler {self.sampler!r}; there are {', '.join(SAMPLER_NAMES)}")
        check_sampler(self.sampler, self.objective)
        if not _is_whole(self.steps) or not 1 <= self.steps <= NUM_TIMES:
            raise ValueError(f"steps must be a whole number in 1 .. {NUM_TIMES}, got {self.steps!r}")
        if not _is_number(self.guidance) or not 0 <= self.guidance < math.inf:
            raise ValueError(f"guidance must be a number from 0 on, got {self.guidance!r}")
        for name in ("guidance_interval", "skip_tuning"):
            pair = getattr(self, name)
            if pair is not None:
                is_pair = isinstance(pair, list | tuple) and len(pair) == 2 and all(map(_is_number, pair))
                _check(is_pair, name, self)
                object.__setattr__(self, name, tuple(pair))
        check_guidance_interval(self.guidance_interval)
        if self.skip_tuning is not None:
            SkipTuning(*self.skip_tuning)

    def check_fits(self, num_classes: int) -> None:
        """Checks that the labels are those of a network.

        Args:
            num_classes: rows of its label embedding.

        Raises:
            ValueError: another null label than the last row, or another number of names than there are classes.
        """
        if self.null_label is not None and self.null_label != num_classes - 1:
            raise ValueError(f"the null label {self.null_label} is not the last of {num_classes} rows of labels")
        if self.class_names and len(self.class_names) != self.num_data_classes(num_classes):
            raise ValueError(
                f"{len(self.class_names)} class names, but the network has {self.num_data_classes(num_classes)} classes"
            )

    def num_data_classes(self, num_classes: int) -> int:
        """How many of a network's ``num_classes`` labels are classes of the data."""
        return num_classes - (0 if self.null_label is None else 1)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able form."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Any) -> "PipelineConfig":
        """What ``to_dict`` gave.

        Raises:
            ValueError: something else, or a field or a value that this version does not know.
        """
        if not isinstance(values, Mapping):
            raise ValueError(f"it is described by {str(values)[:60]!r}")
        values = dict(values)
        if unknown := values.keys() - {f.name for f in fields(cls)}:
            raise ValueError(f"it has the unknown {', '.join(sorted(unknown))}")
        try:
            objective = ObjectiveConfig(**values.pop("objective"))
        except KeyError:
            raise ValueError("it has no 'objective'") from None
        except TypeError as error:
            raise ValueError(f"its objective does not fit this version: {error}") from None
        return cls(objective=objective, **values)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _check(holds: bool, name: str, config: PipelineConfig) -> None:
    if not holds:
        raise ValueError(f"its {name} makes no sense: {str(getattr(config, name))[:60]!r}")
