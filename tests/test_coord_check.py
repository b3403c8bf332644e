"""The coordinate check: it passes muP under every policy, finds each seeded bug, and says what cannot be checked."""

import csv
from dataclasses import replace

import pytest
import torch

pytest.importorskip("tyro")

from scalelong.bench.mup.coord_check import GATE, main
from scalelong.bench.mup.coordinates import (
    BUGS,
    MODELS,
    Check,
    Curve,
    batch_of,
    curves_of,
    layer_kind,
    networks,
    slope_of,
    worst_growth,
    worst_of_kinds,
)
from scalelong.bench.mup.experiments import cases
from scalelong.model.skip_profile import profile_skips
from scalelong.model.skip_scale import ProfiledScale, SkipScale, Unscaled, make_skip_scale
from scalelong.train.errors import UserError

FOUND_FROM = 0.5
"""The least slope that a wrong parametrisation must have."""
DEFAULT, SMALL = Check(), Check(widths=(64, 256), seeds=1, steps=2)
KINDS_OF_BUG = {"skip-linear": {"skip_linear"}, "readout": {"decoder_pred", "final_layer.linear"}, "qkv": {"attn.qkv"}}
each_model = pytest.mark.parametrize("model", sorted(MODELS))


def checked(model: str, policy: str = "none", bug: str | None = None, check: Check = DEFAULT) -> list[Curve]:
    config = replace(MODELS[model], parametrization="mup", base_width=64)
    return curves_of(networks(config, make_skip_scale(policy), bug), check)


SAMPLED = {("uvit", "mup", "ls"), ("dit", "mup", "geometric")}
"""What make test checks of everything that has to pass."""


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, marks=() if case.words in SAMPLED else pytest.mark.exhaustive, id=" ".join(case.words))
        for case in cases()
        if case.parametrization == "mup" and not case.bug
    ],
)
def test_coordinates_keep_their_size_under_mup(case):
    curves = case.curves()
    assert worst_growth(curves) <= GATE
    kinds = {kind for kind, measure in worst_of_kinds(curves) if measure == "update"}
    assert kinds >= {"attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2", "skip_linear"}


def test_every_policy_that_trains_the_network_is_checked():
    checked_policies = {case.policy.kind for case in cases() if case.parametrization == "mup" and not case.bug}
    ours = {name for name, kind in SkipScale.known.items() if kind.policy.__module__ == SkipScale.__module__}
    assert checked_policies == ours - {name for name in ours if SkipScale.known[name].policy.trains_alone}


def test_factors_that_are_measured_are_those_of_each_network():
    """With the weights that it would have had without."""
    config = MODELS["uvit"]
    torch.manual_seed(0)
    found = networks(config, ProfiledScale(share=0.3))(64)
    torch.manual_seed(0)
    plain = networks(config, Unscaled())(64)
    images, _, times, labels = batch_of(plain)
    assert isinstance(found.skip_scale, ProfiledScale)
    assert found.skip_scale.factors == profile_skips(plain, lambda: plain(images, times, labels), share=0.3)
    assert all(torch.equal(a, b) for a, b in zip(found.parameters(), plain.parameters(), strict=True))


@each_model
@pytest.mark.parametrize("bug", sorted(BUGS))
def test_a_bug_shows_in_the_layers_that_have_it(model, bug):
    """With a slope of nearly one, of one seed already."""
    growth = {key[0]: curve.growth for key, curve in worst_of_kinds(checked(model, bug=bug, check=SMALL)).items()}
    assert max(growth[kind] for kind in KINDS_OF_BUG[bug] & growth.keys()) >= 0.8


@pytest.mark.exhaustive
@each_model
@pytest.mark.parametrize("bug", sorted(BUGS))
def test_every_bug_is_past_the_gate_of_the_default_check(model, bug):
    assert worst_growth(checked(model, "cs", bug)) >= FOUND_FROM


@each_model
def test_the_standard_parametrisation_grows(model):
    make = networks(MODELS[model], make_skip_scale("none"))
    assert worst_growth(curves_of(make, SMALL)) >= FOUND_FROM


def test_slopes_and_kinds():
    assert slope_of((64, 128, 256), (1.0, 2.0, 4.0)) == pytest.approx(1.0)
    assert slope_of((64, 256), (8.0, 4.0)) == pytest.approx(-0.5)
    assert layer_kind("in_blocks.0.attn.qkv") == layer_kind("mid_block.attn.qkv") == layer_kind("blocks.11.attn.qkv")
    assert (layer_kind("out_blocks.1"), layer_kind(""), layer_kind("norm")) == ("block", "network", "norm")
    shrinking, growing = (Curve("a", "update", 1, (1.0, 1.0), slope) for slope in (-0.9, 0.1))
    assert worst_of_kinds([shrinking, growing])["a", "update"] is growing
    assert worst_growth([growing, shrinking, Curve("a", "size", 1, (1.0, 1.0), -0.3)]) == 0.3
    values = (1.0, float("inf"))
    assert worst_growth([growing, Curve("a", "update", 1, values, slope_of((64, 256), values))]) == float("inf")


def test_an_update_is_what_training_added_on_the_same_input():
    """In the first step nothing but the readout, whose weights begin as zero, is given a gradient."""
    check = Check(widths=(32, 64), seeds=1, steps=1)
    updates = {curve.layer for curve in checked("dit", check=check) if curve.measure == "update"}
    assert updates == {"final_layer.linear"}


QUICK = ["--widths", "32,64", "--seeds", "1", "--steps", "1"]


def test_the_command_leaves_tables_and_plots_and_its_exit_code(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    line = [*QUICK, "--skip-scale", "cs:0.7", "--parametrization", "standard,mup", "--out", str(tmp_path)]
    with pytest.raises(SystemExit) as stopped:
        main(line)
    assert stopped.value.code == 1
    printed = capsys.readouterr()
    assert "| skip_linear |" in printed.out
    assert printed.err.startswith("past the gate of 0.25: standard cs:0.7 (")
    with (tmp_path / "slopes.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["parametrization"] for row in rows} == {"standard", "mup"}
    assert all(row["size"] for row in rows)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"slopes.csv", "coordinates.csv", "uvit-cs0.7-size.png", "uvit-cs0.7-update.png"}


def test_within_the_gate_the_command_returns(tmp_path):
    main([*QUICK, "--skip-scale", "none", "--gate", "9", "--out", str(tmp_path)])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (["--skip-scale", "no"], "unknown skip scale 'no'"),
        (["--skip-scale", "none:2"], "'none' takes no value"),
        (["--skip-scale", "cs:2"], r"kappa must lie in \(0, 1\], got 2"),
        (["--model", "dit", "--skip", "none", "--skip-scale", "cs"], "this DiT has no long skips"),
        (["--model", "dit", "--skip", "some"], "skip must be one of"),
        (["--skip", "plain"], "--skip is of a DiT"),
        (["--widths", "64"], "expected at least two widths"),
        (["--widths", "64,100"], "width 100 is no multiple of the width 16 of a head"),
        (["--base-width", "40"], "base_width 40 is no multiple of the width 16 of a head"),
        (["--base-width", "0"], "needs a base_width"),
        (["--parametrization", "standard", "--base-width", "64"], "--base-width is of --parametrization mup"),
        (["--parametrization", "magic"], "--parametrization magic: there are standard, mup"),
        (["--parametrization", "standard", "--bug", "qkv"], "--bug spoils the table of --parametrization mup"),
        (["--depth", "3"], "depth must be even"),
        (["--seeds", "0"], "must be at least 1"),
        (["--learning-rate", "fast"], "expected a number, got 'fast'"),
    ],
    ids=range(16),
)
def test_what_cannot_be_checked_is_one_line(tmp_path, line, message):
    with pytest.raises(UserError, match=message) as caught:
        main([*QUICK, "--out", str(tmp_path), *line])
    assert "\n" not in str(caught.value)
