"""The exponential moving average of the weights, laid out as the weights are: sharded where they are (ZeRO 3)."""

import torch
from torch import Tensor, nn

from scalelong.train.engine import local_shards, shards_of


class Ema:
    """Starts at the weights; every step moves it a share of (1 - decay) towards them."""

    def __init__(self, module: nn.Module, decay: float):
        self.module, self.decay = module, decay
        self.shards = [weights.clone() for weights in local_shards(module)]

    @torch.no_grad()
    def update(self) -> None:
        # Looked up anew each time: ZeRO may move its buffers.
        torch._foreach_lerp_(self.shards, local_shards(self.module), 1 - self.decay)

    def restore(self, whole: dict[str, Tensor]) -> None:
        self.shards = shards_of(self.module, whole)
