"""What the long skips do during training: the quantities of ScaleLong's analysis (arXiv:2310.13545), per skip."""

import torch
from torch import Tensor, nn


class SkipMonitor:
    """Watches a backbone's decoder blocks while ``active``; costs nothing otherwise.

    For skip i (1 the outermost) it keeps, averaged over the batch:
    ``skip/<i>/scale``: the factor (of gates the mean); ``skip/<i>/feature_norm``: the L2 norm of the skip's features
    before scaling; ``skip/<i>/hidden_norm``: that of the block's output, the h_i whose oscillation the paper bounds.
    """

    def __init__(self, model: nn.Module):
        self.active = False
        self._values: dict[str, Tensor | float] = {}
        for i, block in model.skip_blocks():  # type: ignore[operator]
            block.register_forward_hook(self._hook(i))

    def _hook(self, i: int):
        @torch.no_grad()
        def record(_module: nn.Module, inputs: tuple, output: Tensor) -> None:
            if not self.active:
                return
            *_, skip, scale = inputs
            self._values[f"skip/{i}/scale"] = 1.0 if scale is None else _mean(scale)
            self._values[f"skip/{i}/feature_norm"] = _mean_norm(skip)
            self._values[f"skip/{i}/hidden_norm"] = _mean_norm(output)

        return record

    def take(self) -> dict[str, float]:
        """The values of the last forward pass, outermost skip first."""
        values = {name: float(value) for name, value in self._values.items()}
        self._values.clear()
        return dict(sorted(values.items(), key=lambda item: int(item[0].split("/")[1])))


def _mean(scale: Tensor | float) -> Tensor | float:
    return scale.float().mean() if isinstance(scale, Tensor) else scale


def _mean_norm(features: Tensor) -> Tensor:
    return features.float().flatten(1).norm(dim=1).mean()
