"""Rows of a weight scaled to one norm, as magnitude-preserving layers use theirs (EDM2, arXiv:2312.02696, eq. 47).

The gradient of a row is orthogonal to it. Written out, PyTorch makes some eleven passes over the weight in a step; the
kernel of its weight normalisation makes four, but its second derivative is wrong and is taken from the formula here.

Shapes: O rows, any further dimensions, which make up a row together.
"""

from typing import Any

import torch
from torch import Tensor

from scalelong.kernels.backend import Backends, backend_of, is_traced, tells
from scalelong.kernels.double_backward import differentiable_gradients


def unit_rows_ref(weight: Tensor, gain: float = 1.0) -> Tensor:
    """The specification: gain * w / ‖w‖ of each row w."""
    dims = tuple(range(1, weight.dim()))
    return weight * (gain / torch.linalg.vector_norm(weight, dim=dims, keepdim=True))


def unit_rows(weight: Tensor, gain: float = 1.0) -> Tensor:
    """``gain * w / ‖w‖`` of each row w: what multiplies inputs of unit variance without changing their magnitude.

    torch.compile and torch.func's transforms see the plain formula.

    Args:
        weight: (O, ...), no row of which is zero: that one would become NaN.
        gain: the norm of all rows.

    Returns:
        The same shape and dtype, twice differentiable in ``weight``.

    Raises:
        ValueError: a weight without rows.
    """
    if weight.dim() < 2:
        raise ValueError(f"unit_rows: a weight has rows, (O, ...), got {tuple(weight.shape)}")
    return unit_rows_ref(weight, gain) if _backend_of(weight) == "reference" else _UnitRows.apply(weight, gain)


def _backend_of(weight: Tensor) -> str:
    return "reference" if is_traced() or backend_of(weight) == "reference" else "torch"


@tells(unit_rows)
def _(weight: Tensor, _gain: float = 1.0) -> Backends:
    return Backends(_backend_of(weight), _backend_of(weight))


class _UnitRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, gain: float) -> Tensor:
        weight = weight.contiguous()
        lengths = weight.new_full((len(weight), *[1] * (weight.dim() - 1)), gain)
        y, norms = torch.ops.aten._weight_norm_interface(weight, lengths, 0)
        ctx.save_for_backward(weight, lengths, norms)
        ctx.gain = gain
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, None]:
        weight, lengths, norms = ctx.saved_tensors
        if torch.is_grad_enabled():  # with create_graph=True
            (dweight,) = differentiable_gradients(lambda w: unit_rows_ref(w, ctx.gain), (weight,), (True,), dy)
            return dweight, None
        return torch.ops.aten._weight_norm_interface_backward(dy.contiguous(), weight, lengths, norms, 0)[0], None
