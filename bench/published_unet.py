"""The UNets written plainly, as published (https://github.com/openai/guided-diffusion), over the parameters of ours.

They multiply the skip, write the concatenation, and normalise and activate in passes of their own.
"""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scalelong.kernels.arguments import Scale, concatenated
from scalelong.model.linear_layers import TokenConv1d, queries_first
from scalelong.model.skip_layers import Conv3x3, GroupNorm, SkipConv1x1, skip_gain
from scalelong.model.skip_scale import SkipScale
from scalelong.model.unet import AttentionBlock, Embedding, ResBlock, UNet


class PublishedGroupNorm(GroupNorm):
    def forward(self, h: Tensor, *_, **__) -> Tensor:  # type: ignore[override]
        return F.group_norm(h, self.num_groups, self.weight, self.bias, self.eps)


class PublishedResBlock(ResBlock):
    def forward(self, x_BCHW: Tensor, emb: Embedding, skip: Tensor | None = None, scale: Scale = None) -> Tensor:
        norm, activation, conv = self.in_layers
        scaled = concatenated(x_BCHW, skip, scale)
        if skip is not None and scale is not None and self.position == "after-norm":
            h_BCHW = norm(concatenated(x_BCHW, skip, None)) * (1 + skip_gain(scale, x_BCHW, skip))[:, :, None, None]
        else:
            h_BCHW = norm(scaled)
        h_BCHW = activation(h_BCHW)
        shortcut = self.skip_connection(scaled)
        if self.resample is not None:
            h_BCHW, shortcut = self.resample(h_BCHW), self.resample(shortcut)
        h_BCHW = conv(h_BCHW)
        modulation = self.emb_layers(emb.emb_BE)[:, :, None, None]
        norm, *rest = self.out_layers
        if self.is_adaptive:
            gain, shift = modulation.chunk(2, dim=1)
            h_BCHW = norm(h_BCHW) * (1 + gain) + shift
        else:
            h_BCHW = norm(h_BCHW + modulation)
        for layer in rest:
            h_BCHW = layer(h_BCHW)
        return shortcut + h_BCHW


class PublishedAttentionBlock(AttentionBlock):
    def forward(self, x_BCHW: Tensor) -> Tensor:
        qkv = self.qkv(self.norm(x_BCHW).flatten(2))
        if self.is_split_by_heads_first:
            qkv = queries_first(qkv, self.num_heads, dim=1)
        q_BHTE, k_BHTE, v_BHTE = (
            part.unflatten(1, (self.num_heads, -1)).transpose(2, 3).contiguous() for part in qkv.chunk(3, dim=1)
        )
        mixed_BHTE = F.scaled_dot_product_attention(q_BHTE, k_BHTE, v_BHTE)
        return x_BCHW + self.proj_out(mixed_BHTE.transpose(2, 3).flatten(1, 2)).view_as(x_BCHW)


class PublishedUNet(UNet):
    def forward(self, x_BCHW: Tensor, t_B: Tensor, y_B: Tensor | None = None) -> Tensor:
        emb = self._embed(x_BCHW, t_B, y_B)
        h_BCHW = x_BCHW.contiguous(memory_format=torch.channels_last) if self.channels_last else x_BCHW
        h_BCHW = self.input_blocks[0](h_BCHW, emb)
        skips = [h_BCHW]
        for stage in self.input_blocks[1:]:  # type: ignore[index]
            h_BCHW = self._run(stage, h_BCHW, emb)
            skips.append(h_BCHW)
        h_BCHW = self._run(self.middle_block, h_BCHW, emb)
        for executed, stage in enumerate(self.output_blocks):
            skip, num_skips = skips.pop(), len(self.output_blocks)
            scale = self.skip_scale.scale(num_skips - executed, num_skips, skip, self.skip_gates)
            h_BCHW = self._run(stage, h_BCHW, emb, skip, scale)
        return self.out(h_BCHW)


def as_published(model: UNet, *, skip_scale: SkipScale | None = None, channels_last: bool = False) -> UNet:
    """A plain twin that shares the parameters of ``model``.

    Args:
        skip_scale: instead of the policy of ``model``, whose gates it then leaves alone.
        channels_last: the layout of activations.
    """
    twins: dict[type, type] = {
        UNet: PublishedUNet,
        ResBlock: PublishedResBlock,
        AttentionBlock: PublishedAttentionBlock,
        GroupNorm: PublishedGroupNorm,
        Conv3x3: nn.Conv2d,
        SkipConv1x1: nn.Conv2d,
        TokenConv1d: nn.Conv1d,
    }
    twin = copy.deepcopy(model, {id(p): p for p in model.parameters()})
    for module in twin.modules():
        module.__class__ = twins.get(type(module), type(module))
    twin.channels_last = channels_last
    if skip_scale is not None:
        twin.skip_scale = skip_scale
    return twin
