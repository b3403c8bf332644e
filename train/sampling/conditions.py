"""What a run's samples are to show, and how they are drawn: classes in turn, or captions of its data."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from scalelong.train.config import TrainConfig
from scalelong.train.data.source import LatentSource
from scalelong.train.data.stand_ins import SoundImages
from scalelong.train.sampling.generate import Conditions, labels_in_turn


def spread_texts(source: LatentSource, num_images: int) -> Callable[[Sequence[int]], Tensor]:
    """Image n of so many is to show the first caption of an image; those are spread evenly over the data."""

    def texts(numbers: Sequence[int]) -> Tensor:
        indices = np.asarray(numbers) * len(source) // num_images
        return source.contexts(indices, np.zeros_like(indices))

    return texts


def texts_of(config: TrainConfig, source: SoundImages | LatentSource) -> LatentSource | None:
    """The source of a run, if its captions are what the model is conditioned on."""
    return source if source.holds == "latents" and config.context_shape is not None else None


def settings_of(config: TrainConfig) -> dict[str, Any]:
    """Keyword arguments of ``generate`` that say how a run's own samples are drawn, in grids and in scores."""
    sample = config.sample
    return {
        "sampler": sample.sampler,
        "steps": sample.steps,
        "guidance": sample.guidance,
        "guidance_interval": sample.guidance_interval,
        "skip_tuning": sample.skip_tuning,
        "path_drop": sample.path_drop,
        "seed": config.seed,
    }


def null_condition_of(config: TrainConfig, texts: LatentSource | None) -> int | Tensor | None:
    """What stands for no condition: a label, or the features (L, D) of the empty text; None without guidance."""
    return config.null_label if texts is None else texts.empty_context


def default_conditions(config: TrainConfig, texts: LatentSource | None, num_images: int) -> Conditions:
    """Every class in turn, or captions spread over the data; none for a model without either."""
    return labels_in_turn(range(config.num_data_classes)) if texts is None else spread_texts(texts, num_images)
