"""What the magnitude-preserving transformers have in common: attention, the MLP, patches, and both ends.

Blocks have no norms: cosine attention bounds the logits (MaP-DiT, arXiv:2505.19122), and what attention averages is
brought back to unit RMS, without which twelve blocks lose a third of their magnitude.

Shapes: B batch, C image channels, H height, W width, T tokens, D width, P patch side.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scalelong.kernels.attention import attention
from scalelong.model.magnitude import MPGeluLinear, MPLinear, mp_silu, project_mp_gelu, unit_tokens


class MPAttention(nn.Module):
    """Self-attention over tokens by the cosines of queries and keys, of unit RMS before its projection."""

    def __init__(self, width: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = MPLinear(width, 3 * width)
        self.proj = MPLinear(width, width)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.proj(unit_tokens(attention(self.qkv(x_BTD), self.num_heads, qk_norm=unit_tokens)))


class MPMlp(nn.Module):
    """Two linear layers around mp_gelu, the exact one or ("gelu-tanh") its approximation."""

    def __init__(self, width: int, hidden: int, *, act: str = "gelu"):
        super().__init__()
        self.act = act
        self.fc1 = MPLinear(width, hidden)
        self.fc2 = MPGeluLinear(hidden, width)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return project_mp_gelu(self.fc2, self.fc1(x_BTD), act=self.act)


class MPSiLU(nn.Module):
    """mp_silu as a layer."""

    def forward(self, x: Tensor) -> Tensor:
        return mp_silu(x)


class MPPatchEmbed(nn.Module):
    """Each patch of an image as a token, row by row; a constant beside its pixels stands for a bias."""

    def __init__(self, in_channels: int, width: int, patch_size: int):
        super().__init__()
        self.patch_size = patch_size
        self.linear = MPLinear(patch_size**2 * in_channels + 1, width)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        P = self.patch_size
        # (B, C, H/P, P, W/P, P) -> (B, T, C P P)
        patches = x_BCHW.unflatten(3, (-1, P)).unflatten(2, (-1, P)).permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
        return self.linear(F.pad(patches, (0, 1), value=1.0))


class MPReadout(MPLinear):
    """The last projection, with a learned gain that begins as zero, as the prediction then does."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__(in_features, out_features)
        self.gain = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return self.gain.to(y.dtype) * y
