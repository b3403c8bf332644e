"""Reads the weights of a UNet2DModel of diffusers into the names of our UNet, where the two are one network.

They are where it has the blocks of DDPM and ADM: as google/ddpm-* and the converted models of guided-diffusion and of
consistency models have. Only the files are read; diffusers need not be installed.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from scalelong.model.diffusers_saved import scaling_in
from scalelong.model.fitted_weights import Weights
from scalelong.model.unet_config import UNetConfig

BLOCKS = re.compile(r"(Attn|Resnet)?(Down|Up|Downsample|Upsample)Block2D")
FIXED: dict[str, tuple[Any, ...]] = {
    "center_input_sample": (False,),
    "time_embedding_type": ("positional",),
    "time_embedding_dim": (None,),
    "mid_block_type": ("UNetMidBlock2D",),
    "mid_block_scale_factor": (1,),
    "act_fn": ("silu", "swish"),
    "add_attention": (True,),
    "class_embed_type": (None,),
}
"""Values of the options of diffusers that our UNet has, the default of diffusers first."""
RES_BLOCK = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
ENDS = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "class_embedding": "label_emb",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}


def weights_of_diffusers(config: Mapping[str, Any], state: Mapping[str, Tensor]) -> Weights:
    """The weights of a UNet2DModel by our names, with what its configuration says of the network.

    Args:
        config: its ``config.json``.
        state: its state dict, gates of scaled skips included.

    Raises:
        ValueError: it is no network of ours; says why.
    """
    unet = _config_of(config)
    names = module_names(unet)
    ours: dict[str, Tensor] = {}
    for name, tensor in _with_joined_attention(state).items():
        module, _, kind = name.rpartition(".")
        if module not in names and not name.startswith("skip_gates."):
            raise ValueError(f"the UNet2DModel has {name}, which no UNet here has")
        # Ours multiplies queries, keys and values by convolutions of width 1.
        of_attention = names.get(module, "").endswith((".qkv", ".proj_out")) and kind == "weight"
        ours[f"{names[module]}.{kind}" if module in names else name] = tensor[..., None] if of_attention else tensor
    remarks = []
    if not config.get("flip_sin_to_cos", True):  # sines came first
        rows = ours["time_embed.0.weight"]
        ours["time_embed.0.weight"] = torch.cat([*reversed(rows.chunk(2, dim=1))], dim=1)
    if config.get("freq_shift", 0):
        remarks.append(f"the time was embedded by other frequencies (freq_shift {config['freq_shift']})")
    scaling = scaling_in(dict(config))
    policy = None if scaling is None else scaling.policy
    return Weights(ours, unet, policy, remarks=tuple(remarks))


def _config_of(config: Mapping[str, Any]) -> UNetConfig:
    """
    Raises:
        ValueError: an option that our UNet does not have.
    """
    if config.get("_class_name") != "UNet2DModel":
        raise ValueError(f"a {config.get('_class_name')} of diffusers is no network here; a UNet2DModel is")
    for option, allowed in FIXED.items():
        if config.get(option, allowed[0]) not in allowed:
            raise ValueError(f"a UNet2DModel with {option} {config[option]!r} is no network here")
    num_groups = config.get("norm_num_groups", 32)
    if config.get("attn_norm_num_groups") not in (None, num_groups):
        raise ValueError("a UNet2DModel that attends after norms of other groups is no network here")
    down = list(config.get("down_block_types") or ("DownBlock2D", *["AttnDownBlock2D"] * 3))
    up = list(config.get("up_block_types") or (*["AttnUpBlock2D"] * 3, "UpBlock2D"))
    attends = [kind.startswith("Attn") for kind in down]
    if unknown := [kind for kind in (*down, *up) if not BLOCKS.fullmatch(kind)]:
        raise ValueError(f"a UNet2DModel with a {unknown[0]} is no network here")
    if attends != [kind.startswith("Attn") for kind in reversed(up)]:
        raise ValueError("a UNet2DModel that attends on other levels in its decoder is no network here")
    channels = config.get("block_out_channels", (224, 448, 672, 896))
    by_blocks = any(kind.startswith("Resnet") for kind in (*down, *up)) or config.get("downsample_type") == "resnet"
    head_channels = config.get("attention_head_dim", 8)
    return UNetConfig(
        img_size=config.get("sample_size") or 2 ** (len(channels) - 1),
        in_channels=config.get("in_channels", 3),
        out_channels=config.get("out_channels", 3),
        model_channels=channels[0],
        channel_mult=tuple(number / channels[0] for number in channels),
        num_res_blocks=config.get("layers_per_block", 2),
        attention_resolutions=tuple(2**level for level, attending in enumerate(attends) if attending),
        num_head_channels=head_channels or 0,
        use_scale_shift_norm=config.get("resnet_time_scale_shift", "default") == "scale_shift",
        resblock_updown=by_blocks,
        same_padding=config.get("downsample_padding", 1) == 0,
        dropout=config.get("dropout", 0.0),
        num_groups=num_groups,
        norm_eps=config.get("norm_eps", 1e-5),
        num_classes=config.get("num_class_embeds") or 0,
    )


def module_names(config: UNetConfig) -> dict[str, str]:
    """Where each module of diffusers stands in our lists of blocks: residual block, attention, then what resamples."""
    names, levels = dict(ENDS), len(config.channels)

    def add_block(theirs: str, ours: str) -> None:
        names.update({f"{theirs}.{module}": f"{ours}.{name}" for module, name in RES_BLOCK.items()})

    def add_attention(theirs: str, ours: str) -> None:
        names.update({f"{theirs}.group_norm": f"{ours}.norm", f"{theirs}.qkv": f"{ours}.qkv"})
        names[f"{theirs}.to_out.0"] = f"{ours}.proj_out"

    def add_resampling(theirs: str, ours: str, conv: str) -> None:
        add_block(theirs, ours)
        names[f"{theirs}.conv"] = f"{ours}.{conv}"

    place = 1
    for level in range(levels):
        for n in range(config.num_res_blocks):
            add_block(f"down_blocks.{level}.resnets.{n}", f"input_blocks.{place}.0")
            add_attention(f"down_blocks.{level}.attentions.{n}", f"input_blocks.{place}.1")
            place += 1
        if level < levels - 1:
            add_resampling(f"down_blocks.{level}.downsamplers.0", f"input_blocks.{place}.0", "op")
            place += 1
    for n, middle in enumerate((0, 2)):
        add_block(f"mid_block.resnets.{n}", f"middle_block.{middle}")
    add_attention("mid_block.attentions.0", "middle_block.1")
    place = 0
    for block, level in enumerate(reversed(range(levels))):
        for n in range(config.num_res_blocks + 1):
            add_block(f"up_blocks.{block}.resnets.{n}", f"output_blocks.{place}.0")
            add_attention(f"up_blocks.{block}.attentions.{n}", f"output_blocks.{place}.1")
            if level > 0 and n == config.num_res_blocks:
                last = 2 if config.factors[level] in config.attention_resolutions else 1
                add_resampling(f"up_blocks.{block}.upsamplers.0", f"output_blocks.{place}.{last}", "conv")
            place += 1
    return names


def _with_joined_attention(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Queries, keys and values as one projection."""
    joined = {}
    for name, tensor in state.items():
        if match := re.fullmatch(r"(.+)\.to_([qkv])\.(weight|bias)", name):
            module, part, kind = match.groups()
            if part == "q":
                joined[f"{module}.qkv.{kind}"] = torch.cat([state[f"{module}.to_{p}.{kind}"] for p in "qkv"])
        else:
            joined[name] = tensor
    return joined
