"""Which patches the middle of a network sees of each training sample, by (seed, position) alone (SPRINT).

Patches are drawn group by group, of 2 x 2 neighbours, so that every part of an image is seen: with the patches of a
group in random order, number r of g has the key (r + u) / g, u uniform in [0, 1), and those of the smallest keys are
kept. At a ratio of 0.75 and an even side that is one of each group, as published.

Shapes: B samples, T patches, K kept ones.
"""

import math
from functools import cache

import numpy as np
import torch

from scalelong.model.backbone_config import BackboneConfig
from scalelong.model.sparse_middle import MiddleTokens
from scalelong.train.data.order import Stream, generator

SIDE_OF_GROUP = 2


def draw_middle(model: BackboneConfig, seed: int, positions: range, *, drops: bool) -> MiddleTokens | None:
    """What the middle sees of the samples at these positions; None of a network without a sparse one.

    Args:
        drops: whether patches are left out; else the middle sees all of them, but for images that go past it.
    """
    if model.sparse_ratio is None:
        return None
    kept, left_out = [], []
    for position in positions:
        draws = generator(seed, Stream.MIDDLE, position)
        left_out.append(draws.random() < model.path_drop)
        if drops:
            kept.append(kept_patches(draws, model.num_patches, model.num_kept))
    # Where none is left out too, so that the mask token has a gradient in every step.
    return MiddleTokens(torch.from_numpy(np.stack(kept)) if drops else None, torch.tensor(left_out))


def kept_patches(draws: np.random.Generator, num_patches: int, num_kept: int) -> np.ndarray:
    """(K,): so many of the patches of a square image, in ascending order."""
    group_T, first_T, size_T = _groups(num_patches)
    shuffle_T, u_T = draws.random((2, num_patches))
    # Group by group, in random order in each.
    order_T = np.argsort(group_T + shuffle_T, kind="stable")
    group_T = group_T[order_T]
    key_T = (np.arange(num_patches) - first_T[group_T] + u_T) / size_T[group_T]
    return np.sort(order_T[np.argsort(key_T, kind="stable")[:num_kept]])


@cache
def _groups(num_patches: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The group of each patch; of each group, how many patches are in those before it, and in it."""
    side = math.isqrt(num_patches)
    place = np.arange(side) // SIDE_OF_GROUP
    group_T = (place[:, None] * (place[-1] + 1) + place).flatten()
    sizes = np.bincount(group_T)
    return group_T, np.cumsum(sizes) - sizes, sizes
