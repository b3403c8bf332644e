"""ScaleLong: training diffusion backbones whose long skip connections are scaled (arXiv:2310.13545)."""

from importlib import import_module

__version__ = "0.2.0"

_PUBLIC = {
    "DiT": "scalelong.model.dit",
    "DiTConfig": "scalelong.model.dit_config",
    "UNet": "scalelong.model.unet",
    "UNetConfig": "scalelong.model.unet_config",
    "UViT": "scalelong.model.uvit",
    "UViTConfig": "scalelong.model.uvit_config",
    "load_backbone": "scalelong.model.architectures",
    "load_adm_checkpoint": "scalelong.model.adm_checkpoint",
    "load_dit_checkpoint": "scalelong.model.dit_checkpoint",
    "load_uvit_checkpoint": "scalelong.model.uvit_checkpoint",
    "PatchedUNet": "scalelong.model.diffusers_loading",
    "PatchReport": "scalelong.model.diffusers_patch",
    "Pipeline": "scalelong.train.sampling.pipeline",
    "patch_diffusers": "scalelong.model.diffusers_patch",
    "tuned_skips": "scalelong.model.skip_tuning",
    "unpatch_diffusers": "scalelong.model.diffusers_patch",
}
__all__ = ["__version__", *_PUBLIC]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str):
    # Looked up on first use, so that `import scalelong` alone does not cost the import of torch.
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'scalelong' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
