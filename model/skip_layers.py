"""The layers of a UNet's residual block that take a long skip beside the hidden stream, over our operators.

They are PyTorch's own layers where no skip is given, with the same parameters and names, so that a model can be given
them, and be rid of them, by changing the class of its modules.

Shapes: N batch, Ch channels of the hidden stream h, Cs channels of the skip s, C = Ch + Cs, * spatial dimensions.
"""

import torch
from torch import Tensor, nn

from scalelong.kernels.conv3x3 import conv3x3
from scalelong.kernels.group_norm import Scale, group_norm, skip_group_norm
from scalelong.kernels.skip_conv1x1 import skip_conv1x1
from scalelong.model.skip_scale import SkipPosition


class GroupNorm(nn.GroupNorm):
    """nn.GroupNorm with what follows it and, given a skip, with the concatenation before it."""

    def forward(  # type: ignore[override]
        self,
        h: Tensor,
        s: Tensor | None = None,
        scale: Scale = None,
        position: SkipPosition = "before-norm",
        *,
        act: str | None = None,
        gain: Tensor | None = None,
        shift: Tensor | None = None,
    ) -> Tensor:
        """``act(norm(cat([h, scale * s], 1)) * (1 + gain) + shift)``.

        With ``position="after-norm"`` the skip is normalised as it is, and its share of the norm's output is scaled.
        """
        if s is None:
            return group_norm(h, self.num_groups, self.weight, self.bias, gain=gain, shift=shift, eps=self.eps, act=act)
        if position == "after-norm" and scale is not None:
            assert gain is None, "the norm of a skip is not adaptive"
            gain, scale = skip_gain(scale, h, s), None
        return skip_group_norm(
            h, s, scale, self.num_groups, self.weight, self.bias, gain=gain, shift=shift, eps=self.eps, act=act
        )


class Conv3x3(nn.Conv2d):
    """A 3x3 nn.Conv2d with stride 1 and padding 1."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        # An adapter makes layers of the class of the one it adapts, of other sizes too.
        shape = (self.kernel_size, self.stride, self.padding, self.dilation, self.groups)
        if shape != ((3, 3), (1, 1), (1, 1), (1, 1), 1):
            return super().forward(x)
        return conv3x3(x, self.weight, self.bias)


class SkipConv1x1(nn.Conv2d):
    """A 1x1 nn.Conv2d that, given a skip, takes the scaled concatenation."""

    def forward(self, h: Tensor, s: Tensor | None = None, scale: Scale = None) -> Tensor:  # type: ignore[override]
        return super().forward(h) if s is None else skip_conv1x1(h, s, scale, self.weight, self.bias)


def skip_gain(scale: Tensor | float, h: Tensor, s: Tensor) -> Tensor:
    """(N, C): 0 over the channels of h, scale - 1 over those of s, for an adaptive norm's ``1 + gain``."""
    N, Ch, Cs = h.shape[0], h.shape[1], s.shape[1]
    if not isinstance(scale, Tensor):
        scale = torch.full((), scale, dtype=torch.promote_types(h.dtype, torch.float32), device=h.device)
    of_s = (scale - 1).expand(N, Cs)
    return torch.cat([of_s.new_zeros(N, Ch), of_s], dim=1)
