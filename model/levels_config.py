"""What the shapes of all UNets have in common: levels, each half as large as the one above; imports no torch."""

from dataclasses import dataclass

from scalelong.model.backbone_config import BackboneConfig


@dataclass(frozen=True, kw_only=True)
class LevelsConfig(BackboneConfig, architecture=None):
    """The levels of a UNet; the names are those of guided-diffusion.

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
    num_head_channels: int = 0
    """Channels of an attention head; 0: num_heads says, where there is such a field."""
    dropout: float = 0.0
    """Share of the activations dropped before a block's second convolution."""

    def __post_init__(self):
        super().__post_init__()
        if self.parametrization == "mup":
            self.base_config()
        for name in ("channel_mult", "attention_resolutions"):
            value = getattr(self, name)
            if not isinstance(value, list | tuple) or not all(isinstance(part, int | float) for part in value):
                raise ValueError(f"{name} is a tuple of numbers, got {value!r}")
            object.__setattr__(self, name, tuple(value))  # as lists they come from JSON
        self.check_at_least(1, "model_channels", "num_res_blocks")
        if self.context_tokens:
            raise ValueError(f"a {self.architecture} takes no text, got context_tokens {self.context_tokens}")
        if not self.channel_mult or min(self.channels) < 1:
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
        self.check_conditions()

    def check_heads(self, channels: int) -> None:
        """
        Raises:
            ValueError: channels that are no whole number of heads.
        """
        if self.num_head_channels and channels % self.num_head_channels:
            raise ValueError(f"{channels} channels are no heads of num_head_channels {self.num_head_channels}")

    @property
    def channels(self) -> tuple[int, ...]:
        """Of each level."""
        return tuple(int(self.model_channels * mult) for mult in self.channel_mult)

    @property
    def factors(self) -> tuple[int, ...]:
        """By which each level is smaller than the image."""
        return tuple(2**level for level in range(len(self.channel_mult)))

    @property
    def encoder_widths(self) -> tuple[int, ...]:
        """Features of what each block of the encoder puts out, the first layer among them."""
        first, *others = self.channels
        widths = [first] * (1 + self.num_res_blocks)
        for above, channels in zip(self.channels, others, strict=False):
            widths += [above, *[channels] * self.num_res_blocks]  # halved, then widened
        return tuple(widths)
