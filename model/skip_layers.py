"""The layers of a UNet's residual block that take a long skip beside the hidden stream, over our operators.

They are PyTorch's own layers where no skip is given, with the same parameters and names, so that a model can be given
them, and be rid of them, by changing the class of its modules. The functions at the end call such a layer, or whatever
was put in its place as the plain network would: given the concatenation.

Shapes: N batch, Ch channels of the hidden stream h, Cs channels of the skip s, C = Ch + Cs, * spatial dimensions; the
common factor of a concatenation is None for 1, a number, or a tensor of one element.
"""

import torch
from torch import Tensor, nn

from scalelong.kernels.arguments import Scale, as_argument, concatenated
from scalelong.kernels.conv3x3 import conv3x3
from scalelong.kernels.group_norm import group_norm, skip_group_norm
from scalelong.kernels.skip_conv1x1 import skip_conv1x1
from scalelong.model.common_factor import CommonFactor, multiplied
from scalelong.model.layer_calls import has_method_of, is_called_by_class
from scalelong.model.unet_config import SkipPosition


class GroupNorm(nn.GroupNorm):
    """nn.GroupNorm with what follows it and, given a skip, with the concatenation before it."""

    def forward(  # type: ignore[override]
        self,
        h: Tensor,
        s: Tensor | None = None,
        scale: Scale = None,
        position: SkipPosition = "before-norm",
        *,
        common: CommonFactor = None,
        act: str | None = None,
        gain: Tensor | None = None,
        shift: Tensor | None = None,
    ) -> Tensor:
        """``act(norm(common * cat([h, scale * s], 1)) * (1 + gain) + shift)``.

        With ``position="after-norm"`` hidden stream and skip are normalised as they are, and what the norm puts out is
        multiplied instead: all of it by ``common``, the skip's share by ``scale`` too.
        """
        weight, bias = self.weight, self.bias
        if bias is None and weight is not None:
            bias = torch.zeros_like(weight)
        if s is None:
            return group_norm(h, self.num_groups, weight, bias, gain=gain, shift=shift, eps=self.eps, act=act)
        eps = self.eps
        if position == "after-norm" and not (scale is None and common is None):
            assert gain is None, "the norm of a skip is not adaptive"
            gain, scale = skip_gain(scale, h, s, common), None
        elif common is not None:
            common = common.reshape(()) if isinstance(common, Tensor) else as_argument(common, h)
            if isinstance(common, Tensor):
                h, scale = common * h, common if scale is None else common * scale
            else:
                eps /= common**2  # all that a norm leaves of a factor
        return skip_group_norm(h, s, scale, self.num_groups, weight, bias, gain=gain, shift=shift, eps=eps, act=act)


class Conv3x3(nn.Conv2d):
    """A 3x3 nn.Conv2d with stride 1 and padding 1."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        # An adapter makes layers of the class of the one it adapts, of other sizes too; to tile, users change the rest.
        return conv3x3(x, self.weight, self.bias) if keeps_sides(self, 3) else super().forward(x)


class SkipConv1x1(nn.Conv2d):
    """A 1x1 nn.Conv2d that, given a skip, takes the scaled concatenation."""

    def forward(  # type: ignore[override]
        self, h: Tensor, s: Tensor | None = None, scale: Scale = None, common: CommonFactor = None
    ) -> Tensor:
        """``conv(common * cat([h, scale * s], 1))``; the common factor is folded into the weight."""
        if s is None or not keeps_sides(self, 1):
            return super().forward(multiplied(concatenated(h, s, scale), common))
        return skip_conv1x1(h, s, scale, multiplied(self.weight, common), self.bias)


def keeps_sides(conv: nn.Conv2d, size: int) -> bool:
    """Whether it is a convolution of that size, padded with zeros so that it keeps the sides, and nothing else."""
    shape = (conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups, conv.padding_mode)
    expected = ((size, size), (1, 1), (size // 2, size // 2), (1, 1), 1, "zeros")
    return shape == expected and has_method_of(conv, "_conv_forward", nn.Conv2d)


def skip_gain(scale: Scale, h: Tensor, s: Tensor, common: CommonFactor = None) -> Tensor:
    """(N, C): what ``1 + gain`` of an adaptive norm takes to multiply the channels of h by ``common``, those of s by
    ``common * scale``."""
    N, Ch, Cs = h.shape[0], h.shape[1], s.shape[1]

    def as_tensor(factor: Scale) -> Tensor:
        if isinstance(factor, Tensor):
            return factor
        dtype = torch.promote_types(h.dtype, torch.float32)
        return torch.full((), 1.0 if factor is None else factor, dtype=dtype, device=h.device)

    scale = as_tensor(scale)
    if common is None:
        of_s = (scale - 1).expand(N, Cs)
        return torch.cat([of_s.new_zeros(N, Ch), of_s], dim=1)
    common = as_tensor(common).reshape(())
    of_s = (common * scale - 1).expand(N, Cs)
    return torch.cat([(common - 1).to(of_s.dtype).expand(N, Ch), of_s], dim=1)


def norm_and_activation(
    norm: nn.Module,
    activation: nn.Module,
    h: Tensor,
    s: Tensor | None = None,
    scale: Scale = None,
    position: SkipPosition = "before-norm",
    *,
    common: CommonFactor = None,
    gain: Tensor | None = None,
    shift: Tensor | None = None,
) -> Tensor:
    """``activation(norm(common * cat([h, scale * s], 1)) * (1 + gain) + shift)``, as ``GroupNorm`` has it; in one
    operator where both layers are ours."""
    if not is_called_by_class(norm, GroupNorm):
        return activation(_norm_as_it_is(norm, h, s, scale, position, common, gain, shift))
    act = fused_activation(activation)
    y = norm(h, s, scale, position, common=common, act=act, gain=gain, shift=shift)
    return activation(y) if act is None else y


def fused_activation(activation: nn.Module) -> str | None:
    """Its name among the activations of our norm, or None."""
    if not is_called_by_class(activation, type(activation)):
        return None
    if type(activation) is nn.SiLU:
        return "silu"
    if type(activation) is nn.GELU:
        return "gelu" if activation.approximate == "none" else "gelu-tanh"
    return None


def _norm_as_it_is(
    norm: nn.Module,
    h: Tensor,
    s: Tensor | None,
    scale: Scale,
    position: SkipPosition,
    common: CommonFactor,
    gain: Tensor | None,
    shift: Tensor | None,
) -> Tensor:
    """What our GroupNorm computes before the activation, by a norm that somebody wrapped, watches or replaced."""
    if s is not None and position == "after-norm" and not (scale is None and common is None):
        gain, scale, common = skip_gain(scale, h, s, common).to(h.dtype), None, None
    y = norm(multiplied(concatenated(h, s, scale), common))
    over_space = (..., *[None] * (h.dim() - 2))
    if gain is not None:
        y = y * (1 + gain[over_space])
    return y if shift is None else y + shift[over_space]


def shortcut(conv: nn.Module, h: Tensor, s: Tensor | None, scale: Scale, common: CommonFactor = None) -> Tensor:
    """``conv(common * cat([h, scale * s], 1))``."""
    if is_called_by_class(conv, SkipConv1x1):
        return conv(h, s, scale, common)
    return conv(multiplied(concatenated(h, s, scale), common))
