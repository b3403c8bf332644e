"""What there is to train and which flags are used most, in words: known without an import of torch."""

from collections.abc import Mapping
from typing import Any

TRAIN_PROGRAM = "python -m scalelong.train"
HELP_FLAGS = ("-h", "--help", "--help-all")
DESCRIPTIONS = {
    "images32-uvit": "your own images (32x32), with their classes if they have any, U-ViT-S/2, 44 M parameters",
    "images64-uvit": "your own images (64x64), with their classes if they have any, U-ViT-S/4, 44 M parameters",
    "images64-unet": "your own images (64x64), with their classes if they have any, the UNet of EDM, 68 M parameters",
    "digits-uvit": "the embedded handwritten digits (8x8), class-conditional with guidance; minutes on two CPU cores",
    "photos32-uvit": "crops (32x32) of the embedded photographs, unconditional; minutes on two CPU cores",
    "cifar10-uvit-s2": "CIFAR-10 (32x32), unconditional, 44 M parameters",
    "celeba64-uvit-s4": "CelebA (64x64), unconditional, 44 M parameters",
    "imagenet64-uvit-m4": "ImageNet (64x64), class-conditional, 131 M parameters",
    "imagenet64-uvit-l4": "ImageNet (64x64), class-conditional, 287 M parameters",
    "imagenet256-uvit-l2": "ImageNet (latents of 256x256), class-conditional with guidance, 287 M parameters",
    "imagenet256-uvit-h2": "ImageNet (latents of 256x256), class-conditional with guidance, 501 M parameters",
    "imagenet512-uvit-l4": "ImageNet (latents of 512x512), class-conditional with guidance, 287 M parameters",
    "imagenet512-uvit-h4": "ImageNet (latents of 512x512), class-conditional with guidance, 501 M parameters",
    "mscoco-uvit-s2": "MS-COCO (latents of 256x256), conditioned on text with guidance, 45 M parameters",
    "mscoco-uvit-s2-deep": "MS-COCO (latents of 256x256), conditioned on text with guidance, 58 M parameters",
    "digits-dit": "the embedded digits by a diffusion transformer with adaptive norms, without long skips",
    "imagenet256-dit-s2": "ImageNet (latents of 256x256), DiT-S/2, 33 M parameters",
    "imagenet256-dit-s4": "ImageNet (latents of 256x256), DiT-S/4, 33 M parameters",
    "imagenet256-dit-s8": "ImageNet (latents of 256x256), DiT-S/8, 33 M parameters",
    "imagenet256-dit-b2": "ImageNet (latents of 256x256), DiT-B/2, 131 M parameters",
    "imagenet256-dit-b4": "ImageNet (latents of 256x256), DiT-B/4, 131 M parameters",
    "imagenet256-dit-b8": "ImageNet (latents of 256x256), DiT-B/8, 131 M parameters",
    "imagenet256-dit-l2": "ImageNet (latents of 256x256), DiT-L/2, 458 M parameters",
    "imagenet256-dit-l4": "ImageNet (latents of 256x256), DiT-L/4, 458 M parameters",
    "imagenet256-dit-l8": "ImageNet (latents of 256x256), DiT-L/8, 458 M parameters",
    "imagenet256-dit-xl2": "ImageNet (latents of 256x256), DiT-XL/2, 675 M parameters",
    "imagenet256-dit-xl4": "ImageNet (latents of 256x256), DiT-XL/4, 675 M parameters",
    "imagenet256-dit-xl8": "ImageNet (latents of 256x256), DiT-XL/8, 675 M parameters",
    "imagenet512-dit-xl2": "ImageNet (latents of 512x512), DiT-XL/2, 675 M parameters",
    "digits-unet": "the embedded digits by a convolutional UNet",
    "photos32-unet": "the crops of the embedded photographs by a convolutional UNet",
    "cifar10-ddpm-unet": "CIFAR-10 (32x32), the UNet of DDPM, unconditional, 36 M parameters",
    "imagenet64-adm": "ImageNet (64x64), the UNet of ADM, class-conditional, 296 M parameters",
    "digits-mpuvit": "the embedded digits by a U-ViT that preserves magnitudes, without norms",
    "digits-mpdit": "the embedded digits by a diffusion transformer that preserves magnitudes, without norms",
    "imagenet256-mpdit-xl2": "ImageNet (latents of 256x256), DiT-XL/2 that preserves magnitudes, 674 M parameters",
    "imagenet64-edm2-s": "ImageNet (64x64), the UNet of EDM2 (S, configuration G), class-conditional, 280 M parameters",
}
"""What each recipe of the command line trains; recipes.py has the recipes."""


OFTEN_USED = {
    "run": {
        "run": "run folder; the same command goes on with it",
        "total-images": "images to train on; more go on with a finished run",
        "images-per-step": "global batch",
        "seed": "of everything random",
    },
    "data": {
        "data.path": "folder of images, shards or latents, or digits, photos",
        "data.flip": "mirror half of the images",
        "label-drop": "share of labels dropped, for guidance",
    },
    "network": {
        "skip-scale": "none, inv-sqrt2, cs, geometric, ls, ls-separate",
        "skip-scale.kappa": "of cs and geometric, in (0, 1]",
        "model.width": "of tokens",
        "model.model-channels": "of the first level",
        "model.depth": "blocks",
    },
    "steps": {
        "optimizer.learning-rate": "after the warm-up",
        "optimizer.schedule": "constant, cosine, inverse-sqrt, warmup-stable-decay",
        "precision": "fp32, bf16, fp16",
        "zero-stage": "of DeepSpeed, 0 to 3",
        "compile": "by torch.compile: none, model, blocks",
        "recompute": "in backward, for less memory: none, blocks, or a share kept",
    },
    "start": {
        "init-from": "weights: a file, an export, RUN, a folder of diffusers",
        "branch-from": "RUN or RUN@IMAGES, with its optimizer and place",
    },
    "watching": {
        "images-per-log": "between rows of the log",
        "images-per-grid": "between grids of samples",
        "images-per-evaluation": "between scores of samples; 0: never",
        "log.wandb": "project of Weights & Biases",
        "profile": "steps to trace, for Perfetto",
    },
}
"""Names of fields by what they are about, and a word on each: what ``RECIPE --help`` lists of those that it has."""


def short_help(name: str, values: Mapping[str, Any]) -> str:
    """The help of a recipe, on one screen.

    Args:
        name: the recipe, or what stands in its place.
        values: every flag and the recipe's value.
    """
    lines = [f"usage: {TRAIN_PROGRAM} {name} [--config FILE] [--print-config] [--field value ...]", ""]
    for group, fields in OFTEN_USED.items():
        shown = [
            (f"--{field}", words, values[f"--{field}"]) for field, words in fields.items() if f"--{field}" in values
        ]
        heads = [group, *[""] * len(shown)]
        lines += [
            f"{head:<8}  {flag:<25}  {words} [{'-' if value in (None, '') else value}]"
            for head, (flag, words, value) in zip(heads, shown, strict=False)
        ]
    return "\n".join([*lines, "", f"{TRAIN_PROGRAM} {name} --help-all lists every field."])


def usage() -> str:
    """The help of the command that trains."""
    width = max(map(len, DESCRIPTIONS))
    lines = [f"  {name:<{width}}  {DESCRIPTIONS[name]}" for name in DESCRIPTIONS]
    return "\n".join(
        [
            f"usage: {TRAIN_PROGRAM} RECIPE | RUN [--config FILE] [--print-config] [--field value ...]",
            "",
            "Trains a diffusion model with scaled long skips. The same command resumes, and so does the name of a run.",
            "--config FILE (YAML or JSON) has fields in the place of flags; --print-config prints all of them.",
            "",
            "recipes:",
            *lines,
            "",
            f"{TRAIN_PROGRAM} RECIPE --help lists the fields that are used most, --help-all every one.",
        ]
    )
