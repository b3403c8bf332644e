"""Reads the public checkpoints of ADM (https://github.com/openai/guided-diffusion), whose state dict is ours."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from scalelong.model.checkpoint_file import check_dimensions, check_keys, read_state_dict, with_one_dtype
from scalelong.model.skip_scale import make_skip_scale
from scalelong.model.unet import UNet, UNetConfig

DIMENSIONS = {"time_embed.0.weight": 2, "input_blocks.0.0.weight": 4, "out.2.weight": 4, "label_emb.weight": 2}


def load_adm_checkpoint(
    path_or_state_dict: str | Path | Mapping[str, Tensor],
    *,
    image_size: int,
    num_res_blocks: int,
    channel_mult: Sequence[float],
    attention_resolutions: Sequence[int],
    num_head_channels: int,
    use_scale_shift_norm: bool,
    resblock_updown: bool,
    use_new_attention_order: bool = False,
    skip_scale: str = "none",
    kappa: float = 0.5,
    num_heads: int | None = None,
) -> UNet:
    """A UNet with the weights of a public checkpoint, giving the published network's outputs for ``model(x, t, y)``.

    The names are guided-diffusion's. Channels, classes and whether the variance is learned are read from the tensors.

    Args:
        path_or_state_dict: a ``.pt``/``.pth`` file, a ``.safetensors`` file, or the state dict itself.
        image_size: side of the image, in pixels.
        num_res_blocks, channel_mult, use_scale_shift_norm, resblock_updown, use_new_attention_order: as trained.
        attention_resolutions: where blocks attend, as downsampling factors: (2, 4, 8) for sides 32, 16, 8 of 64.
        num_head_channels: channels of an attention head; -1: ``num_heads`` of them, whatever their width.
        skip_scale: "none", "inv-sqrt2", "cs", "geometric", "ls" or "ls-separate". Public checkpoints were trained with
            "none"; gates that the tensors lack are made anew.
        kappa: of "cs" and "geometric".
        num_heads: where num_head_channels is -1.

    Returns:
        The model in evaluation mode, on the CPU, in the most precise dtype of the tensors, sharing no memory with them.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file that cannot be read safely, not a UNet, or sizes or a policy that contradict the tensors.
    """
    policy = make_skip_scale(skip_scale, kappa)
    state = read_state_dict(path_or_state_dict)
    needed = ("time_embed.0.weight", "input_blocks.0.0.weight", "output_blocks.0.0.in_layers.0.weight", "out.2.weight")
    if missing := [name for name in needed if name not in state]:
        raise ValueError(f"not an ADM checkpoint: it has no {', '.join(missing)}")
    check_dimensions(state, DIMENSIONS, "UNet")
    for name, value in (("channel_mult", channel_mult), ("attention_resolutions", attention_resolutions)):
        if isinstance(value, str):
            raise ValueError(f"{name} is a sequence of numbers, got the text {value!r}")
    if num_head_channels == -1 and num_heads is None:
        raise ValueError("with num_head_channels=-1 the tensors do not tell the number of heads: give num_heads")
    config = UNetConfig(
        img_size=image_size,
        in_channels=state["input_blocks.0.0.weight"].shape[1],
        out_channels=state["out.2.weight"].shape[0],
        model_channels=state["time_embed.0.weight"].shape[1],
        channel_mult=tuple(channel_mult),
        num_res_blocks=num_res_blocks,
        attention_resolutions=tuple(attention_resolutions),
        num_heads=num_heads or 1,
        num_head_channels=max(num_head_channels, 0),
        use_scale_shift_norm=use_scale_shift_norm,
        resblock_updown=resblock_updown,
        use_new_attention_order=use_new_attention_order,
        num_classes=state["label_emb.weight"].shape[0] if "label_emb.weight" in state else 0,
    )
    with torch.device("meta"):
        model = UNet(config, skip_scale=policy)
    if model.skip_gates is not None and not any(name.startswith("skip_gates.") for name in state):
        state |= _new_gates(model.skip_gates)
    check_keys(state, model.state_dict(), "UNet")
    state = with_one_dtype(state)
    model.load_state_dict({name: tensor.detach().clone() for name, tensor in state.items()}, assign=True)
    return model.requires_grad_(True).eval()


def _new_gates(gates: nn.Module) -> dict[str, Tensor]:
    gates.to_empty(device="cpu")
    for layer in gates.modules():
        if isinstance(layer, nn.Linear):
            layer.reset_parameters()
    return {f"skip_gates.{name}": tensor for name, tensor in gates.state_dict().items()}
