"""The published U-ViTs (https://github.com/baofff/U-ViT) and the embedded default, as one table.

Class counts are rows of the label embedding: with guidance the last row is the null label.
"""

from scalelong.model.uvit import UViTConfig

# fmt: off
_COLUMNS = ("img_size", "patch_size", "in_channels", "width", "depth", "num_heads", "num_classes", "context_tokens", "final_conv")
_UVITS = {
    "digits-uvit":             (  8, 2, 1,   96,  4,  4,   11,  0, True),
    "cifar10-uvit-s2":         ( 32, 2, 3,  512, 12,  8,    0,  0, True),
    "celeba64-uvit-s4":        ( 64, 4, 3,  512, 12,  8,    0,  0, True),
    "imagenet64-uvit-m4":      ( 64, 4, 3,  768, 16, 12, 1000,  0, True),
    "imagenet64-uvit-l4":      ( 64, 4, 3, 1024, 20, 16, 1000,  0, True),
    "imagenet256-uvit-l2":     ( 32, 2, 4, 1024, 20, 16, 1001,  0, True),
    "imagenet256-uvit-h2":     ( 32, 2, 4, 1152, 28, 16, 1001,  0, False),
    "imagenet512-uvit-l4":     ( 64, 4, 4, 1024, 20, 16, 1001,  0, True),
    "imagenet512-uvit-h4":     ( 64, 4, 4, 1152, 28, 16, 1001,  0, False),
    "mscoco-uvit-s2":          ( 32, 2, 4,  512, 12,  8,    0, 77, True),
    "mscoco-uvit-s2-deep":     ( 32, 2, 4,  512, 16,  8,    0, 77, True),
}
# fmt: on

MODEL_PRESETS: dict[str, UViTConfig] = {
    name: UViTConfig(**dict(zip(_COLUMNS, row, strict=True))) for name, row in _UVITS.items()
}
