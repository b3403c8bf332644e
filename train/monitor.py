"""What blocks and long skips do during training: the quantities of ScaleLong's analysis (arXiv:2310.13545)."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from scalelong.model.backbone import Backbone
from scalelong.model.skip_scale import LongSkip

OUTSIDE = "outside"
"""What stands for the parameters that belong to no block: embeddings, the ends of the network, gates."""


class Monitor:
    """Takes down what a backbone reports of its blocks and long skips while ``active``; costs nothing otherwise.

    For block n (0 the first that is computed) it keeps:
    ``block/<n>/feature_norm``: the L2 norm of what it puts out, averaged over the batch;
    ``block/<n>/magnitude``: the root mean square of the same (arXiv:2312.02696: what EDM2 preserves);
    and of its parameters, before the step:
    ``block/<n>/gradient_norm``, ``block/<n>/weight_norm``: the L2 norms of their gradients and of themselves;
    ``block/<n>/gradient_alignment``: the cosine of both, by which a small step changes the weights' norm (0 where
    weights are normalised, as their gradients then lie at right angles to them).
    ``block/outside/...`` is the same of all parameters outside of blocks.

    For skip i (1 the outermost) it keeps, averaged over the batch:
    ``skip/<i>/scale``: the factor (of gates the mean); ``skip/<i>/scale_spread``: of gates, their standard deviation;
    ``skip/<i>/kappa_eff``: the weight of a feature of the skip over that of one of the hidden stream, of gates the root
    mean square: by what constant factor the policy acts, whatever it multiplies both with;
    ``skip/<i>/feature_norm``: the L2 norm of the skip's features before scaling; ``skip/<i>/hidden_norm``: that of the
    block's output, the h_i whose oscillation the paper bounds; ``skip/<i>/common_scale``: the factor of the whole
    concatenation, where the policy renormalises.
    """

    def __init__(self, model: Backbone):
        self._model = model
        self.blocks = [name for name, _ in model.named_blocks()]
        """The names of the blocks, by their numbers."""
        self._block_of_parameter = torch.tensor([self._number_of(name) for name, _ in model.named_parameters()])
        self._stops: list[Callable[[], None]] = []
        self._values: dict[str, Tensor | float] = {}
        self._norms_NB: dict[int, Tensor] = {}
        # A skip is what a block of the encoder has put out: its norms are not computed twice.
        self._known = WeakIdKeyDictionary()

    @property
    def active(self) -> bool:
        return bool(self._stops)

    @active.setter
    def active(self, active: bool) -> None:
        if active and not self._stops:
            self._stops = [self._model.watch_blocks(self._record_block), self._model.watch_skips(self._record_skip)]
        elif not active:
            for stop in self._stops:
                stop()
            self._stops = []

    @torch.no_grad()
    def _record_block(self, number: int, output: Tensor) -> None:
        self._norms_NB[number] = norms_B = self._norms_of(output)
        self._values[f"block/{number}/feature_norm"] = norms_B.mean()
        self._values[f"block/{number}/magnitude"] = (norms_B.square().sum() / max(output.numel(), 1)).sqrt()

    @torch.no_grad()
    def _record_skip(self, skip: LongSkip, output: Tensor) -> None:
        name, scale = f"skip/{skip.i}", skip.scale
        self._values[f"{name}/scale"] = 1.0 if scale is None else _mean(scale)
        self._values[f"{name}/kappa_eff"] = 1.0 if scale is None else _root_mean_square(scale)
        if isinstance(scale, Tensor) and scale.numel() > 1:
            self._values[f"{name}/scale_spread"] = scale.float().std()
        self._values[f"{name}/feature_norm"] = self._norms_of(skip.features).mean()
        self._values[f"{name}/hidden_norm"] = self._norms_of(output).mean()
        if skip.common is not None:
            self._values[f"{name}/common_scale"] = _mean(skip.common)

    def record_gradients(
        self, norms_P: Tensor, weight_norms_P: Tensor | None = None, products_P: Tensor | None = None
    ) -> None:
        """Takes the gradients' norms, one for each of the model's parameters in their order, without the loss scale.

        Those of what the loss learns stand behind them and are left out.

        Args:
            weight_norms_P, products_P: norms of the parameters, and their inner products with the gradients.
        """
        gradient_norms_N = self._of_blocks(norms_P.square()).sqrt()
        found = {"gradient_norm": gradient_norms_N}
        if weight_norms_P is not None and products_P is not None:
            found["weight_norm"] = weight_norms_N = self._of_blocks(weight_norms_P.square()).sqrt()
            lengths_N = (weight_norms_N * gradient_norms_N).clamp_min(torch.finfo(torch.float32).tiny)
            found["gradient_alignment"] = self._of_blocks(products_P) / lengths_N
        for name, values_N in found.items():
            for number, value in enumerate(values_N):
                block = number if number < len(self.blocks) else OUTSIDE
                self._values[f"block/{block}/{name}"] = value

    def _of_blocks(self, values_P: Tensor) -> Tensor:
        """Sums over the parameters of each block, and of those outside."""
        sums_N = values_P.new_zeros(len(self.blocks) + 1)
        values_P = values_P[: len(self._block_of_parameter)]
        return sums_N.index_add_(0, self._block_of_parameter.to(values_P.device), values_P)

    def take(self) -> dict[str, float]:
        """The values of the last forward pass: skips, outermost first, then blocks."""
        # One transfer from a GPU, not one for each.
        tensors = {name: value for name, value in self._values.items() if isinstance(value, Tensor)}
        numbers = torch.stack([value.float() for value in tensors.values()]).tolist() if tensors else []
        values: dict[str, float] = {**self._values, **dict(zip(tensors, numbers, strict=True))}  # pyright: ignore
        self._values.clear()
        return dict(sorted(values.items(), key=_place))

    def take_outliers(self, count: int = 3) -> list[tuple[float, int]]:
        """The images of the last batch whose features stand out: (times the batch's median norm, place in the batch).

        In the block where each stands out most, those that stand out most first; norms that are not finite count as
        infinite. Empty if nothing was watched since the last call.
        """
        if not self._norms_NB:
            return []
        norms_NB = torch.stack([self._norms_NB[number] for number in sorted(self._norms_NB)]).nan_to_num(nan=torch.inf)
        self._norms_NB = {}
        ratios_B = (norms_NB / norms_NB.median(dim=1, keepdim=True).values).nan_to_num(nan=torch.inf).amax(dim=0)
        top = ratios_B.topk(min(count, len(ratios_B)))
        return list(zip(top.values.tolist(), top.indices.tolist(), strict=True))

    def _norms_of(self, features: Tensor) -> Tensor:
        if features not in self._known:
            self._known[features] = features.detach().float().flatten(1).norm(dim=1)
        return self._known[features]

    def _number_of(self, parameter: str) -> int:
        places = (number for number, block in enumerate(self.blocks) if parameter.startswith(block + "."))
        return next(places, len(self.blocks))


def _mean(scale: Tensor | float) -> Tensor | float:
    return scale.float().mean() if isinstance(scale, Tensor) else scale


def _root_mean_square(scale: Tensor | float) -> Tensor | float:
    return scale.float().square().mean().sqrt() if isinstance(scale, Tensor) else abs(scale)


def _place(item: tuple[str, float]) -> tuple[bool, float]:
    """Skips before blocks, by their numbers."""
    kind, number, _ = item[0].split("/")
    return kind != "skip", float("inf") if number == OUTSIDE else int(number)
