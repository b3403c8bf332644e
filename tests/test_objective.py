"""Predictions, weightings and times against their equations, and objectives put together from them."""

import math
from itertools import product
from typing import Any, get_args

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from scalelong.train.diffusion.process import OWN_PROCESSES, PROCESSES
from scalelong.train.diffusion.times import standard_normal
from scalelong.train.diffusion.weighting import LogVariance, with_uncertainty
from scalelong.train.objective import Objective, make_objective
from scalelong.train.objective_config import (
    NoiseName,
    ObjectiveConfig,
    PredictionName,
    TimesName,
    WeightingName,
    check_sampler,
)

PREDICTIONS, WEIGHTINGS, TIMES = get_args(PredictionName), get_args(WeightingName), get_args(TimesName)
LARGEST_U = float(np.nextafter(np.float32(1), np.float32(0)))
MEAN, STD = 0.3, 0.5
NOISES: list[tuple[Any, Any]] = [(p, n) for p in ("eps", "v", "x0") for n in get_args(NoiseName)]
NOISES += [(p, "vp-sde") for p in ("flow", "edm")]
each_noise = pytest.mark.parametrize(("prediction", "noise"), NOISES)


def objective(**fields: Any) -> Objective:
    return make_objective(ObjectiveConfig(**fields))


def batch(B: int = 7) -> tuple[Tensor, Tensor, Tensor]:
    x0, noise = torch.randn(2, B, 1, 3, 3, dtype=torch.float64).unbind()
    return x0, noise, torch.linspace(0.03, 0.97, B, dtype=torch.float64)


def levels(made: Objective, u_B: Tensor) -> tuple[Tensor, Tensor]:
    return made.process.levels(made.draw_time(u_B)[:, None, None, None])


def targets(prediction: str, x0: Tensor, noise: Tensor, signal: Tensor, level: Tensor) -> Tensor:
    """What each network is to predict, as the papers have it."""
    sigma, data = level / signal, 0.5
    c_skip, c_out = data**2 / (sigma**2 + data**2), sigma * data / (sigma**2 + data**2).sqrt()
    return {
        "eps": noise,
        "v": signal * noise - level * x0,
        "x0": x0,
        "flow": noise - x0,
        "edm": (x0 - c_skip * (x0 + sigma * noise)) / c_out,
    }[prediction]


@each_noise
def test_a_network_that_predicts_the_target_has_no_loss_and_denoises_to_the_image(prediction, noise):
    made, (x0, eps, u) = objective(prediction=prediction, noise=noise), batch()
    target = targets(prediction, x0, eps, *levels(made, u))
    assert made.loss(lambda x, t, y: target, x0, eps, u, None).item() < 1e-13
    signal, level = levels(made, u)
    for n, sigma in enumerate((level / signal).flatten().tolist()):
        denoise = made.denoiser(lambda x, t, n=n: target[n : n + 1])
        torch.testing.assert_close(denoise(x0[n : n + 1] + sigma * eps[n : n + 1], sigma), x0[n : n + 1])


@each_noise
def test_the_network_is_shown_and_told_the_same_in_training_and_in_sampling(prediction, noise):
    made, (x0, eps, u) = objective(prediction=prediction, noise=noise), batch()
    shown: list[tuple[Tensor, Tensor]] = []

    def network(x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        shown.append((x, t))
        return torch.zeros_like(x)

    made.loss(network, x0, eps, u, None)
    signal, level = levels(made, u)
    for n, sigma in enumerate((level / signal).flatten().tolist()):
        made.denoiser(network)((x0 + sigma * eps)[n : n + 1], sigma)
        torch.testing.assert_close(shown[-1][0], shown[0][0][n : n + 1])
        torch.testing.assert_close(shown[-1][1], shown[0][1][n : n + 1], rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_what_the_network_is_shown_keeps_its_size(prediction):
    """Of data with the standard deviation 0.5 that EDM takes for granted."""
    made = objective(prediction=prediction)
    x0, noise = (factor * torch.randn(5, 1, 200, 200) for factor in (0.5, 1.0))
    shown: list[Tensor] = []
    made.loss(lambda x, t, y: shown.append(x) or x, x0, noise, torch.linspace(0.001, 0.999, 5), None)
    sizes = shown[0].std(dim=(1, 2, 3))
    assert ((sizes > 0.4) & (sizes < 1.1)).all()
    if prediction == "edm":
        torch.testing.assert_close(sizes, torch.ones(5), rtol=0, atol=0.02)


def weight_by_hand(weighting: str, prediction: str, signal: float, level: float) -> float:
    """Of squared errors of the output: the weight of errors of the image, times how far an output moves the image."""
    sigma, data, snr = level / signal, 0.5, (signal / level) ** 2
    moved = {"eps": sigma, "v": level, "x0": 1.0, "flow": level, "edm": sigma * data / math.hypot(sigma, data)}
    of_image = {
        "min-snr": min(snr, 5.0),
        "sigmoid": snr / (1 + math.exp(-(-1.0 - math.log(snr)))),
        "edm": (sigma**2 + data**2) / (sigma * data) ** 2,
        "uniform": moved[prediction] ** -2,
        "uncertainty": moved[prediction] ** -2,
    }
    return of_image[weighting] * moved[prediction] ** 2


@pytest.mark.parametrize(("weighting", "prediction"), [*product(WEIGHTINGS, PREDICTIONS)])
def test_each_weighting_is_its_equation(weighting, prediction):
    made, (x0, eps, u) = objective(weighting=weighting, prediction=prediction), batch()
    signal, level = levels(made, u)
    error = torch.linspace(0.5, 2, len(u), dtype=torch.float64)[:, None, None, None]
    output = targets(prediction, x0, eps, signal, level) + error
    expected = [
        weight_by_hand(weighting, prediction, a, s) * e**2
        for a, s, e in zip(*(x.flatten().tolist() for x in (signal, level, error)), strict=True)
    ]
    loss = made.loss(lambda x, t, y: output, x0, eps, u, None)
    assert loss.item() == pytest.approx(float(np.mean(expected)), rel=1e-5)


def test_published_forms_of_the_weights():
    """Min-SNR of the noise: min(1, γ / SNR). EDM's with its own prediction: all alike. SiD2's of v: SNR / (SNR + 1)."""
    signal, level = torch.tensor([0.9, 0.6, 0.1]), torch.tensor([math.sqrt(0.19), 0.8, math.sqrt(0.99)])
    snr = (signal / level) ** 2
    weight = objective(weighting="min-snr", min_snr_gamma=0.5).weight(signal, level)
    torch.testing.assert_close(weight, (0.5 / snr).clamp(max=1))
    weight = objective(weighting="sigmoid", sigmoid_bias=-2.0, prediction="v").weight(signal, level)
    torch.testing.assert_close(weight, snr / (snr + 1) * torch.sigmoid(-2 - snr.log()))
    sigma = torch.tensor([0.002, 0.5, 80.0])
    weight = objective(weighting="edm", prediction="edm").weight(torch.ones(3), sigma)
    torch.testing.assert_close(weight, torch.ones(3))


@pytest.mark.parametrize(("weighting", "times"), [*product(WEIGHTINGS, TIMES)])
@each_noise
def test_the_numbers_at_the_edge_that_a_run_can_draw_have_finite_losses(prediction, noise, weighting, times):
    made = objective(prediction=prediction, noise=noise, weighting=weighting, times=times)
    x0, eps = torch.randn(2, 3, 1, 2, 2).unbind()
    u = torch.tensor([0.0, 0.5, LARGEST_U])
    told: list[Tensor] = []
    loss = made.loss(lambda x, t, y: told.append(t) or torch.zeros_like(x), x0, eps, u, None)
    assert loss.isfinite()
    assert loss.dtype == torch.float32
    assert told[0].dtype == torch.float32
    assert (told[0].diff() > 0).all()  # a larger number never means less noise
    assert told[0].abs().max() <= (2600 if prediction == "edm" else 1000)


def test_normal_numbers_are_those_of_uniform_ones():
    u = torch.tensor([0.0, 0.1, 0.5, 0.975, LARGEST_U])
    found = standard_normal(u)
    assert found[1:4].tolist() == pytest.approx(stats.norm.ppf(u[1:4].double().numpy()), abs=1e-6)
    assert found[0].item() == pytest.approx(-found[-1].item(), rel=1e-6)


EVENLY = (torch.arange(4000) + 0.5) / 4000


@pytest.mark.parametrize("noise", PROCESSES)
@pytest.mark.parametrize("prediction", ["eps", "flow", "edm"])
def test_times_edm_have_a_normal_ln_sigma(prediction, noise):
    made = objective(prediction=prediction, noise=noise, times="edm", log_sigma_mean=-0.4, log_sigma_std=1.0)
    signal, level = made.process.levels(made.draw_time(EVENLY.double()))
    logs = (level / signal).log()
    # The smallest sigma of Stable Diffusion's schedule, 0.03, stands for all below it.
    assert (logs.mean().item(), logs.std().item()) == pytest.approx((-0.4, 1.0), abs=0.01)


@pytest.mark.parametrize(("prediction", "of_time"), [("flow", lambda t: t), ("eps", lambda t: t)])
def test_logit_normal_times_are_the_sigmoid_of_a_normal_variable(prediction, of_time):
    made = objective(prediction=prediction, times="logit-normal", logit_mean=0.5, logit_std=0.8)
    logits = torch.logit(of_time(made.draw_time(EVENLY.double())))
    assert (logits.mean().item(), logits.std().item()) == pytest.approx((0.5, 0.8), abs=0.01)


def test_logit_normal_times_of_a_discrete_schedule_are_its_times():
    times = objective(noise="linear", times="logit-normal").draw_time(EVENLY)
    assert torch.equal(times, times.round())
    assert times.min() >= 1
    assert times.max() <= 1000
    assert times.median() == pytest.approx(500, abs=1)


def test_uniform_times_of_edm_have_an_even_ln_sigma():
    logs = objective(prediction="edm").draw_time(EVENLY.double()).log()
    assert logs.mean().item() == pytest.approx(math.log(0.002 * 80) / 2)
    assert (logs.min().exp().item(), logs.max().exp().item()) == pytest.approx((0.002, 80), rel=0.01)


@pytest.mark.parametrize("name", [*PROCESSES, *OWN_PROCESSES])
def test_the_training_time_of_a_sigma_is_the_nearest(name):
    process = {**PROCESSES, **OWN_PROCESSES}[name]
    t = process.draw_time(torch.linspace(0.001, 0.999, 50, dtype=torch.float64))
    signal, level = process.levels(t)
    torch.testing.assert_close(process.training_times(level / signal), t)
    if name in PROCESSES:  # what no time reaches
        ends = process.training_times(torch.tensor([1e-9, 1e9], dtype=torch.float64))
        assert ends.tolist() == pytest.approx([0, 1] if name == "vp-sde" else [1, 1000], abs=1e-6)


def test_a_learned_weighting_begins_as_the_fixed_loss():
    made, (x0, eps, u) = objective(weighting="uncertainty", prediction="edm"), (part.float() for part in batch())
    network = lambda x, t, y: torch.tanh(x)  # noqa: E731
    learned = made.make_log_variance()
    assert learned is not None
    minimised, loss = made.training_loss(network, x0, eps, u, None, learned)
    assert minimised.item() == pytest.approx(loss.item(), rel=1e-6)
    assert loss.item() == pytest.approx(made.loss(network, x0, eps, u, None).item(), rel=1e-6)
    assert objective().make_log_variance() is None


def test_the_least_value_of_a_learned_weighting_is_at_the_mean_of_the_squares():
    squares = torch.rand(4, 1, 8, 8, dtype=torch.float64) * torch.tensor([0.1, 1, 5, 20.0])[:, None, None, None]
    u = squares.mean(dim=(1, 2, 3)).log().requires_grad_()
    with_uncertainty(squares, u).backward()
    torch.testing.assert_close(u.grad, torch.zeros(4, dtype=torch.float64))


def test_a_learned_weighting_learns_how_large_errors_are_at_each_noise_level():
    torch.manual_seed(0)
    learned = LogVariance()
    optimizer = torch.optim.AdamW(learned.parameters(), lr=2e-2, weight_decay=0)
    sizes = lambda log_sigma: torch.exp(1.5 * torch.tanh(log_sigma / 2))  # noqa: E731
    for _ in range(400):
        log_sigma = -1.2 + 1.2 * torch.randn(128)
        squares = sizes(log_sigma)[:, None, None, None] * torch.randn(128, 1, 4, 4).square()
        optimizer.zero_grad()
        with_uncertainty(squares, learned(log_sigma)).backward()
        optimizer.step()
    where = torch.linspace(-3, 1, 9)
    assert (learned(where) - sizes(where).log()).abs().max() < 0.3


def test_two_learned_weightings_have_the_same_features():
    first, second = LogVariance(), LogVariance()
    assert torch.equal(first.waves, second.waves)
    assert set(first.state_dict()) == {"weight", "bias"}


@each_noise
def test_the_exact_denoiser_of_a_gaussian_is_the_least_loss_of_every_prediction(prediction, noise):
    """An output that stands for E[x_0 | x] cannot be made better by adding or multiplying."""
    made = objective(prediction=prediction, noise=noise)
    x0 = MEAN + STD * torch.randn(64, 1, 60, 60, dtype=torch.float64)
    eps, u = torch.randn_like(x0), torch.full((64,), 0.45, dtype=torch.float64)
    signal, level = (float(part[0]) for part in levels(made, u))
    sigma = level / signal

    def exact(x: Tensor) -> Tensor:
        return MEAN + STD**2 / (STD**2 + sigma**2) * (x - MEAN)

    x = x0 + sigma * eps
    # The output that stands for D: affine, so that two values of it tell the rest.
    zero, one = (made.denoiser(lambda x, t, v=v: torch.full_like(x, v))(x, sigma) for v in (0.0, 1.0))
    output = (exact(x) - zero) / (one - zero)
    least = made.loss(lambda x, t, y: output, x0, eps, u, None)
    for change in (output + 0.05, output - 0.05, 1.05 * output, 0.95 * output):
        assert made.loss(lambda x, t, y, change=change: change, x0, eps, u, None) > least


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"prediction": "epsilon"}, "objective.prediction 'epsilon'; there are eps, v, x0, flow, edm"),
        ({"noise": "edm"}, "objective.noise 'edm'"),
        ({"min_snr_gamma": 0.0}, "min_snr_gamma must be positive"),
        ({"sigma_data": float("inf")}, "sigma_data must be positive"),
        ({"log_sigma_std": -1.0}, "log_sigma_std must be positive"),
        ({"sigmoid_bias": float("nan")}, "sigmoid_bias must be finite"),
    ],
)
def test_what_is_no_objective_is_named(fields, named):
    with pytest.raises(ValueError, match=named):
        ObjectiveConfig(**fields)


def test_samplers_that_cannot_serve_an_objective_are_refused():
    check_sampler("euler-maruyama", ObjectiveConfig(prediction="v"))
    for config, named in ((ObjectiveConfig(noise="cosine"), "cosine"), (ObjectiveConfig(prediction="flow"), "flow")):
        with pytest.raises(ValueError, match=f"euler-maruyama needs a run with --objective vp-sde, not {named}"):
            check_sampler("euler-maruyama", config)
