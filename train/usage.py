"""What there is to train, in words: known without an import of torch."""

TRAIN_PROGRAM = "python -m scalelong.train"
DESCRIPTIONS = {
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
            f"{TRAIN_PROGRAM} RECIPE --help lists the fields of a recipe and their values.",
        ]
    )
