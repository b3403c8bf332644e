"""Skip-Tuning: the long skips of a trained network scaled while it samples, without training (arXiv:2402.15170).

Skip i of N is multiplied by rho_i besides its policy's factor, on a straight line from ``bottom`` at the innermost skip
(i = N) to ``top`` at the outermost (i = 1). At 1 and 1 the network is what it was, to the bit. Imports no torch.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from scalelong.model.skip_scale import LongSkip

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class SkipTuning:
    """The line that rho_i lies on.

    Raises:
        ValueError: a factor that is not a positive number.
    """

    bottom: float
    """Of the innermost skip; the only one of a network with a single skip."""
    top: float = 1.0
    """Of the outermost."""

    def __post_init__(self):
        if not all(isinstance(rho, int | float) and 0 < rho < math.inf for rho in (self.bottom, self.top)):
            raise ValueError(f"skip_tuning must be two positive factors, BOTTOM TOP, got {self.bottom}, {self.top}")

    def factor(self, i: int, num_skips: int) -> float:
        """rho_i of skip i of num_skips, i = 1 the outermost."""
        return self.bottom + (self.top - self.bottom) * (num_skips - i) / max(1, num_skips - 1)

    def tune(self, skip: LongSkip, num_skips: int) -> LongSkip:
        """The skip with its factor multiplied; the same where rho_i is 1."""
        rho = self.factor(skip.i, num_skips)
        return skip if rho == 1 else skip._replace(scale=rho if skip.scale is None else rho * skip.scale)


@contextmanager
def tuned_skips(network: "nn.Module", tuning: SkipTuning | tuple[float, float] | None) -> Iterator[None]:
    """While entered, the long skips inside ``network`` are tuned; None leaves them as they are.

    Args:
        network: one of this project's, or a network of diffusers that ``patch_diffusers`` has changed.
        tuning: or its two factors, (bottom, top).

    Raises:
        ValueError: no long skips in it, or factors that are none.
    """
    if tuning is None:
        yield
        return
    if not isinstance(tuning, SkipTuning):
        tuning = SkipTuning(*tuning)
    places = _places(network)
    if not places:
        raise ValueError(f"{type(network).__name__} has no long skips to tune (those of diffusers: patch it first)")
    before = [place.skip_tuning for place in places]
    try:
        for place in places:
            place.skip_tuning = tuning
        yield
    finally:
        for place, its_own in zip(places, before, strict=True):
            place.skip_tuning = its_own


def _places(network: "nn.Module") -> list[Any]:
    """What holds the ``skip_tuning`` of each network inside: backbones, and what patched blocks of diffusers share."""
    found: dict[int, Any] = {}
    for module in network.modules():
        skips = vars(module).get("skips")
        place = getattr(skips, "network", module)
        if skips and hasattr(place, "skip_tuning"):
            found[id(place)] = place
    return list(found.values())
