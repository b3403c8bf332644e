"""A whole training step of U-ViT: forward, backward, AdamW and EMA, against the network written plainly.

Shapes are MODEL B=batch MODE, MODE being the skip scale of ours. Providers:
  eager                 the published network with that skip scale
  eager-unscaled        the published network with its skips unscaled: what scaling costs is held against it
  published-unscaled    the same with the published step: AdamW as torch makes it, EMA parameter by parameter
  eager-fp32-attention  eager, with queries, keys and values sent through fp32 as published; bf16 only
  compile-unscaled, ours-compile, and on a CPU compile
All share one set of parameters, and all but published-unscaled one fused AdamW and one EMA. bf16 is autocast over fp32
parameters, as in training.

On a GPU: S/2, M/4, L/2 and H/2 in bf16, and what checkpointing saves. On a CPU: S/2 in fp32, compiled once;
SCALELONG_BENCH=full adds the other modes, S/2 in bf16 (minutes) and checkpointing.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import product

import pytest
import torch
import torch.nn.functional as F

from scalelong.bench.compare import DEVICE, ON_GPU
from scalelong.bench.published_uvit import as_published
from scalelong.bench.record import Row, environment
from scalelong.bench.timing import Timing, measure
from scalelong.model.checkpointing import Checkpointing
from scalelong.model.presets import UVIT_PRESETS
from scalelong.model.skip_scale import Unscaled, make_skip_scale
from scalelong.model.uvit import UViT, UViTConfig

IS_FULL = ON_GPU or os.environ.get("SCALELONG_BENCH") == "full"
MAX_SECONDS = 4.0 if ON_GPU else 10.0
# Dense bf16 products per second, by compute capability: the datasheets of A100 and of H100 and H200 (SXM).
PEAK_FLOPS = {(8, 0): 312e12, (9, 0): 989e12}
# Batches of a GPU, such that the parameters with their optimizer state and the activations of the plain network fit.
PRESETS = {
    "imagenet64-uvit-m4": 128,
    "imagenet256-uvit-l2": 64,
    "cifar10-uvit-s2": 128,
    "imagenet256-uvit-h2": 32,
}


@dataclass(frozen=True)
class Benchmark:
    preset: str
    batch: int
    mode: str
    dtype: torch.dtype
    compiles: bool

    def __str__(self) -> str:
        return f"{self.preset}-{self.mode}-{str(self.dtype).removeprefix('torch.')}"


def benchmarks() -> Iterator[Benchmark]:
    """The most informative first."""
    if ON_GPU:
        for mode, (preset, batch) in product(("ls", "none", "cs"), PRESETS.items()):
            yield Benchmark(preset, batch, mode, torch.bfloat16, compiles=mode == "ls")
        return
    yield Benchmark("cifar10-uvit-s2", 4, "ls", torch.float32, compiles=True)
    if IS_FULL:
        for mode in ("none", "cs"):
            yield Benchmark("cifar10-uvit-s2", 4, mode, torch.float32, compiles=False)
        yield Benchmark("cifar10-uvit-s2", 4, "ls", torch.bfloat16, compiles=False)


class Trainer:
    """What all providers train with: the parameters of one model, its images, AdamW and the EMA."""

    def __init__(self, model: UViT, batch: int, dtype: torch.dtype):
        config = model.config
        self.model, self.dtype = model, dtype
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
        self.plain_optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)
        self.parameters: list[torch.Tensor] = list(model.parameters())
        self.ema = [p.detach().clone() for p in self.parameters]
        size = (batch, config.in_channels, config.img_size, config.img_size)
        self.noisy, self.noise = torch.randn(2, *size, device=DEVICE)
        self.time = torch.rand(batch, device=DEVICE) * 999
        self.labels = torch.randint(config.num_classes, (batch,), device=DEVICE) if config.num_classes else None

    def step(self, network: Callable[..., torch.Tensor]) -> None:
        self.find_gradients(network)
        self.optimizer.step()
        self.optimizer.zero_grad()
        with torch.no_grad():
            torch._foreach_lerp_(self.ema, self.parameters, 1e-4)

    def published_step(self, network: Callable[..., torch.Tensor]) -> None:
        self.find_gradients(network)
        self.plain_optimizer.step()
        self.plain_optimizer.zero_grad()
        with torch.no_grad():
            for averaged, parameter in zip(self.ema, self.parameters, strict=True):
                averaged.copy_(averaged * 0.9999 + parameter * 1e-4)

    def find_gradients(self, network: Callable[..., torch.Tensor]) -> None:
        autocast = nullcontext() if self.dtype == torch.float32 else torch.autocast(DEVICE.type, self.dtype)
        with autocast:
            loss = F.mse_loss(network(self.noisy, self.time, self.labels), self.noise)
        loss.backward()


def make_model(config: UViTConfig, mode: str) -> UViT:
    torch.manual_seed(0)
    with torch.device(DEVICE):
        return UViT(config, skip_scale=make_skip_scale(mode))


def networks(model: UViT, benchmark: Benchmark) -> dict[str, Callable[..., torch.Tensor]]:
    plain, unscaled = as_published(model), as_published(model, skip_scale=Unscaled())
    found: dict[str, Callable[..., torch.Tensor]] = {"eager": plain, "eager-unscaled": unscaled}
    if benchmark.dtype != torch.float32 and ON_GPU:
        found["eager-fp32-attention"] = as_published(model, casts_to_fp32=True)
    if benchmark.compiles:
        torch.compiler.reset()
        found |= {"compile-unscaled": compiled(unscaled), "ours-compile": compiled(model)}
        if not ON_GPU:  # where deep networks take a minute each to compile
            found["compile"] = compiled(plain)
    if benchmark.mode == "none":
        found = {name: network for name, network in found.items() if not name.endswith("-unscaled")}
    return {**found, "ours": model}


def compiled(network: UViT) -> Callable[..., torch.Tensor]:
    return torch.compile(network, fullgraph=True, dynamic=False)


def rows(benchmark: Benchmark, shape: str, timings: dict[str, Timing]) -> list[Row]:
    return [
        Row(
            **environment(DEVICE),
            op="uvit_step",
            shape=shape,
            dtype=str(benchmark.dtype).removeprefix("torch."),
            layout="contiguous",
            direction="step",
            provider=name,
            ms_median=timing.ms_median,
            ms_p20=timing.ms_p20,
            ms_p80=timing.ms_p80,
            gb_per_s=None,
            percent_of_copy=None,
            peak_mb=timing.peak_mb,
        )
        for name, timing in timings.items()
    ]


def speed(benchmark: Benchmark, model: UViT, name: str, timing: Timing) -> str:
    images_per_second = 1e3 * benchmark.batch / timing.ms_median
    flops = 3 * model.flops() * images_per_second
    line = f"{name} {images_per_second:.4g} images/s, {flops / 1e12:.3g} TFLOP/s"
    peak = PEAK_FLOPS.get(torch.cuda.get_device_capability(DEVICE)) if ON_GPU else None
    return line if peak is None else f"{line}, MFU {100 * flops / peak:.3g} %"


@pytest.mark.parametrize("case", list(benchmarks()), ids=str)
def test_uvit_step(benchmark, report, note, case):
    model = make_model(UVIT_PRESETS[case.preset], case.mode)
    trainer = Trainer(model, case.batch, case.dtype)
    published = as_published(model, skip_scale=Unscaled())
    steps = {"published-unscaled": partial(trainer.published_step, published)}
    steps |= {name: partial(trainer.step, network) for name, network in networks(model, case).items()}
    timings = measure(benchmark, steps, device=DEVICE, min_rounds=10, max_seconds=MAX_SECONDS)
    shape = f"{case.preset} B={case.batch} {case.mode}"
    report(rows(case, shape, timings))
    note(f"uvit_step {shape}: " + "; ".join(speed(case, model, name, timing) for name, timing in timings.items()))


@pytest.mark.skipif(not IS_FULL, reason="SCALELONG_BENCH=full runs it")
def test_checkpointing(benchmark, report):
    """What it saves and what it costs; "ours" keeps all that backward needs."""
    preset, batch = ("imagenet256-uvit-l2", 64) if ON_GPU else ("cifar10-uvit-s2", 4)
    case = Benchmark(preset, batch, "ls", torch.bfloat16 if ON_GPU else torch.float32, compiles=False)
    model = make_model(UVIT_PRESETS[preset], case.mode)
    trainer = Trainer(model, batch, case.dtype)

    def step(checkpointing: Checkpointing) -> None:
        model.checkpointing = checkpointing
        trainer.step(model)

    choices: dict[str, Checkpointing] = {
        "ours-blocks": "blocks",
        "ours-budget-0.5": 0.5,
        "ours-budget-0.85": 0.85,
        "ours": "none",
    }
    steps = {name: partial(step, choice) for name, choice in choices.items()}
    timings = measure(benchmark, steps, device=DEVICE, min_rounds=10, max_seconds=MAX_SECONDS)
    report(rows(case, f"{preset} B={batch} ls checkpointing", timings))
