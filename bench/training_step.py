"""A whole training step, as the benchmarks of the backbones time it: forward, backward, AdamW and EMA."""

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import asdict
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scalelong.bench.compare import DEVICE, ON_GPU
from scalelong.bench.record import Row, environment
from scalelong.bench.timing import IS_DRY_RUN, Timing, measure
from scalelong.model.backbone import Backbone
from scalelong.model.backbone_config import BackboneConfig
from scalelong.train.resources import FORWARD_AND_BACKWARD, peak_flops

if TYPE_CHECKING:
    from pytest_benchmark.fixture import BenchmarkFixture

Network = Callable[..., Tensor]
MAX_SECONDS = 2.0 if ON_GPU else 10.0


class Trainer:
    """What all providers train with: the parameters of one model, a batch, a fused AdamW and an EMA.

    Args:
        inputs: what the network is called with, a tensor whose noise it predicts first.
        dtype: fp32, or that of autocast over fp32 parameters.
    """

    def __init__(self, model: nn.Module, inputs: tuple, dtype: torch.dtype):
        self.inputs, self.dtype = inputs, dtype
        self.noise = torch.randn_like(inputs[0])
        self.parameters: list[Tensor] = list(model.parameters())
        self.ema = [p.detach().clone() for p in self.parameters]
        # Capturable, so that a step can be replayed from a graph.
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-6, fused=True, capturable=DEVICE.type == "cuda")

    def step(self, network: Network) -> None:
        self.find_gradients(network)
        self.optimizer.step()
        self.optimizer.zero_grad()
        with torch.no_grad():
            torch._foreach_lerp_(self.ema, self.parameters, 1e-4)

    def find_gradients(self, network: Network) -> None:
        autocast = nullcontext() if self.dtype == torch.float32 else torch.autocast(DEVICE.type, self.dtype)
        with autocast:
            loss = F.mse_loss(network(*self.inputs), self.noise)
        loss.backward()


def noisy_batch(config: BackboneConfig, batch: int) -> tuple[Tensor, ...]:
    """Images, times and, for a model with labels, labels."""
    images = torch.randn(batch, config.in_channels, config.img_size, config.img_size, device=DEVICE)
    inputs = (images, torch.rand(batch, device=DEVICE) * 999)
    if config.num_classes:
        inputs += (torch.randint(config.num_classes, (batch,), device=DEVICE),)
    return inputs


def compiled(network: Network) -> Network:
    return torch.compile(network, fullgraph=True, dynamic=False, backend="eager" if IS_DRY_RUN else "inductor")


def step_rows(
    benchmark: "BenchmarkFixture",
    op: str,
    shape: str,
    dtype: torch.dtype,
    layout: str,
    steps: Mapping[str, Callable[[], None]],
) -> tuple[list[Row], dict[str, Timing]]:
    """Times the steps as a trainer runs them, host and all; on a GPU those named "...-graph" as replays."""
    failures: dict[str, str] = {}
    graphs = [name for name in steps if name.endswith("-graph")]
    timings = measure(benchmark, steps, device=DEVICE, max_seconds=MAX_SECONDS, graphs=graphs, failures=failures)
    what = {**environment(DEVICE), "op": op, "shape": shape, "layout": layout, "direction": "step"}
    what["dtype"] = str(dtype).removeprefix("torch.")
    rows = [Row(**what, provider=name, **asdict(timing)) for name, timing in timings.items()]
    return [*rows, *(Row(**what, provider=name, error=error) for name, error in failures.items())], timings


def speed(model: Backbone, batch: int, name: str, timing: Timing) -> str:
    images_per_second = 1e3 * batch / timing.ms_median
    flops = FORWARD_AND_BACKWARD * model.flops() * images_per_second
    line = f"{name} {images_per_second:.4g} images/s, {flops / 1e12:.3g} TFLOP/s"
    peak = peak_flops(torch.cuda.get_device_name(DEVICE), "bf16") if DEVICE.type == "cuda" else None
    return line if peak is None else f"{line}, MFU {100 * flops / peak:.3g} %"
