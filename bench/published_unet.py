"""The UNets written plainly, as published (https://github.com/openai/guided-diffusion), over the parameters of ours.

They multiply the skip, write the concatenation, and normalise and activate in passes of their own.
"""

import copy
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scalelong.kernels.arguments import concatenated
from scalelong.model.backbone import last_of
from scalelong.model.common_factor import multiplied
from scalelong.model.linear_layers import TokenConv1d, queries_first
from scalelong.model.skip_layers import Conv3x3, GroupNorm, SkipConv1x1, skip_gain
from scalelong.model.skip_scale import LongSkip, SkipScale
from scalelong.model.unet import NO_SKIP, AttentionBlock, Embedding, ResBlock, UNet


class PublishedGroupNorm(GroupNorm):
    def forward(self, h: Tensor, *_, **__) -> Tensor:  # type: ignore[override]
        return F.group_norm(h, self.num_groups, self.weight, self.bias, self.eps)


class PublishedResBlock(ResBlock):
    def forward(self, x_BCHW: Tensor, emb: Embedding, skip: LongSkip | None = None) -> Tensor:
        norm, activation, conv = self.in_layers
        s, scale, _, common = NO_SKIP if skip is None else skip
        scaled = multiplied(concatenated(x_BCHW, s, scale), common)
        if s is not None and self.position == "after-norm" and not (scale is None and common is None):
            gain = skip_gain(scale, x_BCHW, s, common)[:, :, None, None]
            h_BCHW = norm(concatenated(x_BCHW, s, None)) * (1 + gain)
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
        return self.out(last_of(self.hidden_states(x_BCHW, t_B, y_B)))

    def hidden_states(self, x_BCHW: Tensor, t_B: Tensor, y_B: Tensor | None = None) -> Iterator[Tensor]:
        emb = self._embed(x_BCHW, t_B, y_B)
        h_BCHW = x_BCHW.contiguous(memory_format=torch.channels_last) if self.channels_last else x_BCHW
        h_BCHW = self.input_blocks[0](h_BCHW, emb)
        yield h_BCHW
        skips = [h_BCHW]
        for stage in self.input_blocks[1:]:  # type: ignore[index]
            h_BCHW = self._run(stage, h_BCHW, emb)
            skips.append(h_BCHW)
            yield h_BCHW
        h_BCHW = self._run(self.middle_block, h_BCHW, emb)
        yield h_BCHW
        for executed, stage in enumerate(self.output_blocks):
            h_BCHW = self._run(stage, h_BCHW, emb, self._long_skip(executed, skips.pop(), self.skip_gates))
            yield h_BCHW


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
