"""Clipping of gradients that follows how large they have been: off unless it is configured.

It is given the norm of a step's gradient before it is taken, the same on all ranks, and answers with a factor. What it
remembers is part of a checkpoint, so that resuming is exact.
"""

import math
from typing import Any


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

    def factor(self, norm: float) -> float:
        """What multiplies the gradient of a step, whose norm is given, the same on all ranks; 1 for one that stays."""
        if not math.isfinite(norm):
            return 1.0  # the guard decides about such a step
        if len(self._first) < self.WARM_UP_STEPS:
            self._first.append(norm)
            self._mean = sum(self._first) / len(self._first)
            self._variance = sum((g - self._mean) ** 2 for g in self._first) / len(self._first)
            return 1.0
        deviation = math.sqrt(self._variance)
        z = (norm - self._mean) / deviation if deviation > 0 else 0.0
        clipped = self._mean + deviation * self._threshold**2 / z if z > self._threshold else norm
        self._mean = self.DECAY * self._mean + (1 - self.DECAY) * clipped
        self._variance = self.DECAY * self._variance + (1 - self.DECAY) * (clipped - self._mean) ** 2
        return clipped / norm if norm > 0 else 1.0

    def state(self) -> dict[str, Any]:
        """What it remembers, JSON-able."""
        return {"first": self._first, "mean": self._mean, "variance": self._variance}

    def restore(self, state: dict[str, Any]) -> None:
        """Puts back what ``state`` gave."""
        self._first, self._mean, self._variance = list(state["first"]), state["mean"], state["variance"]
