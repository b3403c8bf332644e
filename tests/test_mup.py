"""muP: which parameters begin and learn how, that it survives what networks go through, and the coordinate check."""

import copy
import math
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from scalelong.model.architectures import load_backbone, make_backbone
from scalelong.model.dit import DiT, DiTConfig
from scalelong.model.parameter_kinds import ParameterKind, kind_of
from scalelong.model.skip_scale import make_skip_scale
from scalelong.model.unet_config import UNetConfig
from scalelong.model.uvit import UViT, UViTConfig
from scalelong.train.command_line import parse_train_arguments
from scalelong.train.errors import UserError

HEAD, BASE = 16, 64
SIZES: Any = {
    "img_size": 8,
    "patch_size": 2,
    "depth": 4,
    "num_classes": 4,
    "parametrization": "mup",
    "base_width": BASE,
}
UVIT = UViTConfig(width=2 * BASE, num_heads=2 * BASE // HEAD, **SIZES)
DIT = DiTConfig(width=2 * BASE, num_heads=2 * BASE // HEAD, skip="layer-norm", **SIZES)
each_config = pytest.mark.parametrize("config", [UVIT, DIT], ids=["uvit", "dit"])
X, T, Y = torch.randn(4, 3, 8, 8), torch.linspace(10, 990, 4), torch.arange(4)


def of_width(config: Any, width: int) -> Any:
    return replace(config, width=width, num_heads=width // HEAD)


@each_config
def test_factors_are_those_of_the_kind(config):
    model = make_backbone(config, skip_scale=make_skip_scale("ls"))
    readout = "decoder_pred" if isinstance(model, UViT) else "final_layer.linear"
    found = {(g.learning_rate_factor, g.weight_decay_factor): set(g.names) for g in model.parameter_groups()}
    assert found.keys() == {(1.0, 1.0), (0.5, 2.0), (2.0, 0.5)}
    hidden = {
        name
        for name, p in model.named_parameters()
        if (p.dim() == 2 and name.endswith(("qkv.weight", "proj.weight", "fc1.weight", "fc2.weight")))
        or name.endswith(("skip_linear.weight", "mlp.2.weight", "adaLN_modulation.1.weight"))
    }
    assert found[0.5, 2.0] == hidden
    assert found[2.0, 0.5] == {f"{readout}.bias"}
    for name in hidden:
        p = model.get_parameter(name)
        assert p.std().item() == pytest.approx(p.shape[1] ** -0.5, rel=0.1), name
    assert not model.get_parameter(f"{readout}.weight").any()
    (hook,) = model.get_submodule(readout)._forward_hooks.values()
    assert hook.factor == 0.5  # type: ignore[attr-defined]


@each_config
def test_weights_begin_alike_at_every_width(config):
    """At the base width too, whose factors are 1."""
    model = make_backbone(of_width(config, BASE))
    assert [(g.learning_rate_factor, g.weight_decay_factor) for g in model.parameter_groups()] == [(1.0, 1.0)]
    weight = next(p for name, p in model.named_parameters() if name.endswith("fc1.weight"))
    assert weight.std().item() == pytest.approx(BASE**-0.5, rel=0.1)


@each_config
def test_the_standard_parametrisation_is_the_networks_own_table(config):
    standard = replace(config, parametrization="standard", base_width=0)
    model = make_backbone(standard)
    assert model.parameter_kinds() is type(model).kinds


@each_config
@torch.no_grad()
def test_multipliers_survive_copies_compilation_and_folders(config, tmp_path):
    torch.manual_seed(0)
    model = make_backbone(config, skip_scale=make_skip_scale("cs"))
    for p in model.parameters():
        p.add_(0.05 * torch.randn_like(p))
    expected = model(X, T, Y)
    plain = make_backbone(replace(config, parametrization="standard", base_width=0), skip_scale=make_skip_scale("cs"))
    plain.load_state_dict(model.state_dict())
    if isinstance(model, DiT):
        torch.testing.assert_close(expected, 0.5 * plain(X, T, Y))
    assert not torch.allclose(expected, plain(X, T, Y))
    assert torch.equal(copy.deepcopy(model)(X, T, Y), expected)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(X, T, Y), expected)
    model.save_pretrained(tmp_path)
    loaded = load_backbone(tmp_path)
    assert loaded.config == config
    assert torch.equal(loaded(X, T, Y), expected)
    assert loaded.parameter_groups() == model.parameter_groups()


def coordinates(make: Callable[[int], Any], width: int, learning_rate: float, *, steps: int = 4) -> Tensor:
    """The mean size of what each module puts out, after some steps of AdamW."""
    model = make(width)
    parameters = dict(model.named_parameters())
    groups = [
        {"params": [parameters[name] for name in g.names], "lr": learning_rate * g.learning_rate_factor}
        for g in model.parameter_groups()
    ]
    optimizer = torch.optim.AdamW(groups, eps=1e-12, weight_decay=0.0)
    x, noise = torch.randn(2, 4, 3, 8, 8, generator=torch.Generator().manual_seed(7))
    for _ in range(steps):
        optimizer.zero_grad()
        F.mse_loss(model(x, T, Y), noise).backward()
        optimizer.step()
    sizes: list[Tensor] = []
    for name, module in model.named_modules():
        # What a gate of LS sees is a mean over features, and smaller the more there are: its output is looked at.
        if re.search(r"(se|skip_gates)\.(.*\.)?layer\d", name):
            continue
        module.register_forward_hook(lambda *a: sizes.append(a[2].abs().mean()))
    with torch.no_grad():
        model(x, T, Y)
    return torch.stack(sizes)


def worst_slope(
    make: Callable[[int], Any],
    learning_rate: float = 2**-7,
    *,
    widths: tuple[int, ...] = (64, 128, 256),
    seeds: int = 4,
) -> float:
    """Of log2 size against log2 width, the largest of any module."""
    sizes = []
    for width in widths:
        found = []
        for seed in range(seeds):
            torch.manual_seed(seed)
            found.append(coordinates(make, width, learning_rate))
        sizes.append(torch.stack(found).mean(0).log2())
    at = torch.tensor([math.log2(width) for width in widths])
    at = at - at.mean()
    slopes = (torch.stack(sizes) * at[:, None]).sum(0) / at.square().sum()
    return float(slopes.abs().max())


def spoiled(config: Any, change: Callable[[ParameterKind, str], ParameterKind]) -> Callable[[int], Any]:
    """The network with a bug in its table."""

    def make(width: int) -> Any:
        network: Any = config.network()

        class Spoiled(network):
            def parameter_kinds(self):
                kinds = super().parameter_kinds()
                rows = {name: kind_of(name, kinds) for name, _ in self.named_parameters()}
                return tuple(replace(change(kind, name), names=name) for name, kind in rows.items())

        return Spoiled(of_width(config, width))

    return make


def make_backbone_of(config: Any, policy: str = "none") -> Callable[[int], Any]:
    return lambda width: make_backbone(of_width(config, width), skip_scale=make_skip_scale(policy))


BUGS: dict[str, Callable[[ParameterKind, str], ParameterKind]] = {
    "skip_linear": lambda kind, name: replace(kind, learning_rate=1.0) if "skip_linear.weight" in name else kind,
    "readout": lambda kind, name: replace(kind, output=1.0),
    "qkv": lambda kind, name: replace(kind, learning_rate=1.0) if "qkv.weight" in name else kind,
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "policy", ["geometric", *(pytest.param(p, marks=pytest.mark.exhaustive) for p in ("none", "cs", "ls"))]
)
@each_config
def test_coordinates_do_not_grow_with_the_width(config, policy):
    """Nor by the factor of the whole concatenation, in which there is no width of either network."""
    assert worst_slope(make_backbone_of(config, policy)) <= 0.25


@pytest.mark.exhaustive
@pytest.mark.parametrize("modulation", ["scale-rot", "rot", "scale"])
def test_coordinates_of_each_modulation_do_not_grow_with_the_width(modulation):
    assert worst_slope(make_backbone_of(replace(DIT, modulation=modulation), "geometric")) <= 0.25


@pytest.mark.exhaustive
@each_config
def test_coordinates_of_the_standard_parametrisation_grow(config):
    standard = replace(config, parametrization="standard", base_width=0)
    assert worst_slope(make_backbone_of(standard)) >= 0.5


@pytest.mark.slow
@pytest.mark.parametrize(
    "bug", ["readout", *(pytest.param(b, marks=pytest.mark.exhaustive) for b in ("skip_linear", "qkv"))]
)
def test_coordinates_of_a_table_with_a_bug_grow(bug):
    """At a rate at which the right table stays below the gate, and the mildest bug is well above it."""
    assert worst_slope(make_backbone_of(UVIT), 2**-6) <= 0.25
    assert worst_slope(spoiled(UVIT, BUGS[bug]), 2**-6) >= 0.5


@pytest.mark.parametrize(
    ("config", "change", "message"),
    [
        (UVIT, {"base_width": 0}, "the parametrization mup needs a base_width"),
        (DIT, {"base_width": 40}, "base_width 40 is no multiple of the width 16 of a head"),
        (DIT, {"parametrization": "standard"}, "base_width 64 is of the parametrization mup alone"),
        (DIT, {"parametrization": "magic"}, "parametrization must be standard or mup, got 'magic'"),
    ],
    ids=range(4),
)
def test_a_base_that_cannot_be_is_refused(config, change, message):
    with pytest.raises(ValueError, match=message):
        replace(config, **change)


def test_a_unet_has_none():
    with pytest.raises(ValueError, match="a UNet has no parametrization mup"):
        UNetConfig(img_size=8, model_channels=32, parametrization="mup", base_width=32)


def test_it_is_chosen_by_flags():
    config = parse_train_arguments(["digits-uvit", "--parametrization", "mup", "--base-width", "48"])
    assert (config.model.parametrization, config.model.base_width) == ("mup", 48)
    with pytest.raises(UserError, match=r"--base-width 48 and --model.base-width 24 disagree"):
        parse_train_arguments(
            ["digits-uvit", "--base-width", "48", "--model.base-width", "24", "--model.parametrization", "mup"]
        )
