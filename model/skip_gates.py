"""The learned gates of LS (ScaleLong, arXiv:2310.13545): factors in (0, 1) from the skip itself.

Shapes: B batch, T tokens, D width, C channels of the skip, * spatial dimensions.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from scalelong.model.skip_scale import SkipShape


def make_gates(skips: Sequence[SkipShape], reduction: int, *, shared: bool) -> nn.Module:
    """One gate network for all skips (where they are channels, for all of equal number), or one for each.

    Raises:
        ValueError: a network to be shared by skips of different numbers of tokens.
    """
    if not shared:
        # In execution order, as in the published checkpoints: the first belongs to the innermost skip, i = N.
        return nn.ModuleList(_make_gate(skip, reduction) for skip in skips)
    if skips[0].kind == "channels":
        return SharedChannelGates([skip.width for skip in skips], reduction)
    if len({skip.num_tokens for skip in skips}) > 1:
        raise ValueError("one gate network cannot be shared by skips of different numbers of tokens")
    return _make_gate(skips[0], reduction)


def _make_gate(skip: SkipShape, reduction: int) -> nn.Module:
    return TokenGate(skip.num_tokens, reduction) if skip.kind == "tokens" else ChannelGate(skip.width, reduction)


class Gate(nn.Module):
    """g = σ(W₂ relu(W₁ pooled)): one factor in (0, 1) for each of ``size`` pooled numbers, which it mixes.

    The weights keep nn.Linear's default initialisation, so that gates start near σ(0 ± 0.25), about one half.
    The state dict has the published names.
    """

    def __init__(self, size: int, reduction: int):
        super().__init__()
        hidden = max(1, size // reduction)
        self.layer1 = nn.Linear(size, hidden)
        self.layer2 = nn.Linear(hidden, size)

    def of_pooled(self, pooled: Tensor) -> Tensor:
        return torch.sigmoid(self.layer2(torch.relu(self.layer1(pooled))))


class TokenGate(Gate):
    """Pools each token over its features and excites across tokens: (B, T, D) to (B, T, 1)."""

    def forward(self, skip_BTD: Tensor) -> Tensor:
        return self.of_pooled(skip_BTD.mean(dim=-1)).unsqueeze(-1)


class ChannelGate(Gate):
    """Pools each channel over space and excites across channels: (B, C, *) to (B, C)."""

    def forward(self, skip: Tensor) -> Tensor:
        return self.of_pooled(skip.flatten(2).mean(dim=-1))


class SharedChannelGates(nn.ModuleDict):
    """One ``ChannelGate`` for each number of channels that occurs; how unequal skips share is not published."""

    def __init__(self, channels: Sequence[int], reduction: int):
        super().__init__({str(num_channels): ChannelGate(num_channels, reduction) for num_channels in channels})

    def forward(self, skip: Tensor) -> Tensor:
        return self[str(int(skip.shape[1]))](skip)  # a tracer's symbol too
