"""The UNets of DDPM (Ho et al., arXiv:2006.11239) and ADM (Dhariwal and Nichol, arXiv:2105.05233), their skips scaled.

Every norm is fused with the activation after it, and with the concatenation before it, which is never written: the
first norm of a decoder block and its 1x1 shortcut read the hidden stream and the scaled skip (arXiv:2310.13545).
The state dict is that of https://github.com/openai/guided-diffusion, name for name. ``forward`` takes time as it is fed
to the published networks, 0 .. 999.

Shapes: B batch, C channels, H height, W width, E features of the embedding of time and label.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scalelong.kernels.attention import attention
from scalelong.kernels.backend import in_transform
from scalelong.model.backbone import Backbone, last_and_kept
from scalelong.model.backbone_config import Recompute
from scalelong.model.hidden_matrices import HiddenMatrices
from scalelong.model.layer_calls import is_called_by_class
from scalelong.model.linear_layers import TokenConv1d, project_tokens
from scalelong.model.parameter_kinds import ParameterKind
from scalelong.model.recompute import run_block
from scalelong.model.resampling import Downsample, Upsample, doubled, halved
from scalelong.model.residual_skips import ResidualJoin
from scalelong.model.skip_layers import Conv3x3, GroupNorm, SkipConv1x1, norm_and_activation, shortcut
from scalelong.model.skip_scale import LongSkip, SkipScale, SkipShape
from scalelong.model.time_embedding import check_labels, time_embedding, times_of_images
from scalelong.model.unet_config import SkipPosition
from scalelong.model.unet_config import UNetConfig as UNetConfig

# fmt: off
PARAMETERS = (
    # names                                              begin as         learning rate, weight decay, output
    ParameterKind("skip_gates.*"),                       # gates of LS
    ParameterKind("time_embed.* label_emb.*"),
    ParameterKind("*.out_layers.3.*",                    nn.init.zeros_),  # the last layers of residual branches
    ParameterKind("*.proj_out.*",                        nn.init.zeros_),
    ParameterKind("out.2.*",                             nn.init.zeros_),
    ParameterKind("*.in_layers.0.* *.out_layers.0.* *.norm.* out.0.*"),
    ParameterKind("*.emb_layers.1.* *.qkv.*"),
    ParameterKind("*.in_layers.2.* *.skip_connection.* *.op.* *.conv.* input_blocks.0.0.*"),
)
# fmt: on
"""As published: branches that end in a layer of zeros, everything else as PyTorch does."""
MATRICES = HiddenMatrices(
    "*.in_layers.2.weight *.out_layers.3.weight *.skip_connection.weight *.op.weight *.conv.weight *.qkv.weight "
    "*.proj_out.weight",
    takes_skip="*.in_layers.2.weight *.skip_connection.weight",
)


class Embedding(NamedTuple):
    """The embedding of time and label, before the activation that each block begins with and after it."""

    emb_BE: Tensor
    activated_BE: Tensor
    """Shared by all blocks."""
    time_BE: Tensor
    """Of time alone."""


NO_SKIP = (None, None, 0, None)


class ResBlock(nn.Module):
    """A residual block with the embedding of time and label; in the decoder it takes in a long skip.

    The activations keep the published names: those in ``in_layers`` and ``out_layers`` are computed with the norms, the
    one in ``emb_layers`` once for all blocks.
    """

    takes_embedding = True
    """What wraps a block hands this on, as torch.compile does."""

    def __init__(
        self,
        config: UNetConfig,
        in_channels: int,
        out_channels: int,
        *,
        resample: str | None = None,
    ):
        super().__init__()
        self.resample = {None: None, "up": doubled, "down": halved}[resample]
        self.position: SkipPosition = config.skip_position
        self.is_adaptive = config.use_scale_shift_norm
        self.in_layers = nn.Sequential(
            GroupNorm(config.num_groups, in_channels, config.norm_eps),
            nn.SiLU(),
            Conv3x3(in_channels, out_channels, 3, padding=1),
        )
        modulation = 2 * out_channels if self.is_adaptive else out_channels
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(config.embedding_width, modulation))
        self.out_layers = nn.Sequential(
            GroupNorm(config.num_groups, out_channels, config.norm_eps),
            nn.SiLU(),
            nn.Dropout(config.dropout),
            Conv3x3(out_channels, out_channels, 3, padding=1),
        )
        self.skip_connection = (
            nn.Identity() if in_channels == out_channels else SkipConv1x1(in_channels, out_channels, 1)
        )

    def forward(self, x_BCHW: Tensor, emb: Embedding, skip: LongSkip | None = None) -> Tensor:
        norm, activation, conv = self.in_layers
        s, scale, _, common = NO_SKIP if skip is None else skip
        h_BCHW = norm_and_activation(norm, activation, x_BCHW, s, scale, self.position, common=common)
        shortcut_BCHW = shortcut(self.skip_connection, x_BCHW, s, scale, common)
        if self.resample is not None:
            h_BCHW, shortcut_BCHW = self.resample(h_BCHW), self.resample(shortcut_BCHW)
        h_BCHW = conv(h_BCHW)
        modulation = self._modulation(emb)
        norm, activation, dropout, conv = self.out_layers
        if self.is_adaptive:
            gain, shift = modulation.chunk(2, dim=1)
            h_BCHW = norm_and_activation(norm, activation, h_BCHW, gain=gain, shift=shift)
        else:
            h_BCHW = norm_and_activation(norm, activation, h_BCHW + modulation[:, :, None, None])
        return shortcut_BCHW + conv(dropout(h_BCHW))

    def _modulation(self, emb: Embedding) -> Tensor:
        activation, projection = self.emb_layers
        is_shared = type(activation) is nn.SiLU and is_called_by_class(activation, nn.SiLU)
        return projection(emb.activated_BE if is_shared else activation(emb.emb_BE))


class AttentionBlock(nn.Module):
    """Self-attention over positions, with a residual connection."""

    def __init__(self, config: UNetConfig, channels: int):
        super().__init__()
        self.num_heads = config.num_heads_of(channels)
        self.is_split_by_heads_first = not config.use_new_attention_order
        self.norm = GroupNorm(config.num_groups, channels, config.norm_eps)
        self.qkv = TokenConv1d(channels, 3 * channels, 1)
        self.proj_out = TokenConv1d(channels, channels, 1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        tokens_BTC = self.norm(x_BCHW).flatten(2).transpose(1, 2)
        heads_first = self.num_heads if self.is_split_by_heads_first else None
        mixed_BTC = attention(project_tokens(self.qkv, tokens_BTC, heads_first), self.num_heads)
        update_BTC = project_tokens(self.proj_out, mixed_BTC)
        return x_BCHW + update_BTC.transpose(1, 2).unflatten(2, x_BCHW.shape[2:])


class Stage(nn.ModuleList):
    """What stands at one place of the published list of blocks, called one after the other."""

    def forward(self, x_BCHW: Tensor, emb: Embedding, skip: LongSkip | None = None) -> Tensor:
        for layer in self:
            if not getattr(layer, "takes_embedding", False):
                x_BCHW = layer(x_BCHW)
            elif skip is None:
                x_BCHW = layer(x_BCHW, emb)
            else:
                x_BCHW, skip = layer(x_BCHW, emb, skip), None
        return x_BCHW


class UNet(Backbone):
    """A UNet with scaled long skips; its arguments are those of ``Backbone``, and one.

    Args:
        channels_last: the layout that activations have inside, the faster one for convolutions; may be set at any time.
    """

    config_class = UNetConfig
    kinds = PARAMETERS
    matrices = MATRICES

    def __init__(
        self,
        config: UNetConfig,
        *,
        skip_scale: SkipScale | None = None,
        recompute: Recompute = "none",
        channels_last: bool = True,
    ):
        super().__init__(config, skip_scale=skip_scale, recompute=recompute)
        self.channels_last = channels_last

        width = config.embedding_width
        self.time_embed = nn.Sequential(nn.Linear(config.model_channels, width), nn.SiLU(), nn.Linear(width, width))
        self.label_emb = nn.Embedding(config.num_classes, width) if config.num_classes else None
        self.input_blocks, skip_channels = self._make_encoder()
        channels = config.channels[-1]
        middle = (ResBlock(config, channels, channels) for _ in range(2))
        self.middle_block = Stage([next(middle), AttentionBlock(config, channels), next(middle)])
        self.joins: Any = ()
        if config.skip == "residual":
            self.output_blocks, self.joins, self.skips = self._make_residual_decoder()
        else:
            self.output_blocks, self.skips = self._make_decoder(skip_channels)
        channels = config.channels[0]
        self.out = nn.Sequential(
            GroupNorm(config.num_groups, channels, config.norm_eps),
            nn.SiLU(),
            Conv3x3(channels, config.channels_out, 3, padding=1),
        )
        self.init_weights()
        self.skip_gates = self.skip_scale.make_gates(self.skips)
        self._add_conditions(width)

    def _make_encoder(self) -> tuple[nn.ModuleList, list[int]]:
        """The blocks, and the channels of the skip that each gives."""
        config = self.config
        channels = config.channels[0]
        stages, skip_channels = [Stage([Conv3x3(config.in_channels, channels, 3, padding=1)])], [channels]
        for level, (level_channels, factor) in enumerate(zip(config.channels, config.factors, strict=True)):
            for _ in range(config.num_res_blocks):
                stages.append(Stage([ResBlock(config, channels, level_channels)]))
                channels = level_channels
                if factor in config.attention_resolutions:
                    stages[-1].append(AttentionBlock(config, channels))
                skip_channels.append(channels)
            if level < len(config.channels) - 1:
                stages.append(Stage([self._make_resampler(channels, "down")]))
                skip_channels.append(channels)
        return nn.ModuleList(stages), skip_channels

    def _make_decoder(self, skip_channels: list[int]) -> tuple[nn.ModuleList, tuple[SkipShape, ...]]:
        """The blocks, and the skip that each takes."""
        config = self.config
        stages, skips, channels, skip_channels = [], [], config.channels[-1], list(skip_channels)
        for level in reversed(range(len(config.channels))):
            for n in range(config.num_res_blocks + 1):
                skips.append(SkipShape("channels", skip_channels.pop(), channels))
                incoming, channels = channels + skips[-1].width, config.channels[level]
                stages.append(Stage([ResBlock(config, incoming, channels)]))
                if config.factors[level] in config.attention_resolutions:
                    stages[-1].append(AttentionBlock(config, channels))
                if level > 0 and n == config.num_res_blocks:
                    stages[-1].append(self._make_resampler(channels, "up"))
        return nn.ModuleList(stages), tuple(skips)

    def _make_residual_decoder(self) -> tuple[nn.ModuleList, nn.ModuleList, tuple[SkipShape, ...]]:
        """The blocks, as many as without; what joins each level but the lowest to those below; the skip it takes."""
        config = self.config
        stages, joins, skips, channels = [], [], [], config.channels[-1]
        for level in reversed(range(len(config.channels))):
            for n in range(config.num_res_blocks + 1):
                # The last block of a level has the channels of the level above, whose features came down with them.
                outgoing = config.channels[max(0, level - 1) if n == config.num_res_blocks else level]
                stages.append(Stage([ResBlock(config, channels, outgoing)]))
                channels = outgoing
                if config.factors[level] in config.attention_resolutions:
                    stages[-1].append(AttentionBlock(config, channels))
            if level > 0:
                joins.append(ResidualJoin(self._make_resampler(channels, "up")))
                skips.append(SkipShape("channels", channels, channels))
        return nn.ModuleList(stages), nn.ModuleList(joins), tuple(skips)

    def _make_resampler(self, channels: int, direction: str) -> nn.Module:
        if self.config.resblock_updown:
            return ResBlock(self.config, channels, channels, resample=direction)
        return Upsample(channels) if direction == "up" else Downsample(self.config, channels)

    def forward(
        self,
        x_BCHW: Tensor,
        t_B: Tensor,
        y_B: Tensor | None = None,
        augment_BA: Tensor | None = None,
        *,
        keeps: int | None = None,
    ) -> Any:
        """Predicts the noise in ``x_BCHW``.

        Args:
            x_BCHW: noisy images or latents.
            t_B: time as the network is fed it (see the head of this file); one, () or (1,), for all images.
            y_B: class labels (B,).
            augment_BA: labels of how the images were augmented (``augment_dim``); None: as of plain images.
            keeps: the number of a block whose features are wanted too.

        Returns:
            The prediction, shaped as ``x_BCHW`` but for ``out_channels``; with ``keeps``, it and those features.

        Raises:
            ValueError: an image of another shape than the configuration's, another number of times or labels than of
                images, labels missing or not wanted.
        """
        h_BCHW, kept_BCHW = last_and_kept(self.hidden_states(x_BCHW, t_B, y_B, augment_BA), keeps)
        norm, activation, conv = self.out
        output_BCHW = conv(norm_and_activation(norm, activation, h_BCHW))
        return output_BCHW if keeps is None else (output_BCHW, kept_BCHW)

    def hidden_states(
        self, x_BCHW: Tensor, t_B: Tensor, y_B: Tensor | None = None, augment_BA: Tensor | None = None
    ) -> Iterator[Tensor]:
        emb = self._embed(x_BCHW, t_B, y_B, augment_BA)
        h_BCHW = self.input_blocks[0](x_BCHW, emb)
        if self.channels_last and not in_transform():  # vmap knows no layouts
            h_BCHW = h_BCHW.contiguous(memory_format=torch.channels_last)
        yield h_BCHW
        skips, emb = [h_BCHW], self._self_conditioned(emb, h_BCHW, 0)
        for number, stage in enumerate(self.input_blocks[1:], start=1):  # type: ignore[index]
            h_BCHW = self._run(stage, h_BCHW, emb)
            skips.append(h_BCHW)
            yield h_BCHW
            emb = self._self_conditioned(emb, h_BCHW, number)
        h_BCHW, middle = self._run(self.middle_block, h_BCHW, emb), len(skips)
        yield h_BCHW
        emb = self._self_conditioned(emb, h_BCHW, middle)
        yield from (self._decode_residual if self.joins else self._decode)(h_BCHW, emb, skips, middle + 1)

    def _decode(self, h_BCHW: Tensor, emb: Embedding, skips: list[Tensor], first: int) -> Iterator[Tensor]:
        for executed, stage in enumerate(self.output_blocks):
            skip = self._long_skip(executed, skips.pop(), self.skip_gates)
            h_BCHW = self._run(stage, h_BCHW, emb, skip)
            yield h_BCHW
            emb = self._self_conditioned(emb, h_BCHW, first + executed)

    def _self_conditioned(self, emb: Embedding, h_BCHW: Tensor, number: int) -> Embedding:
        """What the blocks behind block ``number``, which puts out ``h_BCHW``, are told."""
        if number != self.config.self_condition_block or self.self_condition is None:
            return emb
        emb_BE = self.self_condition(emb.emb_BE, self.pooled(h_BCHW), emb.time_BE)
        return Embedding(emb_BE, F.silu(emb_BE), emb.time_BE)

    def _decode_residual(self, h_BCHW: Tensor, emb: Embedding, encoded: list[Tensor], first: int) -> Iterator[Tensor]:
        stages_of_level = self.config.num_res_blocks + 1
        # Of each level but the lowest, what the encoder put out last, and the same brought down.
        downs = range(stages_of_level, len(encoded), stages_of_level)
        kept = [(encoded[down - 1], encoded[down]) for down in downs]
        encoded.clear()
        number = first
        for n, stage in enumerate(self.output_blocks, start=1):
            h_BCHW = self._run(stage, h_BCHW, emb)
            yield h_BCHW
            emb, number = self._self_conditioned(emb, h_BCHW, number), number + 1
            if n % stages_of_level == 0 and kept:
                executed, (features_BCHW, below_BCHW) = n // stages_of_level - 1, kept.pop()
                skip = self._long_skip(executed, features_BCHW, self.skip_gates)
                h_BCHW = self._run(self.joins[executed], h_BCHW, emb, skip, below_BCHW)
                yield h_BCHW
                emb, number = self._self_conditioned(emb, h_BCHW, number), number + 1

    def _run(self, block: nn.Module, *arguments: Any) -> Tensor:
        return run_block(
            block, *arguments, recompute=self.recompute, is_random=self.training and self.config.dropout > 0
        )

    def _embed(self, x_BCHW: Tensor, t_B: Tensor, y_B: Tensor | None, augment_BA: Tensor | None = None) -> Embedding:
        config = self.config
        expected = (config.in_channels, config.img_size, config.img_size)
        if tuple(x_BCHW.shape[1:]) != expected:
            raise ValueError(f"UNet: expected images of shape {expected}, got {tuple(x_BCHW.shape[1:])}")
        if (y_B is None) != (config.num_classes == 0):
            raise ValueError("UNet: " + ("labels are missing" if y_B is None else "this model takes no labels"))
        t_B = times_of_images(t_B, x_BCHW, "UNet")
        if y_B is not None:
            check_labels(y_B, x_BCHW, "UNet")
        time_BE = self.time_embed(time_embedding(t_B, config.model_channels, x_BCHW.dtype))
        emb_BE = self._with_augmentation(time_BE, augment_BA)
        if self.label_emb is not None:
            emb_BE = emb_BE + self.label_emb(y_B)
        return Embedding(emb_BE, F.silu(emb_BE), time_BE)

    def named_blocks(self) -> list[tuple[str, nn.Module]]:
        return [
            *((f"input_blocks.{n}", stage) for n, stage in enumerate(self.input_blocks)),
            ("middle_block", self.middle_block),
            *self._named_decoder(),
        ]

    def _named_decoder(self) -> Iterator[tuple[str, nn.Module]]:
        stages_of_level = self.config.num_res_blocks + 1
        for n, stage in enumerate(self.output_blocks):
            yield f"output_blocks.{n}", stage
            level, place = divmod(n, stages_of_level)
            if place == self.config.num_res_blocks and level < len(self.joins):
                yield f"joins.{level}", self.joins[level]

    def skip_blocks(self) -> list[tuple[int, nn.Module]]:
        num_skips = self.config.num_skips
        if self.joins:
            return [(num_skips - executed, join) for executed, join in enumerate(self.joins)]
        return [(num_skips - executed, next(stage.children())) for executed, stage in enumerate(self.output_blocks)]

    def flops(self, batch_size: int = 1) -> int:
        config = self.config
        macs = _macs(self.time_embed, 1) + self._condition_macs()
        side = config.img_size
        for _, stage in self.named_blocks():
            for layer in stage.children():
                if isinstance(layer, Downsample) or getattr(layer, "resample", None) is halved:
                    side //= 2
                elif isinstance(layer, Upsample) or getattr(layer, "resample", None) is doubled:
                    side *= 2
                macs += _macs(layer, side)
        return 2 * batch_size * (macs + _macs(self.out, side))


def _macs(layer: nn.Module, side: int) -> int:
    """Multiply-adds for one image, where the layer's convolutions write squares of ``side``."""
    # A convolution's weights are applied at every position, a linear layer's once; norms have vectors.
    macs = sum(p.numel() * (side**2 if p.dim() > 2 else 1) for p in layer.parameters() if p.dim() > 1)
    return macs + 2 * side**4 * layer.qkv.in_channels if isinstance(layer, AttentionBlock) else macs
