"""Clipping of gradients that follows how large they have been: off unless it is configured.

Each is given the norms of a step's gradients before it is taken, the same on all ranks, and answers with factors. What
it remembers is part of a checkpoint, so that resuming is exact.
"""

import math
from collections.abc import Sequence
from typing import Any, Protocol

from scalelong.train.config import OptimizerConfig


class Clipping(Protocol):
    """What follows the gradients of a run."""

    def factors(self, norms_P: Sequence[float]) -> list[float]:
        """What multiplies the gradient of each of P parameters, whose norms are given; 1 for one that stays."""
        ...

    def state(self) -> dict[str, Any]:
        """What it remembers, JSON-able."""
        ...

    def restore(self, state: dict[str, Any]) -> None:
        """Puts back what ``state`` gave."""
        ...


def make_clipping(config: OptimizerConfig) -> Clipping | None:
    """The one that is configured, if any."""
    if config.clip_z_score:
        return ZScoreClipping(config.clip_z_score)
    return TensorClipping(config.clip_per_tensor) if config.clip_per_tensor else None


class ZScoreClipping:
    """ZClip (arXiv:2504.02507, algorithm 1): a norm too many deviations above its running mean is brought back.

    With z = (g - mu) / sigma of the whole gradient's norm g, one with z > threshold becomes mu + sigma threshold² / z.
    The running moments take in the norm as clipped, so that a spike does not raise them.

    Args:
        threshold: in deviations; the paper has 2.5.
    """

    DECAY = 0.97
    WARM_UP_STEPS = 25
    """Whose norms make the first mean and variance; none is clipped."""

    def __init__(self, threshold: float):
        self._threshold = threshold
        self._first: list[float] = []
        self._mean = self._variance = 0.0

    def factors(self, norms_P: Sequence[float]) -> list[float]:
        norm = math.hypot(*norms_P)
        if not math.isfinite(norm):
            return [1.0] * len(norms_P)  # the guard decides about such a step
        if len(self._first) < self.WARM_UP_STEPS:
            self._first.append(norm)
            self._mean = sum(self._first) / len(self._first)
            self._variance = sum((g - self._mean) ** 2 for g in self._first) / len(self._first)
            return [1.0] * len(norms_P)
        deviation = math.sqrt(self._variance)
        z = (norm - self._mean) / deviation if deviation > 0 else 0.0
        clipped = self._mean + deviation * self._threshold**2 / z if z > self._threshold else norm
        self._mean = self.DECAY * self._mean + (1 - self.DECAY) * clipped
        self._variance = self.DECAY * self._variance + (1 - self.DECAY) * (clipped - self._mean) ** 2
        return [clipped / norm if norm > 0 else 1.0] * len(norms_P)

    def state(self) -> dict[str, Any]:
        return {"first": self._first, "mean": self._mean, "variance": self._variance}

    def restore(self, state: dict[str, Any]) -> None:
        self._first, self._mean, self._variance = list(state["first"]), state["mean"], state["variance"]


class TensorClipping:
    """AdaGC (arXiv:2502.11034, algorithm 1): each parameter's gradient is held to a multiple of its own running norm.

    For the first steps the whole gradient is clipped to norm 1, and the running norm of a parameter is the smallest
    that it has had; from then on it follows the clipped norms.

    Args:
        growth: how many times its running norm a gradient may be; the paper has 1.05.
    """

    DECAY = 0.98
    WARM_UP_STEPS = 100
    WARM_UP_NORM = 1.0

    def __init__(self, growth: float):
        self._growth = growth
        self._steps = 0
        self._running_P: list[float] = []

    def factors(self, norms_P: Sequence[float]) -> list[float]:
        if not all(map(math.isfinite, norms_P)):
            return [1.0] * len(norms_P)
        self._steps += 1
        if self._steps <= self.WARM_UP_STEPS:
            factor = min(1.0, self.WARM_UP_NORM / max(math.hypot(*norms_P), 1e-30))
            before_P = self._running_P or [math.inf] * len(norms_P)
            self._running_P = [min(r, factor * g) for r, g in zip(before_P, norms_P, strict=True)]
            return [factor] * len(norms_P)
        limits_P = [self._growth * r for r in self._running_P]
        factors_P = [min(1.0, limit / g) if g > 0 else 1.0 for limit, g in zip(limits_P, norms_P, strict=True)]
        self._running_P = [
            self.DECAY * r + (1 - self.DECAY) * f * g
            for r, f, g in zip(self._running_P, factors_P, norms_P, strict=True)
        ]
        return factors_P

    def state(self) -> dict[str, Any]:
        return {"steps": self._steps, "running": self._running_P}

    def restore(self, state: dict[str, Any]) -> None:
        self._steps, self._running_P = state["steps"], list(state["running"])
