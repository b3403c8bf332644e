"""Writes a UNet as a UNet2DModel of diffusers, where the two are one network: diffusers_unet.py the other way round.

Scaled skips are described as in a patched network that was saved: ``scalelong.PatchedUNet.from_pretrained`` loads
network, policy and gates, diffusers' own class the network without its scaling. diffusers need not be installed.
"""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scalelong.model.checkpoint_file import write_tensors
from scalelong.model.diffusers_saved import ENTRY
from scalelong.model.diffusers_unet import module_names
from scalelong.model.skip_scale import SkipScale, Unscaled, skip_scale_to_dict
from scalelong.model.unet import UNet
from scalelong.model.unet_config import UNetConfig


def save_as_unet2d(model: torch.nn.Module, folder: str | Path) -> None:
    """Writes ``config.json`` and ``diffusion_pytorch_model.safetensors``, for ``UNet2DModel.from_pretrained``.

    Args:
        model: a UNet; its forward and that of what is loaded agree to rounding.
        folder: made if need be.

    Raises:
        ValueError: a network that is no UNet2DModel, naming what it has and that has not; nothing is written.
    """
    if type(model) is not UNet:
        raise ValueError(f"a {type(model).__name__} is no UNet2DModel of diffusers: of the networks here, a UNet is")
    config = unet2d_config(model.config, model.skip_scale)
    state = unet2d_state(model.config, model.state_dict())
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    write_tensors(state, folder / "diffusion_pytorch_model.safetensors")


def unet2d_config(config: UNetConfig, skip_scale: SkipScale) -> dict[str, Any]:
    """The ``config.json`` of the UNet2DModel that is the same network.

    Raises:
        ValueError: there is none, naming the option that it lacks.
    """
    if config.parametrization != "standard":
        raise ValueError(f"a UNet2DModel of diffusers has no parametrization {config.parametrization!r}")
    for name, without in (("self_condition_block", None), ("augment_dim", 0)):
        if getattr(config, name) != without:
            raise ValueError(f"a UNet2DModel of diffusers has no {name}")
    if config.skip != "concatenated":
        raise ValueError(f"a UNet2DModel of diffusers has no skip {config.skip!r}")
    attends = [factor in config.attention_resolutions for factor in config.factors]
    plain, resampling = ("DownBlock2D", "UpBlock2D"), "conv"
    if config.resblock_updown:
        plain, resampling = ("ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D"), "resnet"
    described = {
        "_class_name": "UNet2DModel",
        "sample_size": config.img_size,
        "in_channels": config.in_channels,
        "out_channels": config.channels_out,
        "center_input_sample": False,
        "time_embedding_type": "positional",
        "freq_shift": 0,
        "flip_sin_to_cos": True,
        "down_block_types": ["AttnDownBlock2D" if attending else plain[0] for attending in attends],
        "up_block_types": ["AttnUpBlock2D" if attending else plain[1] for attending in reversed(attends)],
        "block_out_channels": list(config.channels),
        "layers_per_block": config.num_res_blocks,
        "mid_block_scale_factor": 1,
        "downsample_padding": 0 if config.same_padding else 1,
        "downsample_type": resampling,
        "upsample_type": resampling,
        "dropout": config.dropout,
        "act_fn": "silu",
        "attention_head_dim": _head_channels(config),
        "norm_num_groups": config.num_groups,
        "attn_norm_num_groups": config.num_groups,  # with scale_shift, attention has no norm where it is not given
        "norm_eps": config.norm_eps,
        "resnet_time_scale_shift": "scale_shift" if config.use_scale_shift_norm else "default",
        "add_attention": True,
        "class_embed_type": None,
        "num_class_embeds": config.num_classes or None,
    }
    if not isinstance(skip_scale, Unscaled):
        described[ENTRY] = {
            "network": "UNet2DModel",
            "skip_scale": skip_scale_to_dict(skip_scale),
            "position": config.skip_position,
        }
    return described


def _head_channels(config: UNetConfig) -> int | None:
    """Channels of a head, the same wherever the network attends; None for one head everywhere."""
    factors = zip(config.channels, config.factors, strict=True)
    attending = {channels for channels, factor in factors if factor in config.attention_resolutions}
    attending.add(config.channels[-1])  # the middle
    if all(config.num_heads_of(channels) == 1 for channels in attending):
        return None
    widths = {channels // config.num_heads_of(channels) for channels in attending}
    if len(widths) > 1:
        raise ValueError(
            f"a UNet2DModel of diffusers has attention heads of one width on all levels; num_heads {config.num_heads} "
            f"makes them {', '.join(map(str, sorted(widths)))} channels wide"
        )
    return widths.pop()


def unet2d_state(config: UNetConfig, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of the UNet2DModel, gates of scaled skips included."""
    theirs_of_ours = {ours: theirs for theirs, ours in module_names(config).items()}
    theirs: dict[str, Tensor] = {}
    for name, tensor in state.items():
        module, _, kind = name.rpartition(".")
        if module not in theirs_of_ours:
            theirs[name] = tensor.contiguous()  # a gate
        elif module.endswith(".qkv"):
            attention = theirs_of_ours[module].removesuffix(".qkv")
            for part, rows in zip("qkv", _separated(config, tensor), strict=True):
                theirs[f"{attention}.to_{part}.{kind}"] = rows
        else:
            tensor = tensor.squeeze(-1) if module.endswith(".proj_out") and kind == "weight" else tensor
            theirs[f"{theirs_of_ours[module]}.{kind}"] = tensor.contiguous()
    return theirs


def _separated(config: UNetConfig, rows: Tensor) -> list[Tensor]:
    """Queries, keys and values of a joined projection, each with the rows of all heads, in their order."""
    if rows.dim() == 3:  # a convolution of width 1
        rows = rows.squeeze(-1)
    if not config.use_new_attention_order:
        heads = config.num_heads_of(len(rows) // 3)
        rows = rows.unflatten(0, (heads, 3, -1)).transpose(0, 1).flatten(0, 2)
    return [part.contiguous() for part in rows.chunk(3)]
