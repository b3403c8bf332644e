"""EDM's augmentations of images, drawn for each sample and view by (seed, position) alone, with labels that tell them.

Geometric, each with some probability, in this order (Karras et al., arXiv:2206.00364, appendix F.2): mirrored, upside
down, scaled by 2^(0.2 n), turned by any angle, stretched along one axis at any angle by 2^(0.2 |n|), and shifted by n /
8 of the side, with n standard normal. A network that is told the label draws plain images where it is told none.

Resampling is bicubic between reflected borders, where EDM filters with wavelets.

Shapes: B batch, C channels, H height, W width; A = 9 numbers of a label.
"""

import math
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from scalelong.train.data.order import Stream, draw_noise, generator

LOG2_SCALE, SHIFT = 0.2, 0.125


class Augmentation(NamedTuple):
    """What is done to an image."""

    mirrored: bool
    upside_down: bool
    inverse_23: np.ndarray
    """(2, 3): from a place of the result to one of the image, both in [-1, 1] along each side."""
    label_A: np.ndarray
    """(9,): mirrored, upside down, scale, turn (2), stretch (2), shift (2); zero of what is not done."""

    @property
    def resamples(self) -> bool:
        return bool(self.label_A[2:].any())


class Views(NamedTuple):
    """Two views of each image of a batch, the first of which is the batch's image."""

    labels_BA: Tensor
    """Of the first view."""
    second_BCHW: Tensor
    second_labels_BA: Tensor
    second_noise_BCHW: Tensor
    """Standard normal, for the second view."""


def draw_augmentation(seed: int, position: int, view: int, *, probability: float, mirrors: bool) -> Augmentation:
    """That of a view, 0 or 1, of the sample at a position.

    Args:
        probability: of each of the five but the first.
        mirrors: whether half of the views are mirrored, or none.
    """
    draws = generator(seed, Stream.AUGMENT, 2 * position + view)
    done, coin = draws.random(5) < probability, bool(draws.random() < 0.5)
    scale, stretch, shift_x, shift_y = draws.standard_normal(4)
    turn, along = draws.uniform(-math.pi, math.pi, 2)
    stretch = abs(stretch)  # or two stretches would have one label, in EDM's form of it: (n, angle), (-n, angle + π)
    mirrored, upside_down = mirrors and coin, bool(done[0])
    inverse_33, label_A = np.eye(3), np.zeros(9, dtype=np.float32)
    label_A[:2] = mirrored, upside_down
    if done[1]:
        factor = 2 ** -(LOG2_SCALE * scale)
        inverse_33, label_A[2] = inverse_33 @ np.diag([factor, factor, 1]), scale
    if done[2]:
        inverse_33, label_A[3:5] = inverse_33 @ _turned(-turn), (math.cos(turn) - 1, math.sin(turn))
    if done[3]:
        factor = 2 ** -(LOG2_SCALE * stretch)
        inverse_33 = inverse_33 @ _turned(along) @ np.diag([factor, 1 / factor, 1]) @ _turned(-along)
        label_A[5:7] = stretch * math.cos(along), stretch * math.sin(along)
    if done[4]:
        moved = np.eye(3)
        moved[:2, 2] = -2 * SHIFT * shift_x, -2 * SHIFT * shift_y  # a side is 2 long
        inverse_33, label_A[7:9] = inverse_33 @ moved, (shift_x, shift_y)
    return Augmentation(mirrored, upside_down, inverse_33[:2].astype(np.float32), label_A)


def _turned(angle: float) -> np.ndarray:
    cos, sin = math.cos(angle), math.sin(angle)
    return np.array([[cos, -sin, 0], [sin, cos, 0], [0, 0, 1]])


def augmented(images_BCHW: Tensor, done: Iterable[Augmentation]) -> tuple[Tensor, Tensor]:
    """The images, and the labels (B, A) of what is done to them; images of which nothing is asked are as they were."""
    done, device = list(done), images_BCHW.device
    labels_BA = torch.from_numpy(np.stack([one.label_A for one in done])).to(device)
    for dim, flips in ((3, [one.mirrored for one in done]), (2, [one.upside_down for one in done])):
        if any(flips):
            flips_B111 = torch.tensor(flips, device=device)[:, None, None, None]
            images_BCHW = torch.where(flips_B111, images_BCHW.flip(dim), images_BCHW)
    places = [place for place, one in enumerate(done) if one.resamples]
    if places:
        inverse_B23 = torch.from_numpy(np.stack([done[place].inverse_23 for place in places])).to(device)
        chosen = torch.tensor(places, device=device)
        images_BCHW = images_BCHW.index_copy(0, chosen, resampled(images_BCHW[chosen], inverse_B23))
    return images_BCHW, labels_BA


def resampled(images_BCHW: Tensor, inverse_B23: Tensor) -> Tensor:
    """Images in [-1, 1] read at the places that affine maps give."""
    grid_BHW2 = F.affine_grid(inverse_B23, list(images_BCHW.shape), align_corners=False)
    found_BCHW = F.grid_sample(images_BCHW, grid_BHW2, mode="bicubic", padding_mode="reflection", align_corners=False)
    return found_BCHW.clamp(-1, 1)


def two_views(
    images_BCHW: Tensor, seed: int, positions: range, *, probability: float, mirrors: bool
) -> tuple[Tensor, Views]:
    """The first view of the samples at these positions, and what else there is of both."""
    shape = tuple(images_BCHW.shape[1:])
    views = []
    for view in (0, 1):
        done = (draw_augmentation(seed, p, view, probability=probability, mirrors=mirrors) for p in positions)
        views.append(augmented(images_BCHW, done))
    noise = np.stack([draw_noise(seed, p, shape, Stream.TEACHER) for p in positions])
    (first_BCHW, labels_BA), (second_BCHW, second_labels_BA) = views
    noise_BCHW = torch.from_numpy(noise).to(images_BCHW.device)
    return first_BCHW, Views(labels_BA, second_BCHW, second_labels_BA, noise_BCHW)
