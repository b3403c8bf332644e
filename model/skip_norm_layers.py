"""nn.LayerNorm of a concatenated long skip before the layer that projects it, folded into that layer's weights.

Shapes: B samples, T tokens, D1 width of the stream, D2 width of the skip, D = D1 + D2.
"""

from typing import Literal, overload

from torch import Tensor, nn

from scalelong.kernels.arguments import Scale, concatenated_tokens
from scalelong.model.common_factor import CommonFactor, multiplied
from scalelong.model.layer_calls import is_called_by_class
from scalelong.model.linear_layers import NormToFold, SkipLinear


class SkipLayerNorm(nn.LayerNorm):
    """nn.LayerNorm that, asked to, hands its parameters to the layer behind it instead of normalising."""

    @overload
    def forward(self, x: Tensor) -> Tensor: ...
    @overload
    def forward(self, x: Tensor, *, folds: Literal[True]) -> NormToFold: ...
    def forward(self, x: Tensor, *, folds: bool = False) -> Tensor | NormToFold:
        if not folds:
            return super().forward(x)
        # Copies, for what shards or offloads parameters takes them away when the call ends.
        weight, bias = (None if p is None else p.clone() for p in (self.weight, self.bias))
        return NormToFold(weight, bias, self.eps)


def project_normalised_skip(
    norm: nn.Module,
    layer: nn.Module,
    x_BTD1: Tensor,
    s_BTD2: Tensor,
    scale: Scale,
    common: CommonFactor = None,
) -> Tensor:
    """``layer(norm(common * cat([x, scale * s], -1)))``."""
    if is_called_by_class(norm, SkipLayerNorm) and is_called_by_class(layer, SkipLinear):
        folded: NormToFold = norm(x_BTD1, folds=True)
        if isinstance(common, Tensor):
            common = common.reshape(())
            x_BTD1, scale = common * x_BTD1, common if scale is None else common * scale
        elif common is not None:
            # All that a norm leaves of a factor.
            folded = folded._replace(eps=folded.eps / common**2)
        return layer(x_BTD1, s_BTD2, scale, norm=folded)
    return layer(norm(multiplied(concatenated_tokens(x_BTD1, s_BTD2, scale), common)))
