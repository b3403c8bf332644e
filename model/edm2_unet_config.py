"""The shape of EDM2's UNet; imports no torch."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from scalelong.model.levels_config import LevelsConfig

if TYPE_CHECKING:
    from scalelong.model.edm2_unet import EDM2UNet


@dataclass(frozen=True, kw_only=True)
class EDM2UNetConfig(LevelsConfig, architecture="EDM2UNet"):
    """The shape of EDM2's UNet in its configuration G; its layers keep the magnitude of what passes.

    Raises:
        ValueError: sizes that do not fit together, naming them.
    """

    model_channels: int = 192
    channel_mult: tuple[int, ...] = (1, 2, 3, 4)  # pyright: ignore[reportIncompatibleVariableOverride]
    num_res_blocks: int = 3
    attention_resolutions: tuple[int, ...] = (4, 8)
    num_head_channels: int = 64

    def __post_init__(self):
        super().__post_init__()
        if not all(isinstance(mult, int) for mult in self.channel_mult):
            raise ValueError(f"channel_mult is a tuple of whole numbers, got {self.channel_mult!r}")
        self.check_at_least(1, "num_head_channels")
        attending = [level for level in range(len(self.channels) - 1) if self.attends(level)]
        for channels in (*(self.channels[level] for level in attending), self.channels[-1]):
            self.check_heads(channels)

    @classmethod
    def network(cls) -> type["EDM2UNet"]:
        from scalelong.model.edm2_unet import EDM2UNet

        return EDM2UNet

    @property
    def preserves_magnitude(self) -> bool:
        return True

    @property
    def embedding_width(self) -> int:
        return max(self.channels)

    @property
    def block_widths(self) -> tuple[int, ...]:
        up = [self.channels[-1]] * (2 + self.num_res_blocks + 1)
        for below, channels in zip(self.channels[:0:-1], self.channels[-2::-1], strict=True):
            up += [below, *[channels] * (self.num_res_blocks + 1)]  # doubled, then narrowed
        return (*self.encoder_widths, *up)

    @property
    def num_skips(self) -> int:
        return len(self.channel_mult) * (self.num_res_blocks + 1)

    def attends(self, level: int) -> bool:
        """Whether the blocks of a level attend."""
        return self.factors[level] in self.attention_resolutions
