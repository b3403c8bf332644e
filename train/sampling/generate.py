"""Images from a model: the noise and the guidance of each, in batches.

Classifier-free guidance is eps_c + s (eps_c - eps_u) (Ho and Salimans, arXiv:2207.12598, with s = w; s = 0 is none).

Shapes: B batch, C channels, H height, W width.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from scalelong.model.backbone import Backbone
from scalelong.train.data.latents import LatentFolder
from scalelong.train.data.order import Stream, draw_noise, draw_seed
from scalelong.train.objective import Process
from scalelong.train.sampling.samplers import Denoiser, denoise


def guided(model: Backbone, labels_B: Tensor | None, null_label: int | Tensor | None, guidance: float) -> Denoiser:
    """The model's noise prediction for the labels, with classifier-free guidance of strength s = ``guidance``.

    Args:
        labels_B: labels, or text features (B, L, D).
        null_label: what stands for none: a label, or the features (L, D) of the empty text.
    """

    def predict(x_BCHW: Tensor, t: Tensor) -> Tensor:
        t_B = t.to(x_BCHW.dtype).expand(len(x_BCHW))
        if guidance == 0 or labels_B is None:
            return model(x_BCHW, t_B, labels_B)
        assert null_label is not None, "guidance needs a null label"
        null_B = torch.as_tensor(null_label).to(labels_B).expand_as(labels_B)
        # One pass over both halves: the batch is doubled, the launches are not.
        both = model(torch.cat([x_BCHW, x_BCHW]), torch.cat([t_B, t_B]), torch.cat([labels_B, null_B]))
        conditional, unconditional = both.chunk(2)
        return conditional + guidance * (conditional - unconditional)

    return predict


@torch.inference_mode()
def generate(
    model: Backbone,
    process: Process,
    labels: list[int] | Tensor | None,
    *,
    num_images: int,
    null_label: int | Tensor | None,
    sampler: str,
    steps: int,
    guidance: float,
    seed: int = 0,
    batch_size: int = 256,
    to_pictures: Callable[[Tensor], Tensor] | None = None,
) -> np.ndarray:
    """Images (N, H, W, C) in uint8; image n depends on (seed, n), its label and the settings, not on the batches.

    Args:
        labels: one for each image, or text features (N, L, D); None for a model without labels.
        null_label: as ``guided`` takes it.
        to_pictures: makes images (B, C, H, W) in [-1, 1] of what the model draws; None: it draws images.
    """
    config = model.config
    device = next(model.parameters()).device
    shape = (config.in_channels, config.img_size, config.img_size)
    images = []
    for first in range(0, num_images, batch_size):
        numbers = range(first, min(first + batch_size, num_images))
        noise = np.stack([draw_noise(seed, n, shape, Stream.GENERATION) for n in numbers])
        labels_B = None if labels is None else torch.as_tensor(labels[first : numbers.stop]).to(device)
        x_BCHW = denoise(
            guided(model, labels_B, null_label, guidance),
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


def default_texts(num_images: int, source: LatentFolder) -> Tensor:
    """Text features (N, L, D) of the first captions of images spread evenly over the data."""
    indices = np.arange(num_images) * len(source) // num_images
    return source.contexts(indices, np.zeros_like(indices))
