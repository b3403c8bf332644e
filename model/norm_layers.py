"""nn.LayerNorm with the residual sum before it and the adaptive form after it, over our operator.

Shapes: B samples, T tokens, D width.
"""

from typing import Literal, overload

from torch import Tensor, nn

from scalelong.kernels.add_layer_norm import add_layer_norm, rotated_ref
from scalelong.model.layer_calls import is_called_by_class


class AddLayerNorm(nn.LayerNorm):
    """nn.LayerNorm over the last dimension, with the same parameters and names; given a branch, the sum before it too.

    Called with one tensor it is nn.LayerNorm, but for the dtype of its output: under autocast that of the product which
    follows it.
    """

    def __init__(self, width: int, eps: float = 1e-5, elementwise_affine: bool = True, bias: bool = True):
        super().__init__(width, eps, elementwise_affine, bias)

    @overload
    def forward(
        self, x_BTD: Tensor, *, gain: Tensor | None = ..., shift: Tensor | None = ..., angle: Tensor | None = ...
    ) -> Tensor: ...
    @overload
    def forward(
        self,
        x_BTD: Tensor,
        branch_BTD: Tensor | None = ...,
        *,
        with_stream: Literal[True],
        gain: Tensor | None = ...,
        shift: Tensor | None = ...,
        gate: Tensor | None = ...,
        angle: Tensor | None = ...,
    ) -> tuple[Tensor, Tensor]: ...
    def forward(
        self,
        x_BTD: Tensor,
        branch_BTD: Tensor | None = None,
        *,
        with_stream: bool = False,
        gain: Tensor | None = None,
        shift: Tensor | None = None,
        gate: Tensor | None = None,
        angle: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """``norm(x + gate * branch) * (1 + gain) + shift``, turned; with ``with_stream`` the sum before it.

        Args:
            gain, shift, gate: (B, D) each, or None.
            angle: (B, D / 2), of the pairs of features (i, i + D / 2), or None.

        Raises:
            ValueError: shapes that do not fit, naming them.
        """
        stream, y = add_layer_norm(
            x_BTD, branch_BTD, self.weight, self.bias, gain=gain, shift=shift, gate=gate, angle=angle, eps=self.eps
        )
        return (stream, y) if with_stream else y


def add_norm(
    norm: nn.Module,
    x_BTD: Tensor,
    branch_BTD: Tensor | None = None,
    *,
    gain: Tensor | None = None,
    shift: Tensor | None = None,
    gate: Tensor | None = None,
    angle: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The stream ``x + gate * branch``, or x, and ``norm(stream) * (1 + gain) + shift``; all three (B, D) or None.

    Pairs of what the norm puts out are turned by ``angle`` (B, D / 2), unless that is None.
    In one operator where ``norm`` is an AddLayerNorm: backward then adds the residual's gradient to the norm's in the
    same pass, which is why x itself is to be taken from here too. Anything else in its place, and a layer that is
    watched or whose forward was replaced, is called as it is, after a plain sum.
    """
    if is_called_by_class(norm, AddLayerNorm):
        return norm(x_BTD, branch_BTD, with_stream=True, gain=gain, shift=shift, gate=gate, angle=angle)
    stream_BTD = x_BTD if branch_BTD is None else add_gated(x_BTD, branch_BTD, gate)
    y_BTD = norm(stream_BTD)
    if gain is not None:
        y_BTD = y_BTD * (1 + gain.unsqueeze(1))
    if shift is not None:
        y_BTD = y_BTD + shift.unsqueeze(1)
    return stream_BTD, y_BTD if angle is None else rotated_ref(y_BTD, angle)


def add_gated(x_BTD: Tensor, branch_BTD: Tensor, gate_BD: Tensor | None) -> Tensor:
    """``x + gate * branch`` in the dtype of x."""
    if gate_BD is None:
        return x_BTD + branch_BTD
    return x_BTD + gate_BD.unsqueeze(1) * branch_BTD
