"""Training presets: what the published recipes fix, and the embedded default that a laptop finishes.

The recipes are those of https://github.com/baofff/U-ViT with the skips scaled; steps are given in images.
"""

from pathlib import Path
from typing import Any

from scalelong.model.presets import MODEL_PRESETS
from scalelong.train.config import DataConfig, OptimizerConfig, SampleConfig, TrainConfig

_DIGITS = TrainConfig(
    run=Path("runs/digits-uvit"),
    total_images=192_000,
    images_per_step=64,
    images_per_checkpoint=48_000,
    images_per_grid=48_000,
    images_per_log=0,
    label_drop=0.1,
    model=MODEL_PRESETS["digits-uvit"],
    optimizer=OptimizerConfig(learning_rate=1.5e-3, beta1=0.9, beta2=0.99, warmup_images=12_800, ema_decay=0.997),
    data=DataConfig(path="digits"),
    sample=SampleConfig(steps=30, guidance=1.0, num_images=100),
)


def _published(name: str, *, batch: int, steps: int, learning_rate: float, beta2: float, warmup: int) -> TrainConfig:
    """A pixel-space recipe of U-ViT; the data's folder has to be given with --data.path."""
    return TrainConfig(
        run=Path("runs") / name,
        total_images=batch * steps,
        images_per_step=batch,
        images_per_checkpoint=batch * 10_000,
        images_per_grid=batch * 5_000,
        images_per_log=batch * 100,
        precision="bf16",
        zero_stage=1,
        model=MODEL_PRESETS[name],
        optimizer=OptimizerConfig(learning_rate=learning_rate, beta2=beta2, warmup_images=batch * warmup),
        data=DataConfig(path="", flip=True),
    )


_IMAGENET64 = {"batch": 1024, "steps": 300_000, "learning_rate": 3e-4, "beta2": 0.99, "warmup": 5_000}
_PUBLISHED: dict[str, Any] = {
    "cifar10-uvit-s2": {"batch": 128, "steps": 500_000, "learning_rate": 2e-4, "beta2": 0.999, "warmup": 2_500},
    "celeba64-uvit-s4": {"batch": 128, "steps": 500_000, "learning_rate": 2e-4, "beta2": 0.99, "warmup": 5_000},
    "imagenet64-uvit-m4": _IMAGENET64,
    "imagenet64-uvit-l4": _IMAGENET64,
}

DESCRIPTIONS = {
    "digits-uvit": "the embedded handwritten digits (8x8), class-conditional with guidance; minutes on two CPU cores",
    "cifar10-uvit-s2": "CIFAR-10 (32x32), unconditional, 44 M parameters",
    "celeba64-uvit-s4": "CelebA (64x64), unconditional, 44 M parameters",
    "imagenet64-uvit-m4": "ImageNet (64x64), class-conditional, 131 M parameters",
    "imagenet64-uvit-l4": "ImageNet (64x64), class-conditional, 287 M parameters",
}

PRESETS: dict[str, TrainConfig] = {
    "digits-uvit": _DIGITS,
    **{name: _published(name, **recipe) for name, recipe in _PUBLISHED.items()},
}

assert PRESETS.keys() == DESCRIPTIONS.keys()
