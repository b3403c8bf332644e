"""Functions and layers that keep magnitudes: each identity, on inputs of unit variance."""

import math

import pytest
import torch
from torch import Tensor, nn

from scalelong.model.magnitude import (
    GELU_RMS,
    SILU_RMS,
    MPConv2d,
    MPEmbedding,
    MPFourier,
    MPGeluLinear,
    MPLinear,
    MPSkipLinear,
    cat_factors,
    forced_normalisation,
    mp_cat,
    mp_gelu,
    mp_silu,
    mp_sum,
    project_mp_gelu,
    unit_rms,
    with_unit_rows,
)
from scalelong.model.plain_layers import use_plain_layers
from scalelong.model.skip_scale import SkipShape, make_skip_scale


def rms(x: Tensor) -> float:
    return float(x.detach().double().square().mean().sqrt())


X, S = torch.randn(64, 512), torch.randn(64, 512)
LABELS = torch.arange(64) % 7


@pytest.mark.parametrize(
    "f",
    [
        lambda: mp_silu(X),
        lambda: mp_gelu(X),
        lambda: mp_gelu(X, act="gelu-tanh"),
        lambda: mp_sum(X, S, 0.3),
        lambda: mp_sum(X, S),
        lambda: mp_cat(X, S, 0.2),
        lambda: mp_cat(X, S[:, :100], 0.5),
        lambda: unit_rms(3 * X),
        lambda: MPLinear(512, 256)(X),
        lambda: MPSkipLinear(1024, 256)(X, S),
        lambda: MPGeluLinear(512, 256)(X, act="gelu"),
        lambda: MPConv2d(32, 64, 1)(X.view(8, 32, 8, 16)),
        lambda: MPEmbedding(7, 256)(LABELS),
        lambda: MPFourier(512)(torch.linspace(-2, 2, 64)),
    ],
)
def test_unit_magnitude_stays(f):
    torch.manual_seed(0)
    assert rms(f()) == pytest.approx(1.0, abs=0.05)


def test_a_convolution_keeps_it_but_at_the_edges():
    """Zeros beyond them are no input of unit variance."""
    torch.manual_seed(0)
    y = MPConv2d(32, 64, 3)(torch.randn(4, 32, 16, 16))
    assert rms(y[..., 1:-1, 1:-1]) == pytest.approx(1.0, abs=0.05)
    assert rms(y[..., 0, 0]) == pytest.approx(2 / 3, abs=0.05)


def test_constants_are_those_of_standard_normal_numbers():
    x = torch.linspace(-12, 12, 200_001, dtype=torch.float64)
    density = torch.exp(-x.square() / 2) / math.sqrt(2 * math.pi) * (x[1] - x[0])
    for f, constant in ((nn.functional.silu, SILU_RMS), (nn.functional.gelu, GELU_RMS)):
        assert (f(x).square() @ density).sqrt() == pytest.approx(constant, abs=1e-3)


@pytest.mark.parametrize("balance", [0.1, 0.3, 0.5, 0.9])
def test_sums_and_concatenations_are_the_published_ones(balance):
    a, b, t = X.double(), S[:, :192].double(), balance
    expected = ((1 - t) * a[:, :192] + t * b) / math.sqrt((1 - t) ** 2 + t**2)
    torch.testing.assert_close(mp_sum(a[:, :192], b, t), expected)
    common = math.sqrt((512 + 192) / ((1 - t) ** 2 + t**2))
    expected = torch.cat([common * (1 - t) / 512**0.5 * a, common * t / 192**0.5 * b], 1)
    torch.testing.assert_close(mp_cat(a, b, t), expected)
    of_a, of_b = cat_factors(512, 192, t)
    assert (512 * of_a**2, 192 * of_b**2) == pytest.approx(((1 - t) ** 2 * common**2, t**2 * common**2))


@pytest.mark.parametrize("num_skip_features", [512, 100])
@pytest.mark.parametrize("kappa", [0.05, 0.5, 0.9, 1.0])
def test_a_renormalised_geometric_skip_is_mp_cat_and_keeps_the_magnitude(kappa, num_skip_features):
    h, s = X.double(), S[:, :num_skip_features].double()
    shape = SkipShape("tokens", num_skip_features, 512, 3)
    skip = make_skip_scale("geometric", kappa).long_skip(2, [shape] * 4, s, None)
    merged = skip.common * torch.cat([h, skip.scale * s], 1)  # type: ignore[operator]
    ratio = kappa * math.sqrt(num_skip_features / 512)
    torch.testing.assert_close(merged, mp_cat(h, s, ratio / (1 + ratio)), rtol=0, atol=1e-6)
    assert rms(merged) == pytest.approx(1.0, abs=0.05)


LAYERS = {
    "linear": lambda: (MPLinear(40, 24), X[:, :40]),
    "skip": lambda: (MPSkipLinear(40, 24), X[:, :40]),
    "gelu": lambda: (MPGeluLinear(40, 24), X[:, :40]),
    "conv": lambda: (MPConv2d(4, 24, 3), X.view(64, 4, 8, 16)),
    "embedding": lambda: (MPEmbedding(7, 24), LABELS),
}


@pytest.mark.parametrize("name", LAYERS)
def test_gradients_are_orthogonal_to_rows(name):
    layer, x = LAYERS[name]()
    layer(x).pow(3).sum().backward()
    rows_RF, gradients_RF = layer.weight.detach().flatten(1).double(), layer.weight.grad.flatten(1).double()
    assert gradients_RF.norm(dim=1).min() > 0
    assert torch.cosine_similarity(rows_RF, gradients_RF, dim=1).abs().max() < 1e-4


@pytest.mark.parametrize("name", LAYERS)
@torch.no_grad()
def test_the_length_of_rows_does_not_count_and_is_put_back(name):
    layer, x = LAYERS[name]()
    before = layer(x)
    layer.weight *= torch.linspace(0.1, 9, len(layer.weight)).view(-1, *[1] * (layer.weight.dim() - 1))
    torch.testing.assert_close(layer(x), before, rtol=1e-4, atol=1e-4)
    ((weight_name, function),) = forced_normalisation(nn.Sequential(layer)).items()
    assert weight_name == "0.weight"
    assert function is with_unit_rows
    rows_R = function(layer.weight).flatten(1).square().mean(1).sqrt()
    torch.testing.assert_close(rows_R, torch.ones(len(rows_R)), rtol=0, atol=1e-3)


def test_only_layers_of_unit_rows_are_normalised():
    assert forced_normalisation(nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))) == {}


@pytest.mark.parametrize("act", ["gelu", "gelu-tanh"])
def test_what_takes_the_place_of_the_second_layer_is_given_what_it_takes(act):
    layer = MPGeluLinear(40, 24)
    fused, seen = project_mp_gelu(layer, X[:, :40], act=act), []
    layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    torch.testing.assert_close(project_mp_gelu(layer, X[:, :40], act=act), fused, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(seen[0], mp_gelu(X[:, :40], act=act))
    plain = use_plain_layers(nn.Sequential(MPGeluLinear(40, 24), MPSkipLinear(24, 8)))
    assert [type(x) for x in plain] == [MPLinear, MPLinear]


def test_features_of_time_are_the_same_for_ever():
    first, second = MPFourier(32), MPFourier(32, bandwidth=2.0)
    torch.randn(5)
    assert torch.equal(MPFourier(32).frequencies, first.frequencies)
    assert torch.equal(second.frequencies, 2 * first.frequencies)
    assert first(torch.zeros(1)).square().mean() == pytest.approx(1.0, abs=0.4)
    with torch.device("meta"):
        loaded = MPFourier(32)
    loaded.load_state_dict({}, assign=True)  # as of a checkpoint, which has parameters alone
    assert torch.equal(loaded.phases, first.phases)
