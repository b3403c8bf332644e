"""The blocks of Hugging Face diffusers over our operators; importing this imports diffusers.

Each class adds no state to the one it stands for, so that a module turns from one into the other by a change of class.
It has the name of that one too, because accelerate and diffusers look for blocks by the names of their classes.

Shapes: N batch, C channels, * height and width; a decoder block takes the hidden stream and the skips, innermost last.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from diffusers import ModelMixin as ModelMixin
from diffusers.models import resnet
from diffusers.models.unets import unet_2d_blocks as unet
from diffusers.utils.torch_utils import apply_freeu
from torch import Tensor, nn

from scalelong.kernels.arguments import Scale, as_layout, concatenated, is_channels_last
from scalelong.model import skip_layers
from scalelong.model.common_factor import CommonFactor, multiplied
from scalelong.model.diffusers_gates import GATES
from scalelong.model.layer_calls import has_forward_of_class, is_called_by_class
from scalelong.model.skip_scale import LongSkip, SkipScale, SkipShape
from scalelong.model.skip_tuning import SkipTuning
from scalelong.model.unet_config import SkipPosition


@dataclass
class NetworkSkips:
    """How the long skips of one network are scaled."""

    policy: SkipScale
    position: SkipPosition
    shapes: tuple[SkipShape, ...]
    """In execution order."""
    holder: nn.Module | None
    """The module whose child ``skip_gates`` are the learned gates, if there are any."""
    skip_tuning: SkipTuning | None = None
    """While it samples: what the skips are multiplied by besides (``skip_tuning.tuned_skips``)."""

    @property
    def gates(self) -> nn.Module | None:
        """Looked up at each call, so that gates which replace these count."""
        return None if self.holder is None else self.holder._modules.get(GATES)

    def __deepcopy__(self, memo: dict[int, Any]) -> "NetworkSkips":
        holder = self.holder
        if holder is not None and id(holder) in memo:
            holder = memo[id(holder)]
        elif holder is not None:  # a block is copied without its network
            holder = nn.Module()
            holder.add_module(GATES, copy.deepcopy(self.gates, memo))
        memo[id(self)] = copied = NetworkSkips(self.policy, self.position, self.shapes, holder, self.skip_tuning)
        return copied


@dataclass
class SkipPlace:
    """Which long skip one residual block takes."""

    i: int
    """1 is the outermost."""
    network: NetworkSkips
    input: Literal["concatenated", "scaled", "taken"] | None = None
    """What the block's input is, while another forward than ours is given a concatenation."""

    @property
    def hidden_channels(self) -> int:
        """Channels of the hidden stream that it is concatenated with."""
        return self.network.shapes[len(self.network.shapes) - self.i].stream_width

    def scaled(self, skip: Tensor) -> LongSkip:
        network = self.network
        scaled = network.policy.long_skip(self.i, network.shapes, skip, network.gates)
        return scaled if network.skip_tuning is None else network.skip_tuning.tune(scaled, len(network.shapes))


@dataclass
class BlockSkips:
    """The long skips of a decoder block, in the order of its residual blocks."""

    network: NetworkSkips
    long_skips: tuple[SkipPlace, ...]

    @property
    def gates(self) -> nn.Module | None:
        return self.network.gates


class GroupNorm(skip_layers.GroupNorm):
    """Our layer where nn.GroupNorm stood."""


class SkipConv1x1(skip_layers.SkipConv1x1):
    """Our layer where the shortcut's nn.Conv2d stood."""


class Conv3x3(skip_layers.Conv3x3):
    """Our layer where a nn.Conv2d stood that keeps the sides."""


class ResnetBlock2D(resnet.ResnetBlock2D):
    """Norms with what surrounds them in one pass; given a skip, over a concatenation that is not written.

    In a decoder it also takes the concatenation, as the one that it stands for, and scales the skip in it.
    """

    long_skip: SkipPlace | None = None

    def forward(  # type: ignore[override]
        self,
        input_tensor: Tensor,
        temb: Tensor | None = None,
        skip: Tensor | None = None,
        scale: Scale = None,
        common: CommonFactor = None,
    ) -> Tensor:
        if skip is None:
            input_tensor, skip, scale, common = self.parted(input_tensor)
        h = self.norm_and_activation(self.norm1, input_tensor, skip, scale, common)
        resample = self.downsample if self.upsample is None else self.upsample
        if resample is not None:
            input_tensor = resample(multiplied(concatenated(input_tensor, skip, scale), common))
            h, skip, common = resample(h), None, None
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
        # In the order of diffusers: recomputation ends with the last layer whose output backward reads.
        h = self.conv2(self.dropout(h))
        y = self.shortcut(input_tensor, skip, scale, common) + h
        factor = self.output_scale_factor
        # By type first: the Skip blocks have one of NumPy, on which torch.compile cannot branch.
        return y if type(factor) in (int, float) and factor == 1 else y / factor

    def parted(self, x: Tensor) -> tuple[Tensor, Tensor | None, Scale, CommonFactor]:
        """Hidden stream, long skip, its factor and the common one, out of their concatenation."""
        long_skip = self.long_skip
        if long_skip is None or long_skip.input == "scaled":
            return x, None, None, None
        if long_skip.input == "concatenated":
            long_skip.input = "taken"
        channels_last, hidden = is_channels_last(x), long_skip.hidden_channels
        h, skip = (as_layout(part, channels_last) for part in x.split((hidden, x.shape[1] - hidden), dim=1))
        skip, scale, _, common = long_skip.scaled(skip)
        return (x, None, None, None) if scale is None and common is None else (h, skip, scale, common)

    def norm_and_activation(
        self,
        norm: nn.Module,
        h: Tensor,
        skip: Tensor | None = None,
        scale: Scale = None,
        common: CommonFactor = None,
        gain: Tensor | None = None,
        shift: Tensor | None = None,
    ) -> Tensor:
        position = "before-norm" if self.long_skip is None else self.long_skip.network.position
        return skip_layers.norm_and_activation(
            norm, self.nonlinearity, h, skip, scale, position, common=common, gain=gain, shift=shift
        )

    def shortcut(self, h: Tensor, skip: Tensor | None, scale: Scale, common: CommonFactor) -> Tensor:
        if self.conv_shortcut is None:
            return multiplied(concatenated(h, skip, scale), common)
        return skip_layers.shortcut(self.conv_shortcut, h, skip, scale, common)


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
        skip: Any = skips[-1 - k]
        long_skip: SkipPlace = block.skips.long_skips[k]
        if freeu and all(factors.values()):
            h, skip = apply_freeu(block.resolution_idx, h, skip, **factors)
        # Positional, and no tensor inside a container: so every way of checkpointing sees them.
        if is_called_by_class(residual_block, ResnetBlock2D):
            # The factors are arguments: blocks that are compiled one by one share a graph.
            skip, scale, _, common = long_skip.scaled(skip)
            arguments: tuple[Any, ...] = (h, temb, skip, scale, common)
        else:
            residual_block = partial(called_as_it_is, residual_block, long_skip)
            arguments = (h, temb, skip)
        if checkpointed:
            h = block._gradient_checkpointing_func(residual_block, *arguments)
        else:
            h = residual_block(*arguments)
        h = attend(k, h)
    return h


def called_as_it_is(
    residual_block: nn.Module, long_skip: SkipPlace, h: Tensor, temb: Tensor | None, skip: Tensor
) -> Tensor:
    """The output of a residual block that somebody wrapped, watches or replaced: it is given the concatenation.

    Our forward scales the skip in there. Another one may call ours, or may not: before the norm it is given what is
    scaled already, after the norm it can only be ours that scales.
    """
    skip = as_layout(skip, is_channels_last(h))
    if isinstance(residual_block, ResnetBlock2D) and has_forward_of_class(residual_block):
        return residual_block(concatenated(h, skip, None), temb)
    features, scale, _, common = long_skip.scaled(skip)
    must_take = long_skip.network.position == "after-norm" and not (scale is None and common is None)
    long_skip.input = "concatenated" if must_take else "scaled"
    if must_take:
        scale = common = None
    else:
        skip = features
    try:
        y = residual_block(multiplied(concatenated(h, skip, scale), common), temb)
        if long_skip.input == "concatenated":
            raise ValueError(
                f"the forward of a {type(residual_block).__name__} was replaced by one that does not call the patched "
                "forward, so that nothing scales its skip after the norm; use position='before-norm', or unpatch first"
            )
        return y
    finally:
        long_skip.input = None


def upsampled(block: Any, h: Tensor, *arguments: object, **named: object) -> Tensor:
    for upsampler in block.upsamplers or ():
        h = upsampler(h, *arguments, **named)
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
        return upsampled(self, h, temb=temb) if self.upsample_type == "resnet" else upsampled(self, h)


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
