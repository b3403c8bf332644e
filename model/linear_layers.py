"""The linear layers of the networks that take in what stands before them, over our operators.

They are PyTorch's own layers where nothing more is given, with the same parameters and names. The functions beside them
call such a layer, or whatever was put in its place (an adapter, a quantised or a watched layer) as the plain network
would: with the concatenation or the activation written out.

Shapes: B samples, T tokens, D1 width of the stream, D2 width of the skip, O width of the output, H heads.
"""

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from scalelong.kernels.arguments import Scale, concatenated_tokens
from scalelong.kernels.gelu_linear import APPROXIMATE, gelu_linear
from scalelong.kernels.skip_linear import skip_linear
from scalelong.kernels.skip_norm_linear import skip_norm_linear
from scalelong.model.common_factor import CommonFactor, multiplied
from scalelong.model.layer_calls import is_called_by_class


class NormToFold(NamedTuple):
    """A LayerNorm for the layer behind it."""

    weight: Tensor | None
    """(D1 + D2,)."""
    bias: Tensor | None
    """(D1 + D2,)."""
    eps: float


class SkipLinear(nn.Linear):
    """nn.Linear that, given a skip, takes the scaled concatenation."""

    def forward(  # type: ignore[override]
        self,
        x: Tensor,
        s: Tensor | None = None,
        scale: Scale = None,
        common: CommonFactor = None,
        *,
        norm: NormToFold | None = None,
    ) -> Tensor:
        """``linear(norm(common * cat([x, scale * s], -1)))``.

        Args:
            s, scale: (B, T, D2), as ``skip_linear`` takes them.
            common: a number or a tensor of one element; it is folded into the weight.
            norm: a LayerNorm to normalise with, in the place of the common factor; None: as it is.
        """
        weight = self.product_weight()
        if s is None:
            return F.linear(x, weight, self.bias)
        if norm is None:
            return skip_linear(x, s, scale, multiplied(weight, common), self.bias)
        assert common is None, "a norm leaves no common factor"
        return skip_norm_linear(x, s, scale, norm.weight, norm.bias, weight, self.bias, eps=norm.eps)

    def product_weight(self) -> Tensor:
        """What inputs are multiplied with: a layer of another parametrisation makes it of its weight."""
        return self.weight


class GeluLinear(nn.Linear):
    """nn.Linear that, asked to, activates its input; backward then keeps the input alone."""

    def forward(self, x: Tensor, *, act: str | None = None) -> Tensor:  # type: ignore[override]
        """``linear(act(x))``, act being "gelu", the exact one, or "gelu-tanh"; or ``linear(x)``."""
        weight = self.product_weight()
        return F.linear(x, weight, self.bias) if act is None else gelu_linear(x, weight, self.bias, act=act)

    def product_weight(self) -> Tensor:
        """What inputs are multiplied with: a layer of another parametrisation makes it of its weight."""
        return self.weight


class TokenConv1d(nn.Conv1d):
    """nn.Conv1d of size 1 that also takes tokens, (B, T, D), and may put out its channels in another order."""

    def forward(  # type: ignore[override]
        self, x: Tensor, *, is_tokens: bool = False, heads_first: int | None = None
    ) -> Tensor:
        """``x`` is (B, D, T) or, with ``is_tokens``, (B, T, D); so is the output.

        Args:
            heads_first: H of a projection whose rows are split into heads first and these into queries, keys and
                values: the output of tokens has queries, keys and values first. None: as the rows are.
        """
        if not is_tokens:
            return super().forward(x)
        weight, bias = self.weight.squeeze(2), self.bias
        if heads_first is not None:
            weight, bias = (None if rows is None else queries_first(rows, heads_first) for rows in (weight, bias))
        return F.linear(x, weight, bias)  # type: ignore[arg-type]


def queries_first(rows: Tensor, num_heads: int, dim: int = 0) -> Tensor:
    """``rows`` in the dimension ``dim``, split into heads and these into queries, keys and values: the other way."""
    return rows.unflatten(dim, (num_heads, 3, -1)).transpose(dim, dim + 1).flatten(dim, dim + 2)


def project_skip(layer: nn.Module, x_BTD1: Tensor, s_BTD2: Tensor, scale: Scale, common: CommonFactor = None) -> Tensor:
    """``layer(common * cat([x, scale * s], -1))``."""
    if is_called_by_class(layer, SkipLinear):
        return layer(x_BTD1, s_BTD2, scale, common)
    return layer(multiplied(concatenated_tokens(x_BTD1, s_BTD2, scale), common))


def project_gelu(layer: nn.Module, x: Tensor, *, act: str = "gelu") -> Tensor:
    """``layer(act(x))``, act being "gelu", the exact one, or "gelu-tanh", its approximation."""
    if is_called_by_class(layer, GeluLinear):
        return layer(x, act=act)
    return layer(F.gelu(x, approximate=APPROXIMATE[act]))


def project_tokens(layer: nn.Module, x_BTD: Tensor, heads_first: int | None = None) -> Tensor:
    """``layer``, a convolution of size 1 over (B, D, T), of tokens; ``heads_first`` as for ``TokenConv1d``."""
    if is_called_by_class(layer, TokenConv1d):
        return layer(x_BTD, is_tokens=True, heads_first=heads_first)
    y_BOT = layer(x_BTD.transpose(1, 2))
    if heads_first is not None:
        y_BOT = queries_first(y_BOT, heads_first, dim=1)
    return y_BOT.transpose(1, 2).contiguous()
