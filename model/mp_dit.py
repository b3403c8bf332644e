"""The parts of a magnitude-preserving DiT (MaP-DiT, arXiv:2505.19122), in the place of the published ones.

Branches join by ``mp_sum``; what modulates them begins as the identity by gains of zero. There is no norm and no bias.

Shapes: B batch, T tokens, D width.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from scalelong.kernels.add_layer_norm import rotated_ref
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
    sum_factors,
)
from scalelong.model.modulation import TOLD, Told, sizes_of, told
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
    """What tells branches the condition: these parts of ``Told``, side by side, each with a gain of its own."""

    def __init__(self, width: int, parts: Sequence[str]):
        super().__init__()
        self.sizes = sizes_of(width, parts)
        self.linear = MPLinear(width, sum(self.sizes))
        self.gain = Gain(len(parts))

    def forward(self, c_BD: Tensor) -> Tensor:
        return self.gain(self.linear(mp_silu(c_BD)), self.sizes)


def modulated(x_BTD: Tensor, to: Told) -> Tensor:
    """``R(angle) (x * (1 + gain) + shift)``."""
    if to.gain is not None:
        factor_B1D = (1 + to.gain).unsqueeze(1)
        x_BTD = x_BTD * factor_B1D if to.shift is None else torch.addcmul(to.shift.unsqueeze(1), x_BTD, factor_B1D)
    return x_BTD if to.angle is None else rotated_ref(x_BTD, to.angle)


def joined(x_BTD: Tensor, y_BTD: Tensor, to: Told) -> Tensor:
    """``mp_sum(x, y * (1 + gate), 0.3)``, in two passes."""
    assert to.gate is not None
    of_x, of_y = sum_factors(RESIDUAL_BALANCE)
    return torch.addcmul(of_x * x_BTD, y_BTD, (of_y * (1 + to.gate)).unsqueeze(1))


class MPBlock(nn.Module):
    """A transformer block whose modulated branches join the stream; it first takes in its long skip, if it has one."""

    def __init__(self, config: DiTConfig, *, takes_skip: bool = False):
        super().__init__()
        width = config.width
        self.skip_linear = MPSkipLinear(2 * width, width) if takes_skip else None
        self.attn = MPAttention(width, config.num_heads)
        self.mlp = MPMlp(width, config.mlp_width, act="gelu-tanh")
        self.parts = (*TOLD[config.modulation], "gate")
        self.adaLN_modulation = MPModulation(width, 2 * self.parts)

    def forward(self, x_BTD: Tensor, c_BD: Tensor, skip: LongSkip | None = None) -> Tensor:
        if self.skip_linear is not None:
            assert skip is not None
            x_BTD = project_skip(self.skip_linear, x_BTD, skip.features, skip.scale, skip.common)
        to_attn, to_mlp = (
            told(half_BE, c_BD.shape[1], self.parts) for half_BE in self.adaLN_modulation(c_BD).chunk(2, dim=1)
        )
        x_BTD = joined(x_BTD, self.attn(modulated(x_BTD, to_attn)), to_attn)
        return joined(x_BTD, self.mlp(modulated(x_BTD, to_mlp)), to_mlp)


class MPFinalLayer(nn.Module):
    def __init__(self, config: DiTConfig):
        super().__init__()
        self.linear = MPReadout(config.width, config.patch_size**2 * config.channels_out)
        self.parts = TOLD[config.modulation]
        self.adaLN_modulation = MPModulation(config.width, self.parts)

    def forward(self, x_BTD: Tensor, c_BD: Tensor) -> Tensor:
        to = told(self.adaLN_modulation(c_BD), c_BD.shape[1], self.parts)
        return self.linear(modulated(x_BTD, to))
