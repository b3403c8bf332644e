"""Linear probes of all columns of features, trained together: logistic regressions that share batches and nothing else.

Columns of one width are one batched product. The protocol is that of DDAE (arXiv:2303.09769): Adam with a rate of 1e-3
that falls by a cosine, epoch by epoch, 15 epochs, batches of 128. Its crops and flips are left out, as features are
computed once.

Shapes: B batch, F all features of an image, H columns of one width, D that width, K classes.
"""

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from scalelong.train.data.order import Stream, generator
from scalelong.train.probing.features import Column, FeatureFile

CHUNK = 256
"""Images at a time where nothing is trained."""
FIRST_EPOCH = 2**62
"""The counter at which the order of the first epoch is drawn, above those of images."""


@dataclass(frozen=True, kw_only=True)
class HeadsConfig:
    """How probes are trained."""

    epochs: int = 15
    """Passes over the images."""
    batch_size: int = 128
    """Images of a step."""
    learning_rate: float = 1e-3
    """Of Adam, at the beginning of a cosine."""
    standardise: bool = False
    """Bring each feature to mean 0 and variance 1 over the training images first. DDAE's protocol does not; of few
    images, or features of small magnitude, its steps do not come to an end."""
    seed: int = 0
    """Of the order of the images."""


class Heads:
    """Linear maps of each column to logits, which begin as zero.

    Args:
        columns: as they lie in the file, those of one width beside each other.
    """

    def __init__(self, columns: Sequence[Column], num_classes: int):
        self.groups: list[tuple[int, int]] = []
        """(H, D) of the columns of each width, in the order of the features."""
        for column in columns:
            if self.groups and self.groups[-1][1] == column.width:
                self.groups[-1] = (self.groups[-1][0] + 1, column.width)
            else:
                self.groups.append((1, column.width))
        self.weights = [torch.zeros(H, D, num_classes, requires_grad=True) for H, D in self.groups]
        self.biases = [torch.zeros(H, 1, num_classes, requires_grad=True) for H, _ in self.groups]
        num_features = sum(column.width for column in columns)
        self.mean_F, self.scale_F = torch.zeros(num_features), torch.ones(num_features)

    def logits(self, rows_BF: Tensor) -> Tensor:
        """(columns, B, K)."""
        rows_BF = (rows_BF - self.mean_F) * self.scale_F
        parts, first = [], 0
        for (H, D), weight_HDK, bias_H1K in zip(self.groups, self.weights, self.biases, strict=True):
            x_HBD = rows_BF[:, first : first + H * D].unflatten(1, (H, D)).transpose(0, 1)
            parts.append(torch.baddbmm(bias_H1K, x_HBD, weight_HDK))
            first += H * D
        return torch.cat(parts)


def train_heads(file: FeatureFile, labels: np.ndarray, num_classes: int, config: HeadsConfig) -> Heads:
    """The probes of all columns of a file."""
    heads, labels_N = Heads(file.columns, num_classes), torch.from_numpy(labels)
    if config.standardise:
        heads.mean_F, heads.scale_F = _statistics(file)
    optimizer = torch.optim.Adam([*heads.weights, *heads.biases], lr=config.learning_rate)
    for epoch in range(config.epochs):
        rate = config.learning_rate * 0.5 * (1 + math.cos(math.pi * epoch / config.epochs))
        for group in optimizer.param_groups:
            group["lr"] = rate
        for numbers in _batches(file.num_images, config, epoch):
            _step(heads, optimizer, file.rows(numbers), labels_N[numbers])
    return heads


def _step(heads: Heads, optimizer: torch.optim.Optimizer, rows_BF: Tensor, labels_B: Tensor) -> None:
    logits_LBK = heads.logits(rows_BF)
    targets_LB = labels_B.expand(len(logits_LBK), -1)
    # The sum over columns: each has the gradient that it would have alone.
    loss = F.cross_entropy(logits_LBK.flatten(0, 1), targets_LB.flatten(), reduction="sum") / len(labels_B)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def seconds_of_training(columns: Sequence[Column], num_images: int, num_classes: int, config: HeadsConfig) -> float:
    """How long ``train_heads`` takes on this machine, by the second of two steps; reading is not counted."""
    heads, seconds = Heads(sorted(columns, key=lambda column: column.width), num_classes), 0.0
    optimizer = torch.optim.Adam([*heads.weights, *heads.biases], lr=config.learning_rate)
    size = min(config.batch_size, num_images)
    rows_BF, labels_B = torch.rand(size, len(heads.mean_F)), torch.zeros(size, dtype=torch.int64)
    for _ in range(2):
        began = time.perf_counter()
        _step(heads, optimizer, rows_BF, labels_B)
        seconds = time.perf_counter() - began
    return seconds * config.epochs * math.ceil(num_images / config.batch_size)


@torch.no_grad()
def accuracies(heads: Heads, file: FeatureFile, labels: np.ndarray) -> list[float]:
    """The share of images whose label each column's probe names, in the order of the columns in the file."""
    right = torch.zeros(len(file.columns), dtype=torch.int64)
    labels_N = torch.from_numpy(labels)
    for first in range(0, file.num_images, CHUNK):
        part = slice(first, first + CHUNK)
        right += (heads.logits(file.rows(part)).argmax(dim=2) == labels_N[part]).sum(dim=1)
    return (right / file.num_images).tolist()


def _batches(num_images: int, config: HeadsConfig, epoch: int) -> Iterator[np.ndarray]:
    order = generator(config.seed, Stream.PROBE, FIRST_EPOCH + epoch).permutation(num_images)
    for first in range(0, num_images, config.batch_size):
        # In the order of the file, which reads it faster and changes a sum by rounding alone.
        yield np.sort(order[first : first + config.batch_size])


def _statistics(file: FeatureFile) -> tuple[Tensor, Tensor]:
    """The mean of each feature, and one over its deviation; features that are the same in all images count nothing."""
    total_F = square_F = torch.zeros(file.num_features, dtype=torch.float64)
    for first in range(0, file.num_images, CHUNK):
        rows_BF = file.rows(slice(first, first + CHUNK)).double()
        total_F, square_F = total_F + rows_BF.sum(dim=0), square_F + rows_BF.square().sum(dim=0)
    mean_F = total_F / file.num_images
    variance_F = (square_F / file.num_images - mean_F.square()).clamp_min(0)
    is_constant_F = variance_F <= 1e-10 * mean_F.square()
    scale_F = torch.where(is_constant_F, 0.0, variance_F.clamp_min(torch.finfo(torch.float64).tiny).rsqrt())
    return mean_F.float(), scale_F.float()
