"""Which network tensors are of, where they do not fit: the sizes that differ, and the nearest preset."""

from collections.abc import Mapping
from functools import cache

import torch
from torch import Tensor

from scalelong.model.architectures import make_backbone
from scalelong.model.presets import MODEL_PRESETS

# fmt: off
SIZES = (
    # what           tensor                        dimension
    ("patch_size",     "patch_embed.proj.weight",    2),
    ("width",          "patch_embed.proj.weight",    0),
    ("in_channels",    "patch_embed.proj.weight",    1),
    ("MLP width",      "mid_block.mlp.fc1.weight",   0),
    ("context_dim",    "context_embed.weight",       1),
    ("model_channels", "input_blocks.0.0.weight",    0),
    ("in_channels",    "input_blocks.0.0.weight",    1),
    ("out_channels",   "out.2.weight",               0),
    ("patch_size",     "x_embedder.proj.weight",     2),
    ("width",          "x_embedder.proj.weight",     0),
    ("in_channels",    "x_embedder.proj.weight",     1),
    ("MLP width",      "blocks.0.mlp.fc1.weight",    0),
)
# fmt: on
"""Dimensions of tensors that are sizes of a network."""
LISTS = ("in_blocks", "out_blocks", "input_blocks", "output_blocks", "blocks")
"""Lists of blocks, whose lengths are sizes too."""


def differing_sizes(given: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> list[str]:
    """Sizes that both networks have and that differ, as "width 512 -> 96"; empty where the tensors tell of none."""
    found = []
    for what, name, dimension in SIZES:
        if name in given and name in expected and given[name].dim() == expected[name].dim():
            found.append((what, given[name].shape[dimension], expected[name].shape[dimension]))
    for blocks in LISTS:
        lengths = [
            len({name.split(".")[1] for name in state if name.startswith(f"{blocks}.")}) for state in (given, expected)
        ]
        if min(lengths) > 0:
            found.append((blocks, *lengths))
    return [f"{what} {old} -> {new}" for what, old, new in found if old != new]


def nearest_preset(state: Mapping[str, Tensor]) -> str | None:
    """The architecture and the preset with which tensors share most names and shapes; None where they share no name."""
    best, most = None, (0.0, 0.0)
    of_state = {(name, tuple(tensor.shape)) for name, tensor in state.items()}
    for name, of_preset in _tensors_of_presets().items():
        names = {n for n, _ in of_preset}
        # First by what is there in the same shape, then by name alone: a share of all that either has.
        score = (_overlap(of_state, of_preset), _overlap(set(state), names))
        if score > most:
            best, most = f"{MODEL_PRESETS[name].architecture} {name}", score
    return best


@cache
def _tensors_of_presets() -> dict[str, set[tuple[str, tuple[int, ...]]]]:
    """The names and shapes of each one's tensors."""
    with torch.device("meta"):
        networks = {name: make_backbone(config) for name, config in MODEL_PRESETS.items()}
    return {name: {(n, tuple(x.shape)) for n, x in network.state_dict().items()} for name, network in networks.items()}


def _overlap(a: set, b: set) -> float:
    return len(a & b) / max(1, len(a | b))
