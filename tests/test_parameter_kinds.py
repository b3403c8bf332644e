"""The tables of parameters: they cover every network, and what they say is what happens."""

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from plain_networks import ADM, DDPM, DIT, UVIT
from torch import nn

from scalelong.model.architectures import make_backbone
from scalelong.model.dit import DiT
from scalelong.model.parameter_kinds import ParameterKind, kind_of
from scalelong.model.presets import MODEL_PRESETS
from scalelong.model.skip_scale import SKIP_SCALE_NAMES, make_skip_scale
from scalelong.model.unet import UNet
from scalelong.model.uvit import UViT

TEXT = replace(UVIT, num_classes=0, context_tokens=5)
CONFIGS = {UViT: [UVIT, TEXT], DiT: [DIT], UNet: [DDPM, ADM]}


def names_of(config: Any, policy: str) -> list[str]:
    with torch.device("meta"):
        model = make_backbone(config, skip_scale=make_skip_scale(policy))
    return [name for name, _ in model.named_parameters()]


@pytest.mark.parametrize("policy", SKIP_SCALE_NAMES)
@pytest.mark.parametrize(
    "preset", ["digits-uvit", "mscoco-uvit-s2", "digits-dit", "cifar10-ddpm-unet", "imagenet64-adm"]
)
def test_every_parameter_of_a_preset_is_in_one_group(preset, policy):
    with torch.device("meta"):
        config: Any = MODEL_PRESETS[preset]
        config = config if config.has_skips else replace(config, skip="layer-norm")
        model = make_backbone(config, skip_scale=make_skip_scale(policy))
    (group,) = model.parameter_groups()
    assert group.names == tuple(name for name, _ in model.named_parameters())
    assert (group.learning_rate_factor, group.weight_decay_factor) == (1.0, 1.0)


def wrapped(config):
    """The same network with its linear layers parametrised in another way, where it can have that."""
    return [replace(config, linear="sigma-reparam")] if hasattr(config, "linear") else []


@pytest.mark.parametrize("network", CONFIGS, ids=lambda network: network.__name__)
def test_every_row_of_a_table_is_of_some_parameter(network):
    configs = [*CONFIGS[network], *wrapped(CONFIGS[network][0])]
    names = [name for config in configs for name in names_of(config, "ls")]
    used = {kind_of(name, network.kinds) for name in names}
    assert [kind.names for kind in network.kinds if kind not in used] == []


def test_a_parameter_without_a_row_is_named():
    class Longer(UViT):
        def __init__(self, config):
            super().__init__(config)
            self.register_tokens = nn.Parameter(torch.zeros(1, 4, config.width))

    with pytest.raises(ValueError, match="no row for register_tokens"):
        Longer(UVIT).parameter_groups()


class Halved(UViT):
    """Some hidden weights begin larger, learn at half the rate and decay twice; half the output."""

    def parameter_kinds(self):
        hidden = ParameterKind("*.qkv.weight *.fc1.weight", lambda w: nn.init.normal_(w, std=0.5), 0.5, 2.0)
        return hidden, ParameterKind("decoder_pred.*", 0.1, output=0.5), *self.kinds


def test_a_table_of_ones_own_groups_and_begins_as_it_says():
    model = Halved(UVIT)
    names = [name for group in model.parameter_groups() for name in group.names]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())
    groups = {
        (group.learning_rate_factor, group.weight_decay_factor): group.names for group in model.parameter_groups()
    }
    assert groups.keys() == {(1.0, 1.0), (0.5, 2.0)}
    assert set(groups[0.5, 2.0]) == {name for name in names if name.endswith(("qkv.weight", "fc1.weight"))}
    for name, parameter in model.named_parameters():
        if name in groups[0.5, 2.0]:
            assert parameter.std().item() == pytest.approx(0.5, rel=0.1)
        elif name.endswith((".proj.weight", "fc2.weight")) and not name.startswith("patch"):
            assert parameter.std().item() == pytest.approx(0.02, rel=0.1)


@pytest.mark.parametrize(
    "change", [lambda model: None, lambda model: model.init_weights(), copy.deepcopy], ids=range(3)
)
def test_an_output_is_multiplied_once(change):
    torch.manual_seed(1)
    model = Halved(replace(UVIT, final_conv=False))
    model = change(model) or model
    plain = UViT(replace(UVIT, final_conv=False))
    plain.load_state_dict(model.state_dict())
    batch = torch.randn(2, 3, 8, 8), torch.tensor([1.0, 500.0]), torch.tensor([1, 5])
    torch.testing.assert_close(model(*batch), 0.5 * plain(*batch))
    torch.testing.assert_close(torch.compile(model, backend="eager", fullgraph=True)(*batch), 0.5 * plain(*batch))


def test_the_tables_of_today_multiply_nothing():
    for network, configs in CONFIGS.items():
        kinds = {kind_of(name, network.kinds) for config in configs for name in names_of(config, "ls")}
        assert all((kind.learning_rate, kind.weight_decay, kind.output) == (1, 1, 1) for kind in kinds)
        assert not any(module._forward_hooks for module in network(configs[0]).modules())  # type: ignore[arg-type]
