"""Moving averages of the weights; each rank holds the part whose optimizer state it holds (ZeRO 1 to 3)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from scalelong.train import engine as ds
from scalelong.train.ema_profile import exponent_of_std, share_of_newest

FIXED_DECAY = "ema"


def name_of_std(std: float) -> str:
    """What the average of a relative width is called, in files too."""
    return f"ema-{std:g}"


class Ema:
    """The average of a fixed decay, which starts at the initial weights, and power-function averages of given widths.

    Args:
        engine: of DeepSpeed; its master weights are averaged in fp32.
        decay: of the average "ema", per step.
        stds: relative widths of further averages (``ema_profile``), called "ema-<std>".
    """

    def __init__(self, engine, decay: float, stds: Sequence[float] = ()):
        self.engine, self.decay = engine, decay
        self.exponents = {name_of_std(std): exponent_of_std(std) for std in stds}
        weights = ds.master_shards(engine)
        self.averages = {name: [w.clone() for w in weights] for name in (FIXED_DECAY, *self.exponents)}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Takes in the weights after step number ``step`` (the first is 1)."""
        # Looked up anew each time: ZeRO may move its buffers.
        weights = ds.master_shards(self.engine)
        torch._foreach_lerp_(self.averages[FIXED_DECAY], weights, 1 - self.decay)
        for name, exponent in self.exponents.items():
            torch._foreach_lerp_(self.averages[name], weights, share_of_newest(exponent, step))

    def restore(self, name: str, whole: dict[str, Tensor]) -> None:
        self.averages[name] = ds.shards_of(self.engine, whole)
