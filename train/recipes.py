"""Recipes of training: what the published ones fix, and the embedded defaults that a laptop finishes.

They are those of U-ViT (https://github.com/baofff/U-ViT), DiT (arXiv:2212.09748), DDPM
(https://github.com/hojonathanho/diffusion), ADM (arXiv:2105.05233, table 12), EDM2 (arXiv:2312.02696, table 6) and
MaP-DiT (arXiv:2505.19122) with the skips scaled; steps are given in images.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

from scalelong.model.backbone_config import BackboneConfig
from scalelong.model.presets import DIT_PRESETS, MP_PRESETS, UNET_PRESETS, UVIT_PRESETS
from scalelong.model.skip_scale import ConstantScale, Geometric, Unscaled
from scalelong.train.config import DataConfig, OptimizerConfig, SampleConfig, TrainConfig
from scalelong.train.objective_config import ObjectiveConfig
from scalelong.train.usage import DESCRIPTIONS

_DIGITS = TrainConfig(
    run=Path("runs/digits-uvit"),
    total_images=192_000,
    images_per_step=64,
    images_per_checkpoint=48_000,
    images_per_grid=48_000,
    images_per_average=4_800,
    images_per_log=640,
    images_per_validation=24_000,
    num_validation_images=256,
    label_drop=0.1,
    model=UVIT_PRESETS["digits-uvit"],
    optimizer=OptimizerConfig(learning_rate=1.5e-3, beta1=0.9, beta2=0.99, warmup_images=12_800, ema_decay=0.997),
    data=DataConfig(path="digits"),
    sample=SampleConfig(steps=30, guidance=1.0, num_images=100),
)
_PHOTOS = TrainConfig(
    run=Path("runs/photos32-uvit"),
    total_images=64_000,
    images_per_step=32,
    images_per_checkpoint=16_000,
    images_per_grid=16_000,
    images_per_average=1_600,
    images_per_log=320,
    # The image and not the noise: 48 numbers of noise do not come through a token of this width in so short a training.
    objective=ObjectiveConfig(prediction="x0", noise="cosine", weighting="min-snr"),
    model=UVIT_PRESETS["photos32-uvit"],
    optimizer=OptimizerConfig(learning_rate=2e-3, beta1=0.9, beta2=0.99, warmup_images=3_200, ema_decay=0.99),
    data=DataConfig(path="photos", flip=True),
    sample=SampleConfig(steps=30, num_images=100),
)


def _published(
    name: str,
    model: BackboneConfig,
    *,
    batch: int,
    steps: int,
    learning_rate: float,
    beta2: float,
    warmup: int,
    **optimizer: Any,
) -> TrainConfig:
    """A pixel-space recipe of U-ViT; the data's folder has to be given with --data.path."""
    return TrainConfig(
        run=Path("runs") / name,
        total_images=batch * steps,
        images_per_step=batch,
        images_per_checkpoint=batch * 10_000,
        images_per_grid=batch * 5_000,
        images_per_average=batch * 10_000,
        images_per_log=batch * 100,
        precision="bf16",
        zero_stage=1,
        model=model,
        skip_scale=ConstantScale() if model.has_skips else Unscaled(),
        optimizer=OptimizerConfig(learning_rate=learning_rate, beta2=beta2, warmup_images=batch * warmup, **optimizer),
        data=DataConfig(path="", flip=True),
    )


def _published_unet(
    name: str, *, batch: int, steps: int, learning_rate: float, warmup: int, clip_grad_norm: float, objective: Any
) -> TrainConfig:
    """As ``_published`` for a UNet. A learned variance is left out: the network predicts the noise alone."""
    model = replace(UNET_PRESETS[name], out_channels=0)
    base = _published(name, model, batch=batch, steps=steps, learning_rate=learning_rate, beta2=0.999, warmup=warmup)
    return replace(
        base,
        objective=objective,
        optimizer=replace(base.optimizer, beta1=0.9, weight_decay=0.0, clip_grad_norm=clip_grad_norm),
    )


def _published_latent(name: str, *, label_drop: float, objective: Any, guidance: float, **recipe: Any) -> TrainConfig:
    """As ``_published``, with guidance, on latents (``scalelong prepare --latents``)."""
    base = _published(name, UVIT_PRESETS[name], **recipe)
    sample = replace(base.sample, guidance=guidance)
    return replace(base, label_drop=label_drop, objective=objective, sample=sample)


def _published_text(name: str, **recipe: Any) -> TrainConfig:
    """As ``_published_latent``, on text features too (``scalelong prepare`` of U-ViT's features)."""
    base = _published_latent(name, **recipe)
    return replace(base, optimizer=replace(base.optimizer, beta1=0.9), data=replace(base.data, flip=False))


def _published_dit(name: str, *, steps: int) -> TrainConfig:
    """As ``_published``, with guidance, on latents. A learned variance is left out, as of a UNet."""
    model = replace(DIT_PRESETS[name], out_channels=0)
    base = _published(name, model, batch=256, steps=steps, learning_rate=1e-4, beta2=0.999, warmup=0)
    return replace(
        base,
        objective="linear",
        label_drop=0.1,
        optimizer=replace(base.optimizer, beta1=0.9, weight_decay=0.0),
        sample=replace(base.sample, guidance=0.5),
    )


_IMAGENET64 = {"batch": 1024, "steps": 300_000, "learning_rate": 3e-4, "beta2": 0.99, "warmup": 5_000}
_PUBLISHED: dict[str, Any] = {
    "cifar10-uvit-s2": {"batch": 128, "steps": 500_000, "learning_rate": 2e-4, "beta2": 0.999, "warmup": 2_500},
    "celeba64-uvit-s4": {"batch": 128, "steps": 500_000, "learning_rate": 2e-4, "beta2": 0.99, "warmup": 5_000},
    "imagenet64-uvit-m4": _IMAGENET64,
    "imagenet64-uvit-l4": _IMAGENET64,
}
# On the latents of Stable Diffusion's autoencoder. L trains on the VP-SDE, H on Stable Diffusion's schedule.
_LATENT: dict[str, Any] = {"batch": 1024, "learning_rate": 2e-4, "beta2": 0.99, "warmup": 5_000}
_LATENT_L: dict[str, Any] = {**_LATENT, "label_drop": 0.15, "objective": "vp-sde"}
_LATENT_H: dict[str, Any] = {**_LATENT, "label_drop": 0.1, "objective": "scaled-linear"}
_PUBLISHED_LATENT: dict[str, Any] = {
    "imagenet256-uvit-l2": {**_LATENT_L, "steps": 300_000, "guidance": 0.4},
    "imagenet256-uvit-h2": {**_LATENT_H, "steps": 500_000, "guidance": 0.4},
    "imagenet512-uvit-l4": {**_LATENT_L, "steps": 500_000, "guidance": 0.7},
    "imagenet512-uvit-h4": {**_LATENT_H, "steps": 500_000, "guidance": 0.7},
}
# On features of images and captions, which U-ViT trains without mirroring.
_PUBLISHED_TEXT: dict[str, Any] = {
    name: {**_LATENT_H, "batch": 256, "steps": 1_000_000, "beta2": 0.9, "guidance": 1.0}
    for name in ("mscoco-uvit-s2", "mscoco-uvit-s2-deep")
}
_CIFAR10_DDPM = {"batch": 128, "steps": 800_000, "learning_rate": 2e-4, "warmup": 5_000, "clip_grad_norm": 1.0}
_IMAGENET64_ADM = {"batch": 2048, "steps": 540_000, "learning_rate": 3e-4, "warmup": 0, "clip_grad_norm": 0.0}
_PUBLISHED_UNETS: dict[str, Any] = {
    "cifar10-ddpm-unet": {**_CIFAR10_DDPM, "objective": "linear"},
    "imagenet64-adm": {**_IMAGENET64_ADM, "objective": "cosine"},
}

# DiT's comparisons of sizes are of 400 k steps; those of the published weights went on.
_DIT_STEPS = {name: 400_000 for name in DIT_PRESETS if name != "digits-dit"}
_DIT_STEPS |= {"imagenet256-dit-xl2": 7_000_000, "imagenet512-dit-xl2": 3_000_000}


# Adam without decay, a rate that falls, averages of two widths (arXiv:2312.02696).
_UNIT_ROWS: dict[str, Any] = {"weight_decay": 0.0, "schedule": "inverse-sqrt", "ema_stds": (0.05, 0.1)}


_EDM2_OBJECTIVE = ObjectiveConfig(
    prediction="edm", weighting="uncertainty", times="edm", log_sigma_mean=-0.8, log_sigma_std=1.6
)


def _embedded_mp(name: str, base: TrainConfig, *, learning_rate: float) -> TrainConfig:
    """An embedded recipe by EDM2's; pixels of the digits have the root mean square 0.85."""
    optimizer = replace(
        base.optimizer, learning_rate=learning_rate, stable_images=base.total_images // 10, **_UNIT_ROWS
    )
    return replace(
        base,
        run=Path("runs") / name,
        model=MP_PRESETS[name],
        skip_scale=Geometric() if MP_PRESETS[name].has_skips else Unscaled(),
        objective=replace(_EDM2_OBJECTIVE, sigma_data=0.8),
        optimizer=optimizer,
    )


def _published_mp_dit(name: str, *, steps: int) -> TrainConfig:
    """MaP-DiT's recipe, of widths up to 384, with a rate that goes with 1 / sqrt(width) as EDM2's do."""
    model = replace(MP_PRESETS[name], out_channels=0)
    width: int = model.width  # type: ignore[attr-defined]
    base = _published(
        name, model, batch=256, steps=steps, learning_rate=round(1e-2 * (384 / width) ** 0.5, 4), beta2=0.99,
        warmup=steps // 150, beta1=0.9, stable_images=256 * (steps // 10), clip_grad_norm=0.1, **_UNIT_ROWS,
    )  # fmt: skip
    return replace(base, objective="linear", label_drop=0.1, sample=replace(base.sample, guidance=0.5))


def _published_edm2(name: str, *, learning_rate: float, stable: int, million_images: int) -> TrainConfig:
    """A recipe of EDM2 on pixels."""
    batch, warmup = 2048, 4_883  # ten million images
    base = _published(
        name, MP_PRESETS[name], batch=batch, steps=round(million_images * 1e6 / batch), learning_rate=learning_rate,
        beta2=0.99, warmup=warmup, beta1=0.9, stable_images=batch * stable, **_UNIT_ROWS,
    )  # fmt: skip
    sample = replace(base.sample, sampler="heun")
    return replace(base, skip_scale=Geometric(), objective=_EDM2_OBJECTIVE, sample=sample)


def _images(name: str, model: BackboneConfig, *, batch: int, objective: ObjectiveConfig | None = None) -> TrainConfig:
    """A recipe for a folder of one's own, on one GPU or several; its classes are those of the folder."""
    return TrainConfig(
        run=Path("runs") / name,
        total_images=25_600_000,
        images_per_step=batch,
        images_per_checkpoint=640_000,
        images_per_grid=320_000,
        images_per_average=640_000,
        images_per_log=6_400,
        images_per_validation=320_000,
        label_drop=0.1,
        precision="bf16",
        model=model,
        objective=objective or ObjectiveConfig(),
        # Averages of the last twentieth of the steps so far (EDM): first grids show more than the initial weights.
        optimizer=OptimizerConfig(learning_rate=2e-4, beta2=0.99, warmup_images=320_000, ema_rampup=0.05),
        data=DataConfig(path="", flip=True),
        sample=SampleConfig(steps=30, guidance=1.0, num_images=64),
    )


_EDM_OBJECTIVE = ObjectiveConfig(prediction="edm", weighting="edm", times="edm")
_IMAGES64_UNET = _images("images64-unet", UNET_PRESETS["images64-unet"], batch=256, objective=_EDM_OBJECTIVE)
FOR_ONES_OWN: dict[str, TrainConfig] = {
    "images32-uvit": _images("images32-uvit", UVIT_PRESETS["images32-uvit"], batch=128),
    "images64-uvit": _images("images64-uvit", UVIT_PRESETS["images64-uvit"], batch=128),
    "images64-unet": replace(
        _IMAGES64_UNET,
        skip_scale=ConstantScale(kappa=0.7),  # of twenty skips the innermost keeps a thousandth
        # Adam as EDM has it; heun takes two evaluations a step but for the last.
        optimizer=replace(_IMAGES64_UNET.optimizer, beta1=0.9, beta2=0.999, weight_decay=0.0),
        sample=replace(_IMAGES64_UNET.sample, sampler="heun", steps=35),
    ),
}
"""Recipes whose data is a folder of whoever trains, which has to be given."""
RECIPES: dict[str, TrainConfig] = {
    **FOR_ONES_OWN,
    "digits-uvit": _DIGITS,
    "photos32-uvit": _PHOTOS,
    **{name: _published(name, UVIT_PRESETS[name], **recipe) for name, recipe in _PUBLISHED.items()},
    **{name: _published_latent(name, **recipe) for name, recipe in _PUBLISHED_LATENT.items()},
    **{name: _published_text(name, **recipe) for name, recipe in _PUBLISHED_TEXT.items()},
    "digits-dit": replace(
        _DIGITS,
        run=Path("runs/digits-dit"),
        model=DIT_PRESETS["digits-dit"],
        skip_scale=Unscaled(),
        optimizer=replace(_DIGITS.optimizer, weight_decay=0.0),
    ),
    **{name: _published_dit(name, steps=steps) for name, steps in _DIT_STEPS.items()},
    "digits-unet": replace(
        _DIGITS,
        run=Path("runs/digits-unet"),
        model=UNET_PRESETS["digits-unet"],
        optimizer=replace(_DIGITS.optimizer, weight_decay=0.0),
    ),
    "photos32-unet": replace(
        _PHOTOS,
        run=Path("runs/photos32-unet"),
        total_images=32_000,
        # The published schedule with least noise: errors of so short a training are magnified by as much as there is.
        objective=ObjectiveConfig(noise="scaled-linear"),
        model=UNET_PRESETS["photos32-unet"],
        optimizer=replace(_PHOTOS.optimizer, learning_rate=1e-3, weight_decay=0.0),
    ),
    **{name: _published_unet(name, **recipe) for name, recipe in _PUBLISHED_UNETS.items()},
}
RECIPES |= {
    "digits-mpuvit": _embedded_mp("digits-mpuvit", RECIPES["digits-uvit"], learning_rate=1e-2),
    "digits-mpdit": _embedded_mp("digits-mpdit", RECIPES["digits-dit"], learning_rate=1e-2),
    "imagenet256-mpdit-xl2": _published_mp_dit("imagenet256-mpdit-xl2", steps=400_000),
    "imagenet64-edm2-s": _published_edm2("imagenet64-edm2-s", learning_rate=1e-2, stable=35_000, million_images=1_074),
}

assert RECIPES.keys() == DESCRIPTIONS.keys()
