"""A whole training step of DiT: forward, backward, AdamW and EMA, against the network written plainly.

Shapes are MODEL B=batch SKIP MODE, MODE being the skip scale of ours. Providers: eager, the published network (with the
skips of Skip-DiT or U-ViT written out, where there are any); compile and ours-compile; on a GPU eager-graph and
ours-graph, the whole step replayed from a CUDA graph. All share one set of parameters, one fused AdamW and one EMA.
bf16 is autocast over fp32 parameters, as in training.

On a GPU: L/2 and XL/2 in bf16, compiled too, and XL/2 with both forms of skips.
On a CPU: S/4 on latents of 16 x 16 in fp32, compiled; SCALELONG_BENCH=full adds both forms of skips.

What is kept for backward is measured apart: gradients, optimizer and EMA are the same for all and larger.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial

import pytest
import torch

from scalelong.bench.compare import DEVICE, ON_GPU, is_warm, kept_bytes
from scalelong.bench.published_dit import as_published
from scalelong.bench.timing import IS_DRY_RUN
from scalelong.bench.training_step import Network, Trainer, compiled, noisy_batch, speed, step_rows
from scalelong.model.dit import DiT, DiTConfig
from scalelong.model.dit_config import SkipForm
from scalelong.model.presets import DIT_PRESETS
from scalelong.model.skip_scale import make_skip_scale

IS_FULL = ON_GPU or os.environ.get("SCALELONG_BENCH") == "full"


@dataclass(frozen=True)
class Benchmark:
    preset: str
    batch: int
    skip: SkipForm
    mode: str
    dtype: torch.dtype
    compiles: bool

    def __str__(self) -> str:
        suffix = "-compiled" if self.compiles else ""
        return f"{self.preset}-{self.skip}-{self.mode}-{str(self.dtype).removeprefix('torch.')}{suffix}"

    @property
    def config(self) -> DiTConfig:
        config = replace(DIT_PRESETS[self.preset], skip=self.skip, out_channels=0)
        if IS_DRY_RUN:
            return replace(config, img_size=16, width=32, depth=2, num_heads=2)
        return config if ON_GPU else replace(config, img_size=16)


def benchmarks() -> Iterator[Benchmark]:
    """The most informative first."""
    if ON_GPU:
        for preset, batch in (("imagenet256-dit-xl2", 32), ("imagenet256-dit-l2", 64)):
            for compiles in (False, True):
                yield Benchmark(preset, 2 if IS_DRY_RUN else batch, "none", "none", torch.bfloat16, compiles)
        for skip in ("layer-norm", "plain"):
            yield Benchmark("imagenet256-dit-xl2", 2 if IS_DRY_RUN else 32, skip, "cs", torch.bfloat16, False)
        return
    yield Benchmark("imagenet256-dit-s4", 8, "none", "none", torch.float32, compiles=True)
    if IS_FULL:
        for skip in ("layer-norm", "plain"):
            yield Benchmark("imagenet256-dit-s4", 8, skip, "cs", torch.float32, compiles=True)


def make_model(config: DiTConfig, mode: str) -> DiT:
    torch.manual_seed(0)
    with torch.device(DEVICE):
        model = DiT(config, skip_scale=make_skip_scale(mode))
    with torch.no_grad():  # not zero, as gates begin
        for p in model.parameters():
            p.add_(0.02 * torch.randn_like(p))
    return model


def model_of(case: Benchmark) -> tuple[DiT, int, torch.dtype]:
    """The model, its batch, and the dtype that it trains in."""
    return make_model(case.config, case.mode), case.batch, case.dtype


def networks(model: DiT, benchmark: Benchmark) -> dict[str, Network]:
    plain = as_published(model)
    found: dict[str, Network] = {"eager": plain}
    if ON_GPU and not benchmark.compiles:
        found |= {"eager-graph": plain, "ours-graph": model}
    if benchmark.compiles:
        torch.compiler.reset()
        ways = {"compile": plain, "ours-compile": model}
        found |= {name: compiled(way) for name, way in ways.items() if is_warm(f"{benchmark}-{name}")}
    return {**found, "ours": model}


@pytest.mark.parametrize("case", list(benchmarks()), ids=str)
def test_dit_step(benchmark, report, note, case):
    model, batch, dtype = model_of(case)
    trainer = Trainer(model, noisy_batch(model.config, batch), dtype)
    found = networks(model, case)
    if ON_GPU and case.compiles and not any("compile" in name for name in found):
        pytest.skip("nothing was compiled in time")
    steps = {name: partial(trainer.step, network) for name, network in found.items()}
    shape = f"{case.preset} B={case.batch} {case.skip} {case.mode}"
    shape += "" if case.config.img_size == DIT_PRESETS[case.preset].img_size else f" side={case.config.img_size}"
    rows, timings = step_rows(benchmark, "dit_step", shape, case.dtype, "contiguous", steps)
    note(f"dit_step {shape}: " + "; ".join(speed(model, case.batch, name, timing) for name, timing in timings.items()))
    if not ON_GPU:
        found = {name: network for name, network in found.items() if not name.endswith("-graph")}
        given = (*trainer.inputs, *trainer.parameters)
        kept = {name: kept_bytes(lambda *_, f=f: f(*trainer.inputs), given) / 1e6 for name, f in found.items()}
        note(f"dit_step {shape}, MB kept for backward: " + "; ".join(f"{name} {mb:.3g}" for name, mb in kept.items()))
    report(rows)
