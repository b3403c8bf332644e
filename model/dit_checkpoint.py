"""Reads the public checkpoints of DiT (https://github.com/facebookresearch/DiT), whose state dict is ours."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from scalelong.model.checkpoint_file import check_dimensions, check_keys, read_state_dict, with_one_dtype
from scalelong.model.dit import DiT, DiTConfig

DIMENSIONS = {
    "pos_embed": 3,
    "x_embedder.proj.weight": 4,
    "blocks.0.mlp.fc1.weight": 2,
    "final_layer.linear.weight": 2,
    "y_embedder.embedding_table.weight": 2,
}


def load_dit_checkpoint(
    path_or_state_dict: str | Path | Mapping[str, Tensor], *, img_size: int, patch_size: int, num_heads: int
) -> DiT:
    """A DiT with the weights of a public checkpoint, giving the published network's outputs for ``model(x, t, y)``.

    Time is 0 .. 999 as published; the output has the channels of the learned variance behind those of the noise. Width,
    depth, channels and classes (the null class included, as the last) are read from the tensors.

    Args:
        path_or_state_dict: a ``.pt``/``.pth`` file, a ``.safetensors`` file, or the state dict itself; of a training
            checkpoint the averaged weights ("ema") are taken.
        img_size, patch_size: sides of the latent (of 256 x 256 images 32) and of a patch, in pixels.
        num_heads: attention heads, which the tensors do not tell.

    Returns:
        The model in evaluation mode, on the CPU, in the most precise dtype of the tensors, sharing no memory with them.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file that cannot be read safely, not a DiT, or sizes that contradict the tensors.
    """
    state = read_state_dict(path_or_state_dict, parts=("ema", "state_dict"))
    needed = ("pos_embed", "x_embedder.proj.weight", "blocks.0.mlp.fc1.weight", "final_layer.linear.weight")
    if missing := [name for name in needed if name not in state]:
        raise ValueError(f"not a DiT checkpoint: it has no {', '.join(missing)}")
    check_dimensions(state, DIMENSIONS, "DiT")
    config = _config_from_tensors(state, img_size=img_size, patch_size=patch_size, num_heads=num_heads)
    with torch.device("meta"):
        model = DiT(config)
    check_keys(state, model.state_dict(), "DiT")
    # Assigned rather than copied in, so that the model has the tensors' dtype.
    state = with_one_dtype(state)
    model.load_state_dict({name: tensor.detach().clone() for name, tensor in state.items()}, assign=True)
    return model.requires_grad_(True).eval()


def _config_from_tensors(state: dict[str, Tensor], *, img_size: int, patch_size: int, num_heads: int) -> DiTConfig:
    width, in_channels, patch_side, _ = state["x_embedder.proj.weight"].shape
    if patch_side != patch_size:
        raise ValueError(f"the checkpoint has patches of {patch_side} pixels, not patch_size={patch_size}")
    labels = state.get("y_embedder.embedding_table.weight")
    channels_out = state["final_layer.linear.weight"].shape[0] // patch_size**2
    config = DiTConfig(
        img_size=img_size,
        patch_size=patch_size,
        in_channels=in_channels,
        out_channels=0 if channels_out == in_channels else channels_out,
        width=width,
        depth=len({name.split(".")[1] for name in state if name.startswith("blocks.")}),
        num_heads=num_heads,
        mlp_ratio=state["blocks.0.mlp.fc1.weight"].shape[0] / width,
        num_classes=0 if labels is None else labels.shape[0],
    )
    if config.num_tokens != state["pos_embed"].shape[1]:
        raise ValueError(
            f"the checkpoint has {state['pos_embed'].shape[1]} tokens, "
            f"but img_size={img_size} and patch_size={patch_size} make {config.num_tokens}"
        )
    return config
