"""Modulation by rotation against that by shift, in the norm and in a whole training step of DiT.

The norm: forward with backward of ``add_layer_norm`` with a gain and, beside it, a shift ("shift"), the angles of
rotations inside the operator ("ours"), or the rotation as operations of their own behind it ("composed"). Shapes are
B=batch T=tokens D=width. The step: S/4 on latents of 16 x 16, on a GPU XL/2, each modulation with a network, AdamW and
EMA of its own. The note says how many times the time of the shift each takes, by the medians.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch

from scalelong.bench.bench_dit_step import make_model
from scalelong.bench.compare import DEVICE, DTYPE, ON_GPU
from scalelong.bench.timing import IS_DRY_RUN, Timing
from scalelong.bench.training_step import Trainer, noisy_batch, step_rows
from scalelong.kernels.add_layer_norm import add_layer_norm, rotated_ref
from scalelong.model.dit_config import MODULATIONS
from scalelong.model.presets import DIT_PRESETS

SHAPES = ((128, 256, 1152), (256, 256, 384)) if ON_GPU else ((16, 64, 384), (4, 256, 1152))  # B, T, D
STEP_DTYPE = torch.bfloat16 if ON_GPU else torch.float32


def norm_step(how: str, B: int, T: int, D: int) -> Callable[[], object]:
    """Forward with backward; both outputs have a gradient, as in a block."""
    tensors = (*torch.randn(2, B, T, D), *torch.randn(2, B, D) / 10, torch.randn(B, D if how == "shift" else D // 2))
    leaves = [p.to(DEVICE, DTYPE).requires_grad_() for p in tensors]
    gradients = [p.to(DEVICE, DTYPE) for p in torch.randn(2, B, T, D)]

    def step() -> object:
        x, branch, gain, gate, told = leaves
        norm = partial(add_layer_norm, x, branch, None, None, gain=gain, gate=gate)
        if how == "composed":
            stream, y = norm()
            y = rotated_ref(y, told)
        else:
            stream, y = norm(shift=told) if how == "shift" else norm(angle=told)
        return torch.autograd.grad((stream, y), leaves, gradients)

    return step


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def test_norm(benchmark, report, note, shape):
    B, T, D = (2, 3, 8) if IS_DRY_RUN else shape
    steps = {how: norm_step(how, B, T, D) for how in ("shift", "composed", "ours")}
    rows, timings = step_rows(benchmark, "rotation_of_norm", f"B={B} T={T} D={D}", DTYPE, "contiguous", steps)
    report(rows)
    note(times_of("shift", timings))


def test_step(benchmark, report, note):
    preset, batch = ("imagenet256-dit-xl2", 32) if ON_GPU else ("imagenet256-dit-s4", 8)
    config = replace(DIT_PRESETS[preset], out_channels=0)
    if not ON_GPU or IS_DRY_RUN:
        config = replace(config, img_size=16)
    if IS_DRY_RUN:
        config, batch = replace(config, width=32, depth=2, num_heads=2), 2
    steps = {}
    for modulation in MODULATIONS:
        model = make_model(replace(config, modulation=modulation), "none")
        steps[modulation] = partial(Trainer(model, noisy_batch(model.config, batch), STEP_DTYPE).step, model)
    rows, timings = step_rows(benchmark, "dit_modulations", f"{preset} B={batch}", STEP_DTYPE, "", steps)
    report(rows)
    note(times_of("adaln", timings))


def times_of(base: str, timings: dict[str, Timing]) -> str:
    times = (f"{name} {timing.ms_median / timings[base].ms_median:.3f}" for name, timing in timings.items())
    return f"times {base}: {', '.join(times)}"
