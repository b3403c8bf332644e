"""The maximal update parametrisation: a learning rate found on a narrow network serves the wide one.

Yang et al., arXiv:2203.03466, for diffusion transformers Zheng et al., arXiv:2505.15270. Each parameter is of a kind by
which sides of it grow with the width; m is its fan-in over that of the same network at the base width.

    kind     grows with width   begins as            learning rate   weight decay   output
    hidden   inputs, outputs    N(0, 1 / fan-in)     η / m           λ m
    input    outputs            N(0, 1 / fan-in)     η               λ
    output   inputs             0                    η               λ              / m
    others   one dimension      as without muP       η               λ

Heads keep their width, of which there are more, and so attention its scale. The multiplier of the output stands behind
the layer's bias too, whose rate is therefore η m. Multipliers are plain numbers of the layers and the groups.
Magnitude-preserving layers (magnitude.py) begin as ever, those of a growing fan-in with the learning rate η / √m.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from scalelong.model.magnitude import UnitRows, normal_rows
from scalelong.model.parameter_kinds import ParameterKind
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
    own = (ParameterKind(" ".join(names), *_treatment(kind)) for kind, names in names_of.items())
    return *own, *network.kinds


def _shapes(config: Any, skip_scale: SkipScale) -> dict[str, torch.Size]:
    with torch.device("meta"):
        network: Backbone = config.network()(config, skip_scale=skip_scale)
    return {name: p.shape for name, p in network.named_parameters()}


def _kinds(
    network: "Backbone", base_shapes: Mapping[str, torch.Size], wider_shapes: Mapping[str, torch.Size]
) -> Iterator[tuple[str, ParameterKind]]:
    """The parameters that muP treats in a way of its own."""
    for layer_name, layer in network.named_modules():
        if not isinstance(layer, nn.Linear | nn.Conv2d):
            continue
        name = f"{layer_name}.weight"
        (base_out, base_fan_in, *_), (wider_out, *_) = base_shapes[name], wider_shapes[name]
        if base_shapes[name] == wider_shapes[name]:
            continue
        m = layer.weight.shape[1] / base_fan_in
        if isinstance(layer, UnitRows):
            # Its rows have unit RMS and are divided by √fan-in, which leaves 1 / √m to the rate.
            if m != 1:
                yield name, ParameterKind("", normal_rows, m**-0.5)
        elif base_out == wider_out:
            yield name, ParameterKind("", nn.init.zeros_, output=1 / m)
            if layer.bias is not None:
                yield f"{layer_name}.bias", ParameterKind("", nn.init.zeros_, m, 1 / m, 1 / m)
        else:
            yield name, ParameterKind("", normal_by_fan_in, 1 / m, m)


def _treatment(kind: ParameterKind) -> tuple:
    return kind.init, kind.learning_rate, kind.weight_decay, kind.output


def normal_by_fan_in(weight: Tensor) -> None:
    """Each output of unit variance where the inputs are."""
    nn.init.normal_(weight, std=weight[0].numel() ** -0.5)
