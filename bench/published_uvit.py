"""The U-ViT written plainly, as published (https://github.com/baofff/U-ViT), over the parameters of ours.

It multiplies the skip, writes the concatenation and takes queries, keys and values as three slices of one copy.
"""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scalelong.model.common_factor import multiplied
from scalelong.model.linear_layers import GeluLinear, SkipLinear
from scalelong.model.norm_layers import AddLayerNorm
from scalelong.model.skip_scale import LongSkip, SkipScale
from scalelong.model.transformer_layers import Attention
from scalelong.model.uvit import Block, UViT


class PublishedAttention(Attention):
    def project(self, x_BTD: Tensor) -> Tensor:
        return self.qkv(x_BTD)

    def forward(self, x_BTD: Tensor) -> Tensor:
        B, T, D = x_BTD.shape
        qkv = self.project(x_BTD)
        qkv_3BTHE = qkv.reshape(B, T, 3, self.num_heads, D // self.num_heads).permute(2, 0, 1, 3, 4)
        q_BTHE, k_BTHE, v_BTHE = qkv_3BTHE[0], qkv_3BTHE[1], qkv_3BTHE[2]
        if self.q_norm is not None and self.k_norm is not None:
            q_BTHE, k_BTHE = self.q_norm(q_BTHE).to(v_BTHE.dtype), self.k_norm(k_BTHE).to(v_BTHE.dtype)
        q_BHTE, k_BHTE, v_BHTE = (x.transpose(1, 2) for x in (q_BTHE, k_BTHE, v_BTHE))
        y_BHTE = F.scaled_dot_product_attention(q_BHTE, k_BHTE, v_BHTE)
        return self.proj(y_BHTE.transpose(1, 2).reshape(B, T, D).to(x_BTD.dtype))


class PublishedAttentionInFp32(PublishedAttention):
    def project(self, x_BTD: Tensor) -> Tensor:
        return self.qkv(x_BTD).float()


class PublishedBlock(Block):
    def forward(self, x_BTD: Tensor, skip: LongSkip | None = None) -> Tensor:
        if self.skip_linear is not None:
            assert skip is not None
            skip_BTD = skip.features if skip.scale is None else skip.scale * skip.features
            x_BTD = self.skip_linear(multiplied(torch.cat([x_BTD, skip_BTD], dim=-1), skip.common))
        x_BTD = x_BTD + self.attn(self.norm1(x_BTD))
        return x_BTD + self.mlp.fc2(F.gelu(self.mlp.fc1(self.norm2(x_BTD))))


def as_published(model: UViT, *, skip_scale: SkipScale | None = None, casts_to_fp32: bool = False) -> UViT:
    """A plain twin that shares the parameters of ``model``.

    Args:
        skip_scale: instead of the policy of ``model``, whose gates it then leaves alone.
        casts_to_fp32: attention computes with queries, keys and values in fp32, as the published code does.
    """
    twin = copy.deepcopy(model, {id(p): p for p in model.parameters()})
    twins: dict[type, type] = {
        Block: PublishedBlock,
        Attention: PublishedAttentionInFp32 if casts_to_fp32 else PublishedAttention,
        AddLayerNorm: nn.LayerNorm,
        SkipLinear: nn.Linear,
        GeluLinear: nn.Linear,
    }
    for module in twin.modules():
        module.__class__ = twins.get(type(module), type(module))
    if skip_scale is not None:
        twin.skip_scale = skip_scale
    return twin
