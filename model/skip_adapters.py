"""Adapters on long skips for fine-tuning with everything else frozen: SCEdit's SC-Tuner (arXiv:2312.11392).

    s' = s + W2 gelu(W1 s),   W2 = 0 and its bias 0 at the start

of each token, or of each position, over ``rank`` hidden features. The network begins bit for bit as without, and
backward goes through the decoder alone.

Shapes: B batch, T tokens, D width, C channels of the skip, * spatial dimensions.
"""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from scalelong.model.skip_scale import SkipShape


class SkipAdapter(nn.Module):
    """s + W2 gelu(W1 s): (B, T, D) to the same, or (B, C, *)."""

    def __init__(self, skip: SkipShape, rank: int):
        super().__init__()
        self.over_channels = skip.kind == "channels"
        self.down, self.up = nn.Linear(skip.width, rank), nn.Linear(rank, skip.width)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, skip: Tensor) -> Tensor:
        features = skip.movedim(1, -1) if self.over_channels else skip
        change = self.up(F.gelu(self.down(features)))
        return skip + (change.movedim(-1, 1) if self.over_channels else change).to(skip.dtype)


def make_adapters(skips: Sequence[SkipShape], rank: int) -> nn.ModuleList:
    """One for each skip, in execution order: the first belongs to the innermost."""
    return nn.ModuleList(SkipAdapter(skip, rank) for skip in skips)


def freeze_all_but_adapters(network: nn.Module) -> None:
    """Leaves the adapters of a network to be trained, and nothing else.

    Raises:
        ValueError: a network without adapters: no policy "adapter" is in it.
    """
    adapters = [module for module in network.modules() if isinstance(module, SkipAdapter)]
    if not adapters:
        raise ValueError(f"this {type(network).__name__} has no adapters on its skips (skip scale 'adapter')")
    network.requires_grad_(False)
    for adapter in adapters:
        adapter.requires_grad_(True)
