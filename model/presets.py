"""The published U-ViTs (https://github.com/baofff/U-ViT) and DiTs (https://github.com/facebookresearch/DiT), the UNets
of DDPM (https://github.com/hojonathanho/diffusion) and ADM (https://github.com/openai/guided-diffusion), those that
preserve magnitudes (https://github.com/NVlabs/edm2, arXiv:2505.19122), and the embedded defaults, as one table.

Class counts are rows of the label embedding: with guidance the last row is the null label.
"""

from dataclasses import replace

from scalelong.model.backbone_config import BackboneConfig
from scalelong.model.dit_config import DiTConfig
from scalelong.model.edm2_unet_config import EDM2UNetConfig
from scalelong.model.unet_config import UNetConfig
from scalelong.model.uvit_config import UViTConfig


# fmt: off
def _uvit(
    img_size: int, patch_size: int, in_channels: int, width: int, depth: int, num_heads: int, **more
) -> UViTConfig:
    return UViTConfig(
        img_size=img_size, patch_size=patch_size, in_channels=in_channels,
        width=width, depth=depth, num_heads=num_heads, **more,
    )


UVIT_PRESETS: dict[str, UViTConfig] = {
    # side, patch, channels, width, depth, heads
    "digits-uvit":         _uvit(8,  2, 1,   96,  4,  4, num_classes=11),
    "photos32-uvit":       _uvit(32, 4, 3,  128,  4,  4),
    "cifar10-uvit-s2":     _uvit(32, 2, 3,  512, 12,  8),
    "celeba64-uvit-s4":    _uvit(64, 4, 3,  512, 12,  8),
    # Of ten classes and a null label: a recipe takes those of its data.
    "images32-uvit":       _uvit(32, 2, 3,  512, 12,  8, num_classes=11),
    "images64-uvit":       _uvit(64, 4, 3,  512, 12,  8, num_classes=11),
    "imagenet64-uvit-m4":  _uvit(64, 4, 3,  768, 16, 12, num_classes=1000),
    "imagenet64-uvit-l4":  _uvit(64, 4, 3, 1024, 20, 16, num_classes=1000),
    "imagenet256-uvit-l2": _uvit(32, 2, 4, 1024, 20, 16, num_classes=1001),
    "imagenet256-uvit-h2": _uvit(32, 2, 4, 1152, 28, 16, num_classes=1001, final_conv=False),
    "imagenet512-uvit-l4": _uvit(64, 4, 4, 1024, 20, 16, num_classes=1001),
    "imagenet512-uvit-h4": _uvit(64, 4, 4, 1152, 28, 16, num_classes=1001, final_conv=False),
    "mscoco-uvit-s2":      _uvit(32, 2, 4,  512, 12,  8, context_tokens=77),
    "mscoco-uvit-s2-deep": _uvit(32, 2, 4,  512, 16,  8, context_tokens=77),
}
def _dit(img_size: int, patch_size: int, width: int, depth: int, num_heads: int) -> DiTConfig:
    # Eight channels out: the published networks learn the variance as well.
    return DiTConfig(
        img_size=img_size, patch_size=patch_size, in_channels=4, out_channels=8,
        width=width, depth=depth, num_heads=num_heads, num_classes=1001,
    )


DIT_PRESETS: dict[str, DiTConfig] = {
    "digits-dit": DiTConfig(
        img_size=8, patch_size=2, in_channels=1, width=96, depth=6, num_heads=4, num_classes=11,
    ),
    # side, patch, width, depth, heads
    "imagenet256-dit-s2":  _dit(32, 2,  384, 12,  6),
    "imagenet256-dit-s4":  _dit(32, 4,  384, 12,  6),
    "imagenet256-dit-s8":  _dit(32, 8,  384, 12,  6),
    "imagenet256-dit-b2":  _dit(32, 2,  768, 12, 12),
    "imagenet256-dit-b4":  _dit(32, 4,  768, 12, 12),
    "imagenet256-dit-b8":  _dit(32, 8,  768, 12, 12),
    "imagenet256-dit-l2":  _dit(32, 2, 1024, 24, 16),
    "imagenet256-dit-l4":  _dit(32, 4, 1024, 24, 16),
    "imagenet256-dit-l8":  _dit(32, 8, 1024, 24, 16),
    "imagenet256-dit-xl2": _dit(32, 2, 1152, 28, 16),
    "imagenet256-dit-xl4": _dit(32, 4, 1152, 28, 16),
    "imagenet256-dit-xl8": _dit(32, 8, 1152, 28, 16),
    "imagenet512-dit-xl2": _dit(64, 2, 1152, 28, 16),
}
UNET_PRESETS: dict[str, UNetConfig] = {
    "digits-unet": UNetConfig(
        img_size=8, in_channels=1, model_channels=32, channel_mult=(1, 2), num_res_blocks=2, num_classes=11,
    ),
    "photos32-unet": UNetConfig(
        img_size=32, model_channels=32, channel_mult=(1, 2, 2), num_res_blocks=1, attention_resolutions=(4,),
    ),
    "cifar10-ddpm-unet": UNetConfig(
        img_size=32, model_channels=128, channel_mult=(1, 2, 2, 2), num_res_blocks=2, attention_resolutions=(2,),
        same_padding=True, norm_eps=1e-6, dropout=0.1,
    ),
    # The sizes of EDM for FFHQ and AFHQ (arXiv:2206.00364, table 7), in the blocks of ADM.
    "images64-unet": UNetConfig(
        img_size=64, model_channels=128, channel_mult=(1, 2, 2, 2), num_res_blocks=4, attention_resolutions=(4,),
        num_head_channels=64, use_scale_shift_norm=True, resblock_updown=True, dropout=0.05, num_classes=11,
    ),
    # Six channels out: the published network learns the variance as well.
    "imagenet64-adm": UNetConfig(
        img_size=64, out_channels=6, model_channels=192, channel_mult=(1, 2, 3, 4), num_res_blocks=3,
        attention_resolutions=(2, 4, 8), num_head_channels=64, use_scale_shift_norm=True, resblock_updown=True,
        use_new_attention_order=False, dropout=0.1, num_classes=1000,
    ),
}
MP_PRESETS: dict[str, BackboneConfig] = {
    "digits-mpuvit":         replace(UVIT_PRESETS["digits-uvit"], magnitude_preserving=True),
    "digits-mpdit":          replace(DIT_PRESETS["digits-dit"], magnitude_preserving=True),
    "imagenet256-mpdit-xl2": replace(DIT_PRESETS["imagenet256-dit-xl2"], magnitude_preserving=True),
    "imagenet64-edm2-s":     EDM2UNetConfig(img_size=64, model_channels=192, num_classes=1000),
}
# fmt: on
MODEL_PRESETS: dict[str, BackboneConfig] = {**UVIT_PRESETS, **DIT_PRESETS, **UNET_PRESETS, **MP_PRESETS}
