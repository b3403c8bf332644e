"""A whole training step of magnitude-preserving networks against the same sizes with norms.

Forward, backward, AdamW and EMA. Shapes are MODEL width side B=batch; providers: plain, the fused network with norms;
mp, the magnitude-preserving one, whose rows are normalised after the step; mp-free, the same without that. Each trains
weights of its own.

On a GPU: XL/2 and U-ViT-L/2 in bf16. On a CPU: S/4 on latents of 32 x 32, U-ViT-S/2 on images of 16 x 16, in fp32.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import pytest
import torch

from scalelong.bench.compare import DEVICE, ON_GPU
from scalelong.bench.timing import IS_DRY_RUN
from scalelong.bench.training_step import Trainer, noisy_batch, speed, step_rows
from scalelong.model.architectures import make_backbone
from scalelong.model.backbone import Backbone
from scalelong.model.backbone_config import BackboneConfig
from scalelong.model.presets import DIT_PRESETS, UVIT_PRESETS
from scalelong.train.zero.rows import replace_rows


@dataclass(frozen=True)
class Benchmark:
    name: str
    config: BackboneConfig
    batch: int
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"{self.name}-{str(self.dtype).removeprefix('torch.')}"


def benchmarks() -> Iterator[Benchmark]:
    dit = replace(DIT_PRESETS["imagenet256-dit-xl2" if ON_GPU else "imagenet256-dit-s4"], out_channels=0)
    uvit = UVIT_PRESETS["imagenet256-uvit-l2" if ON_GPU else "cifar10-uvit-s2"]
    for name, config in (("dit", dit), ("uvit", uvit)):
        if IS_DRY_RUN:
            yield Benchmark(name, replace(config, img_size=8, width=32, depth=2, num_heads=2), 2, torch.float32)
        elif ON_GPU:
            yield Benchmark(name, config, 32, torch.bfloat16)
        else:
            yield Benchmark(name, config if name == "dit" else replace(config, img_size=16), 16, torch.float32)


def steps_of(case: Benchmark) -> tuple[dict[str, Callable[[], None]], dict[str, Backbone]]:
    steps, models = {}, {}
    for name, preserves in (("plain", False), ("mp-free", True), ("mp", True)):
        torch.manual_seed(0)
        with torch.device(DEVICE):
            model = make_backbone(replace(case.config, magnitude_preserving=preserves))  # type: ignore[call-arg]
        trainer = Trainer(model, noisy_batch(case.config, case.batch), case.dtype)
        steps[name], models[name] = _step(trainer, model, normalises=name == "mp"), model
    return steps, models


def _step(trainer: Trainer, model, *, normalises: bool) -> Callable[[], None]:
    parameters = dict(model.named_parameters())
    functions = {parameters[name]: function for name, function in model.after_step().items()} if normalises else {}

    def step() -> None:
        trainer.step(model)
        with torch.no_grad():
            for parameter, function in functions.items():
                replace_rows(parameter, function)

    return step


@pytest.mark.parametrize("case", list(benchmarks()), ids=str)
def test_magnitude_step(benchmark, report, note, case):
    steps, models = steps_of(case)
    shape = f"{case.name} width={case.config.width} side={case.config.img_size} B={case.batch}"
    rows, timings = step_rows(benchmark, "magnitude_step", shape, case.dtype, "contiguous", steps)
    note(f"{shape}: " + "; ".join(speed(models[name], case.batch, name, timing) for name, timing in timings.items()))
    note(f"{shape}: mp / plain {timings['mp'].ms_median / timings['plain'].ms_median:.3f}")
    report(rows)
