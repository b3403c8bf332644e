"""A whole training step of the UNets: forward, backward, AdamW and EMA, against the networks written plainly.

Shapes are MODEL B=batch MODE, MODE being the skip scale of ours. Providers:
  eager, eager-channels-last      the published network with that skip scale
  eager-unscaled                  the published network with its skips unscaled: what scaling costs is held against it
  compile, compile-channels-last  torch.compile of the first two
  ours, ours-contiguous, ours-compile
  eager-channels-last-graph, ours-graph  the whole step replayed from a CUDA graph; on a GPU
All share one set of parameters, one fused AdamW and one EMA. bf16 is autocast over fp32 parameters, as in training.

unet_patched holds a UNet of diffusers against its patched self, each in both layouts: Stable Diffusion 1.5 and SDXL on
a GPU, a small one of the same kind on a CPU, with random weights.

On a GPU: ADM ImageNet-64 and DDPM CIFAR-10 in bf16. On a CPU: DDPM CIFAR-10 in fp32 with constant scales;
SCALELONG_BENCH=full adds the other modes and recomputing.
"""

import copy
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from scalelong.bench.compare import DEVICE, ON_GPU, is_warm
from scalelong.bench.published_unet import as_published
from scalelong.bench.timing import IS_DRY_RUN
from scalelong.bench.training_step import Network, Trainer, compiled, noisy_batch, speed, step_rows
from scalelong.model.backbone_config import Recompute
from scalelong.model.diffusers_patch import patch_diffusers
from scalelong.model.presets import UNET_PRESETS
from scalelong.model.skip_scale import Unscaled, make_skip_scale
from scalelong.model.unet import UNet

IS_FULL = ON_GPU or os.environ.get("SCALELONG_BENCH") == "full"
BATCHES = {"imagenet64-adm": 64, "cifar10-ddpm-unet": 128} if ON_GPU else {"cifar10-ddpm-unet": 8}
if IS_DRY_RUN:
    BATCHES = dict.fromkeys(BATCHES, 2)
DTYPE = torch.bfloat16 if ON_GPU else torch.float32


@dataclass(frozen=True)
class Benchmark:
    preset: str
    mode: str
    compiles: bool

    def __str__(self) -> str:
        return f"{self.preset}-{self.mode}{'-compiled' if self.compiles else ''}"


def benchmarks() -> Iterator[Benchmark]:
    """The most informative first."""
    for mode, preset in product(("cs", "ls", "none") if IS_FULL else ("cs",), BATCHES):
        yield Benchmark(preset, mode, compiles=mode == "cs" and not ON_GPU)
        if ON_GPU and mode == "cs":
            yield Benchmark(preset, mode, compiles=True)


def make_model(preset: str, mode: str) -> UNet:
    torch.manual_seed(0)
    # A learned variance is not trained.
    config = replace(UNET_PRESETS[preset], out_channels=0)
    if IS_DRY_RUN:
        small = {
            "img_size": 8,
            "model_channels": 32,
            "channel_mult": (1, 2),
            "num_res_blocks": 1,
            "num_head_channels": 16,
        }
        config = replace(config, **small, attention_resolutions=(2,))
    with torch.device(DEVICE):
        return UNet(config, skip_scale=make_skip_scale(mode, 0.7))


def model_of(case: Benchmark) -> tuple[UNet, int, torch.dtype]:
    """The model, its batch, and the dtype that it trains in."""
    return make_model(case.preset, case.mode), BATCHES[case.preset], DTYPE


def networks(model: UNet, benchmark: Benchmark) -> dict[str, Network]:
    plain, plain_channels_last = as_published(model), as_published(model, channels_last=True)
    contiguous = copy.deepcopy(model, {id(p): p for p in model.parameters()})
    contiguous.channels_last = False
    found: dict[str, Network] = {"eager": plain, "eager-channels-last": plain_channels_last}
    if not (ON_GPU and benchmark.compiles):
        if benchmark.mode != "none":
            found["eager-unscaled"] = as_published(model, skip_scale=Unscaled())
        if ON_GPU:
            found |= {"eager-channels-last-graph": plain_channels_last, "ours-graph": model}
        found["ours-contiguous"] = contiguous
    if benchmark.compiles:
        torch.compiler.reset()
        ways = {"compile": plain, "compile-channels-last": plain_channels_last, "ours-compile": model}
        found |= {name: compiled(way) for name, way in ways.items() if is_warm(f"{benchmark}-{name}")}
    return {**found, "ours": model}


@pytest.mark.parametrize("case", list(benchmarks()), ids=str)
def test_unet_step(benchmark, report, note, case):
    model, batch, dtype = model_of(case)
    trainer = Trainer(model, noisy_batch(model.config, batch), dtype)
    steps = {name: partial(trainer.step, network) for name, network in networks(model, case).items()}
    if ON_GPU and case.compiles and not any("compile" in name for name in steps):
        pytest.skip("nothing was compiled in time")
    shape = f"{case.preset} B={batch} {case.mode}"
    rows, timings = step_rows(benchmark, "unet_step", shape, DTYPE, "channels_last", steps)
    note(f"unet_step {shape}: " + "; ".join(speed(model, batch, name, timing) for name, timing in timings.items()))
    report(rows)


@pytest.mark.skipif(not IS_FULL, reason="SCALELONG_BENCH=full runs it")
@pytest.mark.parametrize("preset", BATCHES)
def test_recomputing(benchmark, report, preset):
    model, batch = make_model(preset, "cs"), BATCHES[preset]
    trainer = Trainer(model, noisy_batch(model.config, batch), DTYPE)

    def step(recompute: Recompute) -> None:
        model.recompute = recompute
        trainer.step(model)

    choices: dict[str, Recompute] = {"ours-blocks": "blocks", "ours": "none"}
    steps = {name: partial(step, choice) for name, choice in choices.items()}
    rows, _ = step_rows(benchmark, "unet_step", f"{preset} B={batch} cs checkpointing", DTYPE, "channels_last", steps)
    report(rows)


# The shapes of the public configurations of Stable Diffusion, and a small network of the first one's kind.
SD15: dict[str, Any] = {
    "sample_size": 64,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (320, 640, 1280, 1280),
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}
SDXL: dict[str, Any] = {
    "sample_size": 128,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
TINY: dict[str, Any] = {
    **SD15,
    "sample_size": 32,
    "block_out_channels": (64, 128, 256, 256),
    "cross_attention_dim": 128,
}
PATCHED = {"sd15": (SD15, 8), "sdxl": (SDXL, 2)} if ON_GPU else {"tiny-sd15": (TINY, 4)}


@pytest.mark.parametrize("name", PATCHED)
def test_patched_diffusers(benchmark, report, name):
    diffusers = pytest.importorskip("diffusers")
    config, batch = PATCHED[name]
    torch.manual_seed(0)
    with torch.device(DEVICE):
        plain = diffusers.UNet2DConditionModel(**config).train()
    patched = copy.deepcopy(plain, {id(p): p for p in plain.parameters()})
    patch_diffusers(patched, skip_scale="cs", kappa=0.7)
    inputs = diffusion_batch(config, batch)
    trainer = Trainer(plain, inputs, DTYPE)

    def network(unet: nn.Module, memory_format: torch.memory_format, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        more = {}
        if "addition_embed_type" in config:
            more["added_cond_kwargs"] = {
                "text_embeds": text.new_zeros(batch, 1280),
                "time_ids": text.new_zeros(batch, 6),
            }
        x = x.contiguous(memory_format=memory_format)
        return unet(x, t, encoder_hidden_states=text, **more).sample

    networks = {
        "eager": partial(network, plain, torch.contiguous_format),
        "eager-channels-last": partial(network, plain, torch.channels_last),
        "ours-contiguous": partial(network, patched, torch.contiguous_format),
        "ours": partial(network, patched, torch.channels_last),
    }
    steps = {provider: partial(trainer.step, call) for provider, call in networks.items()}
    rows, _ = step_rows(benchmark, "unet_patched", f"{name} B={batch} cs", DTYPE, "channels_last", steps)
    report(rows)


def diffusion_batch(config: dict[str, Any], batch: int) -> tuple[Tensor, Tensor, Tensor]:
    side = config["sample_size"]
    return (
        torch.randn(batch, 4, side, side, device=DEVICE),
        torch.randint(1000, (batch,), device=DEVICE),
        torch.randn(batch, 77, config["cross_attention_dim"], device=DEVICE),
    )
