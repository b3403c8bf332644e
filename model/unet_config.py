"""The shape of a UNet; imports no torch."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

from scalelong.model.levels_config import LevelsConfig

if TYPE_CHECKING:
    from scalelong.model.skip_scale import SkipScale
    from scalelong.model.unet import UNet

SkipPosition = Literal["before-norm", "after-norm"]
SkipTopology = Literal["concatenated", "residual"]
SKIP_POSITIONS: tuple[str, ...] = get_args(SkipPosition)


def check_position(position: str) -> None:
    """
    Raises:
        ValueError: no position that the factor of a skip can have.
    """
    if position not in SKIP_POSITIONS:
        raise ValueError(f"the position of a skip scale is {' or '.join(SKIP_POSITIONS)}, got {position!r}")


@dataclass(frozen=True, kw_only=True)
class UNetConfig(LevelsConfig, architecture="UNet"):
    """The shape of a UNet; the names are those of guided-diffusion.

    Raises:
        ValueError: sizes that do not fit together, naming them.
    """

    num_heads: int = 1
    """Attention heads, where num_head_channels is 0."""
    use_scale_shift_norm: bool = False
    """The second norm of a block is adaptive: time and label give it gain and shift."""
    resblock_updown: bool = False
    """Residual blocks change the resolution, not convolutions."""
    use_new_attention_order: bool = True
    """Rows of the projection: queries, keys, values, each split into heads; else heads, each split into those three."""
    same_padding: bool = False
    """Strided convolutions pad below and to the right, as TensorFlow's do."""
    num_groups: int = 32
    """Groups of every norm."""
    norm_eps: float = 1e-5
    """Added to the variance of every norm."""
    skip: SkipTopology = "concatenated"
    """Long skips: one of each block of the encoder, concatenated, as published; or one of each level, which the decoder
    adds to what the levels below it have changed, as SiD2's (arXiv:2410.19324)."""
    skip_position: SkipPosition = "before-norm"
    """The first norm of a decoder block reads the scaled skip, or what it yields of the skip is scaled."""

    def __post_init__(self):
        super().__post_init__()
        self.check_at_least(1, "num_heads", "num_groups")
        self.check_at_least(0, "num_head_channels", "norm_eps")
        check_position(self.skip_position)
        self._check_skip()
        if self.model_channels % 2:
            raise ValueError(f"model_channels must be even for the time embedding, got {self.model_channels}")
        for channels in self.channels:
            if channels % self.num_groups:
                raise ValueError(f"{channels} channels (model_channels x channel_mult) are no {self.num_groups} groups")
            self.check_heads(channels)
            if channels % self.num_heads:
                raise ValueError(f"{channels} channels are no num_heads {self.num_heads}")

    def _check_skip(self) -> None:
        if self.skip not in get_args(SkipTopology):
            raise ValueError(f"skip must be {' or '.join(get_args(SkipTopology))}, got {self.skip!r}")
        if self.skip == "residual" and len(self.channel_mult) < 2:
            raise ValueError("skip 'residual' joins levels: channel_mult needs at least two")
        if self.skip == "residual" and self.skip_position != "before-norm":
            raise ValueError("skip 'residual' enters no norm: skip_position must be before-norm")

    def check_skip_scale(self, policy: "SkipScale") -> None:
        super().check_skip_scale(policy)
        if self.skip == "residual" and (getattr(policy, "renorm", False) or policy.kind == "profiled"):
            raise ValueError(f"skip scale {policy.kind!r} is of concatenations, and skip 'residual' has none")

    @classmethod
    def network(cls) -> type["UNet"]:
        from scalelong.model.unet import UNet

        return UNet

    @property
    def embedding_width(self) -> int:
        return 4 * self.model_channels

    @property
    def block_widths(self) -> tuple[int, ...]:
        up = [channels for channels in reversed(self.channels) for _ in range(self.num_res_blocks + 1)]
        if self.skip == "residual":
            up = []
            for channels, above in zip(self.channels[:0:-1], self.channels[-2::-1], strict=True):
                up += [*[channels] * self.num_res_blocks, above, above]  # narrowed, then doubled
            up += [self.channels[0]] * (self.num_res_blocks + 1)
        return (*self.encoder_widths, self.channels[-1], *up)

    @property
    def num_skips(self) -> int:
        levels = len(self.channel_mult)
        return levels - 1 if self.skip == "residual" else levels * (self.num_res_blocks + 1)

    def num_heads_of(self, channels: int) -> int:
        return channels // self.num_head_channels if self.num_head_channels else self.num_heads
