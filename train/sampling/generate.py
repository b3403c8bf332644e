"""Images from a model: the noise and the guidance of each, in batches.

Classifier-free guidance is eps_c + s (eps_c - eps_u) (Ho and Salimans, arXiv:2207.12598, with s = w; s = 0 is none).

Shapes: B batch, C channels, H height, W width.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from scalelong.model.backbone import Backbone
from scalelong.train.config import TrainConfig
from scalelong.train.data.order import Stream, draw_noise, draw_seed
from scalelong.train.data.source import LatentSource
from scalelong.train.data.stand_ins import SoundImages
from scalelong.train.objective import Process
from scalelong.train.sampling.samplers import Denoiser, denoise


def guided(model: Backbone, condition: Tensor | None, null_condition: int | Tensor | None, guidance: float) -> Denoiser:
    """The model's noise prediction under the condition, with classifier-free guidance of strength s = ``guidance``.

    Args:
        condition: labels (B,), or text features (B, L, D).
        null_condition: what stands for none: a label, or the features (L, D) of the empty text.
    """

    def predict(x_BCHW: Tensor, t: Tensor) -> Tensor:
        t_B = t.to(x_BCHW.dtype).expand(len(x_BCHW))
        if guidance == 0 or condition is None:
            return model(x_BCHW, t_B, condition)
        assert null_condition is not None, "guidance needs a null condition"
        null = torch.as_tensor(null_condition).to(condition).expand_as(condition)
        # One pass over both halves: the batch is doubled, the launches are not.
        both = model(torch.cat([x_BCHW, x_BCHW]), torch.cat([t_B, t_B]), torch.cat([condition, null]))
        conditional, unconditional = both.chunk(2)
        return conditional + guidance * (conditional - unconditional)

    return predict


@torch.inference_mode()
def generate(
    model: Backbone,
    process: Process,
    conditions: list[int] | Tensor | None,
    *,
    num_images: int,
    null_condition: int | Tensor | None,
    sampler: str,
    steps: int,
    guidance: float,
    seed: int = 0,
    batch_size: int = 256,
    to_pictures: Callable[[Tensor], Tensor] | None = None,
) -> np.ndarray:
    """Images (N, H, W, C) in uint8; image n depends on (seed, n), its condition and the settings, not on the batches.

    Args:
        conditions: a label for each image, or text features (N, L, D); None for a model without either.
        null_condition: as ``guided`` takes it.
        to_pictures: makes images (B, C, H, W) in [-1, 1] of what the model draws; None: it draws images.
    """
    config = model.config
    device = next(model.parameters()).device
    shape = (config.in_channels, config.img_size, config.img_size)
    images = []
    for first in range(0, num_images, batch_size):
        numbers = range(first, min(first + batch_size, num_images))
        noise = np.stack([draw_noise(seed, n, shape, Stream.GENERATION) for n in numbers])
        condition = None if conditions is None else torch.as_tensor(conditions[first : numbers.stop]).to(device)
        x_BCHW = denoise(
            guided(model, condition, null_condition, guidance),
            process,
            torch.from_numpy(noise).to(device),
            sampler=sampler,
            steps=steps,
            generators=[_torch_generator(seed, n) for n in numbers],
        )
        images.append(to_uint8(x_BCHW if to_pictures is None else to_pictures(x_BCHW)))
    return np.concatenate(images)


def _torch_generator(seed: int, number: int) -> torch.Generator:
    """Of the noise that a stochastic sampler adds to image ``number``."""
    return torch.Generator().manual_seed(draw_seed(seed, Stream.SAMPLER, number))


def to_uint8(x_BCHW: Tensor) -> np.ndarray:
    """(B, H, W, C): [-1, 1] to 0 .. 255, rounded and clamped."""
    return ((x_BCHW.float() + 1) * 127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1).cpu().numpy()


def default_labels(num_images: int, num_classes: int) -> list[int] | None:
    """Every class in turn; None for a model without labels."""
    return [n % num_classes for n in range(num_images)] if num_classes else None


def default_texts(num_images: int, source: LatentSource) -> Tensor:
    """Text features (N, L, D) of the first captions of images spread evenly over the data."""
    indices = np.arange(num_images) * len(source) // num_images
    return source.contexts(indices, np.zeros_like(indices))


def texts_of(config: TrainConfig, source: SoundImages | LatentSource) -> LatentSource | None:
    """The source of a run, if its captions are what the model is conditioned on."""
    return source if source.holds == "latents" and config.context_shape is not None else None


def null_condition_of(config: TrainConfig, texts: LatentSource | None) -> int | Tensor | None:
    """What stands for no condition: a label, or the features (L, D) of the empty text; None without guidance."""
    return config.null_label if texts is None else texts.empty_context


def default_conditions(config: TrainConfig, texts: LatentSource | None, num_images: int) -> list[int] | Tensor | None:
    """Every class in turn, or captions spread over the data; None for a model without either."""
    return default_labels(num_images, config.num_data_classes) if texts is None else default_texts(num_images, texts)
