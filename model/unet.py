"""The UNets of DDPM (Ho et al., arXiv:2006.11239) and ADM (Dhariwal and Nichol, arXiv:2105.05233), their skips scaled.

Every norm is fused with the activation after it, and with the concatenation before it, which is never written: the
first norm of a decoder block and its 1x1 shortcut read the hidden stream and the scaled skip (arXiv:2310.13545).
The state dict is that of https://github.com/openai/guided-diffusion, name for name. ``forward`` takes time as it is fed
to the published networks, 0 .. 999.

Shapes: B batch, C channels, H height, W width, E features of the embedding of time and label.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scalelong.kernels.arguments import Scale
from scalelong.kernels.attention import attention
from scalelong.kernels.backend import in_transform
from scalelong.model.backbone import Backbone, check_whole_numbers
from scalelong.model.checkpointing import Checkpointing, run_block
from scalelong.model.layer_calls import is_called_by_class
from scalelong.model.linear_layers import TokenConv1d, project_tokens
from scalelong.model.skip_layers import Conv3x3, GroupNorm, SkipConv1x1, norm_and_activation, shortcut
from scalelong.model.skip_scale import SkipPosition, SkipScale, Unscaled
from scalelong.model.time_embedding import check_labels, time_embedding, times_of_images


@dataclass(frozen=True, kw_only=True)
class UNetConfig:
    """The shape of a UNet; the names are those of guided-diffusion.

    Raises:
        ValueError: sizes that do not fit together, naming them.
    """

    img_size: int
    """Side of the (square) image or latent, in pixels."""
    in_channels: int = 3
    """Channels of the image or latent."""
    out_channels: int = 0
    """Channels of the prediction; 0: as the image. Networks that learn the variance have twice as many."""
    model_channels: int = 128
    """Channels of the first level."""
    channel_mult: tuple[float, ...] = (1, 2, 2, 2)
    """Channels of each level over model_channels; each level halves the side."""
    num_res_blocks: int = 2
    """Residual blocks of a level of the encoder; the decoder has one more."""
    attention_resolutions: tuple[int, ...] = (2,)
    """Where blocks attend, as downsampling factors."""
    num_heads: int = 1
    """Attention heads, where num_head_channels is 0."""
    num_head_channels: int = 0
    """Channels of an attention head; 0: num_heads says."""
    use_scale_shift_norm: bool = False
    """The second norm of a block is adaptive: time and label give it gain and shift."""
    resblock_updown: bool = False
    """Residual blocks change the resolution, not convolutions."""
    use_new_attention_order: bool = True
    """Rows of the projection: queries, keys, values, each split into heads; else heads, each split into those three."""
    same_padding: bool = False
    """Strided convolutions pad below and to the right, as TensorFlow's do."""
    dropout: float = 0.0
    """Share of the activations dropped before a block's second convolution."""
    num_classes: int = 0
    """Rows of the label embedding, a null label for guidance included; 0: no labels."""
    num_groups: int = 32
    """Of every norm."""
    norm_eps: float = 1e-5
    """Added to the variance of every norm."""

    def __post_init__(self):
        check_whole_numbers(self)
        for name in ("channel_mult", "attention_resolutions"):
            value = getattr(self, name)
            if not isinstance(value, list | tuple) or not all(isinstance(part, int | float) for part in value):
                raise ValueError(f"{name} is a tuple of numbers, got {value!r}")
            object.__setattr__(self, name, tuple(value))  # as lists they come from JSON
        for name in ("img_size", "in_channels", "model_channels", "num_res_blocks", "num_heads", "num_groups"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("num_classes", "out_channels", "num_head_channels", "norm_eps"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if not self.channel_mult or min(self.channels) < 1:
            raise ValueError(f"channel_mult must give each level channels, got {self.channel_mult}")
        if self.model_channels % 2:
            raise ValueError(f"model_channels must be even for the time embedding, got {self.model_channels}")
        if self.img_size % self.factors[-1]:
            raise ValueError(
                f"img_size {self.img_size} cannot be halved {len(self.factors) - 1} times, once a level after the first"
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must lie in [0, 1), got {self.dropout}")
        if unknown := set(self.attention_resolutions) - set(self.factors):
            raise ValueError(
                f"attention_resolutions are downsampling factors, here of {', '.join(map(str, self.factors))}; "
                f"got {', '.join(map(str, sorted(unknown)))}"
            )
        for channels in self.channels:
            if channels % self.num_groups:
                raise ValueError(f"{channels} channels (model_channels x channel_mult) are no {self.num_groups} groups")
            if self.num_head_channels and channels % self.num_head_channels:
                raise ValueError(f"{channels} channels are no heads of num_head_channels {self.num_head_channels}")
            if channels % self.num_heads:
                raise ValueError(f"{channels} channels are no num_heads {self.num_heads}")

    @property
    def channels(self) -> tuple[int, ...]:
        """Of each level."""
        return tuple(int(self.model_channels * mult) for mult in self.channel_mult)

    @property
    def factors(self) -> tuple[int, ...]:
        """By which each level is smaller than the image."""
        return tuple(2**level for level in range(len(self.channel_mult)))

    @property
    def embedding_width(self) -> int:
        return 4 * self.model_channels

    @property
    def num_skips(self) -> int:
        return len(self.channel_mult) * (self.num_res_blocks + 1)

    @property
    def context_tokens(self) -> int:
        """A UNet takes no text."""
        return 0

    def num_heads_of(self, channels: int) -> int:
        return channels // self.num_head_channels if self.num_head_channels else self.num_heads


class Embedding(NamedTuple):
    """The embedding of time and label, before the activation that each block begins with and after it."""

    emb_BE: Tensor
    activated_BE: Tensor
    """Shared by all blocks."""


class Downsample(nn.Module):
    """Halves the side by a strided convolution."""

    def __init__(self, config: UNetConfig, channels: int):
        super().__init__()
        self.same_padding = config.same_padding
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=0 if config.same_padding else 1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.op(F.pad(x_BCHW, (0, 1, 0, 1)) if self.same_padding else x_BCHW)


class Upsample(nn.Module):
    """Doubles the side by repeating pixels, then a convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = Conv3x3(channels, channels, 3, padding=1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.conv(doubled(x_BCHW))


def doubled(x_BCHW: Tensor) -> Tensor:
    return F.interpolate(x_BCHW, scale_factor=2.0, mode="nearest")


def halved(x_BCHW: Tensor) -> Tensor:
    return F.avg_pool2d(x_BCHW, 2)


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
        position: SkipPosition = "before-norm",
    ):
        super().__init__()
        self.resample = {None: None, "up": doubled, "down": halved}[resample]
        self.position: SkipPosition = position
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
            zeroed(Conv3x3(out_channels, out_channels, 3, padding=1)),
        )
        self.skip_connection = (
            nn.Identity() if in_channels == out_channels else SkipConv1x1(in_channels, out_channels, 1)
        )

    def forward(self, x_BCHW: Tensor, emb: Embedding, skip: Tensor | None = None, scale: Scale = None) -> Tensor:
        norm, activation, conv = self.in_layers
        h_BCHW = norm_and_activation(norm, activation, x_BCHW, skip, scale, self.position)
        shortcut_BCHW = shortcut(self.skip_connection, x_BCHW, skip, scale)
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
        zeroed(self.proj_out)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        tokens_BTC = self.norm(x_BCHW).flatten(2).transpose(1, 2)
        heads_first = self.num_heads if self.is_split_by_heads_first else None
        mixed_BTC = attention(project_tokens(self.qkv, tokens_BTC, heads_first), self.num_heads)
        update_BTC = project_tokens(self.proj_out, mixed_BTC)
        return x_BCHW + update_BTC.transpose(1, 2).unflatten(2, x_BCHW.shape[2:])


class Stage(nn.ModuleList):
    """What stands at one place of the published list of blocks, called one after the other."""

    def forward(self, x_BCHW: Tensor, emb: Embedding, skip: Tensor | None = None, scale: Scale = None) -> Tensor:
        for layer in self:
            if not getattr(layer, "takes_embedding", False):
                x_BCHW = layer(x_BCHW)
            elif skip is None:
                x_BCHW = layer(x_BCHW, emb)
            else:
                x_BCHW, skip = layer(x_BCHW, emb, skip, scale), None
        return x_BCHW


class UNet(Backbone):
    """A UNet with scaled long skips.

    Args:
        config: the network's shape.
        skip_scale: the policy that scales the long skips; unscaled if not given.
        checkpointing: what backward finds of the blocks: all of it ("none") or their inputs ("blocks"), the rest being
            computed again. May be set on the model at any time.
        channels_last: the layout that activations have inside, the faster one for convolutions; may be set at any time.

    Raises:
        ValueError: a share as ``checkpointing``.
    """

    config_class = UNetConfig

    def __init__(
        self,
        config: UNetConfig,
        *,
        skip_scale: SkipScale | None = None,
        checkpointing: Checkpointing = "none",
        channels_last: bool = True,
    ):
        super().__init__()
        self.skip_scale = skip_scale if skip_scale is not None else Unscaled()
        self.check_options(self.skip_scale, checkpointing)
        self.config = config
        self.checkpointing = checkpointing
        self.channels_last = channels_last

        width = config.embedding_width
        self.time_embed = nn.Sequential(nn.Linear(config.model_channels, width), nn.SiLU(), nn.Linear(width, width))
        self.label_emb = nn.Embedding(config.num_classes, width) if config.num_classes else None
        encoder, skip_channels = self._make_encoder()
        self.input_blocks = encoder
        channels = config.channels[-1]
        middle = (ResBlock(config, channels, channels) for _ in range(2))
        self.middle_block = Stage([next(middle), AttentionBlock(config, channels), next(middle)])
        self.output_blocks = self._make_decoder(skip_channels)
        channels = config.channels[0]
        self.out = nn.Sequential(
            GroupNorm(config.num_groups, channels, config.norm_eps),
            nn.SiLU(),
            zeroed(Conv3x3(channels, config.out_channels or config.in_channels, 3, padding=1)),
        )
        # In the order of the decoder.
        self.skip_gates = self.skip_scale.make_channel_gates(skip_channels[::-1])

    @classmethod
    def check_options(cls, skip_scale: SkipScale, checkpointing: Checkpointing) -> None:
        if checkpointing not in ("none", "blocks"):
            raise ValueError(f"checkpointing of a UNet is 'none' or 'blocks', got {checkpointing!r}")

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

    def _make_decoder(self, skip_channels: list[int]) -> nn.ModuleList:
        config = self.config
        stages, channels, skip_channels = [], config.channels[-1], list(skip_channels)
        for level in reversed(range(len(config.channels))):
            for n in range(config.num_res_blocks + 1):
                incoming = channels + skip_channels.pop()
                channels = config.channels[level]
                stages.append(Stage([ResBlock(config, incoming, channels, position=self.skip_scale.position)]))
                if config.factors[level] in config.attention_resolutions:
                    stages[-1].append(AttentionBlock(config, channels))
                if level > 0 and n == config.num_res_blocks:
                    stages[-1].append(self._make_resampler(channels, "up"))
        return nn.ModuleList(stages)

    def _make_resampler(self, channels: int, direction: str) -> nn.Module:
        if self.config.resblock_updown:
            return ResBlock(self.config, channels, channels, resample=direction)
        return Upsample(channels) if direction == "up" else Downsample(self.config, channels)

    def forward(self, x_BCHW: Tensor, t_B: Tensor, y_B: Tensor | None = None) -> Tensor:
        """Predicts the noise in ``x_BCHW``.

        Args:
            x_BCHW: noisy images or latents.
            t_B: time as the network is fed it (see the head of this file); one, () or (1,), for all images.
            y_B: class labels (B,).

        Returns:
            The prediction, shaped as ``x_BCHW`` but for ``out_channels``.

        Raises:
            ValueError: an image of another shape than the configuration's, another number of times or labels than of
                images, labels missing or not wanted.
        """
        emb = self._embed(x_BCHW, t_B, y_B)
        h_BCHW = self.input_blocks[0](x_BCHW, emb)
        if self.channels_last and not in_transform():  # vmap knows no layouts
            h_BCHW = h_BCHW.contiguous(memory_format=torch.channels_last)
        skips = [h_BCHW]
        for stage in self.input_blocks[1:]:  # type: ignore[index]
            h_BCHW = self._run(stage, h_BCHW, emb)
            skips.append(h_BCHW)
        h_BCHW = self._run(self.middle_block, h_BCHW, emb)
        num_skips = self.config.num_skips
        for executed, stage in enumerate(self.output_blocks):
            skip = skips.pop()
            scale = self.skip_scale.scale(num_skips - executed, num_skips, skip, self.skip_gates)
            h_BCHW = self._run(stage, h_BCHW, emb, skip, scale)
        norm, activation, conv = self.out
        return conv(norm_and_activation(norm, activation, h_BCHW))

    def _run(self, stage: nn.Module, *arguments: Tensor | Embedding | Scale) -> Tensor:
        return run_block(
            stage, *arguments, checkpointing=self.checkpointing, is_random=self.training and self.config.dropout > 0
        )

    def _embed(self, x_BCHW: Tensor, t_B: Tensor, y_B: Tensor | None) -> Embedding:
        config = self.config
        expected = (config.in_channels, config.img_size, config.img_size)
        if tuple(x_BCHW.shape[1:]) != expected:
            raise ValueError(f"UNet: expected images of shape {expected}, got {tuple(x_BCHW.shape[1:])}")
        if (y_B is None) != (config.num_classes == 0):
            raise ValueError("UNet: " + ("labels are missing" if y_B is None else "this model takes no labels"))
        t_B = times_of_images(t_B, x_BCHW, "UNet")
        if y_B is not None:
            check_labels(y_B, x_BCHW, "UNet")
        emb_BE = self.time_embed(time_embedding(t_B, config.model_channels, x_BCHW.dtype))
        if self.label_emb is not None:
            emb_BE = emb_BE + self.label_emb(y_B)
        return Embedding(emb_BE, F.silu(emb_BE))

    def skip_blocks(self) -> list[tuple[int, nn.Module]]:
        num_skips = self.config.num_skips
        return [(num_skips - executed, next(stage.children())) for executed, stage in enumerate(self.output_blocks)]

    def flops(self, batch_size: int = 1) -> int:
        config = self.config
        macs = _macs(self.time_embed, 1)
        side = config.img_size
        for stage in (*self.input_blocks, self.middle_block, *self.output_blocks):
            for layer in stage.children():
                if isinstance(layer, Downsample) or getattr(layer, "resample", None) is halved:
                    side //= 2
                elif isinstance(layer, Upsample) or getattr(layer, "resample", None) is doubled:
                    side *= 2
                macs += _macs(layer, side)
        return 2 * batch_size * (macs + _macs(self.out, side))


def zeroed(layer: nn.Conv1d | nn.Conv2d) -> nn.Module:
    """A residual branch that begins at zero."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


def _macs(layer: nn.Module, side: int) -> int:
    """Multiply-adds for one image, where the layer's convolutions write squares of ``side``."""
    # A convolution's weights are applied at every position, a linear layer's once; norms have vectors.
    macs = sum(p.numel() * (side**2 if p.dim() > 2 else 1) for p in layer.parameters() if p.dim() > 1)
    return macs + 2 * side**4 * layer.qkv.in_channels if isinstance(layer, AttentionBlock) else macs
