"""The shape of EDM2's UNet; imports no torch."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from scalelong.model.backbone_config import BackboneConfig

if TYPE_CHECKING:
    from scalelong.model.edm2_unet import EDM2UNet


@dataclass(frozen=True, kw_only=True)
class EDM2UNetConfig(BackboneConfig, architecture="EDM2UNet"):
    """The shape of EDM2's UNet in its configuration G; its layers keep the magnitude of what passes.

    Raises:
        ValueError: sizes that do not fit together, naming them.
    """

    model_channels: int = 192
    """Channels of the first level."""
    channel_mult: tuple[int, ...] = (1, 2, 3, 4)
    """Channels of each level over model_channels; each level halves the side."""
    num_res_blocks: int = 3
    """Residual blocks of a level of the encoder; the decoder has one more."""
    attention_resolutions: tuple[int, ...] = (4, 8)
    """Where blocks attend, as downsampling factors."""
    num_head_channels: int = 64
    """Channels of an attention head."""
    dropout: float = 0.0
    """Share of the activations dropped before a block's second convolution."""

    def __post_init__(self):
        super().__post_init__()
        if self.parametrization == "mup":
            self.base_config()
        for name in ("channel_mult", "attention_resolutions"):
            value = getattr(self, name)
            if not isinstance(value, list | tuple) or not all(isinstance(part, int) for part in value):
                raise ValueError(f"{name} is a tuple of whole numbers, got {value!r}")
            object.__setattr__(self, name, tuple(value))  # as lists they come from JSON
        self.check_at_least(1, "model_channels", "num_res_blocks", "num_head_channels")
        if self.context_tokens:
            raise ValueError(f"EDM2's UNet takes no text, got context_tokens {self.context_tokens}")
        if not self.channel_mult or min(self.channel_mult) < 1:
            raise ValueError(f"channel_mult must give each level channels, got {self.channel_mult}")
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
        attending = [level for level in range(len(self.channels) - 1) if self.attends(level)]
        for channels in (*(self.channels[level] for level in attending), self.channels[-1]):
            if channels % self.num_head_channels:
                raise ValueError(f"{channels} channels are no heads of num_head_channels {self.num_head_channels}")
        self.check_conditions()

    @classmethod
    def network(cls) -> type["EDM2UNet"]:
        from scalelong.model.edm2_unet import EDM2UNet

        return EDM2UNet

    @property
    def preserves_magnitude(self) -> bool:
        return True

    @property
    def channels(self) -> tuple[int, ...]:
        """Of each level."""
        return tuple(self.model_channels * mult for mult in self.channel_mult)

    @property
    def factors(self) -> tuple[int, ...]:
        """By which each level is smaller than the image."""
        return tuple(2**level for level in range(len(self.channel_mult)))

    @property
    def embedding_width(self) -> int:
        return max(self.channels)

    @property
    def block_widths(self) -> tuple[int, ...]:
        first, *others = self.channels
        down = [first] * (1 + self.num_res_blocks)
        for above, channels in zip(self.channels, others, strict=False):
            down += [above, *[channels] * self.num_res_blocks]  # halved, then widened
        up = [self.channels[-1]] * (2 + self.num_res_blocks + 1)
        for below, channels in zip(self.channels[:0:-1], self.channels[-2::-1], strict=True):
            up += [below, *[channels] * (self.num_res_blocks + 1)]  # doubled, then narrowed
        return (*down, *up)

    @property
    def num_skips(self) -> int:
        return len(self.channel_mult) * (self.num_res_blocks + 1)

    def attends(self, level: int) -> bool:
        """Whether the blocks of a level attend."""
        return self.factors[level] in self.attention_resolutions
