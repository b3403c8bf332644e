"""The blocks of Hugging Face diffusers over our operators; importing this imports diffusers.

Each class adds no state to the one it stands for, so that a module turns from one into the other by a change of class.
It has the name of that one too, because accelerate and diffusers look for blocks by the names of their classes.

Shapes: N batch, C channels, * height and width; a decoder block takes the hidden stream and the skips, innermost last.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models import resnet
from diffusers.models.unets import unet_2d_blocks as unet
from diffusers.utils.torch_utils import apply_freeu
from torch import Tensor, nn

from scalelong.kernels.group_norm import Scale, concatenated
from scalelong.model import skip_layers
from scalelong.model.skip_scale import SkipPosition, SkipScale


@dataclass(frozen=True)
class BlockSkips:
    """The skips of one decoder block: how they are scaled, and their places among all of the network."""

    policy: SkipScale
    num_skips: int
    """Of the network."""
    first: int
    """i of the skip that the block's first residual block takes; the next ones take i - 1, i - 2, ..."""
    gates: nn.Module | None
    """Of the network; registered there, not in the block."""

    def scale(self, k: int, skip: Tensor) -> Scale:
        """The factor of the skip that residual block k takes."""
        return self.policy.scale(self.first - k, self.num_skips, skip, self.gates)


class GroupNorm(skip_layers.GroupNorm):
    """Our layer where nn.GroupNorm stood."""


class SkipConv1x1(skip_layers.SkipConv1x1):
    """Our layer where the shortcut's nn.Conv2d stood."""


class Conv3x3(skip_layers.Conv3x3):
    """Our layer where a nn.Conv2d stood that keeps the sides."""


def fused_activation(activation: nn.Module) -> str | None:
    """Its name among the activations of our norm, or None."""
    if type(activation) is nn.SiLU:
        return "silu"
    return "gelu" if type(activation) is nn.GELU and activation.approximate == "none" else None


class ResnetBlock2D(resnet.ResnetBlock2D):
    """Norms with what surrounds them in one pass; given a skip, over a concatenation that is not written."""

    def forward(  # type: ignore[override]
        self,
        input_tensor: Tensor,
        temb: Tensor | None = None,
        skip: Tensor | None = None,
        scale: Scale = None,
        position: SkipPosition = "before-norm",
    ) -> Tensor:
        h = self.norm_and_activation(self.norm1, input_tensor, skip, scale, position)
        resample = self.downsample if self.upsample is None else self.upsample
        if resample is not None:
            input_tensor, skip = resample(concatenated(input_tensor, skip, scale)), None
            h = resample(h)
        h = self.conv1(h)
        if self.time_emb_proj is not None:
            temb = self.time_emb_proj(temb if self.skip_time_act else self.nonlinearity(temb))[:, :, None, None]
        gain = shift = None
        if self.time_embedding_norm == "scale_shift":
            assert temb is not None, "scale_shift needs an embedding"
            gain, shift = temb.flatten(1).chunk(2, dim=1)
        elif self.time_embedding_norm == "default" and temb is not None:
            h = h + temb
        h = self.norm_and_activation(self.norm2, h, gain=gain, shift=shift)
        y = self.shortcut(input_tensor, skip, scale) + self.conv2(self.dropout(h))
        factor = self.output_scale_factor
        # By type first: the Skip blocks have one of NumPy, on which torch.compile cannot branch.
        return y if type(factor) in (int, float) and factor == 1 else y / factor

    def norm_and_activation(
        self,
        norm: nn.Module,
        h: Tensor,
        skip: Tensor | None = None,
        scale: Scale = None,
        position: SkipPosition = "before-norm",
        gain: Tensor | None = None,
        shift: Tensor | None = None,
    ) -> Tensor:
        if not isinstance(norm, GroupNorm):
            return self.nonlinearity(norm_as_it_is(norm, h, skip, scale, position, gain, shift))
        act = fused_activation(self.nonlinearity)
        y = norm(h, skip, scale, position, act=act, gain=gain, shift=shift)
        return self.nonlinearity(y) if act is None else y

    def shortcut(self, h: Tensor, skip: Tensor | None, scale: Scale) -> Tensor:
        if isinstance(self.conv_shortcut, SkipConv1x1):
            return self.conv_shortcut(h, skip, scale)
        x = concatenated(h, skip, scale)
        return x if self.conv_shortcut is None else self.conv_shortcut(x)


def norm_as_it_is(
    norm: nn.Module,
    h: Tensor,
    skip: Tensor | None,
    scale: Scale,
    position: SkipPosition,
    gain: Tensor | None,
    shift: Tensor | None,
) -> Tensor:
    """What our GroupNorm computes before the activation, by a norm that somebody wrapped or replaced."""
    if skip is not None and scale is not None and position == "after-norm":
        gain, scale = skip_layers.skip_gain(scale, h, skip).to(h.dtype), None
    y = norm(concatenated(h, skip, scale))
    if gain is not None:
        y = y * (1 + gain[:, :, None, None])
    return y if shift is None else y + shift[:, :, None, None]


def decoded(
    block: Any,
    h: Tensor,
    skips: tuple[Tensor, ...],
    temb: Tensor | None,
    attend: Callable[[int, Tensor], Tensor] = lambda k, h: h,
    *,
    freeu: bool = False,
) -> Tensor:
    """The loop of every decoder block: residual block k takes the last skip that is left, then ``attend(k, h)``."""
    checkpointed = torch.is_grad_enabled() and getattr(block, "gradient_checkpointing", False)
    factors = {name: getattr(block, name, None) for name in ("s1", "s2", "b1", "b2")} if freeu else {}
    for k, residual_block in enumerate(block.resnets):
        skip = skips[-1 - k]
        if freeu and all(factors.values()):
            h, skip = apply_freeu(block.resolution_idx, h, skip, **factors)
        # Positional, and no tensor inside a container: so every way of checkpointing sees them.
        arguments = (h, temb, skip, block.skips.scale(k, skip), block.skips.policy.position)
        if checkpointed:
            h = block._gradient_checkpointing_func(residual_block, *arguments)
        else:
            h = residual_block(*arguments)
        h = attend(k, h)
    return h


def upsampled(block: Any, h: Tensor, *arguments: object) -> Tensor:
    for upsampler in block.upsamplers or ():
        h = upsampler(h, *arguments)
    return h


def with_image(block: Any, h: Tensor, temb: Tensor | None, image: Tensor | None) -> tuple[Tensor, Tensor | int]:
    """The hidden stream, and the image that every block of the Skip kind adds to (Song et al., arXiv:2011.13456)."""
    total = 0 if image is None else block.upsampler(image)
    if block.resnet_up is not None:
        total = total + block.skip_conv(block.act(block.skip_norm(h)))
        h = block.resnet_up(h, temb)
    return h, total


# The forwards below take, and ignore, the deprecated arguments that those of diffusers take and ignore.


class UpBlock2D(unet.UpBlock2D):
    def forward(self, hidden_states, res_hidden_states_tuple, temb=None, upsample_size=None, *_, **__):
        h = decoded(self, hidden_states, res_hidden_states_tuple, temb, freeu=True)
        return upsampled(self, h, upsample_size)


class ResnetUpsampleBlock2D(unet.ResnetUpsampleBlock2D):
    def forward(self, hidden_states, res_hidden_states_tuple, temb=None, upsample_size=None, *_, **__):
        return upsampled(self, decoded(self, hidden_states, res_hidden_states_tuple, temb), temb)


class AttnUpBlock2D(unet.AttnUpBlock2D):
    def forward(self, hidden_states, res_hidden_states_tuple, temb=None, upsample_size=None, *_, **__):
        h = decoded(self, hidden_states, res_hidden_states_tuple, temb, lambda k, h: self.attentions[k](h))
        return upsampled(self, h, temb) if self.upsample_type == "resnet" else upsampled(self, h)


class CrossAttnUpBlock2D(unet.CrossAttnUpBlock2D):
    def forward(
        self,
        hidden_states,
        res_hidden_states_tuple,
        temb=None,
        encoder_hidden_states=None,
        cross_attention_kwargs=None,
        upsample_size=None,
        attention_mask=None,
        encoder_attention_mask=None,
    ):
        def attend(k: int, h: Tensor) -> Tensor:
            return self.attentions[k](
                h,
                encoder_hidden_states=encoder_hidden_states,
                cross_attention_kwargs=cross_attention_kwargs,
                attention_mask=attention_mask,
                encoder_attention_mask=encoder_attention_mask,
                return_dict=False,
            )[0]

        h = decoded(self, hidden_states, res_hidden_states_tuple, temb, attend, freeu=True)
        return upsampled(self, h, upsample_size)


class SimpleCrossAttnUpBlock2D(unet.SimpleCrossAttnUpBlock2D):
    def forward(
        self,
        hidden_states,
        res_hidden_states_tuple,
        temb=None,
        encoder_hidden_states=None,
        upsample_size=None,
        attention_mask=None,
        cross_attention_kwargs=None,
        encoder_attention_mask=None,
    ):
        # A mask of the hidden states serves for the encoder's too, as in diffusers.
        if attention_mask is None and encoder_hidden_states is not None:
            attention_mask = encoder_attention_mask
        more = cross_attention_kwargs or {}

        def attend(k: int, h: Tensor) -> Tensor:
            attention = self.attentions[k]
            return attention(h, encoder_hidden_states=encoder_hidden_states, attention_mask=attention_mask, **more)

        return upsampled(self, decoded(self, hidden_states, res_hidden_states_tuple, temb, attend), temb)


class SkipUpBlock2D(unet.SkipUpBlock2D):
    def forward(self, hidden_states, res_hidden_states_tuple, temb=None, skip_sample=None, *_, **__):
        return with_image(self, decoded(self, hidden_states, res_hidden_states_tuple, temb), temb, skip_sample)


class AttnSkipUpBlock2D(unet.AttnSkipUpBlock2D):
    def forward(self, hidden_states, res_hidden_states_tuple, temb=None, skip_sample=None, *_, **__):
        h = self.attentions[0](decoded(self, hidden_states, res_hidden_states_tuple, temb))
        return with_image(self, h, temb, skip_sample)


DECODER_BLOCKS = (
    UpBlock2D,
    ResnetUpsampleBlock2D,
    AttnUpBlock2D,
    CrossAttnUpBlock2D,
    SimpleCrossAttnUpBlock2D,
    SkipUpBlock2D,
    AttnSkipUpBlock2D,
)
BLOCK_ORIGINALS = {block: block.__base__ for block in (*DECODER_BLOCKS, ResnetBlock2D)}
ORIGINALS = {**BLOCK_ORIGINALS, GroupNorm: nn.GroupNorm, Conv3x3: nn.Conv2d, SkipConv1x1: nn.Conv2d}
"""The class that each of ours stands for."""
