"""The 1x1 shortcut convolution of a scaled skip concatenation (arXiv:2310.13545), without the concatenation.

It is the sum of a product with h and one with s. The scale goes into the weights of s, once or for each sample, so that
its gradient comes from the gradient of those weights, without a pass over activations. In channels_last the positions
are the rows of skip_linear.

Shapes: N batch, Ch channels of h, Cs channels of the skip s, O channels of the output, P positions,
* any number of spatial dimensions.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from scalelong.kernels.arguments import (
    Scale,
    as_layout,
    check_scale,
    check_skip,
    concatenated,
    described,
    is_channels_last,
)
from scalelong.kernels.backend import Backends, in_transform, is_traced, tells
from scalelong.kernels.precision import cast_by_autocast
from scalelong.kernels.skip_linear import backend_of_products, backends_of_projection, projected


def skip_conv1x1_ref(h: Tensor, s: Tensor, scale: Scale, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The specification: scale the skip, concatenate, mix the channels of each position."""
    return F.linear(concatenated(h, s, scale).movedim(1, -1), weight.flatten(1), bias).movedim(-1, 1)


def skip_conv1x1(h: Tensor, s: Tensor, scale: Scale, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The 1x1 convolution of ``cat([h, scale * s], 1)``.

    Args:
        h: (N, Ch, *), the hidden stream, contiguous or channels_last.
        s: (N, Cs, *), the long skip, of the dtype and device of h. In another layout than h, it is copied.
        scale: None for 1, a float, a tensor of one element () or (1,), one factor a channel (Cs,) or (N, Cs), or one
            a sample (N, 1).
        weight: (O, Ch + Cs, 1, ...) as a convolution has it, or (O, Ch + Cs).
        bias: (O,) or None.

    All but the scale have one dtype; under autocast they are cast as for torch's convolutions.

    Returns:
        (N, O, *) in the layout of h, differentiable in every tensor argument. Backward keeps h, s and weights.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, naming them.
    """
    h, s, weight, bias = cast_by_autocast(h, s, weight, bias)  # type: ignore[assignment]
    _check(h, s, weight, bias)
    if isinstance(scale, Tensor):
        scale = check_scale("skip_conv1x1", scale, h, s)
    backend = backend_of_products(h, s, weight)
    if backend == "reference":
        y = skip_conv1x1_ref(h, s, scale, weight, bias)
        return y if in_transform() else as_layout(y, is_channels_last(h))  # vmap knows no layouts
    N, Ch, *spatial = h.shape
    weight = weight.flatten(1)
    channels_last = is_channels_last(h)
    h, s = as_layout(h, channels_last), as_layout(s, channels_last)
    if channels_last and _scales_rows(scale):
        return _rows(h, s, scale, weight, bias, backend)
    weight_h, weight_s = _scaled_weights(scale, weight, Ch)
    if channels_last:
        h_NPC, s_NPC = h.movedim(1, -1).flatten(1, -2), s.movedim(1, -1).flatten(1, -2)
        y_NPO = torch.baddbmm(F.linear(h_NPC, weight_h, bias), s_NPC, weight_s.mT)
        return _without_view(y_NPO.unflatten(1, spatial).movedim(-1, 1))
    weight_h, weight_s = weight_h.expand(N, -1, -1), weight_s.expand(N, -1, -1)
    h_NCP, s_NCP = h.flatten(2), s.flatten(2)
    y_NOP = torch.bmm(weight_h, h_NCP) if bias is None else torch.baddbmm(bias[:, None], weight_h, h_NCP)
    return _without_view(torch.baddbmm(y_NOP, weight_s, s_NCP).unflatten(2, spatial))


@tells(skip_conv1x1)
def _(h: Tensor, s: Tensor, scale: Scale, weight: Tensor, bias: Tensor | None) -> Backends:
    h, s, weight, bias = cast_by_autocast(h, s, weight, bias)  # type: ignore[assignment]
    if backend_of_products(h, s, weight) == "reference" or (is_channels_last(h) and _scales_rows(scale)):
        return backends_of_projection(h, s, scale, weight, bias)
    return Backends("torch", "torch")


def _scales_rows(scale: Scale) -> bool:
    """Whether it is one that skip_linear takes, with a position for a token."""
    return not isinstance(scale, Tensor) or scale.dim() < 2 or scale.shape[1] == 1


def _without_view(y: Tensor) -> Tensor:
    return y if is_traced() else _WithoutView.apply(y)


class _WithoutView(torch.autograd.Function):
    """The same tensor, of which autograd does not know that it is a view of another, which nobody else has."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.detach()

    @staticmethod
    def backward(ctx: Any, dx: Tensor) -> Tensor:
        return dx


def _rows(h: Tensor, s: Tensor, scale: Scale, weight_OC: Tensor, bias_O: Tensor | None, backend: str) -> Tensor:
    """By ``skip_linear``, with a position for a token."""
    if isinstance(scale, Tensor) and scale.dim() == 2:
        scale = scale.expand(-1, h.shape[2:].numel())
    if not is_traced():
        return projected(h, s, scale, weight_OC, bias_O, channels_last=True, backend=backend)
    h_NPC, s_NPC = h.movedim(1, -1).flatten(1, -2), s.movedim(1, -1).flatten(1, -2)
    y_NPO = projected(h_NPC, s_NPC, scale, weight_OC, bias_O, channels_last=False, backend=backend)
    return y_NPO.unflatten(1, h.shape[2:]).movedim(-1, 1)


def _scaled_weights(scale: Scale, weight_OC: Tensor, Ch: int) -> tuple[Tensor, Tensor]:
    """The weights of h, and those of s with the scale in them, for each sample if it differs there."""
    weight_h, weight_s = weight_OC.split((Ch, weight_OC.shape[1] - Ch), dim=1)
    if isinstance(scale, Tensor) and scale.dim() == 2:
        scale = scale[:, None]
    return weight_h, weight_s if scale is None else (weight_s * scale).to(weight_s.dtype)


def _check(h: Tensor, s: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    if h.dim() < 3 or not h.is_floating_point():
        raise ValueError(f"skip_conv1x1: needs a floating (N, C, *) with spatial dimensions, got {described(h)}")
    if weight.dim() == h.dim() + 1:
        raise ValueError(
            f"skip_conv1x1: h {tuple(h.shape)} has no batch: weight {tuple(weight.shape)} takes (N, C, *) with "
            f"{weight.dim() - 2} spatial dimensions; h[None] and s[None] are a batch of one"
        )
    check_skip("skip_conv1x1", h, s)
    C = h.shape[1] + s.shape[1]
    if weight.dim() not in (2, h.dim()) or weight.shape[1] != C or any(size != 1 for size in weight.shape[2:]):
        raise ValueError(
            f"skip_conv1x1: weight {tuple(weight.shape)} does not fit h {tuple(h.shape)} beside s {tuple(s.shape)}; "
            f"it needs (O, {C}{', 1' * (h.dim() - 2)})"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"skip_conv1x1: bias {tuple(bias.shape)} does not fit weight {tuple(weight.shape)}")
    for name, x in (("weight", weight), ("bias", bias)):
        if x is not None and (x.dtype != h.dtype or x.device != h.device):
            raise ValueError(f"skip_conv1x1: h is {described(h)} but {name} is {described(x)}")
