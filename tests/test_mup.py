"""muP: which parameters begin and learn how, and that it survives what networks go through."""

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from scalelong.model.architectures import load_backbone, make_backbone
from scalelong.model.dit import DiT, DiTConfig
from scalelong.model.skip_scale import make_skip_scale
from scalelong.model.unet_config import UNetConfig
from scalelong.model.uvit import UViT, UViTConfig
from scalelong.train.command_line import parse_train_arguments
from scalelong.train.errors import UserError
from scalelong.train.run_folder import write_config

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
    found: dict[tuple[float, float], set[str]] = {}
    for g in model.parameter_groups():
        found.setdefault((g.learning_rate_factor, g.weight_decay_factor), set()).update(g.names)
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
    assert [g[1:] for g in model.parameter_groups()] == [(1.0, 1.0, 1.0)]
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


def gradients(config: Any, width: int) -> dict[str, float]:
    """The root mean square of each parameter's gradient, after two steps at the rates of its group."""
    torch.manual_seed(0)
    model = make_backbone(of_width(config, width), skip_scale=make_skip_scale("ls"))
    parameters = dict(model.named_parameters())
    groups = [
        {"params": [parameters[name] for name in g.names], "lr": 2**-9 * g.learning_rate_factor}
        for g in model.parameter_groups()
    ]
    optimizer = torch.optim.AdamW(groups, eps=1e-12)
    noise = torch.randn(X.shape, generator=torch.Generator().manual_seed(1))
    for _ in range(3):
        optimizer.zero_grad()
        F.mse_loss(model(X, T, Y), noise).backward()
        optimizer.step()
    return {name: float(p.grad.square().mean().sqrt()) for name, p in parameters.items() if p.grad is not None}


@each_config
def test_epsilon_shrinks_as_gradients_do_and_is_small_beside_them(config):
    """At eight times the base width: those of what grows with the width are an eighth, and not the root of that."""
    config = replace(config, depth=2)
    wide, base = gradients(config, 8 * BASE), gradients(config, BASE)
    model = make_backbone(of_width(config, 8 * BASE), skip_scale=make_skip_scale("ls"))
    factors = {name: g.epsilon_factor for g in model.parameter_groups() for name in g.names}
    assert set(factors.values()) == {1 / 8, 1.0}
    constant = {name.split(".")[0] for name, factor in factors.items() if factor == 1}
    assert constant <= {"final_layer", "se", "skip_gates"}
    for name, factor in factors.items():
        if base[name] * wide[name] == 0:  # a gate whose hidden units are all off
            continue
        ratio = wide[name] / base[name]
        assert (1 / 24 < ratio < 2.5 / 8) if factor < 1 else ratio > 2 / 8, (name, ratio)
        assert 1e-8 * factor < 0.01 * wide[name], name


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


@pytest.fixture
def base_run(tmp_path) -> str:
    flags = ["--parametrization", "mup", "--base-width", "48", "--optimizer.learning-rate", "0.004"]
    small = ["--model.width", "48", "--model.num-heads", "2", "--run", str(tmp_path / "base")]
    write_config(parse_train_arguments(["digits-uvit", *flags, *small]))
    return str(tmp_path / "base")


def test_a_base_run_gives_its_rate_and_base_width(base_run, capsys):
    line = ["digits-uvit", "--base-run", base_run, "--model.width", "192", "--model.num-heads", "8"]
    config = parse_train_arguments(line)
    assert (config.model.parametrization, config.model.base_width) == ("mup", 48)
    assert config.optimizer.learning_rate == 0.004
    assert parse_train_arguments([*line, "--optimizer.learning-rate", "0.1"]).optimizer.learning_rate == 0.1
    assert capsys.readouterr().err == ""


def test_what_mup_does_not_carry_over_is_warned_of(base_run, capsys):
    line = ["digits-uvit", "--base-run", base_run, "--model.width", "192", "--model.num-heads", "4"]
    parse_train_arguments([*line, "--model.depth", "8", "--images-per-step", "32"])
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith("warning: muP carries a learning rate over the width alone, and ")
    for part in (
        f"{base_run} differs in depth (4, here 8)",
        "kappa 0.794 gives it",
        "width of a head (24, here 48)",
        "images-per-step (64, here 32)",
    ):
        assert part in said


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (["digits-uvit", "--base-width", "24"], "has the base width 48, not 24"),
        (["digits-uvit", "--parametrization", "standard"], "is of mup, --parametrization standard is not: give one"),
        (["digits-dit"], "is of a UViT, this is a DiT"),
        (["digits-uvit", "--model.width", "100"], "base_width 48 is no multiple of the width 25 of a head"),
    ],
    ids=range(4),
)
def test_a_base_run_that_does_not_fit_is_one_line(base_run, line, message):
    with pytest.raises(UserError, match=message) as caught:
        parse_train_arguments([*line, "--base-run", base_run])
    assert "\n" not in str(caught.value)


def test_a_base_run_of_another_parametrization_is_refused(tmp_path):
    write_config(parse_train_arguments(["digits-uvit", "--run", str(tmp_path)]))
    with pytest.raises(UserError, match="has no parametrization mup"):
        parse_train_arguments(["digits-uvit", "--base-run", str(tmp_path)])
    with pytest.raises(UserError, match="is no run folder"):
        parse_train_arguments(["digits-uvit", "--base-run", str(tmp_path / "none")])
