"""Each of our networks beside the same one written plainly over the same weights, small, with inputs for both."""

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from scalelong.bench import published_dit, published_unet, published_uvit
from scalelong.model.dit import DiT, DiTConfig
from scalelong.model.skip_scale import make_skip_scale
from scalelong.model.unet import UNet, UNetConfig
from scalelong.model.uvit import UViT, UViTConfig

KAPPA = 0.7
UVIT = UViTConfig(img_size=8, patch_size=2, width=32, depth=4, num_heads=4, num_classes=7, qkv_bias=True, time_mlp=True)
DIT = DiTConfig(
    img_size=8, patch_size=2, width=32, depth=4, num_heads=4, num_classes=7, skip="layer-norm", qk_norm=True
)
DDPM = UNetConfig(img_size=8, model_channels=16, channel_mult=(1, 2), num_res_blocks=1, num_groups=8)
ADM = replace(
    DDPM,
    attention_resolutions=(1, 2),
    num_head_channels=8,
    use_scale_shift_norm=True,
    resblock_updown=True,
    use_new_attention_order=False,
    num_classes=7,
)


class Pair(NamedTuple):
    ours: Any
    plain: Any
    call: Callable[[nn.Module], Tensor]
    """The prediction of a network for one and the same batch."""


def uvit(mode: str = "ls") -> Pair:
    model = _drawn(UViT(UVIT, skip_scale=make_skip_scale(mode, KAPPA)))
    batch = torch.randn(2, 3, 8, 8), torch.tensor([3.0, 700.0]), torch.tensor([1, 5])
    return Pair(model, _apart(published_uvit.as_published(model)), lambda network: _called(network, *batch))


def dit(mode: str = "ls") -> Pair:
    model = _drawn(DiT(DIT, skip_scale=make_skip_scale(mode, KAPPA)))
    batch = torch.randn(2, 3, 8, 8), torch.tensor([3.0, 700.0]), torch.tensor([1, 5])
    return Pair(model, _apart(published_dit.as_published(model)), lambda network: _called(network, *batch))


def unet(config: UNetConfig, mode: str = "ls", position: Any = "before-norm") -> Pair:
    model = _drawn(UNet(replace(config, skip_position=position), skip_scale=make_skip_scale(mode, KAPPA)))
    labels = torch.tensor([1, 5]) if config.num_classes else None
    batch = torch.randn(2, 3, 8, 8), torch.tensor([3.0, 700.0]), labels
    plain = published_unet.as_published(model)
    return Pair(model, _apart(plain), lambda network: _called(network, *batch))


def diffusers_unet(mode: str = "cs", position: Any = "before-norm") -> Pair:
    """A patched network; the plain one is scaled by hooks, under a policy without gates."""
    from test_diffusers_patch import make_inputs, make_network, patched_copy, scaled_by_hooks

    network = make_network("ddpm")
    inputs = make_inputs(network)
    inputs["sample"] = inputs["sample"][..., :8, :8]
    plain = copy.deepcopy(network)
    if mode != "none":
        plain = scaled_by_hooks(network, lambda i, skip: KAPPA ** (i - 1), position)
    patched = patched_copy(network, skip_scale=mode, kappa=KAPPA, position=position)
    return Pair(patched, plain, lambda network: _called(network, **inputs).sample)


def _called(network: nn.Module, *arguments: Any, **named: Any) -> Any:
    """In the dtype of the network."""
    dtype = next(p.dtype for p in network.parameters() if p.is_floating_point())

    def cast(x: Any) -> Any:
        return x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x

    return network(*map(cast, arguments), **{name: cast(x) for name, x in named.items()})


def _drawn(model: Any) -> Any:
    """No parameter at 0 or 1, so that every one matters."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.add_(0.05 * torch.randn_like(p))
            if name.endswith("layer1.bias"):  # so that no hidden unit of a gate is dead
                p.fill_(1.0)
    return model


def _apart(twin: nn.Module) -> nn.Module:
    """With parameters of its own, of the same values."""
    return copy.deepcopy(twin)


PAIRS: dict[str, Callable[[], Pair]] = {
    "uvit": uvit,
    "dit": dit,
    "unet-ddpm": lambda: unet(DDPM),
    "unet-adm": lambda: unet(ADM),
    "unet-after-norm": lambda: unet(ADM, "cs", "after-norm"),
    "diffusers": diffusers_unet,
}
