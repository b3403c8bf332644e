"""PyTorch's own layers in place of the fused ones, for tools that look for layers by their exact class."""

from typing import TypeVar

from torch import nn

from scalelong.model import linear_layers, linear_wrappers, magnitude, norm_layers, skip_layers, skip_norm_layers

Network = TypeVar("Network", bound=nn.Module)

PLAIN_LAYERS: dict[type[nn.Module], type[nn.Module]] = {
    magnitude.MPSkipLinear: magnitude.MPLinear,
    magnitude.MPGeluLinear: magnitude.MPLinear,
    linear_wrappers.SigmaSkipLinear: linear_wrappers.SigmaLinear,
    linear_wrappers.SigmaGeluLinear: linear_wrappers.SigmaLinear,
    linear_wrappers.SigmaLinear: linear_wrappers.SigmaLinear,
    linear_layers.SkipLinear: nn.Linear,
    linear_layers.GeluLinear: nn.Linear,
    linear_layers.TokenConv1d: nn.Conv1d,
    norm_layers.AddLayerNorm: nn.LayerNorm,
    skip_norm_layers.SkipLayerNorm: nn.LayerNorm,
    skip_layers.GroupNorm: nn.GroupNorm,
    skip_layers.Conv3x3: nn.Conv2d,
    skip_layers.SkipConv1x1: nn.Conv2d,
}
"""The class that each fused layer is derived from, with the same parameters, or the unfused one of its kind."""


def use_plain_layers(network: Network) -> Network:
    """Changes every fused layer inside ``network``, in place, into the layer of PyTorch that it is derived from.

    The network computes the same, unfused: parameters, names and values stay. Call it before a tool that takes layers
    whose class is ``nn.Linear`` itself, as ``torch.ao.quantization.quantize_dynamic`` does; what only asks whether a
    layer is an instance of ``nn.Linear`` (adapters, pruning) needs no such call. A network of diffusers is given back
    its own layers, blocks included, by ``scalelong.unpatch_diffusers``.

    Returns:
        ``network`` itself.
    """
    for module in network.modules():
        kind = next((ours for ours in type(module).__mro__ if ours in PLAIN_LAYERS), None)
        if kind is not None:
            module.__class__ = PLAIN_LAYERS[kind]
    return network
