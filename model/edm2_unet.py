"""EDM2's UNet in its configuration G (Karras et al., arXiv:2312.02696, figure 21), its skips scaled (2310.13545).

Its layers keep the magnitude of what passes, without norms of groups and without biases. ``forward`` takes time as
1000 c_noise, c_noise = ln(sigma) / 4 under EDM's preconditioning. A long skip joins by ``mp_cat``, in which both halves
have an equal share; a policy scales that of the skip.

Shapes: B batch, C channels, H height, W width, T positions, E features of the embedding of time and label.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scalelong.kernels.arguments import concatenated
from scalelong.kernels.attention import attention
from scalelong.kernels.backend import in_transform
from scalelong.model.backbone import Backbone, last_and_kept
from scalelong.model.backbone_config import Recompute
from scalelong.model.common_factor import multiplied
from scalelong.model.edm2_unet_config import EDM2UNetConfig as EDM2UNetConfig
from scalelong.model.hidden_matrices import HiddenMatrices
from scalelong.model.magnitude import (
    RESIDUAL_BALANCE,
    Gain,
    MPConv2d,
    MPFourier,
    MPLinear,
    cat_factors,
    mp_silu,
    mp_sum,
    normal_rows,
    unit_rms,
    unit_tokens,
)
from scalelong.model.parameter_kinds import ParameterKind
from scalelong.model.recompute import run_block
from scalelong.model.skip_scale import LongSkip, SkipScale, SkipShape
from scalelong.model.time_embedding import check_labels, times_of_images

LARGEST_ACTIVATION = 256.0
"""Where activations are cut, lest fp16 overflows, as published."""
# fmt: off
PARAMETERS = (
    # names                     begin as
    ParameterKind("skip_gates.*"),
    ParameterKind("*.gain",     nn.init.zeros_),
    ParameterKind("*.weight",   normal_rows),
)
# fmt: on
"""Rows of random direction and unit RMS, and gains of zero: modulations begin as the identity, predictions as zero."""
MATRICES = HiddenMatrices(
    "*.conv_res0.weight *.conv_res1.weight *.conv_skip.weight *.attn.qkv.weight *.attn.proj.weight",
    takes_skip="*.conv_res0.weight *.conv_skip.weight",
)


class LabelEmbedding(MPLinear):
    """The projection of labels as one-hot vectors of unit RMS."""

    def forward(self, y_B: Tensor) -> Tensor:
        return math.sqrt(self.in_features) * F.embedding(y_B, self.product_weight().t())


class SelfAttention(nn.Module):
    """Attention over positions by the cosines of queries and keys, of values of unit RMS, joined with the stream."""

    def __init__(self, channels: int, head_channels: int):
        super().__init__()
        self.num_heads, self.head_channels = channels // head_channels, head_channels
        self.qkv = MPLinear(channels, 3 * channels)
        self.proj = MPLinear(channels, channels)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        tokens_BTC = x_BCHW.flatten(2).transpose(1, 2)
        qkv_BT3C = unit_tokens(self.qkv(tokens_BTC).unflatten(2, (-1, self.head_channels))).flatten(2)
        y_BTC = self.proj(attention(qkv_BT3C, self.num_heads))
        return mp_sum(x_BCHW, y_BTC.transpose(1, 2).unflatten(2, x_BCHW.shape[2:]), RESIDUAL_BALANCE)


class Block(nn.Module):
    """A residual block with the embedding of time and label, and attention at some levels."""

    def __init__(self, config: EDM2UNetConfig, in_channels: int, out_channels: int, *, attends: bool = False):
        super().__init__()
        self.conv_skip = None if in_channels == out_channels else MPConv2d(in_channels, out_channels, 1)
        self.emb_linear = MPLinear(config.embedding_width, out_channels)
        self.emb_gain = Gain()
        self.conv_res0 = MPConv2d(self.residual_channels(in_channels, out_channels), out_channels, 3)
        self.dropout = nn.Dropout(config.dropout)
        self.conv_res1 = MPConv2d(out_channels, out_channels, 3)
        self.attn = SelfAttention(out_channels, config.num_head_channels) if attends else None

    @staticmethod
    def residual_channels(in_channels: int, out_channels: int) -> int:
        """Of what the residual branch begins with."""
        raise NotImplementedError

    def _with_branch(self, x_BCHW: Tensor, branch_BCHW: Tensor, emb_BE: Tensor) -> Tensor:
        """``x`` joined with the residual branch of ``branch_BCHW``, then with attention."""
        y_BCHW = self.conv_res0(mp_silu(branch_BCHW))
        factor_BC = 1 + self.emb_gain(self.emb_linear(emb_BE))
        y_BCHW = self.conv_res1(self.dropout(mp_silu(y_BCHW * factor_BC[:, :, None, None])))
        x_BCHW = mp_sum(x_BCHW, y_BCHW, RESIDUAL_BALANCE)
        if self.attn is not None:
            x_BCHW = self.attn(x_BCHW)
        return x_BCHW.clamp(-LARGEST_ACTIVATION, LARGEST_ACTIVATION)


class EncoderBlock(Block):
    """Its input has every position brought to unit RMS over its channels, behind halving and the 1x1 convolution."""

    def __init__(self, *sizes: Any, halves: bool = False, **options: Any):
        super().__init__(*sizes, **options)
        self.halves = halves

    @staticmethod
    def residual_channels(in_channels: int, out_channels: int) -> int:
        return out_channels

    def forward(self, x_BCHW: Tensor, emb_BE: Tensor) -> Tensor:
        if self.halves:
            x_BCHW = F.avg_pool2d(x_BCHW, 2)
        if self.conv_skip is not None:
            x_BCHW = self.conv_skip(x_BCHW)
        x_BCHW = unit_rms(x_BCHW, dim=1)
        return self._with_branch(x_BCHW, x_BCHW, emb_BE)


class DecoderBlock(Block):
    """Takes in a long skip, or doubles the side, or neither."""

    def __init__(self, *sizes: Any, doubles: bool = False, **options: Any):
        super().__init__(*sizes, **options)
        self.doubles = doubles

    @staticmethod
    def residual_channels(in_channels: int, out_channels: int) -> int:
        return in_channels

    def forward(self, x_BCHW: Tensor, emb_BE: Tensor, skip: LongSkip | None = None) -> Tensor:
        if self.doubles:
            x_BCHW = F.interpolate(x_BCHW, scale_factor=2.0, mode="nearest")
        if skip is not None:
            x_BCHW = joined(x_BCHW, skip)
        shortcut_BCHW = x_BCHW if self.conv_skip is None else self.conv_skip(x_BCHW)
        return self._with_branch(shortcut_BCHW, x_BCHW, emb_BE)


def joined(h_BCHW: Tensor, skip: LongSkip) -> Tensor:
    """``common * mp_cat(h, scale * s)``."""
    of_h, of_s = cat_factors(h_BCHW.shape[1], skip.features.shape[1])
    scale = of_s if skip.scale is None else of_s * skip.scale
    return multiplied(concatenated(of_h * h_BCHW, skip.features, scale), skip.common)


class EDM2UNet(Backbone):
    """EDM2's UNet with scaled long skips; its arguments are those of ``Backbone``, and one.

    Args:
        channels_last: the layout that activations have inside, the faster one for convolutions; may be set at any time.
    """

    config_class = EDM2UNetConfig
    kinds = PARAMETERS
    matrices = MATRICES

    def __init__(
        self,
        config: EDM2UNetConfig,
        *,
        skip_scale: SkipScale | None = None,
        recompute: Recompute = "none",
        channels_last: bool = True,
    ):
        super().__init__(config, skip_scale=skip_scale, recompute=recompute)
        self.channels_last = channels_last
        self.emb_fourier = MPFourier(config.model_channels)
        self.emb_noise = MPLinear(config.model_channels, config.embedding_width)
        self.emb_label = LabelEmbedding(config.num_classes, config.embedding_width) if config.num_classes else None
        # The channel more is a constant, which stands for all biases.
        self.in_conv = MPConv2d(config.in_channels + 1, config.channels[0], 3)
        self.in_blocks, skip_channels = self._make_encoder()
        self.out_blocks, self.skips = self._make_decoder(skip_channels)
        self.out_conv = MPConv2d(config.channels[0], config.channels_out, 3)
        self.out_gain = Gain()
        self.init_weights()
        self.skip_gates = self.skip_scale.make_gates(self.skips)
        self._add_conditions(config.embedding_width)

    def _make_encoder(self) -> tuple[nn.ModuleList, list[int]]:
        """The blocks, and the channels of the skips, the first of which is that of ``in_conv``."""
        config, channels = self.config, self.config.channels[0]
        blocks, skip_channels = [], [channels]
        for level, level_channels in enumerate(config.channels):
            if level > 0:
                blocks.append(EncoderBlock(config, channels, channels, halves=True))
            for _ in range(config.num_res_blocks):
                blocks.append(EncoderBlock(config, channels, level_channels, attends=config.attends(level)))
                channels = level_channels
        skip_channels += [block.conv_res1.out_channels for block in blocks]
        return nn.ModuleList(blocks), skip_channels

    def _make_decoder(self, skip_channels: list[int]) -> tuple[nn.ModuleList, tuple[SkipShape, ...]]:
        """The blocks, and the skips that those in ``takes_skip`` take, in order."""
        config, channels = self.config, self.config.channels[-1]
        blocks: list[DecoderBlock] = [
            DecoderBlock(config, channels, channels, attends=True),
            DecoderBlock(config, channels, channels),
        ]
        skip_channels, skips, self.takes_skip = list(skip_channels), [], []
        for level in reversed(range(len(config.channels))):
            if level < len(config.channels) - 1:
                blocks.append(DecoderBlock(config, channels, channels, doubles=True))
            for _ in range(config.num_res_blocks + 1):
                # By mp_cat the stream counts for as much as the skip, however many channels it has.
                skips.append(SkipShape("channels", skip_channels[-1], stream_width=skip_channels[-1]))
                incoming, channels = channels + skip_channels.pop(), config.channels[level]
                self.takes_skip.append(len(blocks))
                blocks.append(DecoderBlock(config, incoming, channels, attends=config.attends(level)))
        return nn.ModuleList(blocks), tuple(skips)

    def forward(
        self,
        x_BCHW: Tensor,
        t_B: Tensor,
        y_B: Tensor | None = None,
        augment_BA: Tensor | None = None,
        *,
        keeps: int | None = None,
    ) -> Any:
        """Predicts what EDM's preconditioning asks for (or the noise) from ``x_BCHW``.

        Args:
            x_BCHW: noisy images or latents, of unit variance.
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
        output_BCHW = self.out_gain(self.out_conv(h_BCHW))
        return output_BCHW if keeps is None else (output_BCHW, kept_BCHW)

    def hidden_states(
        self, x_BCHW: Tensor, t_B: Tensor, y_B: Tensor | None = None, augment_BA: Tensor | None = None
    ) -> Iterator[Tensor]:
        c_BE, time_BE = self._embed(x_BCHW, t_B, y_B, augment_BA)
        emb_BE = mp_silu(c_BE)
        h_BCHW = self.in_conv(F.pad(x_BCHW, (0, 0, 0, 0, 0, 1), value=1.0))
        if self.channels_last and not in_transform():  # vmap knows no layouts
            h_BCHW = h_BCHW.contiguous(memory_format=torch.channels_last)
        yield h_BCHW
        skips, num_encoding = [h_BCHW], len(self.in_blocks)
        for number, block in enumerate((*self.in_blocks, *self.out_blocks), start=1):
            if self.self_condition is not None and number - 1 == self.config.self_condition_block:
                emb_BE = mp_silu(self.self_condition(c_BE, self.pooled(h_BCHW), time_BE))
            if number - num_encoding - 1 in self.takes_skip:
                skip = self._long_skip(len(self.skips) - len(skips), skips.pop(), self.skip_gates)
                h_BCHW = self._run(block, h_BCHW, emb_BE, skip)
            else:
                h_BCHW = self._run(block, h_BCHW, emb_BE)
            if number <= num_encoding:
                skips.append(h_BCHW)
            yield h_BCHW

    def _run(self, block: nn.Module, *arguments: Any) -> Tensor:
        return run_block(
            block, *arguments, recompute=self.recompute, is_random=self.training and self.config.dropout > 0
        )

    def _embed(
        self, x_BCHW: Tensor, t_B: Tensor, y_B: Tensor | None, augment_BA: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """(B, E) each: the embedding of time, label and augmentation, and that of time alone."""
        config = self.config
        expected = (config.in_channels, config.img_size, config.img_size)
        if tuple(x_BCHW.shape[1:]) != expected:
            raise ValueError(f"EDM2's UNet: expected images of shape {expected}, got {tuple(x_BCHW.shape[1:])}")
        if (y_B is None) != (config.num_classes == 0):
            raise ValueError("EDM2's UNet: " + ("labels are missing" if y_B is None else "this model takes no labels"))
        time_BE = self.emb_noise(self.emb_fourier(times_of_images(t_B, x_BCHW, "EDM2's UNet") / 1000).to(x_BCHW.dtype))
        emb_BE = self._with_augmentation(time_BE, augment_BA)
        if y_B is not None and self.emb_label is not None:
            check_labels(y_B, x_BCHW, "EDM2's UNet")
            emb_BE = mp_sum(emb_BE, self.emb_label(y_B))
        return emb_BE, time_BE

    def named_blocks(self) -> list[tuple[str, nn.Module]]:
        return [
            ("in_conv", self.in_conv),
            *((f"in_blocks.{n}", block) for n, block in enumerate(self.in_blocks)),
            *((f"out_blocks.{n}", block) for n, block in enumerate(self.out_blocks)),
        ]

    def skip_blocks(self) -> list[tuple[int, nn.Module]]:
        return [(len(self.skips) - n, self.out_blocks[place]) for n, place in enumerate(self.takes_skip)]

    def flops(self, batch_size: int = 1) -> int:
        side = self.config.img_size
        macs = self.emb_noise.weight.numel() + _macs(self.in_conv, side) + self._condition_macs()
        for block in (*self.in_blocks, *self.out_blocks):
            side = (
                side // 2 if getattr(block, "halves", False) else 2 * side if getattr(block, "doubles", False) else side
            )
            macs += _macs(block, side)
        return 2 * batch_size * (macs + _macs(self.out_conv, side))


def _macs(layer: nn.Module, side: int) -> int:
    """Multiply-adds for one image of that side: weights at each position, those of the embedding once, attention."""
    macs = 0
    for name, module in layer.named_modules():
        if isinstance(module, MPConv2d | MPLinear):
            macs += module.weight.numel() * (1 if name == "emb_linear" else side**2)
        elif isinstance(module, SelfAttention):
            macs += 2 * side**4 * module.qkv.in_features
    return macs
