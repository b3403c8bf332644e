"""The shape of a UNet; imports no torch."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

from scalelong.model.backbone_config import BackboneConfig

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
class UNetConfig(BackboneConfig, architecture="UNet"):
    """The shape of a UNet; the names are those of guided-diffusion.

    Raises:
        ValueError: sizes that do not fit together, naming them.
    """

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
        if self.parametrization == "mup":
            self.base_config()
        for name in ("channel_mult", "attention_resolutions"):
            value = getattr(self, name)
            if not isinstance(value, list | tuple) or not all(isinstance(part, int | float) for part in value):
                raise ValueError(f"{name} is a tuple of numbers, got {value!r}")
            object.__setattr__(self, name, tuple(value))  # as lists they come from JSON
        self.check_at_least(1, "model_channels", "num_res_blocks", "num_heads", "num_groups")
        self.check_at_least(0, "num_head_channels", "norm_eps")
        check_position(self.skip_position)
        self._check_skip()
        if self.context_tokens:
            raise ValueError(f"a UNet takes no text, got context_tokens {self.context_tokens}")
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
        self.check_conditions()

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
    def block_widths(self) -> tuple[int, ...]:
        first, *others = self.channels
        down = [first] * (1 + self.num_res_blocks)
        for above, channels in zip(self.channels, others, strict=False):
            down += [above, *[channels] * self.num_res_blocks]  # halved, then widened
        up = [channels for channels in reversed(self.channels) for _ in range(self.num_res_blocks + 1)]
        if self.skip == "residual":
            up = []
            for channels, above in zip(self.channels[:0:-1], self.channels[-2::-1], strict=True):
                up += [*[channels] * self.num_res_blocks, above, above]  # narrowed, then doubled
            up += [first] * (self.num_res_blocks + 1)
        return (*down, self.channels[-1], *up)

    @property
    def num_skips(self) -> int:
        levels = len(self.channel_mult)
        return levels - 1 if self.skip == "residual" else levels * (self.num_res_blocks + 1)

    def num_heads_of(self, channels: int) -> int:
        return channels // self.num_head_channels if self.num_head_channels else self.num_heads
