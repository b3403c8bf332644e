"""Reads the public checkpoints of U-ViT and ScaleLong, whose state dicts ours equals name for name.

https://github.com/baofff/U-ViT and https://github.com/sail-sg/ScaleLong
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from scalelong.model.checkpoint_file import check_dimensions, check_keys, read_state_dict, with_one_dtype
from scalelong.model.skip_scale import LearnedScale, SkipScale, make_skip_scale
from scalelong.model.uvit import UViT, UViTConfig

DIMENSIONS = {
    "pos_embed": 3,
    "patch_embed.proj.weight": 4,
    "mid_block.mlp.fc1.weight": 2,
    "decoder_pred.weight": 2,
    "label_emb.weight": 2,
    "context_embed.weight": 2,
    "se.layer1.weight": 2,
    "se.0.layer1.weight": 2,
}


def load_uvit_checkpoint(
    path_or_state_dict: str | Path | Mapping[str, Tensor],
    *,
    img_size: int,
    patch_size: int,
    num_heads: int,
    skip_scale: str = "none",
    kappa: float = 0.5,
) -> UViT:
    """A U-ViT with the weights of a public checkpoint, giving the published network's outputs for ``model(x, t, y)``.

    Width, depth, channels, classes or text tokens, and the gates of LS are read from the tensors; a checkpoint
    with gates is loaded as LS whether ``skip_scale`` says so or is left at its default.

    Args:
        path_or_state_dict: a ``.pth``/``.pt`` file, a ``.safetensors`` file, or the state dict itself.
        img_size, patch_size: sides of the image (or latent) and of a patch, in pixels. With text they also tell
            how many of the tokens are text: those that are no patches.
        num_heads: attention heads, which the tensors do not tell.
        skip_scale: "none", "inv-sqrt2", "cs", "geometric", "ls" or "ls-separate": how the network was trained.
        kappa: of "cs" and "geometric".

    Returns:
        The model in evaluation mode, on the CPU, in the most precise dtype of the tensors, sharing no memory with them.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file that cannot be read safely, not a U-ViT, or sizes or a policy that contradict the tensors.
    """
    state = read_state_dict(path_or_state_dict)
    needed = ("pos_embed", "patch_embed.proj.weight", "mid_block.mlp.fc1.weight", "decoder_pred.weight")
    if missing := [name for name in needed if name not in state]:
        raise ValueError(f"not a U-ViT checkpoint: it has no {', '.join(missing)}")
    check_dimensions(state, DIMENSIONS, "U-ViT")
    config = _config_from_tensors(state, img_size=img_size, patch_size=patch_size, num_heads=num_heads)
    policy = _policy_from_tensors(state, skip_scale, kappa, config.num_tokens)
    with torch.device("meta"):
        model = UViT(config, skip_scale=policy)
    check_keys(state, model.state_dict(), "U-ViT")
    # Assigned rather than copied in, so that the model has the tensors' dtype.
    state = with_one_dtype(state)
    model.load_state_dict({name: tensor.detach().clone() for name, tensor in state.items()}, assign=True)
    return model.requires_grad_(True).eval()


def _config_from_tensors(state: dict[str, Tensor], *, img_size: int, patch_size: int, num_heads: int) -> UViTConfig:
    width, in_channels, patch_side, _ = state["patch_embed.proj.weight"].shape
    if patch_side != patch_size:
        raise ValueError(f"the checkpoint has patches of {patch_side} pixels, not patch_size={patch_size}")
    num_classes = state["label_emb.weight"].shape[0] if "label_emb.weight" in state else 0
    num_patches = (img_size // patch_size) ** 2
    context_tokens, context_dim = 0, 768
    if "context_embed.weight" in state:
        context_dim = state["context_embed.weight"].shape[1]
        context_tokens = max(state["pos_embed"].shape[1] - 1 - num_patches, 0)
    channels_out = state["decoder_pred.weight"].shape[0] // patch_size**2
    config = UViTConfig(
        img_size=img_size,
        patch_size=patch_size,
        in_channels=in_channels,
        out_channels=0 if channels_out == in_channels else channels_out,
        width=width,
        depth=2 * _count(state, "out_blocks."),
        num_heads=num_heads,
        mlp_ratio=state["mid_block.mlp.fc1.weight"].shape[0] / width,
        num_classes=num_classes,
        context_tokens=context_tokens,
        context_dim=context_dim,
        final_conv="final_layer.weight" in state,
        qkv_bias="mid_block.attn.qkv.bias" in state,
        time_mlp="time_embed.0.weight" in state,
    )
    if config.num_tokens != state["pos_embed"].shape[1]:
        raise ValueError(
            f"the checkpoint has {state['pos_embed'].shape[1]} tokens, "
            f"but img_size={img_size} and patch_size={patch_size} make {config.num_tokens}"
        )
    return config


def _policy_from_tensors(state: dict[str, Tensor], name: str, kappa: float, num_tokens: int) -> SkipScale:
    policy = make_skip_scale(name, kappa)
    if "se.layer1.weight" in state:
        found, hidden = "ls", state["se.layer1.weight"].shape[0]
    elif "se.0.layer1.weight" in state:
        found, hidden = "ls-separate", state["se.0.layer1.weight"].shape[0]
    elif isinstance(policy, LearnedScale):
        raise ValueError(f"skip_scale={name!r}, but the checkpoint has no gates")
    else:
        return policy
    if name not in ("none", found):
        raise ValueError(f"skip_scale={name!r}, but the checkpoint has the gates of {found!r}")
    for reduction in range(1, num_tokens + 1):
        if max(1, num_tokens // reduction) == hidden:
            break
    else:
        raise ValueError(f"gates with {hidden} hidden units over {num_tokens} tokens fit no reduction")
    return LearnedScale(reduction=16 if num_tokens // 16 == hidden else reduction, shared=found == "ls")


def _count(state: dict[str, Tensor], prefix: str) -> int:
    return len({name.removeprefix(prefix).split(".")[0] for name in state if name.startswith(prefix)})
