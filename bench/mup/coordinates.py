"""The coordinate check: how what layers put out goes with the width, as a network takes its first steps.

Two measures, each a mean absolute value over a fixed batch: the *size* of what a module puts out (Yang et al.,
arXiv:2203.03466, appendix D), and the *update*, what a layer's training has added to its output on the same input
(Yang, Simon, Bernstein, arXiv:2310.17813). A parametrisation is right where neither grows with the width. An update may
shrink: gradients of few tokens are noise in part, whose sum counts the less the wider the layer. A size may not.

A rate that is wrong by m shows in the update with a slope of nearly 1, in the size hardly: there the update stands
beside the size that the layer began with, and in a DiT beside the paths that the modulation opens. At a rate of 2^-7,
of sizes alone, the bugs of BUGS had slopes of 0.38 to 0.42 in a DiT, and of updates of 0.8 to 1; at 2^-9, where
features move little and nothing but the parametrisation shows, the right table is below 0.2 and they are above 0.9.
"""

import copy
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scalelong.model.backbone import Backbone
from scalelong.model.dit_config import DiTConfig
from scalelong.model.parameter_kinds import ParameterKind, kind_of
from scalelong.model.skip_profile import profile_skips
from scalelong.model.skip_scale import ProfiledScale, SkipScale
from scalelong.model.uvit_config import UViTConfig
from scalelong.train.optimizer_config import OptimizerConfig, OptimizerName
from scalelong.train.zero.engine import LEARNING_RATE_FACTOR, make_optimizer, matrices_of, optimizer_groups

Measure = Literal["size", "update"]
BATCH = 4
MODELS: dict[str, Any] = {
    "uvit": UViTConfig(img_size=8, patch_size=2, num_classes=4, width=64, depth=4, num_heads=4),
    "dit": DiTConfig(img_size=8, patch_size=2, num_classes=4, width=64, depth=4, num_heads=4, skip="layer-norm"),
}
"""The networks that are checked, small enough for seconds."""
IN_GATES = re.compile(r"(se|skip_gates)\.(.*\.)?layer\d")
"""What a gate of LS pools is a mean over features, smaller the more there are: its output is looked at, not this."""


@dataclass(frozen=True, kw_only=True)
class Check:
    """How networks are trained while they are looked at."""

    widths: tuple[int, ...] = (64, 128, 256)
    seeds: int = 4
    steps: int = 4
    learning_rate: float = 2**-9
    optimizer: OptimizerName = "adamw"


class Curve(NamedTuple):
    """A measure of one module after one step, over the widths; means over seeds."""

    layer: str
    measure: Measure
    step: int
    values: tuple[float, ...]
    """One for each width."""
    slope: float
    """Of log2 of the values over log2 of the width, by least squares."""

    @property
    def growth(self) -> float:
        """What the gate looks at; infinite where values are not finite."""
        if math.isnan(self.slope):
            return math.inf
        return abs(self.slope) if self.measure == "size" else self.slope


Make = Callable[[int], Backbone]
Bug = Callable[[ParameterKind, str], ParameterKind]
BUGS: dict[str, Bug] = {
    "skip-linear": lambda kind, name: replace(kind, learning_rate=1.0) if "skip_linear.weight" in name else kind,
    "readout": lambda kind, _: replace(kind, output=1.0),
    "qkv": lambda kind, name: replace(kind, learning_rate=1.0) if "qkv.weight" in name else kind,
}
"""Mistakes in the table of muP that the check has to find: rates that are not divided, an output not multiplied."""


def of_width(config: Any, width: int) -> Any:
    """The same network with more heads, or fewer, as wide.

    Raises:
        ValueError: a width that is no multiple of a head's.
    """
    head = config.width // config.num_heads
    if width % head:
        raise ValueError(f"width {width} is no multiple of the width {head} of a head")
    return replace(config, width=width, num_heads=width // head)


def networks(config: Any, policy: SkipScale, bug: str | None = None) -> Make:
    """What makes the network of a width, its table of parameters spoiled by a bug of BUGS if one is named.

    Factors that are yet to be measured (``ProfiledScale``) are those of each network on the batch of the check.
    """
    network: Any = config.network() if bug is None else spoiled(config.network(), BUGS[bug])

    def make(width: int) -> Backbone:
        if not isinstance(policy, ProfiledScale) or policy.factors:
            return network(of_width(config, width), skip_scale=policy)
        random = torch.get_rng_state()
        unmeasured = network(of_width(config, width), skip_scale=policy)
        images, _, times, labels = batch_of(unmeasured)
        factors = profile_skips(unmeasured, lambda: unmeasured(images, times, labels), share=policy.share)
        torch.set_rng_state(random)  # the same weights again
        return network(of_width(config, width), skip_scale=replace(policy, factors=factors))

    return make


def spoiled(network: Any, change: Bug) -> Any:
    """The network's class with another table of parameters."""

    class Spoiled(network):
        def parameter_kinds(self):
            kinds = super().parameter_kinds()
            rows = {name: kind_of(name, kinds) for name, _ in self.named_parameters()}
            return tuple(replace(change(row, name), names=name) for name, row in rows.items())

    return Spoiled


class Batch(NamedTuple):
    """What every network of a check is shown."""

    images: Tensor
    noise: Tensor
    times: Tensor
    labels: Tensor


def batch_of(model: Backbone) -> Batch:
    """Noise for images too, the same whatever the width."""
    config, generator = model.config, torch.Generator().manual_seed(7)
    images, noise = torch.randn(2, BATCH, config.in_channels, config.img_size, config.img_size, generator=generator)
    return Batch(images, noise, torch.linspace(10, 990, BATCH), torch.arange(BATCH))


def curves_of(make: Make, check: Check) -> list[Curve]:
    """Every module's curves, after every step."""
    found: list[dict[tuple[str, Measure, int], float]] = []
    for width in check.widths:
        sums: dict[tuple[str, Measure, int], float] = {}
        for seed in range(check.seeds):
            torch.manual_seed(seed)
            for key, value in coordinates(make(width), check):
                sums[key] = sums.get(key, 0.0) + value / check.seeds
        found.append(sums)
    curves = []
    for key in found[0]:
        values = tuple(sums[key] for sums in found)
        if all(values):  # what has not learned yet has no slope
            curves.append(Curve(*key, values, slope_of(check.widths, values)))
    return curves


def coordinates(model: Backbone, check: Check) -> Iterator[tuple[tuple[str, Measure, int], float]]:
    """Steps on one batch; (module, measure, step) and the value, after each step."""
    begun, batch = copy.deepcopy(model), batch_of(model)
    options = OptimizerConfig(kind=check.optimizer, beta1=0.9)
    matrices = matrices_of(model, options)
    optimizer = make_optimizer(optimizer_groups(model, 0.0, matrices), options, model, matrices)
    for group in optimizer.param_groups:
        group["lr"] = check.learning_rate * group[LEARNING_RATE_FACTOR]
    for step in range(1, check.steps + 1):
        optimizer.zero_grad()
        F.mse_loss(model(batch.images, batch.times, batch.labels), batch.noise).backward()
        optimizer.step()
        found: dict[tuple[str, Measure], Tensor] = {}
        stop = watch(model, begun, found)
        with torch.no_grad():
            model(batch.images, batch.times, batch.labels)
        stop()
        yield from (((*key, step), float(value)) for key, value in found.items())


def watch(model: Backbone, begun: Backbone, found: dict[tuple[str, Measure], Tensor]) -> Callable[[], None]:
    """Puts what modules put out into ``found``, until what it returns is called.

    Args:
        begun: the network as it was before it was trained.
    """

    def watcher(name: str, before: nn.Module) -> Callable[..., None]:
        learns = name != "" and any(True for _ in before.parameters(recurse=False))

        def report(_module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any], output: Tensor) -> None:
            found[name, "size"] = output.abs().mean()
            if learns:
                found[name, "update"] = (output - before(*inputs, **named)).abs().mean()

        return report

    modules = dict(begun.named_modules())
    handles = [
        module.register_forward_hook(watcher(name, modules[name]), with_kwargs=True)
        for name, module in model.named_modules()
        if not IN_GATES.search(name)
    ]

    def stop() -> None:
        for handle in handles:
            handle.remove()

    return stop


def slope_of(widths: Sequence[int], values: Sequence[float]) -> float:
    """Of log2 of the values over log2 of the widths, by least squares."""
    x = torch.tensor([math.log2(width) for width in widths], dtype=torch.float64)
    y = torch.tensor(values, dtype=torch.float64).log2()
    x = x - x.mean()
    return float((x * y).sum() / x.square().sum())


def layer_kind(name: str) -> str:
    """ "attn.qkv" of "in_blocks.3.attn.qkv": modules that differ in their block alone are of one kind."""
    name = re.sub(r"^(in_blocks\.\d+|mid_block|out_blocks\.\d+|blocks\.\d+)(\.|$)", r"block\2", name)
    return name.removeprefix("block.") or "network"


def worst_of_kinds(curves: Sequence[Curve]) -> Mapping[tuple[str, Measure], Curve]:
    """Of each kind of layer and measure the curve that grows most, of any layer, after any step."""
    worst: dict[tuple[str, Measure], Curve] = {}
    for curve in curves:
        key = layer_kind(curve.layer), curve.measure
        if key not in worst or curve.growth > worst[key].growth:
            worst[key] = curve
    return worst


def worst_growth(curves: Sequence[Curve]) -> float:
    """What the gate is of: the largest growth of any."""
    return max(curve.growth for curve in curves)
