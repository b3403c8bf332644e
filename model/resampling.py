"""How a UNet changes the side of its features: layers with a convolution, and plain functions.

Shapes: B batch, C channels, H height, W width.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from scalelong.model.skip_layers import Conv3x3
from scalelong.model.unet_config import UNetConfig


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
