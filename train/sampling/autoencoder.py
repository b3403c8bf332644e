"""Latents and the autoencoders of diffusers that make them and make pictures of them. Shapes: B batch, C, H, W."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scalelong.train.config import TrainConfig
from scalelong.train.errors import UserError

SHOWN_RANGE = 3.0


def load_vae(folder: str | Path) -> Any:
    """An AutoencoderKL from a local folder, on a GPU if there is one, in evaluation mode.

    Raises:
        UserError: there is none.
    """
    if not Path(folder).is_dir():
        raise UserError(f"no such folder of an AutoencoderKL: {folder}")
    try:
        from diffusers.models import AutoencoderKL
    except ImportError as error:
        raise UserError(f"an autoencoder needs diffusers: pip install diffusers ({error})") from None

    try:
        vae: Any = AutoencoderKL.from_pretrained(str(folder), local_files_only=True)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        message = " ".join(str(error).split())
        raise UserError(f"{folder} holds no AutoencoderKL of diffusers: {message}") from error
    return vae.to("cuda" if torch.cuda.is_available() else "cpu").eval().requires_grad_(False)


def encode_moments(vae: Any, images_BCHW: Tensor) -> Tensor:
    """Mean and standard deviation (B, 2, C, H, W) of the latents, unscaled."""
    distribution = vae.encode(images_BCHW.to(vae.device)).latent_dist
    return torch.stack([distribution.mean, distribution.std], dim=1).cpu()


def to_pictures(config: TrainConfig) -> Callable[[Tensor], Tensor] | None:
    """What makes a picture of what a run's model draws; as ``make_decoder``, whose folder is ``data.vae``."""
    return make_decoder(config.model.in_channels, config.data.vae)


def make_decoder(channels: int, folder: str | Path | None) -> Callable[[Tensor], Tensor] | None:
    """What makes a picture of an image or a latent of so many channels; None where it is a picture.

    Args:
        folder: of the autoencoder; without, a picture shows the first three channels, ±3 as black and white.

    Raises:
        UserError: the folder holds no AutoencoderKL.
    """
    if channels in (1, 3):
        return None
    if not folder:
        return lambda x_BCHW: x_BCHW[:, : 3 if x_BCHW.shape[1] > 2 else 1] / SHOWN_RANGE
    vae = load_vae(folder)
    return lambda x_BCHW: torch.cat([_decode(vae, x_1CHW) for x_1CHW in x_BCHW.split(1)])


def _decode(vae: Any, x_BCHW: Tensor) -> Tensor:
    return vae.decode(x_BCHW.to(vae.device, vae.dtype) / vae.config.scaling_factor).sample
