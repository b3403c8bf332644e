"""Parameters by kind: how they begin, and how the optimizer and the forward pass treat them.

Each network's file has a table of these. A parametrisation is another table, or one made of that (docs/extending.md).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn


@dataclass(frozen=True)
class ParameterKind:
    """A row of the table of a network: parameters that are treated alike. The first row whose pattern fits counts."""

    names: str
    """Patterns of names, as a shell's, separated by blanks."""
    init: float | Callable[[Tensor], Any] | None = None
    """The standard deviation of a normal distribution that is cut at +-2; a function that fills a tensor; None: as
    PyTorch's layer begins."""
    learning_rate: float = 1.0
    """Multiplies the run's learning rate."""
    weight_decay: float = 1.0
    """Multiplies the run's weight decay."""
    output: float = 1.0
    """Multiplies what the layer of these parameters puts out."""
    epsilon: float = 1.0
    """Multiplies the epsilon that Adam adds to the root of the mean squared gradient."""
    keeps_init: bool = False
    """They begin so in every parametrisation."""

    def fits(self, name: str) -> bool:
        return any(fnmatchcase(name, pattern) for pattern in self.names.split())

    def start(self, parameter: Tensor) -> None:
        """Gives a parameter its first values."""
        if callable(self.init):
            self.init(parameter)
        elif self.init is not None:
            nn.init.trunc_normal_(parameter, std=self.init)


def kind_of(name: str, kinds: Sequence[ParameterKind]) -> ParameterKind:
    """
    Raises:
        ValueError: no row fits the name.
    """
    for kind in kinds:
        if kind.fits(name):
            return kind
    raise ValueError(f"the table of parameters has no row for {name}")


class OutputMultiplier:
    """A forward hook that multiplies what a layer puts out."""

    def __init__(self, factor: float):
        self.factor = factor

    def __call__(self, _layer: nn.Module, _inputs: object, output: Tensor) -> Tensor:
        return self.factor * output


def multiply_outputs(network: nn.Module, kinds: Sequence[ParameterKind]) -> None:
    """Puts the multipliers of the table in place, of no layer twice."""
    for layer in network.modules():
        hooks = layer._forward_hooks
        for key in [key for key, hook in hooks.items() if isinstance(hook, OutputMultiplier)]:
            del hooks[key]
    factors: dict[str, float] = {}
    for name, _ in network.named_parameters():
        factor = kind_of(name, kinds).output
        if factor != 1.0:
            factors[name.rpartition(".")[0]] = factor
    for name, factor in factors.items():
        network.get_submodule(name).register_forward_hook(OutputMultiplier(factor))
