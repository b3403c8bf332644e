"""DiT: a diffusion transformer whose norms are told time and class (Peebles and Xie, arXiv:2212.09748), adaLN-Zero.

What they are told may be rotations of pairs of features in the place of shifts, or of both (arXiv:2505.19122).
The state dict is the published one, name for name (https://github.com/facebookresearch/DiT). Time is n - 1 in 0 .. 999
under DDPM's schedule. Long skips are an option: each block of the second half takes in what one of the first put out,
the innermost pair first, by U-ViT's projection (arXiv:2209.12152), or with a LayerNorm before it as Skip-DiT
(arXiv:2411.17616); where the depth is even, the first of them takes the stream itself for its skip.

Shapes: B batch, C image channels, H height, W width, T tokens, D width, P patch side.
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from scalelong.model.backbone import Backbone, last_and_kept
from scalelong.model.backbone_config import Recompute
from scalelong.model.dit_config import DiTConfig as DiTConfig
from scalelong.model.hidden_matrices import HiddenMatrices, hidden_layers
from scalelong.model.linear_layers import SkipLinear, project_skip
from scalelong.model.linear_wrappers import wrap_linears
from scalelong.model.magnitude import mp_sum, normal_rows, unit_rms
from scalelong.model.modulation import TOLD, Told, modulation, sizes_of, told
from scalelong.model.mp_dit import MPBlock, MPFinalLayer, MPLabelEmbedder, MPTimeEmbedder
from scalelong.model.mp_transformer import MPPatchEmbed
from scalelong.model.norm_layers import AddLayerNorm, add_gated, add_norm
from scalelong.model.parameter_kinds import ParameterKind
from scalelong.model.skip_norm_layers import SkipLayerNorm, project_normalised_skip
from scalelong.model.skip_scale import LongSkip, SkipScale, SkipShape
from scalelong.model.sparse_middle import MiddleTokens, sparse_pass
from scalelong.model.time_embedding import check_labels, time_embedding, times_of_images
from scalelong.model.transformer_layers import Attention, Mlp, PatchEmbed, unpatchify

NUM_FREQUENCIES = 256
EPS = 1e-6


def _xavier_of_patches(weight: Tensor) -> None:
    """As of a linear layer over the pixels of a patch."""
    nn.init.xavier_uniform_(weight.flatten(1))


# fmt: off
PARAMETERS = (
    # names                                                         begin as
    ParameterKind("*.gamma *.alpha",                                weight_decay=0.0),  # of wrapped linear layers
    ParameterKind("skip_gates.* *.skip_norm.* *.skip_linear.*"),    # as PyTorch's layers begin, as Skip-DiT's do
    ParameterKind("*.q_norm.* *.k_norm.*"),
    ParameterKind("x_embedder.proj.weight",                         _xavier_of_patches),
    ParameterKind("y_embedder.* t_embedder.*.weight",               0.02),
    ParameterKind("*.adaLN_modulation.* final_layer.linear.*",      nn.init.zeros_),
    ParameterKind("*.qkv.weight *.attn.proj.weight",                nn.init.xavier_uniform_),
    ParameterKind("*.fc1.weight *.fc2.weight",                      nn.init.xavier_uniform_),
    ParameterKind("*.bias",                                         nn.init.zeros_),
)
MP_PARAMETERS = (
    ParameterKind("skip_gates.*"),
    ParameterKind("*.gain",                                         nn.init.zeros_),
    ParameterKind("*.weight",                                       normal_rows),
)
# fmt: on
"""As published: each block begins as the identity, and the network with zeros. Of magnitude-preserving layers: rows of
random direction and unit RMS, and gains of zero."""


class TimeEmbedder(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(NUM_FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t_B: Tensor, dtype: torch.dtype) -> Tensor:
        return self.mlp(time_embedding(t_B, NUM_FREQUENCIES, dtype))


class LabelEmbedder(nn.Module):
    def __init__(self, num_classes: int, width: int):
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes, width)

    def forward(self, y_B: Tensor) -> Tensor:
        return self.embedding_table(y_B)


class Block(nn.Module):
    """A transformer block with adaptive norms and gated branches; it first takes in its long skip, if it has one."""

    def __init__(self, config: DiTConfig, *, takes_skip: bool = False):
        super().__init__()
        width = config.width
        has_norm = takes_skip and config.skip == "layer-norm"
        self.skip_norm = SkipLayerNorm(2 * width, eps=EPS) if has_norm else None
        self.skip_linear = SkipLinear(2 * width, width) if takes_skip else None
        self.norm1 = AddLayerNorm(width, eps=EPS, elementwise_affine=False)
        self.attn = Attention(width, config.num_heads, qkv_bias=True, qk_norm=config.qk_norm)
        self.norm2 = AddLayerNorm(width, eps=EPS, elementwise_affine=False)
        self.mlp = Mlp(width, config.mlp_width, act="gelu-tanh")
        self.parts = (*TOLD[config.modulation], "gate")
        self.adaLN_modulation = modulation(width, 2 * self.parts)

    def forward(self, x_BTD: Tensor, c_BD: Tensor, skip: LongSkip | None = None) -> Tensor:
        if self.skip_linear is not None:
            assert skip is not None
            x_BTD = self._take_in(x_BTD, skip)
        shift1, gain1, angle1, gate1, shift2, gain2, angle2, gate2 = self.told(c_BD)
        x_BTD, y_BTD = add_norm(self.norm1, x_BTD, gain=gain1, shift=shift1, angle=angle1)
        x_BTD, y_BTD = add_norm(self.norm2, x_BTD, self.attn(y_BTD), gain=gain2, shift=shift2, gate=gate1, angle=angle2)
        return add_gated(x_BTD, self.mlp(y_BTD), gate2)

    def told(self, c_BD: Tensor) -> tuple[Tensor | None, ...]:
        """What attention's norm and branch are told, then what the MLP's are."""
        width, halves = c_BD.shape[1], self.adaLN_modulation(c_BD).chunk(2, dim=1)
        return tuple(part for half_BE in halves for part in told(half_BE, width, self.parts))

    def _take_in(self, x_BTD: Tensor, skip: LongSkip) -> Tensor:
        assert self.skip_linear is not None
        if self.skip_norm is None:
            return project_skip(self.skip_linear, x_BTD, skip.features, skip.scale, skip.common)
        return project_normalised_skip(self.skip_norm, self.skip_linear, x_BTD, skip.features, skip.scale, skip.common)


class FinalLayer(nn.Module):
    def __init__(self, config: DiTConfig):
        super().__init__()
        width = config.width
        self.norm_final = AddLayerNorm(width, eps=EPS, elementwise_affine=False)
        self.linear = nn.Linear(width, config.patch_size**2 * config.channels_out)
        self.parts = TOLD[config.modulation]
        self.adaLN_modulation = modulation(width, self.parts)

    def forward(self, x_BTD: Tensor, c_BD: Tensor) -> Tensor:
        shift, gain, angle, _ = self.told(c_BD)
        _, y_BTD = add_norm(self.norm_final, x_BTD, gain=gain, shift=shift, angle=angle)
        return self.linear(y_BTD)

    def told(self, c_BD: Tensor) -> Told:
        return told(self.adaLN_modulation(c_BD), c_BD.shape[1], self.parts)


class Parts(NamedTuple):
    """The classes of what a DiT is made of."""

    patches: type[nn.Module]
    time: type[nn.Module]
    label: type[nn.Module]
    block: type[nn.Module]
    end: type[nn.Module]


PUBLISHED = Parts(PatchEmbed, TimeEmbedder, LabelEmbedder, Block, FinalLayer)
MAGNITUDE_PRESERVING = Parts(MPPatchEmbed, MPTimeEmbedder, MPLabelEmbedder, MPBlock, MPFinalLayer)


class DiT(Backbone):
    """DiT, whose arguments are those of ``Backbone``; its prediction begins as zero."""

    config_class = DiTConfig
    kinds = PARAMETERS
    matrices = HiddenMatrices("*.qkv.weight *.attn.proj.weight *.fc1.weight *.fc2.weight *.skip_linear.weight")
    pos_embed: Tensor

    def __init__(self, config: DiTConfig, *, skip_scale: SkipScale | None = None, recompute: Recompute = "none"):
        super().__init__(config, skip_scale=skip_scale, recompute=recompute)
        width = config.width
        parts, self.joined = PUBLISHED, torch.add
        if config.magnitude_preserving:
            parts, self.joined, self.kinds = MAGNITUDE_PRESERVING, mp_sum, MP_PARAMETERS
        self.x_embedder = parts.patches(config.in_channels, width, config.patch_size)
        self.t_embedder = parts.time(width)
        self.y_embedder = parts.label(config.num_classes, width) if config.num_classes else None
        self.register_buffer("pos_embed", self._positions())
        takers = config.skip_sources
        self.blocks = nn.ModuleList(parts.block(config, takes_skip=n in takers) for n in range(config.depth))
        self.final_layer = parts.end(config)
        wrap_linears(hidden_layers(self), config.linear)
        self.init_weights()
        self.skips = (SkipShape("tokens", width, width, config.num_tokens),) * config.num_skips
        self.skip_gates = self.skip_scale.make_gates(self.skips)
        self._add_conditions(width)
        self._add_sparse_middle(width, num_extras=0)

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
        """Predicts the noise in ``x_BCHW`` and, where the configuration has twice the channels, its variance.

        Args:
            x_BCHW: noisy images or latents.
            t_B: time as the network is fed it (see the head of this file); one, () or (1,), for all images.
            y_B: class labels (B,).
            augment_BA: labels of how the images were augmented (``augment_dim``); None: as of plain images.
            keeps: the number of a block whose features are wanted too.
            middle: what the blocks of a sparse middle see; None: all tokens.

        Returns:
            The prediction, shaped as ``x_BCHW`` but for ``out_channels``; with ``keeps``, it and those features.

        Raises:
            ValueError: an image of another shape than the configuration's, another number of times or labels than of
                images, labels missing or not wanted, tokens of a middle that there is not.
        """
        config = self.config
        (tokens_BTD, c_BD), kept = last_and_kept(self._states(x_BCHW, t_B, y_B, augment_BA, middle), keeps)
        patches_BTD = self.final_layer(tokens_BTD, c_BD)
        side = config.img_size // config.patch_size
        output_BCHW = unpatchify(patches_BTD, side, config.patch_size, config.channels_out)
        return output_BCHW if kept is None else (output_BCHW, kept[0])

    def hidden_states(
        self,
        x_BCHW: Tensor,
        t_B: Tensor,
        y_B: Tensor | None = None,
        augment_BA: Tensor | None = None,
        middle: MiddleTokens | None = None,
    ) -> Iterator[Tensor]:
        return (tokens_BTD for tokens_BTD, _ in self._states(x_BCHW, t_B, y_B, augment_BA, middle))

    def _states(
        self,
        x_BCHW: Tensor,
        t_B: Tensor,
        y_B: Tensor | None,
        augment_BA: Tensor | None,
        middle: MiddleTokens | None = None,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """What each block puts out, with the condition of what comes behind it."""
        c_BD, time_BD = self._condition(x_BCHW, t_B, y_B, augment_BA)
        tokens_BTD = self.joined(self.x_embedder(x_BCHW), self.pos_embed)
        sparse, sources = sparse_pass(self, middle, tokens_BTD), self.config.skip_sources
        takers = list(sources)
        skips: dict[int, Tensor] = {}  # torch.compile traces no dict[int, Tensor]()
        for n, block in enumerate(self.blocks):
            if sparse is not None:
                tokens_BTD = sparse.before(n, tokens_BTD)
                if sparse.leaves_out(n):
                    yield tokens_BTD, c_BD
                    continue
            if n in sources:
                skip = self._long_skip(takers.index(n), skips.pop(sources[n]), self.skip_gates, sparse)
                tokens_BTD = self._run(block, tokens_BTD, c_BD, skip)
            else:
                tokens_BTD = self._run(block, tokens_BTD, c_BD)
            if n in sources.values():
                skips[n] = tokens_BTD
            if n == self.config.self_condition_block and self.self_condition is not None:
                c_BD = self.self_condition(c_BD, self.pooled(tokens_BTD), time_BD)
            yield tokens_BTD, c_BD

    def _condition(
        self, x_BCHW: Tensor, t_B: Tensor, y_B: Tensor | None, augment_BA: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """(B, D) each: what the blocks are told of time, class and augmentation, and the embedding of time alone."""
        config = self.config
        expected = (config.in_channels, config.img_size, config.img_size)
        if tuple(x_BCHW.shape[1:]) != expected:
            raise ValueError(f"DiT: expected images of shape {expected}, got {tuple(x_BCHW.shape[1:])}")
        if (y_B is None) != (config.num_classes == 0):
            raise ValueError("DiT: " + ("labels are missing" if y_B is None else "this model takes no labels"))
        time_BD = self.t_embedder(times_of_images(t_B, x_BCHW, "DiT"), self.pos_embed.dtype)
        c_BD = self._with_augmentation(time_BD, augment_BA)
        if y_B is None or self.y_embedder is None:
            return c_BD, time_BD
        check_labels(y_B, x_BCHW, "DiT")
        return self.joined(c_BD, self.y_embedder(y_B)), time_BD

    def init_weights(self) -> None:
        super().init_weights()
        self.pos_embed.copy_(self._positions())

    def _positions(self) -> Tensor:
        config = self.config
        positions_TD = position_embedding(config.img_size // config.patch_size, config.width)
        if config.magnitude_preserving:
            # What all have in common is no position, and adds up along the depth.
            positions_TD = unit_rms(positions_TD - positions_TD.mean(dim=0) * (config.num_tokens > 1))
        return positions_TD[None]

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *arguments: Any) -> None:
        """Positions are those of the configuration where a state dict, as a run's checkpoint, has parameters alone."""
        weight = next((x for name, x in state_dict.items() if name.startswith(f"{prefix}x_embedder.")), None)
        if weight is not None and f"{prefix}pos_embed" not in state_dict:
            state_dict[f"{prefix}pos_embed"] = self._positions().to(weight.device, weight.dtype)
        super()._load_from_state_dict(state_dict, prefix, *arguments)

    def named_blocks(self) -> list[tuple[str, nn.Module]]:
        return [(f"blocks.{n}", block) for n, block in enumerate(self.blocks)]

    def skip_blocks(self) -> list[tuple[int, nn.Module]]:
        num_skips = self.config.num_skips
        return [(num_skips - executed, self.blocks[n]) for executed, n in enumerate(self.config.skip_sources)]

    def flops(self, batch_size: int = 1) -> int:
        return self._flops(batch_size, num_dropped=0)

    def training_flops(self, batch_size: int = 1) -> int:
        return self._flops(batch_size, num_dropped=self.config.num_patches - self.config.num_kept)

    def _flops(self, batch_size: int, *, num_dropped: int) -> int:
        """Of a pass of which the middle does not see so many patches."""
        c = self.config
        T, D = c.num_tokens, c.width
        in_features, out_features = (c.patch_size**2 * channels for channels in (c.in_channels, c.channels_out))
        in_features += c.magnitude_preserving  # the constant that stands for a bias
        seen = self._tokens_of_blocks(num_dropped)
        told_macs = D * sum(sizes_of(D, TOLD[c.modulation]))  # of a norm
        # Attention, the MLP, both norms and gates, and the projections of skips.
        blocks = sum(S * (4 * D * D + 2 * S * D + 2 * D * c.mlp_width) + 2 * (told_macs + D * D) for S in seen)
        blocks += sum(2 * seen[n] * D * D for n in c.skip_sources)
        ends = T * in_features * D + NUM_FREQUENCIES * D + D * D + told_macs + T * D * out_features
        return 2 * batch_size * (blocks + ends + self._condition_macs())


def position_embedding(side: int, width: int) -> Tensor:
    """(side², width): the sines and cosines of each patch's column, then of its row (as MAE's, arXiv:2111.06377)."""
    quarter = width // 4
    f = torch.exp(-math.log(10000) * torch.arange(quarter, dtype=torch.float64) / quarter)
    angle = torch.arange(side, dtype=torch.float64)[:, None] * f
    wave = torch.cat([angle.sin(), angle.cos()], dim=1)  # of each place on a line
    of_column, of_row = wave.repeat(side, 1), wave.repeat_interleave(side, dim=0)
    return torch.cat([of_column, of_row], dim=1).float()
