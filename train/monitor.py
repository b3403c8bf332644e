"""What the long skips do during training: the quantities of ScaleLong's analysis (arXiv:2310.13545), per skip."""

from collections.abc import Callable

import torch
from torch import Tensor

from scalelong.model.backbone import Backbone
from scalelong.model.skip_scale import LongSkip


class SkipMonitor:
    """Takes down what a backbone reports of its long skips while ``active``; costs nothing otherwise.

    For skip i (1 the outermost) it keeps, averaged over the batch:
    ``skip/<i>/scale``: the factor (of gates the mean); ``skip/<i>/feature_norm``: the L2 norm of the skip's features
    before scaling; ``skip/<i>/hidden_norm``: that of the block's output, the h_i whose oscillation the paper bounds;
    ``skip/<i>/common_scale``: the factor of the whole concatenation, where the policy renormalises.
    """

    def __init__(self, model: Backbone):
        self._model = model
        self._stop: Callable[[], None] | None = None
        self._values: dict[str, Tensor | float] = {}

    @property
    def active(self) -> bool:
        return self._stop is not None

    @active.setter
    def active(self, active: bool) -> None:
        if active and self._stop is None:
            self._stop = self._model.watch_skips(self._record)
        elif not active and self._stop is not None:
            self._stop()
            self._stop = None

    @torch.no_grad()
    def _record(self, skip: LongSkip, output: Tensor) -> None:
        name = f"skip/{skip.i}"
        self._values[f"{name}/scale"] = 1.0 if skip.scale is None else _mean(skip.scale)
        self._values[f"{name}/feature_norm"] = _mean_norm(skip.features)
        self._values[f"{name}/hidden_norm"] = _mean_norm(output)
        if skip.common is not None:
            self._values[f"{name}/common_scale"] = _mean(skip.common)

    def take(self) -> dict[str, float]:
        """The values of the last forward pass, outermost skip first."""
        values = {name: float(value) for name, value in self._values.items()}
        self._values.clear()
        return dict(sorted(values.items(), key=lambda item: int(item[0].split("/")[1])))


def _mean(scale: Tensor | float) -> Tensor | float:
    return scale.float().mean() if isinstance(scale, Tensor) else scale


def _mean_norm(features: Tensor) -> Tensor:
    return features.float().flatten(1).norm(dim=1).mean()
