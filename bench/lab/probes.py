"""What a network does to its input, on a few real images: perturbations, its Jacobian, norms from block to block.

Shapes: B batch, C channels, H height, W width, N blocks.
"""

import copy
import math
import time
from collections.abc import Callable
from dataclasses import replace
from statistics import median
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from scalelong.bench.lab.metrics import growth_exponent
from scalelong.bench.lab.probe_points import DELTAS, TIMES
from scalelong.model.backbone import Backbone
from scalelong.model.linear_layers import SkipLinear
from scalelong.model.plain_layers import use_plain_layers
from scalelong.model.skip_scale import LongSkip
from scalelong.train.config import TrainConfig
from scalelong.train.data.batches import Batch, prepare_source, read_batches
from scalelong.train.data.order import BatchPlan
from scalelong.train.data.source import open_data
from scalelong.train.objective import make_objective

NUM_IMAGES = 16
NUM_IMAGES_OF_JACOBIAN = 4
POWER_ITERATIONS = 12


class Noisy(NamedTuple):
    """Images as the network is shown them at one time."""

    x_BCHW: Tensor
    t_B: Tensor
    condition: Tensor | None
    noise_BCHW: Tensor


def read_batch(config: TrainConfig) -> Batch:
    """The first images of the training data, the same for every seed.

    Raises:
        UserError: nothing to read there.
    """
    config = replace(config, seed=0, data=replace(config.data, reader="pillow"))
    source = prepare_source(config, open_data(config))
    return next(read_batches(config, source, BatchPlan(0, NUM_IMAGES), num_threads=1, device=torch.device("cpu")))


def noisy(config: TrainConfig, batch: Batch, time_u: float) -> Noisy:
    """A batch corrupted to the time that the objective makes of ``time_u`` in [0, 1)."""
    objective = make_objective(config.objective)
    t_B = objective.draw_time(torch.full((len(batch.images_BCHW),), time_u))
    levels = objective.process.levels(t_B[:, None, None, None])
    x_BCHW = objective.prediction.shown(objective.corrupt(batch.images_BCHW, batch.noise_BCHW, *levels), *levels)
    return Noisy(x_BCHW, objective.process.network_time(t_B), batch.condition, batch.noise_BCHW)


def perturbation_gain(network: Callable[[Tensor], Tensor], x_BCHW: Tensor, delta: float, *, seed: int = 0) -> float:
    """How much larger a random change of the input comes out: E ||f(x + delta r u) - f(x)|| / (delta r ||u||).

    u is standard normal and r the root mean square of each image (ScaleLong, arXiv:2310.13545, theorem 3.4, whose bound
    is eps_delta (sum kappa_i M_0^i + c_0)).

    Args:
        delta: the size of the change, in root mean squares of the image.
    """
    u_BCHW = torch.randn(x_BCHW.shape, generator=torch.Generator().manual_seed(seed), dtype=x_BCHW.dtype)
    change_BCHW = delta * x_BCHW.square().mean(dim=(1, 2, 3), keepdim=True).sqrt() * u_BCHW
    with torch.no_grad():
        difference_BCHW = network(x_BCHW + change_BCHW) - network(x_BCHW)
    return float((_norms(difference_BCHW) / _norms(change_BCHW)).mean())


def jacobian_norm(network: Callable[[Tensor], Tensor], x_BCHW: Tensor, *, iterations: int = POWER_ITERATIONS) -> float:
    """sigma_max(J), the largest gain that any small change of the input has: the mean over images.

    Power iteration on J^T J, v <- J^T J v / ||J^T J v||, sigma = ||J v|| (Golub and Van Loan, section 8.2), by products
    of torch.func. Images do not mix, so that the Jacobian of a batch is that of each image.
    """
    v_BCHW = torch.randn(x_BCHW.shape, generator=torch.Generator().manual_seed(0), dtype=x_BCHW.dtype)
    sigma_B = v_BCHW.new_zeros(len(x_BCHW))
    # The fused attention kernels of CPUs have no forward derivative.
    with sdpa_kernel(SDPBackend.MATH):
        pull_back = torch.func.vjp(network, x_BCHW)[1]
        for _ in range(iterations):
            v_BCHW = v_BCHW / _norms(v_BCHW)[:, None, None, None].clamp(min=1e-30)
            pushed_BCHW = torch.func.jvp(network, (x_BCHW,), (v_BCHW,))[1]
            sigma_B = _norms(pushed_BCHW)
            (v_BCHW,) = pull_back(pushed_BCHW)
    return float(sigma_B.detach().mean())


def mean_mode_share(features: Tensor) -> float:
    """How much of the features is the same everywhere: L ||mean over tokens of h||² / ||h||_F², in [0, 1].

    1: all tokens (pixels) are alike, as where the network has collapsed to its mean mode (rank collapse, Dong et al.,
    arXiv:2103.03404, measures the rest, ||h - 1 mean h||).

    Args:
        features: (B, L, D) of tokens, or (B, C, H, W).
    """
    h_BLD = features.float() if features.dim() == 3 else features.float().flatten(2).transpose(1, 2)
    mean_BD = h_BLD.mean(dim=1)
    shares_B = h_BLD.shape[1] * mean_BD.square().sum(dim=1) / h_BLD.square().sum(dim=(1, 2)).clamp(min=1e-30)
    return float(shares_B.mean())


class DepthLawPoint(NamedTuple):
    """A network's place in the depth law (metrics.fit_depth_law)."""

    kappa_squares: float
    """Of the factors of all skips, gates by their mean square."""
    ratio: float
    """E‖h_0‖² / ‖x‖²: what the last block puts out over what the first does."""


@torch.no_grad()
def depth_law_point(model: Backbone, batch: Noisy) -> DepthLawPoint:
    """Sum of kappa_i² and E‖h_0‖² / ‖x‖² of a network on a batch."""
    squares: list[float] = []
    outputs: list[Tensor] = []

    def note(skip: LongSkip, _output: Tensor) -> None:
        scale = 1.0 if skip.scale is None else skip.scale
        squares.append(float(scale.float().square().mean()) if isinstance(scale, Tensor) else scale**2)

    stops = [model.watch_skips(note), model.watch_blocks(lambda _, output: outputs.append(output))]
    model(batch.x_BCHW, batch.t_B, batch.condition)
    for stop in stops:
        stop()
    ratios_B = _norms(outputs[-1]).square() / _norms(outputs[0]).square()
    return DepthLawPoint(sum(squares), float(ratios_B.mean()))


def preserve_norms(model: Backbone) -> None:
    """Gives the projections of skips the weights that the theorem takes: each half of variance 1 / its inputs.

    ||W_h h||² is then ||h||² on average, and ||W_s s||² is ||s||². The published U-ViT begins with a standard deviation
    of 0.02, at which every projection shrinks the stream.
    """
    for layer in model.modules():
        if isinstance(layer, SkipLinear):
            torch.nn.init.normal_(layer.weight, std=(layer.in_features / 2) ** -0.5)


def probe(model: Backbone, config: TrainConfig) -> dict[str, float | list[float]]:
    """Everything that is measured of a network, by the columns of the table."""
    batch = read_batch(config)
    model = model.eval()
    found: dict[str, float | list[float]] = {}
    for delta in DELTAS:
        found[f"gain_{delta:g}"] = [gain_at(model, noisy(config, batch, time_u), delta) for time_u in TIMES]
    at = noisy(config, batch, 0.5)
    few = Noisy(*(None if part is None else part[:NUM_IMAGES_OF_JACOBIAN] for part in at))  # pyright: ignore
    found["sigma_max"] = jacobian_norm(lambda x: model(x, few.t_B, few.condition), few.x_BCHW)
    names = [name for name, _ in model.named_blocks()]
    with torch.no_grad():
        features = model.features(at.x_BCHW, at.t_B, at.condition, blocks=names)
    found["mean_mode_share"] = [mean_mode_share(features[name]) for name in names]
    law = depth_law_point(model, at)
    return {**found, "kappa_squares": law.kappa_squares, "norm_ratio": law.ratio, **growth(model, at)}


def operators_speedup(model: Backbone, config: TrainConfig, *, rounds: int = 5) -> float:
    """How many times faster the passes of a training step are by this project's operators than by PyTorch's layers.

    Forward and backward of one batch of the run, on the CPU, by the same network with its layers and with PyTorch's
    (``use_plain_layers``), in turns, so that a busy machine slows both: the median of the ratios of each turn.
    """
    at = noisy(config, read_batch(config), 0.5)
    times = -(-config.images_per_step // len(at.x_BCHW))
    x_BCHW, t_B = at.x_BCHW.repeat(times, 1, 1, 1), at.t_B.repeat(times)
    condition = None if at.condition is None else at.condition.repeat(times, *[1] * (at.condition.dim() - 1))
    networks = use_plain_layers(copy.deepcopy(model)).train(), copy.deepcopy(model).train()

    def seconds(network: Backbone) -> float:
        began = time.perf_counter()
        network(x_BCHW, t_B, condition).square().mean().backward()
        return time.perf_counter() - began

    turns = [[seconds(network) for network in networks] for _ in range(1 + rounds)]
    return median(plain / fused for plain, fused in turns[1:])


def gain_at(model: Backbone, at: Noisy, delta: float) -> float:
    return perturbation_gain(lambda x_BCHW: model(x_BCHW, at.t_B, at.condition), at.x_BCHW, delta)


def growth(model: Backbone, at: Noisy) -> dict[str, float]:
    """The growth exponents of activations and of their gradients, over all blocks."""
    norms: dict[int, float] = {}
    gradients: dict[int, float] = {}

    def note(number: int, output: Tensor) -> None:
        norms[number] = float(_norms(output.detach()).mean())
        output.register_hook(lambda gradient: gradients.__setitem__(number, float(_norms(gradient).mean())))

    stop = model.watch_blocks(note)
    loss = (model(at.x_BCHW, at.t_B, at.condition) - at.noise_BCHW).square().mean()
    loss.backward()
    stop()
    model.zero_grad(set_to_none=True)
    last = max(norms)
    backward = growth_exponent(gradients[last], gradients[0], last) if len(gradients) == len(norms) else math.nan
    return {"growth_forward": growth_exponent(norms[0], norms[last], last), "growth_backward": backward}


def _norms(x: Tensor) -> Tensor:
    return x.float().flatten(1).norm(dim=1)
