"""What the transformers have in common: attention, the MLP, and patches in and out.

Shapes: B batch, C image channels, H height, W width, T tokens, D width, P patch side.
"""

from torch import Tensor, nn

from scalelong.kernels.attention import attention
from scalelong.model.linear_layers import GeluLinear, project_gelu


class Attention(nn.Module):
    """Self-attention over tokens; with ``qk_norm`` the queries and the keys of each head pass an RMSNorm."""

    def __init__(self, width: int, num_heads: int, *, qkv_bias: bool, qk_norm: bool = False):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width, bias=qkv_bias)
        self.q_norm, self.k_norm = (nn.RMSNorm(width // num_heads) if qk_norm else None for _ in range(2))
        self.proj = nn.Linear(width, width)

    def forward(self, x_BTD: Tensor) -> Tensor:
        norms = None if self.q_norm is None or self.k_norm is None else (self.q_norm, self.k_norm)
        return self.proj(attention(self.qkv(x_BTD), self.num_heads, qk_norm=norms))


class Mlp(nn.Module):
    """Two linear layers around gelu, the exact one or ("gelu-tanh") its approximation."""

    def __init__(self, width: int, hidden: int, *, act: str = "gelu"):
        super().__init__()
        self.act = act
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = GeluLinear(hidden, width)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return project_gelu(self.fc2, self.fc1(x_BTD), act=self.act)


class PatchEmbed(nn.Module):
    """Each patch of an image as a token, row by row."""

    def __init__(self, in_channels: int, width: int, patch_size: int):
        super().__init__()
        self.proj = nn.Conv2d(in_channels, width, patch_size, stride=patch_size)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.proj(x_BCHW).flatten(2).transpose(1, 2)


def unpatchify(patches_BTD: Tensor, side: int, patch_size: int, num_channels: int) -> Tensor:
    """(B, T, P P C), ``side`` rows of as many patches, to (B, C, H, W)."""
    P = patch_size
    x = patches_BTD.unflatten(2, (P, P, num_channels)).unflatten(1, (side, side))
    # (B, side, side, P, P, C) -> (B, C, side, P, side, P), then one copy: a view of one could not be changed in place.
    return x.permute(0, 5, 1, 3, 2, 4).reshape(x.shape[0], num_channels, side * P, side * P)
