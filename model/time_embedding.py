"""How the networks are told the time (Vaswani et al., arXiv:1706.03762), as U-ViT and ADM do it."""

import math

import torch
from torch import Tensor


def time_embedding(t_B: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    """[cos(t f), sin(t f)], f_k = 10000^(-k / (dim/2)), k = 0 .. dim/2 - 1. In fp32, or fp64 for an fp64 model."""
    compute_dtype = torch.promote_types(dtype, torch.float32)
    half = dim // 2
    f = torch.exp(-math.log(10000) * torch.arange(half, dtype=compute_dtype, device=t_B.device) / half)
    angle = t_B.to(compute_dtype)[:, None] * f
    return torch.cat([angle.cos(), angle.sin()], dim=-1).to(dtype)


def times_of_images(t: Tensor, x_BCHW: Tensor, network: str) -> Tensor:
    """(B,): the time of each image, from those or from one for all of them, () or (1,).

    Raises:
        ValueError: another number of times than of images.
    """
    B = x_BCHW.shape[0]
    if t.shape == (B,):
        return t
    if t.numel() == 1 and t.dim() < 2:
        return t.expand(B)
    raise ValueError(f"{network}: expected a time for each of {B} images or one for all, got times of {tuple(t.shape)}")


def check_labels(y: Tensor, x_BCHW: Tensor, network: str) -> None:
    """
    Raises:
        ValueError: another number of labels than of images.
    """
    if y.shape != x_BCHW.shape[:1]:
        raise ValueError(
            f"{network}: expected a label for each of {x_BCHW.shape[0]} images, got labels of {tuple(y.shape)}"
        )
