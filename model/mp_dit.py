"""The parts of a magnitude-preserving DiT (MaP-DiT, arXiv:2505.19122), in the place of the published ones.

Branches join by ``mp_sum``; what modulates them begins as the identity by gains of zero. There is no norm and no bias.

Shapes: B batch, T tokens, D width.
"""

import torch
from torch import Tensor, nn

from scalelong.model.dit_config import DiTConfig
from scalelong.model.linear_layers import project_skip
from scalelong.model.magnitude import (
    RESIDUAL_BALANCE,
    Gain,
    MPEmbedding,
    MPFourier,
    MPLinear,
    MPSkipLinear,
    mp_silu,
    mp_sum,
)
from scalelong.model.mp_transformer import MPAttention, MPMlp, MPReadout, MPSiLU
from scalelong.model.skip_scale import LongSkip

NUM_FREQUENCIES = 256
LARGEST_TIME = 1000


class MPTimeEmbedder(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.fourier = MPFourier(NUM_FREQUENCIES)
        self.mlp = nn.Sequential(MPLinear(NUM_FREQUENCIES, width), MPSiLU(), MPLinear(width, width))

    def forward(self, t_B: Tensor, dtype: torch.dtype) -> Tensor:
        return self.mlp(self.fourier(t_B / LARGEST_TIME).to(dtype))


class MPLabelEmbedder(nn.Module):
    def __init__(self, num_classes: int, width: int):
        super().__init__()
        self.embedding_table = MPEmbedding(num_classes, width)

    def forward(self, y_B: Tensor) -> Tensor:
        return self.embedding_table(y_B)


class MPModulation(nn.Module):
    """What tells a branch the condition: ``num_parts`` vectors of (B, D), side by side, each with a gain of its own."""

    def __init__(self, width: int, num_parts: int):
        super().__init__()
        self.linear = MPLinear(width, num_parts * width)
        self.gain = Gain(num_parts)

    def forward(self, c_BD: Tensor) -> Tensor:
        return self.gain(self.linear(mp_silu(c_BD)))


def modulated(x_BTD: Tensor, gain_BD: Tensor, shift_BD: Tensor | None = None) -> Tensor:
    """``x * (1 + gain) + shift``."""
    factor_B1D = (1 + gain_BD).unsqueeze(1)
    return x_BTD * factor_B1D if shift_BD is None else torch.addcmul(shift_BD.unsqueeze(1), x_BTD, factor_B1D)


class MPBlock(nn.Module):
    """A transformer block whose modulated branches join the stream; it first takes in its long skip, if it has one."""

    def __init__(self, config: DiTConfig, *, takes_skip: bool = False):
        super().__init__()
        width = config.width
        self.skip_linear = MPSkipLinear(2 * width, width) if takes_skip else None
        self.attn = MPAttention(width, config.num_heads)
        self.mlp = MPMlp(width, config.mlp_width, act="gelu-tanh")
        self.adaLN_modulation = MPModulation(width, 6)

    def forward(self, x_BTD: Tensor, c_BD: Tensor, skip: LongSkip | None = None) -> Tensor:
        if self.skip_linear is not None:
            assert skip is not None
            x_BTD = project_skip(self.skip_linear, x_BTD, skip.features, skip.scale, skip.common)
        shift1, gain1, gate1, shift2, gain2, gate2 = self.adaLN_modulation(c_BD).chunk(6, dim=1)
        y_BTD = modulated(self.attn(modulated(x_BTD, gain1, shift1)), gate1)
        x_BTD = mp_sum(x_BTD, y_BTD, RESIDUAL_BALANCE)
        y_BTD = modulated(self.mlp(modulated(x_BTD, gain2, shift2)), gate2)
        return mp_sum(x_BTD, y_BTD, RESIDUAL_BALANCE)


class MPFinalLayer(nn.Module):
    def __init__(self, config: DiTConfig):
        super().__init__()
        self.linear = MPReadout(config.width, config.patch_size**2 * config.channels_out)
        self.adaLN_modulation = MPModulation(config.width, 2)

    def forward(self, x_BTD: Tensor, c_BD: Tensor) -> Tensor:
        shift, gain = self.adaLN_modulation(c_BD).chunk(2, dim=1)
        return self.linear(modulated(x_BTD, gain, shift))
