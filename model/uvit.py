"""U-ViT: a vision transformer with long skip connections (Bao et al., arXiv:2209.12152), its skips scaled (2310.13545).

The state dict is the published one, name for name. ``forward`` takes time as it is fed to the published network:
999 t under the continuous VP-SDE, n in 1..1000 under the discrete schedule.

Shapes: B batch, C image channels, H height, W width, T tokens (extras + patches), D width, P patch side, L text tokens.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from scalelong.kernels.arguments import Scale
from scalelong.kernels.attention import attention
from scalelong.model.backbone import Backbone, check_whole_numbers
from scalelong.model.checkpointing import Checkpointing, check_checkpointing, run_block
from scalelong.model.linear_layers import GeluLinear, SkipLinear, project_gelu, project_skip
from scalelong.model.norm_layers import AddLayerNorm, add_norm
from scalelong.model.skip_scale import SkipScale, Unscaled
from scalelong.model.time_embedding import check_labels, time_embedding, times_of_images


@dataclass(frozen=True, kw_only=True)
class UViTConfig:
    """The shape of a U-ViT.

    Raises:
        ValueError: sizes that do not fit together, naming them.
    """

    img_size: int
    """Side of the (square) image or latent, in pixels."""
    patch_size: int
    """Side of a patch, in pixels."""
    in_channels: int = 3
    """Channels of the image or latent."""
    width: int = 512
    """Features of a token."""
    depth: int = 12
    """Blocks that a skip joins, half of them on each side; one more block lies between."""
    num_heads: int = 8
    """Attention heads."""
    mlp_ratio: float = 4.0
    """Hidden width of the MLP over the width."""
    num_classes: int = 0
    """Rows of the label embedding, a null label for guidance included; 0: no labels."""
    context_tokens: int = 0
    """Text tokens; 0: no text."""
    context_dim: int = 768
    """Features of a text token as given."""
    final_conv: bool = True
    """A 3x3 convolution after the last projection."""
    qkv_bias: bool = False
    """A bias in the projection to queries, keys and values (no published network has one)."""
    time_mlp: bool = False
    """An MLP over the time embedding (no published network has one)."""

    def __post_init__(self):
        check_whole_numbers(self)
        for name in ("img_size", "patch_size", "in_channels", "width", "num_heads", "context_dim", "mlp_width"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("num_classes", "context_tokens"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if self.img_size % self.patch_size:
            raise ValueError(f"img_size {self.img_size} is no multiple of patch_size {self.patch_size}")
        if self.width % self.num_heads:
            raise ValueError(f"width {self.width} is no multiple of num_heads {self.num_heads}")
        if self.width % 2:
            raise ValueError(f"width must be even for the sinusoidal time embedding, got {self.width}")
        if self.depth < 2 or self.depth % 2:
            raise ValueError(f"depth must be even and at least 2, got {self.depth}")
        if self.num_classes and self.context_tokens:
            raise ValueError("a U-ViT takes class labels or text, not both")

    @property
    def num_skips(self) -> int:
        return self.depth // 2

    @property
    def mlp_width(self) -> int:
        return round(self.width * self.mlp_ratio)

    @property
    def num_extras(self) -> int:
        """Tokens before the patches: the time, then the class before it or the text after it."""
        return 1 + (1 if self.num_classes else 0) + self.context_tokens

    @property
    def num_tokens(self) -> int:
        return self.num_extras + (self.img_size // self.patch_size) ** 2


class Attention(nn.Module):
    def __init__(self, config: UViTConfig):
        super().__init__()
        self.num_heads = config.num_heads
        self.qkv = nn.Linear(config.width, 3 * config.width, bias=config.qkv_bias)
        self.proj = nn.Linear(config.width, config.width)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.proj(attention(self.qkv(x_BTD), self.num_heads))


class Mlp(nn.Module):
    def __init__(self, config: UViTConfig):
        super().__init__()
        hidden = config.mlp_width
        self.fc1 = nn.Linear(config.width, hidden)
        self.fc2 = GeluLinear(hidden, config.width)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return project_gelu(self.fc2, self.fc1(x_BTD))


class Block(nn.Module):
    """A pre-norm transformer block; in the decoder it first takes in its long skip."""

    def __init__(self, config: UViTConfig, *, takes_skip: bool = False):
        super().__init__()
        self.skip_linear = SkipLinear(2 * config.width, config.width) if takes_skip else None
        self.norm1 = AddLayerNorm(config.width)
        self.attn = Attention(config)
        self.norm2 = AddLayerNorm(config.width)
        self.mlp = Mlp(config)

    def forward(self, x_BTD: Tensor, skip_BTD: Tensor | None = None, scale: Scale = None) -> Tensor:
        if self.skip_linear is not None:
            assert skip_BTD is not None
            x_BTD = project_skip(self.skip_linear, x_BTD, skip_BTD, scale)
        x_BTD, y_BTD = add_norm(self.norm1, x_BTD)
        x_BTD, y_BTD = add_norm(self.norm2, x_BTD, self.attn(y_BTD))
        return x_BTD + self.mlp(y_BTD)


class PatchEmbed(nn.Module):
    def __init__(self, config: UViTConfig):
        super().__init__()
        self.proj = nn.Conv2d(config.in_channels, config.width, config.patch_size, stride=config.patch_size)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.proj(x_BCHW).flatten(2).transpose(1, 2)


class UViT(Backbone):
    """U-ViT with scaled long skips.

    Args:
        config: the network's shape.
        skip_scale: the policy that scales the long skips; unscaled if not given.
        checkpointing: what the blocks keep for backward: all of it ("none"), their inputs ("blocks"), or at most a
            share in (0, 1); the rest is computed again. May be set on the model at any time.

    Raises:
        ValueError: a skip scale that stands after a norm, which this network does not have there.
    """

    config_class = UViTConfig

    def __init__(
        self, config: UViTConfig, *, skip_scale: SkipScale | None = None, checkpointing: Checkpointing = "none"
    ):
        super().__init__()
        self.skip_scale = skip_scale if skip_scale is not None else Unscaled()
        self.check_options(self.skip_scale, checkpointing)
        self.checkpointing = checkpointing
        self.config = config

        width = config.width
        self.patch_embed = PatchEmbed(config)
        self.time_embed = (
            nn.Sequential(nn.Linear(width, 4 * width), nn.SiLU(), nn.Linear(4 * width, width))
            if config.time_mlp
            else nn.Identity()
        )
        if config.num_classes:
            self.label_emb = nn.Embedding(config.num_classes, width)
        if config.context_tokens:
            self.context_embed = nn.Linear(config.context_dim, width)
        self.pos_embed = nn.Parameter(torch.zeros(1, config.num_tokens, width))
        self.in_blocks = nn.ModuleList(Block(config) for _ in range(config.num_skips))
        self.mid_block = Block(config)
        self.out_blocks = nn.ModuleList(Block(config, takes_skip=True) for _ in range(config.num_skips))
        self.norm = AddLayerNorm(width)
        self.decoder_pred = nn.Linear(width, config.patch_size**2 * config.in_channels)
        self.final_layer = (
            nn.Conv2d(config.in_channels, config.in_channels, 3, padding=1) if config.final_conv else nn.Identity()
        )
        self.init_weights()
        # After init_weights: the gates of LS keep PyTorch's own initialisation, as published (so does the name "se").
        self.se = self.skip_scale.make_gates(config.num_skips, config.num_tokens)

    @classmethod
    def check_options(cls, skip_scale: SkipScale, checkpointing: Checkpointing) -> None:
        check_checkpointing(checkpointing)
        if skip_scale.position != "before-norm":
            raise ValueError("a U-ViT projects its skips before any norm: no skip scale can stand after one")

    def init_weights(self) -> None:
        """Linear weights and positions N(0, 0.02²), cut at ±2, biases 0; convolutions and labels as PyTorch does."""
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, x_BCHW: Tensor, t_B: Tensor, y_B: Tensor | None = None) -> Tensor:
        """Predicts the noise in ``x_BCHW``.

        Args:
            x_BCHW: noisy images or latents.
            t_B: time as the network is fed it (see the head of this file); one, () or (1,), for all images.
            y_B: class labels (B,), or text tokens (B, L, context_dim).

        Returns:
            The prediction, shaped as ``x_BCHW``.

        Raises:
            ValueError: an image or text of another shape than the configuration's, another number of times or labels
                than of images, labels missing or not wanted.
        """
        tokens_BTD = self._embed(x_BCHW, t_B, y_B)
        skips = []
        for block in self.in_blocks:
            tokens_BTD = self._run(block, tokens_BTD)
            skips.append(tokens_BTD)
        tokens_BTD = self._run(self.mid_block, tokens_BTD)
        num_skips = self.config.num_skips
        for executed, block in enumerate(self.out_blocks):
            skip_BTD = skips.pop()
            scale = self.skip_scale.scale(num_skips - executed, num_skips, skip_BTD, self.se)
            tokens_BTD = self._run(block, tokens_BTD, skip_BTD, scale)
        patches = self.decoder_pred(self.norm(tokens_BTD))[:, self.config.num_extras :]
        return self.final_layer(self._unpatchify(patches))

    def _run(self, block: nn.Module, *arguments: Tensor | Scale) -> Tensor:
        return run_block(
            block, *arguments, checkpointing=self.checkpointing, mlp_ratio=self.config.mlp_width / self.config.width
        )

    def _embed(self, x_BCHW: Tensor, t_B: Tensor, y_B: Tensor | None) -> Tensor:
        config = self.config
        expected = (config.in_channels, config.img_size, config.img_size)
        if tuple(x_BCHW.shape[1:]) != expected:
            raise ValueError(f"U-ViT: expected images of shape {expected}, got {tuple(x_BCHW.shape[1:])}")
        if (y_B is None) != (config.num_classes == 0 and config.context_tokens == 0):
            raise ValueError(
                "U-ViT: " + ("labels or text are missing" if y_B is None else "this model takes no labels")
            )
        t_B = times_of_images(t_B, x_BCHW, "U-ViT")
        if y_B is not None and config.num_classes:
            check_labels(y_B, x_BCHW, "U-ViT")
        elif y_B is not None:
            text = (x_BCHW.shape[0], config.context_tokens, config.context_dim)
            if y_B.shape != text:
                raise ValueError(f"U-ViT: expected text of shape {text}, got {tuple(y_B.shape)}")
        patches_BTD = self.patch_embed(x_BCHW)
        tokens = [self.time_embed(time_embedding(t_B, config.width, self.pos_embed.dtype)).unsqueeze(1), patches_BTD]
        if config.num_classes:
            tokens.insert(0, self.label_emb(y_B).unsqueeze(1))
        elif config.context_tokens:
            tokens.insert(1, self.context_embed(y_B))
        return torch.cat(tokens, dim=1) + self.pos_embed

    def _unpatchify(self, patches_BTD: Tensor) -> Tensor:
        P, side = self.config.patch_size, self.config.img_size // self.config.patch_size
        x = patches_BTD.unflatten(2, (P, P, self.config.in_channels)).unflatten(1, (side, side))
        # (B, side, side, P, P, C) -> (B, C, side, P, side, P)
        return x.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)

    def skip_blocks(self) -> list[tuple[int, nn.Module]]:
        num_skips = self.config.num_skips
        return [(num_skips - executed, block) for executed, block in enumerate(self.out_blocks)]

    def flops(self, batch_size: int = 1) -> int:
        c = self.config
        T, D = c.num_tokens, c.width
        num_patches = T - c.num_extras
        patch_features = c.patch_size**2 * c.in_channels
        attention_macs = 4 * T * D * D + 2 * T * T * D
        mlp_macs = 2 * T * D * c.mlp_width
        blocks = (c.depth + 1) * (attention_macs + mlp_macs) + c.num_skips * 2 * T * D * D
        ends = num_patches * patch_features * D + T * D * patch_features
        if c.final_conv:
            ends += 9 * c.in_channels**2 * c.img_size**2
        if c.context_tokens:
            ends += c.context_tokens * c.context_dim * D
        if c.time_mlp:
            ends += 8 * D * D
        return 2 * batch_size * (blocks + ends)
