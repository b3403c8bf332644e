"""The tensors of ``add_layer_norm``, as its launchers take them. Shapes: (..., D) rows, B samples, M rows in all."""

from typing import NamedTuple

from torch import Tensor


class Inputs(NamedTuple):
    """What is normalised; in backward ``x`` is the stream."""

    x: Tensor  # (..., D)
    branch: Tensor | None  # as x
    weight: Tensor | None  # (D,)
    bias: Tensor | None  # (D,)
    gain: Tensor | None  # (B, D)
    shift: Tensor | None  # (B, D)
    gate: Tensor | None  # (B, D)
    angle: Tensor | None  # (B, D / 2)

    @property
    def num_samples(self) -> int:
        """Whose rows share gain, shift, gate and angle; 1 where there are none."""
        return self.x.shape[0] if any(p is not None for p in self[4:]) else 1


class Outputs(NamedTuple):
    stream: Tensor | None  # as x; None without a branch, when it is x
    y: Tensor  # as x
    mean: Tensor  # (M,), fp32 (fp64 for fp64)
    rstd: Tensor  # (M,)


class Gradients(NamedTuple):
    """Of the inputs, in their order; None for what nobody needs."""

    dx: Tensor | None
    dbranch: Tensor | None
    dweight: Tensor | None
    dbias: Tensor | None
    dgain: Tensor | None
    dshift: Tensor | None
    dgate: Tensor | None
    dangle: Tensor | None
