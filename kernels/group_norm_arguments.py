"""The arguments of ``skip_group_norm``, as its launchers take them."""

from typing import Any, NamedTuple

from torch import Tensor


class Tensors(NamedTuple):
    h: Tensor  # (N, Ch, *)
    s: Tensor | None  # (N, Cs, *)
    scale: Tensor | None  # (), (Cs,), (N, Cs) or (N, 1)
    weight: Tensor | None  # (C,)
    bias: Tensor | None  # (C,)
    gain: Tensor | None  # (N, C)
    shift: Tensor | None  # (N, C)


class Options(NamedTuple):
    float_scale: float  # where scale is no tensor
    groups: int
    eps: float
    act: str | None


class Wanted(NamedTuple):
    """Which gradients somebody wants, in the order of ``Tensors``."""

    h: Any = True
    s: Any = True
    scale: Any = True
    weight: Any = True
    bias: Any = True
    gain: Any = True
    shift: Any = True
