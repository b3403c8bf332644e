"""U-ViT: a vision transformer with long skip connections (Bao et al., arXiv:2209.12152), its skips scaled (2310.13545).

The state dict is the published one, name for name. ``forward`` takes time as it is fed to the published network:
999 t under the continuous VP-SDE, n in 1..1000 under the discrete schedule.

Shapes: B batch, C image channels, H height, W width, T tokens (extras + patches), D width, P patch side, L text tokens.
"""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from scalelong.model.backbone import Backbone, last_and_kept
from scalelong.model.backbone_config import Recompute
from scalelong.model.hidden_matrices import HiddenMatrices, hidden_layers
from scalelong.model.linear_layers import SkipLinear, project_skip
from scalelong.model.linear_wrappers import wrap_linears
from scalelong.model.magnitude import (
    RESIDUAL_BALANCE,
    MPConv2d,
    MPEmbedding,
    MPFourier,
    MPLinear,
    MPSkipLinear,
    mp_sum,
    normal_rows,
    unit_rms,
)
from scalelong.model.mp_transformer import MPAttention, MPMlp, MPPatchEmbed, MPReadout, MPSiLU
from scalelong.model.norm_layers import AddLayerNorm, add_norm
from scalelong.model.parameter_kinds import ParameterKind
from scalelong.model.skip_scale import LongSkip, SkipScale, SkipShape
from scalelong.model.sparse_middle import MiddleTokens, sparse_pass
from scalelong.model.time_embedding import check_labels, time_embedding, times_of_images
from scalelong.model.transformer_layers import Attention, Mlp, PatchEmbed, unpatchify
from scalelong.model.uvit_config import UViTConfig as UViTConfig

# fmt: off
PARAMETERS = (
    # names                                                     begin as    learning rate, weight decay, output
    ParameterKind("*.gamma *.alpha",                            weight_decay=0.0),  # of wrapped linear layers
    ParameterKind("pos_embed",                                  0.02),
    ParameterKind("se.*"),                                      # gates of LS: as PyTorch's layers begin, as published
    ParameterKind("norm.* *.norm1.* *.norm2.*"),
    ParameterKind("patch_embed.* label_emb.* final_layer.*"),
    ParameterKind("time_embed.*.weight context_embed.weight",   0.02),
    ParameterKind("*.qkv.weight *.proj.weight",                 0.02),
    ParameterKind("*.fc1.weight *.fc2.weight",                  0.02),
    ParameterKind("*.skip_linear.weight",                       0.02),
    ParameterKind("decoder_pred.weight",                        0.02),
    ParameterKind("*.bias",                                     nn.init.zeros_),
)
MP_PARAMETERS = (
    ParameterKind("se.*"),
    ParameterKind("*.gain",                                     nn.init.zeros_),
    ParameterKind("pos_embed",                                  lambda x: normal_rows(x[0])),
    ParameterKind("*.weight",                                   normal_rows),
)
# fmt: on
"""As published: linear weights and positions normal, biases 0, convolutions and labels as PyTorch does. Of
magnitude-preserving layers: rows of random direction and unit RMS, and gains of zero."""


class Block(nn.Module):
    """A pre-norm transformer block; in the decoder it first takes in its long skip."""

    def __init__(self, config: UViTConfig, *, takes_skip: bool = False):
        super().__init__()
        self.skip_linear = SkipLinear(2 * config.width, config.width) if takes_skip else None
        self.norm1 = AddLayerNorm(config.width)
        self.attn = Attention(config.width, config.num_heads, qkv_bias=config.qkv_bias)
        self.norm2 = AddLayerNorm(config.width)
        self.mlp = Mlp(config.width, config.mlp_width)

    def forward(self, x_BTD: Tensor, skip: LongSkip | None = None, gain_BD: Tensor | None = None) -> Tensor:
        if self.skip_linear is not None:
            assert skip is not None
            x_BTD = project_skip(self.skip_linear, x_BTD, skip.features, skip.scale, skip.common)
        x_BTD, y_BTD = add_norm(self.norm1, x_BTD, gain=gain_BD)
        x_BTD, y_BTD = add_norm(self.norm2, x_BTD, self.attn(y_BTD), gain=gain_BD)
        return x_BTD + self.mlp(y_BTD)


class MPBlock(nn.Module):
    """A transformer block without norms, whose branches join by ``mp_sum``; in the decoder it first takes in its skip.

    Its policy decides whether that keeps the magnitude: unscaled, or renormalised.
    """

    def __init__(self, config: UViTConfig, *, takes_skip: bool = False):
        super().__init__()
        self.skip_linear = MPSkipLinear(2 * config.width, config.width) if takes_skip else None
        self.attn = MPAttention(config.width, config.num_heads)
        self.mlp = MPMlp(config.width, config.mlp_width)

    def forward(self, x_BTD: Tensor, skip: LongSkip | None = None, gain_BD: Tensor | None = None) -> Tensor:
        if self.skip_linear is not None:
            assert skip is not None
            x_BTD = project_skip(self.skip_linear, x_BTD, skip.features, skip.scale, skip.common)
        x_BTD = mp_sum(x_BTD, self.attn(scaled(x_BTD, gain_BD)), RESIDUAL_BALANCE)
        return mp_sum(x_BTD, self.mlp(scaled(x_BTD, gain_BD)), RESIDUAL_BALANCE)


def scaled(x_BTD: Tensor, gain_BD: Tensor | None) -> Tensor:
    """``x (1 + gain)``."""
    return x_BTD if gain_BD is None else x_BTD * (1 + gain_BD.unsqueeze(1)).to(x_BTD.dtype)


class MPTimeFeatures(nn.Module):
    """Fourier features of unit RMS in the place of ``time_embedding``."""

    def __init__(self, width: int):
        super().__init__()
        self.fourier = MPFourier(width)

    def forward(self, t_B: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
        return self.fourier(t_B / 1000).to(dtype)


class Parts(NamedTuple):
    """What makes the parts of a U-ViT."""

    patches: Callable[..., nn.Module]
    linear: Callable[..., nn.Module]
    activation: Callable[..., nn.Module]
    labels: Callable[..., nn.Module]
    block: Callable[..., nn.Module]
    norm: Callable[..., nn.Module]
    readout: Callable[..., nn.Module]
    conv: Callable[..., nn.Module]


PUBLISHED = Parts(
    PatchEmbed, nn.Linear, nn.SiLU, nn.Embedding, Block, AddLayerNorm, nn.Linear, partial(nn.Conv2d, padding=1)
)
MAGNITUDE_PRESERVING = Parts(MPPatchEmbed, MPLinear, MPSiLU, MPEmbedding, MPBlock, nn.Identity, MPReadout, MPConv2d)


class UViT(Backbone):
    """U-ViT with scaled long skips; its arguments are those of ``Backbone``."""

    config_class = UViTConfig
    kinds = PARAMETERS
    matrices = HiddenMatrices("*.qkv.weight *.attn.proj.weight *.fc1.weight *.fc2.weight *.skip_linear.weight")

    def __init__(self, config: UViTConfig, *, skip_scale: SkipScale | None = None, recompute: Recompute = "none"):
        super().__init__(config, skip_scale=skip_scale, recompute=recompute)
        width, parts, self.time_features = config.width, PUBLISHED, time_embedding
        if config.magnitude_preserving:
            parts, self.time_features, self.kinds = MAGNITUDE_PRESERVING, MPTimeFeatures(width), MP_PARAMETERS
        self.patch_embed = parts.patches(config.in_channels, width, config.patch_size)
        self.time_embed = (
            nn.Sequential(parts.linear(width, 4 * width), parts.activation(), parts.linear(4 * width, width))
            if config.time_mlp
            else nn.Identity()
        )
        if config.num_classes:
            self.label_emb = parts.labels(config.num_classes, width)
        if config.context_tokens:
            self.context_embed = parts.linear(config.context_dim, width)
        self.pos_embed = nn.Parameter(torch.zeros(1, config.num_tokens, width))
        self.in_blocks = nn.ModuleList(parts.block(config) for _ in range(config.num_skips))
        self.mid_block = parts.block(config)
        self.out_blocks = nn.ModuleList(parts.block(config, takes_skip=True) for _ in range(config.num_skips))
        self.norm = parts.norm(width)
        channels = config.channels_out
        self.decoder_pred = parts.readout(width, config.patch_size**2 * channels)
        self.final_layer = parts.conv(channels, channels, 3) if config.final_conv else nn.Identity()
        wrap_linears(hidden_layers(self), config.linear)
        self.init_weights()
        self.skips = (SkipShape("tokens", width, width, config.num_tokens),) * config.num_skips
        # The published name.
        self.se = self.skip_scale.make_gates(self.skips)
        self._add_conditions(width)
        self._add_sparse_middle(width, config.num_extras)

    def forward(
        self,
        x_BCHW: Tensor,
        t_B: Tensor,
        y_B: Tensor | None = None,
        augment_BA: Tensor | None = None,
        *,
        keeps: int | None = None,
        middle: MiddleTokens | None = None,
    ) -> Any:
        """Predicts the noise in ``x_BCHW``.

        Args:
            x_BCHW: noisy images or latents.
            t_B: time as the network is fed it (see the head of this file); one, () or (1,), for all images.
            y_B: class labels (B,), or text tokens (B, L, context_dim).
            augment_BA: labels of how the images were augmented (``augment_dim``); None: as of plain images.
            keeps: the number of a block whose features are wanted too.
            middle: what the blocks of a sparse middle see; None: all tokens.

        Returns:
            The prediction, shaped as ``x_BCHW`` but for ``out_channels``; with ``keeps``, it and those features.

        Raises:
            ValueError: an image or text of another shape than the configuration's, another number of times or labels
                than of images, labels missing or not wanted, tokens of a middle that there is not.
        """
        tokens_BTD, kept_BTD = last_and_kept(self.hidden_states(x_BCHW, t_B, y_B, augment_BA, middle), keeps)
        config = self.config
        patches_BTD = self.decoder_pred(self.norm(tokens_BTD))[:, config.num_extras :]
        side = config.img_size // config.patch_size
        output_BCHW = self.final_layer(unpatchify(patches_BTD, side, config.patch_size, config.channels_out))
        return output_BCHW if keeps is None else (output_BCHW, kept_BTD)

    def hidden_states(
        self,
        x_BCHW: Tensor,
        t_B: Tensor,
        y_B: Tensor | None = None,
        augment_BA: Tensor | None = None,
        middle: MiddleTokens | None = None,
    ) -> Iterator[Tensor]:
        tokens_BTD, time_BD = self._embed(x_BCHW, t_B, y_B, augment_BA)
        sparse = sparse_pass(self, middle, tokens_BTD)
        skips, num_skips = [], self.config.num_skips
        gain: tuple[Tensor, ...] = ()
        for number, (_, block) in enumerate(self.named_blocks()):
            if sparse is not None:
                tokens_BTD = sparse.before(number, tokens_BTD)
                if sparse.leaves_out(number):
                    yield tokens_BTD
                    continue
            executed = number - num_skips - 1
            skip = self._long_skip(executed, skips.pop(), self.se, sparse) if executed >= 0 else None
            # Blocks put in the place of ours need not know of what they are not given.
            arguments = (skip, *gain) if skip is not None or gain else ()
            tokens_BTD = self._run(block, tokens_BTD, *arguments)
            if number < num_skips:
                skips.append(tokens_BTD)
            yield tokens_BTD
            if number == self.config.self_condition_block:
                tokens_BTD, gain = self._self_conditioned(tokens_BTD, time_BD)

    def _self_conditioned(self, tokens_BTD: Tensor, time_BD: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """What the blocks from here on take: the tokens, and the gain of their norms if there is one."""
        assert self.self_condition is not None
        found_BD, place = self.pooled(tokens_BTD), self.config.extras.index("time")
        if self.config.self_condition_form == "modulation":
            return tokens_BTD, (self.self_condition.found(found_BD, time_BD),)  # pyright: ignore[reportCallIssue]
        token_BD = self.self_condition(tokens_BTD[:, place], found_BD, time_BD)
        parts = tokens_BTD[:, :place], token_BD.unsqueeze(1), tokens_BTD[:, place + 1 :]
        return torch.cat(parts, dim=1), ()

    def pooled(self, hidden: Tensor) -> Tensor:
        return super().pooled(hidden[:, self.config.num_extras :])  # the patches alone

    def _embed(
        self, x_BCHW: Tensor, t_B: Tensor, y_B: Tensor | None, augment_BA: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The tokens (B, T, D), and the embedding (B, D) of time."""
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
        time_BD = self.time_embed(self.time_features(t_B, config.width, self.pos_embed.dtype))
        tokens = [self._with_augmentation(time_BD, augment_BA).unsqueeze(1), patches_BTD]
        if config.num_classes:
            tokens.insert(0, self.label_emb(y_B).unsqueeze(1))
        elif config.context_tokens:
            assert y_B is not None
            tokens.insert(1, self.context_embed(unit_rms(y_B) if config.magnitude_preserving else y_B))
        tokens_BTD = torch.cat(tokens, dim=1)
        if config.magnitude_preserving:
            return mp_sum(tokens_BTD, unit_rms(self.pos_embed)), time_BD
        return tokens_BTD + self.pos_embed, time_BD

    def after_step(self) -> Mapping[str, Callable[[Tensor], Tensor]]:
        positions = {"pos_embed": unit_rms} if self.config.magnitude_preserving else {}
        return {**super().after_step(), **positions}

    def named_blocks(self) -> list[tuple[str, nn.Module]]:
        return [
            *((f"in_blocks.{n}", block) for n, block in enumerate(self.in_blocks)),
            ("mid_block", self.mid_block),
            *((f"out_blocks.{n}", block) for n, block in enumerate(self.out_blocks)),
        ]

    def skip_blocks(self) -> list[tuple[int, nn.Module]]:
        num_skips = self.config.num_skips
        return [(num_skips - executed, block) for executed, block in enumerate(self.out_blocks)]

    def flops(self, batch_size: int = 1) -> int:
        return self._flops(batch_size, num_dropped=0)

    def training_flops(self, batch_size: int = 1) -> int:
        return self._flops(batch_size, num_dropped=self.config.num_patches - self.config.num_kept)

    def _flops(self, batch_size: int, *, num_dropped: int) -> int:
        """Of a pass of which the middle does not see so many patches."""
        c = self.config
        T, D = c.num_tokens, c.width
        num_patches = T - c.num_extras
        in_features, out_features = (c.patch_size**2 * channels for channels in (c.in_channels, c.channels_out))
        in_features += c.magnitude_preserving  # the constant that stands for a bias
        seen = self._tokens_of_blocks(num_dropped)
        # Attention, the MLP, and in the decoder the projection of the skip.
        blocks = sum(S * (4 * D * D + 2 * S * D + 2 * D * c.mlp_width) for S in seen)
        blocks += sum(2 * S * D * D for S in seen[-c.num_skips :])
        ends = num_patches * in_features * D + T * D * out_features
        if c.final_conv:
            ends += 9 * c.channels_out**2 * c.img_size**2
        if c.context_tokens:
            ends += c.context_tokens * c.context_dim * D
        if c.time_mlp:
            ends += 8 * D * D
        return 2 * batch_size * (blocks + ends + self._condition_macs())
