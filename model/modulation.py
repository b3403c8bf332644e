"""What a DiT's norms and branches are told of time and class: scales, shifts, rotations (arXiv:2505.19122) and gates.

Shapes: B batch, D width, E outputs of a modulation.
"""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor, nn


class Told(NamedTuple):
    """What a norm, and the branch behind it, are told of the condition."""

    shift: Tensor | None = None  # (B, D)
    gain: Tensor | None = None  # (B, D)
    angle: Tensor | None = None  # (B, D / 2)
    gate: Tensor | None = None  # (B, D), of the branch


TOLD = {"adaln": ("shift", "gain"), "scale-rot": ("gain", "angle"), "rot": ("angle",), "scale": ("gain",)}
"""What each modulation tells a norm, in the order of the outputs of its linear layer."""


def modulation(width: int, parts: Sequence[str]) -> nn.Sequential:
    """What tells norms and branches the condition: these parts of ``Told``, side by side."""
    return nn.Sequential(nn.SiLU(), nn.Linear(width, sum(sizes_of(width, parts))))


def told(parts_BE: Tensor, width: int, parts: Sequence[str]) -> Told:
    """What a modulation puts out, by its parts."""
    return Told(**dict(zip(parts, parts_BE.split(sizes_of(width, parts), dim=1), strict=True)))


def sizes_of(width: int, parts: Sequence[str]) -> list[int]:
    """How many outputs each part has."""
    return [width // 2 if part == "angle" else width for part in parts]
