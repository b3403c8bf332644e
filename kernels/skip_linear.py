"""The projection of a scaled long skip: linear(cat([x, scale * s], -1)) (arXiv:2209.12152 and 2310.13545).

Shapes: B batch, T tokens, D1 width of the stream x, D2 width of the skip s, O width of the output.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

Scale = Tensor | float | None


def skip_linear_ref(x_BTD1: Tensor, s_BTD2: Tensor, scale: Scale, weight_OD: Tensor, bias_O: Tensor | None) -> Tensor:
    """The specification, as published: scale the skip, concatenate, project."""
    if isinstance(scale, Tensor) and scale.dim() == 2:
        scale = scale.unsqueeze(-1)
    scaled_BTD2 = s_BTD2 if scale is None else (s_BTD2 * scale).to(s_BTD2.dtype)
    return F.linear(torch.cat([x_BTD1, scaled_BTD2], dim=-1), weight_OD, bias_O)


def skip_linear(x: Tensor, s: Tensor, scale: Scale, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``linear(cat([x, scale * s], -1), weight, bias)``.

    Args:
        x: (B, T, D1), the hidden stream.
        s: (B, T, D2), the long skip.
        scale: None for 1, a float, a scalar tensor, one factor a token (B, T) or (B, T, 1), or one a channel (D2,).
        weight: (O, D1 + D2).
        bias: (O,) or None.

    Returns:
        (B, T, O), differentiable in every tensor argument.

    Raises:
        ValueError: shapes that do not fit, naming them.
    """
    if x.dim() != 3 or s.dim() != 3 or x.shape[:2] != s.shape[:2]:
        raise ValueError(
            f"skip_linear: x and s must be (B, T, D1) and (B, T, D2), got {tuple(x.shape)} and {tuple(s.shape)}"
        )
    if weight.dim() != 2 or weight.shape[1] != x.shape[-1] + s.shape[-1]:
        raise ValueError(
            f"skip_linear: weight {tuple(weight.shape)} does not fit x {tuple(x.shape)} beside s {tuple(s.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"skip_linear: bias {tuple(bias.shape)} does not fit weight {tuple(weight.shape)}")
    if isinstance(scale, Tensor):
        B, T, D2 = s.shape
        if tuple(scale.shape) not in {(), (B, T), (B, T, 1), (D2,)}:
            raise ValueError(
                f"skip_linear: scale {tuple(scale.shape)} is none of scalar, {(B, T)}, {(B, T, 1)}, {(D2,)}"
            )
    return skip_linear_ref(x, s, scale, weight, bias)
