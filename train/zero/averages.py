"""Moving averages of the weights, each rank with the part whose optimizer state it holds (ZeRO 1 to 3).

Beside one of a fixed decay, power-function averages (Karras et al., arXiv:2312.02696), and one of any length made
afterwards. After T steps the weights of step t count in proportion to t^gamma: the average's profile over time is
p(t) = (gamma + 1) t^gamma / T^(gamma + 1) on (0, T]. Its standard deviation is a fixed share of T, the relative width
("std"), by which an average is called. Averages of two widths kept at many times span other profiles well, so that an
average that nobody kept can be composed as a linear combination of those that were.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from scalelong.model.linear_wrappers import sigma_layers
from scalelong.train.errors import UserError
from scalelong.train.zero import shards

FIXED_DECAY = "ema"
Network = TypeVar("Network", bound=nn.Module)


@dataclass(frozen=True)
class Profile:
    """The power-function average with ``exponent`` gamma of the weights of steps 1 to ``step``."""

    step: int
    exponent: float


def exponent_of_std(std: float) -> float:
    """gamma of a relative width in (0, LARGEST_STD].

    With a, b the moments of t/T under the profile, std^2 = b - a^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3)), a cubic
    in gamma whose largest real root is the one that is not negative.
    """
    inverse = std**-2
    roots = np.roots([1.0, 7.0, 16.0 - inverse, 12.0 - inverse])
    return max(0.0, float(roots[np.abs(roots.imag) < 1e-6 * np.abs(roots)].real.max()))


def share_of_newest(exponent: float, step: int) -> float:
    """How far the average moves towards the weights of ``step``, the first of which is 1.

    Repeated, this gives step t the part of the profile that lies in (t - 1, t], exactly.
    """
    return -math.expm1((exponent + 1) * math.log1p(-1 / step)) if step > 1 else 1.0


def compose(kept: Sequence[Profile], wanted: Profile) -> tuple[np.ndarray, float]:
    """Which combination of kept averages comes closest to another, in least squares over the profiles.

    The coefficients sum to 1, so that weights that stand still come out unchanged.

    Args:
        kept: the profiles of K averages.
        wanted: the profile to make.

    Returns:
        The (K,) coefficients, and the distance of the two profiles over the norm of the wanted one.
    """
    norms = np.sqrt([_product(p, p) for p in kept])
    norm = math.sqrt(_product(wanted, wanted))
    # Profiles scaled to norm 1: the matrix has ones on its diagonal and is well scaled.
    products = np.array([[_product(a, b) for b in kept] for a in kept]) / np.outer(norms, norms)
    towards = np.array([_product(p, wanted) for p in kept]) / (norms * norm)
    sums = norm / norms
    system = np.block([[products, sums[:, None]], [sums[None, :], np.zeros((1, 1))]])
    solution = np.linalg.lstsq(system, np.append(towards, 1.0), rcond=1e-12)[0][:-1]
    squared_error = 1 - 2 * solution @ towards + solution @ products @ solution
    return solution * sums, math.sqrt(max(0.0, squared_error))


def _product(a: Profile, b: Profile) -> float:
    """The integral of the product of two profiles."""
    common = min(a.step, b.step)
    factor = (a.exponent + 1) * (b.exponent + 1) / (a.exponent + b.exponent + 1)
    within = (a.exponent + 1) * math.log(common / a.step) + (b.exponent + 1) * math.log(common / b.step)
    return factor / common * math.exp(within)


def name_of_std(std: float) -> str:
    """What the average of a relative width is called, in files too."""
    return f"ema-{std:g}"


class Ema:
    """The average of a fixed decay, which starts at the initial weights, and power-function averages of given widths.

    Args:
        engine: of DeepSpeed; its master weights are averaged in fp32.
        decay: of the average "ema", per step.
        rampup: its half-life is at most this share of the steps so far (Karras et al., arXiv:2206.00364); 0: any.
        stds: relative widths of further averages, called "ema-<std>".
    """

    def __init__(self, engine, decay: float, stds: Sequence[float] = (), *, rampup: float = 0.0):
        self.engine, self.decay, self.rampup = engine, decay, rampup
        self.exponents = {name_of_std(std): exponent_of_std(std) for std in stds}
        weights = shards.master_shards(engine)
        self.averages = {name: [w.clone() for w in weights] for name in (FIXED_DECAY, *self.exponents)}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Takes in the weights after step number ``step`` (the first is 1)."""
        # Looked up anew each time: ZeRO may move its buffers.
        weights = shards.master_shards(self.engine)
        decay = min(self.decay, 0.5 ** (1 / (self.rampup * step))) if self.rampup else self.decay
        torch._foreach_lerp_(self.averages[FIXED_DECAY], weights, 1 - decay)
        for name, exponent in self.exponents.items():
            torch._foreach_lerp_(self.averages[name], weights, share_of_newest(exponent, step))

    def restore(self, name: str, whole: dict[str, Tensor]) -> None:
        # In place: a network may have been made of them.
        for shard, restored in zip(self.averages[name], shards.shards_of(self.engine, whole), strict=True):
            shard.copy_(restored)


def averaged_network(ema: Ema, make_network: Callable[[], Network]) -> Network:
    """The average of the fixed decay as a network of its own, in evaluation mode, without gradients.

    Without ZeRO its weights are the average's own memory, which later updates change too; under ZeRO they are whole
    copies on every rank, as the average stands. Every rank must call it.

    Args:
        make_network: makes one of the kind that is trained; nothing is allocated or drawn for its weights.
    """
    with torch.device("meta"):
        network = make_network()
    network.load_state_dict(dict(shards.gathered(ema.engine, ema.averages[FIXED_DECAY])), assign=True)
    # What no state dict has, such as the frequencies of Fourier features, is made on the CPU.
    return network.to(ema.engine.device).requires_grad_(False).eval()


class Teacher:
    """The averaged network beside the one that is trained, for a loss that compares the two, under ZeRO 0 to 2.

    Args:
        ema, make_network: as ``averaged_network`` takes them.

    Raises:
        UserError: under ZeRO 3, which is there because no process has room for whole weights.
    """

    def __init__(self, ema: Ema, make_network: Callable[[], nn.Module]):
        if ema.engine.zero_optimization_stage() == 3:
            raise UserError("an averaged teacher needs whole weights on every process: take --zero-stage 0, 1 or 2")
        self.ema, self.network = ema, averaged_network(ema, make_network)

    @torch.no_grad()
    def follow(self) -> None:
        """Takes in the average as it stands, which without ZeRO it has already. Every rank must call it."""
        if self.ema.engine.zero_optimization_stage() > 0:
            weights = dict(self.network.named_parameters())
            for name, whole in shards.gathered(self.ema.engine, self.ema.averages[FIXED_DECAY]):
                weights[name].copy_(whole)
        for _, layer in sigma_layers(self.network):
            layer.power_step(layer.weight)
