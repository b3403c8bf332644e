"""The DiT written plainly, as published (https://github.com/facebookresearch/DiT), over the parameters of ours.

Norms, modulation, gates and gelu are an operation each; a skip is multiplied, concatenated, normalised and projected.
Other modulations than the published one are written as plainly.
"""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scalelong.bench.published_uvit import PublishedAttention
from scalelong.model.common_factor import multiplied
from scalelong.model.dit import Block, DiT, FinalLayer
from scalelong.model.linear_layers import GeluLinear, SkipLinear
from scalelong.model.norm_layers import AddLayerNorm
from scalelong.model.skip_norm_layers import SkipLayerNorm
from scalelong.model.skip_scale import LongSkip
from scalelong.model.transformer_layers import Attention


def modulated(x_BTD: Tensor, shift_BD: Tensor | None, gain_BD: Tensor | None, angle_BE: Tensor | None) -> Tensor:
    if gain_BD is not None:
        x_BTD = x_BTD * (1 + gain_BD.unsqueeze(1))
    if shift_BD is not None:
        x_BTD = x_BTD + shift_BD.unsqueeze(1)
    if angle_BE is None:
        return x_BTD
    cos_B1E, sin_B1E = angle_BE.cos().unsqueeze(1), angle_BE.sin().unsqueeze(1)
    first, second = x_BTD.chunk(2, dim=-1)
    return torch.cat([first * cos_B1E - second * sin_B1E, first * sin_B1E + second * cos_B1E], dim=-1)


class PublishedBlock(Block):
    def forward(self, x_BTD: Tensor, c_BD: Tensor, skip: LongSkip | None = None) -> Tensor:
        if self.skip_linear is not None:
            assert skip is not None
            skip_BTD = skip.features if skip.scale is None else skip.scale * skip.features
            z_BTD = multiplied(torch.cat([x_BTD, skip_BTD], dim=-1), skip.common)
            x_BTD = self.skip_linear(z_BTD if self.skip_norm is None else self.skip_norm(z_BTD))
        shift1, gain1, angle1, gate1, shift2, gain2, angle2, gate2 = self.told(c_BD)
        assert gate1 is not None
        assert gate2 is not None
        x_BTD = x_BTD + gate1.unsqueeze(1) * self.attn(modulated(self.norm1(x_BTD), shift1, gain1, angle1))
        y_BTD = self.mlp.fc1(modulated(self.norm2(x_BTD), shift2, gain2, angle2))
        return x_BTD + gate2.unsqueeze(1) * self.mlp.fc2(F.gelu(y_BTD, approximate="tanh"))


class PublishedFinalLayer(FinalLayer):
    def forward(self, x_BTD: Tensor, c_BD: Tensor) -> Tensor:
        return self.linear(modulated(self.norm_final(x_BTD), *self.told(c_BD)[:3]))


def as_published(model: DiT) -> DiT:
    """A plain twin that shares the parameters of ``model``."""
    twin = copy.deepcopy(model, {id(p): p for p in model.parameters()})
    twins: dict[type, type] = {
        Block: PublishedBlock,
        FinalLayer: PublishedFinalLayer,
        Attention: PublishedAttention,
        AddLayerNorm: nn.LayerNorm,
        SkipLayerNorm: nn.LayerNorm,
        SkipLinear: nn.Linear,
        GeluLinear: nn.Linear,
    }
    for module in twin.modules():
        module.__class__ = twins.get(type(module), type(module))
    return twin
