"""A whole training step of U-ViT: forward, backward, AdamW and EMA, against the network written plainly.

Shapes are MODEL B=batch MODE, MODE being the skip scale of ours. Providers:
  eager                 the published network with that skip scale
  eager-unscaled        the published network with its skips unscaled: what scaling costs is held against it
  published-unscaled    the same with the published step: AdamW as torch makes it, EMA parameter by parameter
  eager-fp32-attention  eager, with queries, keys and values sent through fp32 as published; bf16 only
  compile, ours-compile, and on a CPU compile-unscaled
  eager-graph, ours-graph  the whole step replayed from a CUDA graph; on a GPU
All share one set of parameters, and all but published-unscaled one fused AdamW and one EMA. bf16 is autocast over fp32
parameters, as in training.

On a GPU: M/4 first, then L/2, S/2 and H/2 in bf16, each mode, compiled with LS, and what recomputing saves.
On a CPU: S/2 in fp32, compiled once; SCALELONG_BENCH=full adds the other modes, S/2 in bf16 (minutes), recomputing.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import product

import pytest
import torch

from scalelong.bench.compare import DEVICE, ON_GPU, is_warm
from scalelong.bench.published_uvit import as_published
from scalelong.bench.timing import IS_DRY_RUN
from scalelong.bench.training_step import Network, Trainer, compiled, noisy_batch, speed, step_rows
from scalelong.model.backbone_config import Recompute
from scalelong.model.presets import UVIT_PRESETS
from scalelong.model.skip_scale import Unscaled, make_skip_scale
from scalelong.model.uvit import UViT, UViTConfig

IS_FULL = ON_GPU or os.environ.get("SCALELONG_BENCH") == "full"
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
        suffix = "-compiled" if self.compiles else ""
        return f"{self.preset}-{self.mode}-{str(self.dtype).removeprefix('torch.')}{suffix}"

    @property
    def config(self) -> UViTConfig:
        config = UVIT_PRESETS[self.preset]
        return replace(config, img_size=16, width=32, depth=2, num_heads=2) if IS_DRY_RUN else config


def benchmarks() -> Iterator[Benchmark]:
    """The most informative first."""
    if ON_GPU:
        for mode, (preset, batch) in product(("ls", "none", "cs"), PRESETS.items()):
            batch = 2 if IS_DRY_RUN else batch
            yield Benchmark(preset, batch, mode, torch.bfloat16, compiles=False)
            if mode == "ls":
                yield Benchmark(preset, batch, mode, torch.bfloat16, compiles=True)
        return
    yield Benchmark("cifar10-uvit-s2", 4, "ls", torch.float32, compiles=True)
    if IS_FULL:
        for mode in ("none", "cs"):
            yield Benchmark("cifar10-uvit-s2", 4, mode, torch.float32, compiles=False)
        yield Benchmark("cifar10-uvit-s2", 4, "ls", torch.bfloat16, compiles=False)


class UViTTrainer(Trainer):
    """Knows the published step as well: AdamW as torch makes it, and an EMA parameter by parameter."""

    def __init__(self, model: UViT, batch: int, dtype: torch.dtype):
        super().__init__(model, noisy_batch(model.config, batch), dtype)
        self.plain_optimizer = torch.optim.AdamW(self.parameters, lr=1e-6)

    def published_step(self, network: Network) -> None:
        self.find_gradients(network)
        self.plain_optimizer.step()
        self.plain_optimizer.zero_grad()
        with torch.no_grad():
            for averaged, parameter in zip(self.ema, self.parameters, strict=True):
                averaged.copy_(averaged * 0.9999 + parameter * 1e-4)


def make_model(config: UViTConfig, mode: str) -> UViT:
    torch.manual_seed(0)
    with torch.device(DEVICE):
        return UViT(config, skip_scale=make_skip_scale(mode))


def model_of(case: Benchmark) -> tuple[UViT, int, torch.dtype]:
    """The model, its batch, and the dtype that it trains in."""
    return make_model(case.config, case.mode), case.batch, case.dtype


def networks(model: UViT, benchmark: Benchmark) -> dict[str, Network]:
    plain, unscaled = as_published(model), as_published(model, skip_scale=Unscaled())
    found: dict[str, Network] = {"eager": plain}
    if not (ON_GPU and benchmark.compiles):
        found["eager-unscaled"] = unscaled
        if ON_GPU:
            found |= {"eager-fp32-attention": as_published(model, casts_to_fp32=True), "eager-graph": plain}
            found["ours-graph"] = model
    if benchmark.compiles:
        torch.compiler.reset()
        ways = {"compile": plain, "ours-compile": model} | ({} if ON_GPU else {"compile-unscaled": unscaled})
        found |= {name: compiled(way) for name, way in ways.items() if is_warm(f"{benchmark}-{name}")}
    if benchmark.mode == "none":
        found = {name: network for name, network in found.items() if not name.endswith("-unscaled")}
    return {**found, "ours": model}


@pytest.mark.parametrize("case", list(benchmarks()), ids=str)
def test_uvit_step(benchmark, report, note, case):
    model, batch, dtype = model_of(case)
    trainer = UViTTrainer(model, batch, dtype)
    published = as_published(model, skip_scale=Unscaled())
    steps = {"published-unscaled": partial(trainer.published_step, published)}
    steps |= {name: partial(trainer.step, network) for name, network in networks(model, case).items()}
    if ON_GPU and case.compiles and not any("compile" in name for name in steps):
        pytest.skip("nothing was compiled in time")
    shape = f"{case.preset} B={case.batch} {case.mode}"
    rows, timings = step_rows(benchmark, "uvit_step", shape, case.dtype, "contiguous", steps)
    note(f"uvit_step {shape}: " + "; ".join(speed(model, case.batch, name, timing) for name, timing in timings.items()))
    report(rows)


@pytest.mark.skipif(not IS_FULL, reason="SCALELONG_BENCH=full runs it")
def test_recomputing(benchmark, report):
    """What it saves and what it costs; "ours" keeps all that backward needs."""
    preset, batch = ("imagenet256-uvit-l2", 2 if IS_DRY_RUN else 64) if ON_GPU else ("cifar10-uvit-s2", 4)
    case = Benchmark(preset, batch, "ls", torch.bfloat16 if ON_GPU else torch.float32, compiles=False)
    model = make_model(case.config, case.mode)
    trainer = UViTTrainer(model, batch, case.dtype)

    def step(recompute: Recompute) -> None:
        model.recompute = recompute
        trainer.step(model)

    choices: dict[str, Recompute] = {
        "ours-blocks": "blocks",
        "ours-budget-0.5": 0.5,
        "ours-budget-0.85": 0.85,
        "ours": "none",
    }
    steps = {name: partial(step, choice) for name, choice in choices.items()}
    rows, _ = step_rows(benchmark, "uvit_step", f"{preset} B={batch} ls checkpointing", case.dtype, "contiguous", steps)
    report(rows)
