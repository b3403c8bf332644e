"""The maximal update parametrisation: a learning rate found on a narrow network serves the wide one.

Yang et al., arXiv:2203.03466, for diffusion transformers Zheng et al., arXiv:2505.15270. Each parameter is of a kind by
which sides of it grow with the width; m is its fan-in over that of the same network at the base width.

    kind     grows with width   begins as            learning rate   weight decay   output   epsilon
    hidden   inputs, outputs    N(0, 1 / fan-in)     η / m           λ m                     ε / m
    input    outputs            N(0, 1 / fan-in)     η               λ                       ε / m
    output   inputs             0                    η               λ              / m      ε / m
    vector   its one side       as without muP       η               λ                       ε / m
    others   nothing            as without muP       η               λ                       ε

Heads keep their width, of which there are more, and so attention its scale. The multiplier of the output stands behind
the layer's bias too, whose rate is therefore η m. Gradients shrink as 1 / m, and so does Adam's epsilon beside them.
Multipliers are plain numbers of the layers and the groups. Magnitude-preserving layers (magnitude.py) begin as ever,
those of a growing fan-in with the learning rate η / √m.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from scalelong.model.magnitude import UnitRows, normal_rows
from scalelong.model.parameter_kinds import ParameterKind, kind_of
from scalelong.model.skip_scale import SkipScale

if TYPE_CHECKING:
    from scalelong.model.backbone import Backbone


def mup_kinds(network: "Backbone") -> tuple[ParameterKind, ...]:
    """The table of a network whose configuration has a base width: rows of its own before those of the network's."""
    base = network.config.base_config()
    base_shapes = _shapes(base, network.skip_scale)
    wider_shapes = _shapes(replace(base, width=2 * base.width, num_heads=2 * base.num_heads), network.skip_scale)
    names_of: dict[ParameterKind, list[str]] = {}
    for name, kind in _kinds(network, base_shapes, wider_shapes):
        names_of.setdefault(kind, []).append(name)
    own = (replace(kind, names=" ".join(names)) for kind, names in names_of.items())
    return *own, *network.kinds


def _shapes(config: Any, skip_scale: SkipScale) -> dict[str, torch.Size]:
    with torch.device("meta"):
        network: Backbone = config.network()(config, skip_scale=skip_scale)
    return {name: p.shape for name, p in network.named_parameters()}


def _kinds(
    network: "Backbone", base_shapes: Mapping[str, torch.Size], wider_shapes: Mapping[str, torch.Size]
) -> Iterator[tuple[str, ParameterKind]]:
    """The parameters that muP treats in a way of its own."""
    layers = {f"{name}.weight": layer for name, layer in network.named_modules()}
    for name, parameter in network.named_parameters():
        base_shape, wider_shape = base_shapes[name], wider_shapes[name]
        if base_shape == wider_shape:
            continue
        layer, kind = layers.get(name), kind_of(name, network.kinds)
        init = kind.init if kind.keeps_init else normal_by_fan_in
        m = parameter.numel() / base_shape.numel()
        if not isinstance(layer, nn.Linear | nn.Conv2d):
            yield name, replace(kind, names="", epsilon=1 / m)
        elif isinstance(layer, UnitRows):
            # Its rows have unit RMS and are divided by √fan-in, which leaves 1 / √m to the rate.
            of_rows, of_fan_in = (side / base for side, base in zip(parameter.shape[:2], base_shape[:2], strict=True))
            yield name, ParameterKind("", normal_rows, of_fan_in**-0.5, epsilon=1 / max(of_rows, of_fan_in))
        elif base_shape[0] == wider_shape[0]:
            yield name, ParameterKind("", nn.init.zeros_, output=1 / m, epsilon=1 / m)
            if layer.bias is not None:
                bias = name.removesuffix("weight") + "bias"
                yield bias, ParameterKind("", nn.init.zeros_, m, 1 / m, output=1 / m, epsilon=1 / m)
        elif base_shape[1] == wider_shape[1]:
            yield name, ParameterKind("", init, epsilon=1 / m)
        else:
            m = parameter.shape[1] / base_shape[1]
            yield name, ParameterKind("", init, 1 / m, m, epsilon=1 / m)


def normal_by_fan_in(weight: Tensor) -> None:
    """Each output of unit variance where the inputs are."""
    nn.init.normal_(weight, std=weight[0].numel() ** -0.5)
