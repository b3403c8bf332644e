"""Forward processes against their formulas, and the training objective against a computation by hand."""

import math
from typing import cast

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from scalelong.train.diffusion.process import PROCESSES, VPSDE, Discrete, ScaledLinear
from scalelong.train.objective import make_objective
from scalelong.train.objective_config import NoiseName, ObjectiveConfig

LARGEST_U = float(np.nextafter(np.float32(1), np.float32(0)))
COSINE = np.cos((np.arange(1001) / 1000 + 0.008) / 1.008 * np.pi / 2) ** 2
BETAS = {
    "linear": np.linspace(1e-4, 0.02, 1000),
    "cosine": np.minimum(1 - COSINE[1:] / COSINE[:-1], 0.999),
    "scaled-linear": np.linspace(math.sqrt(0.00085), math.sqrt(0.012), 1000) ** 2,
}
OBJECTIVES = {name: make_objective(ObjectiveConfig(noise=cast(NoiseName, name))) for name in PROCESSES}
each_process = pytest.mark.parametrize("name", PROCESSES)


def grid(name: str, dtype: torch.dtype = torch.float64) -> Tensor:
    """All times of the grid on which the samplers work."""
    return PROCESSES[name].grid_time(torch.arange(1, 1001, dtype=dtype))


def test_vp_sde_is_the_exponential_of_its_integrated_rate():
    for t in (0.0, 0.001, 0.3, 1.0):
        integral, _ = quad(lambda s: 0.1 + 19.9 * s, 0, t)
        expected = math.exp(-integral)
        assert VPSDE().alpha_bar(torch.tensor(t, dtype=torch.float64)).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("name", BETAS)
def test_discrete_schedules_are_the_products_of_the_published_ones(name):
    np.testing.assert_allclose(PROCESSES[name].alpha_bar(grid(name)), np.cumprod(1 - BETAS[name]), rtol=1e-12)


def test_cosine_is_a_squared_cosine_until_its_steps_are_bounded():
    found = PROCESSES["cosine"].alpha_bar(grid("cosine")).numpy()
    np.testing.assert_allclose(found[:-1], COSINE[1:-1] / COSINE[0], rtol=1e-9)
    assert found[-1] == pytest.approx(found[-2] * 0.001)


@each_process
def test_the_signal_only_ever_fades(name):
    alpha_bar = PROCESSES[name].alpha_bar(grid(name))
    assert (alpha_bar.diff() < 0).all()
    assert 0.99 < alpha_bar[0] < 1
    assert 0 < alpha_bar[-1] < 0.01


@each_process
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_alpha_bar_has_the_dtype_of_the_time_and_is_as_precise(name, dtype):
    process = PROCESSES[name]
    found = process.alpha_bar(grid(name, dtype))
    assert found.dtype == dtype
    # exp amplifies the rounding of its argument, at most 10.
    torch.testing.assert_close(found.double(), process.alpha_bar(grid(name)), rtol=30 * torch.finfo(dtype).eps, atol=0)


def test_discrete_times_are_1_to_1000_for_every_number_a_run_can_draw():
    u = torch.arange(2**24, dtype=torch.float32) * 2.0**-24
    assert u[-1] == LARGEST_U
    times = ScaledLinear().draw_time(u)
    assert (times.min(), times.max()) == (1, 1000)
    counts = torch.bincount(times.long(), minlength=1001)[1:]
    # Equally often, but for the rounding of 1000 u at the edges.
    assert (counts - 2**24 / 1000).abs().max() < 64


def test_continuous_times_are_the_drawn_numbers():
    u = torch.tensor([0.0, 0.25, LARGEST_U])
    assert torch.equal(VPSDE().draw_time(u), u)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("vp-sde", [0.0, 249.75, 999.0]),
        ("linear", [0, 250, 999]),
        ("cosine", [0, 250, 999]),
        ("scaled-linear", [1, 251, 1000]),
    ],
)
def test_the_network_is_told_the_time_as_published(name, expected):
    process = PROCESSES[name]
    told = process.network_time(process.draw_time(torch.tensor([0.0, 0.25, LARGEST_U])))
    torch.testing.assert_close(told, torch.tensor(expected, dtype=torch.float32))


def test_noising_weighs_image_and_noise_by_hand():
    x0, noise = torch.full((2, 1, 1, 1), 2.0), torch.full((2, 1, 1, 1), 10.0)
    levels = torch.tensor([0.6, 1.0])[:, None, None, None], torch.tensor([0.8, 0.0])[:, None, None, None]
    noisy = OBJECTIVES["vp-sde"].corrupt(x0, noise, *levels)
    assert noisy.flatten().tolist() == pytest.approx([0.6 * 2 + 0.8 * 10, 2.0])


@each_process
def test_noising_preserves_the_variance(name):
    x0, noise = torch.randn(2, 5, 3, 64, 64).unbind()
    process = PROCESSES[name]
    t_B = process.draw_time(torch.tensor([0.0, 0.1, 0.5, 0.9, 0.999]))
    noisy = OBJECTIVES[name].corrupt(x0, noise, *process.levels(t_B[:, None, None, None]))
    torch.testing.assert_close(noisy.var(dim=(1, 2, 3)), torch.ones(5), rtol=0, atol=0.06)


def test_a_table_is_made_once_for_a_device_and_dtype_and_left_alone_by_stand_ins():
    process = ScaledLinear()
    made = []
    process._make_table = lambda: made.append(None) or Discrete._make_table(process)  # type: ignore[method-assign]
    t = torch.tensor([1.0, 1000.0])
    for _ in range(3):
        process.alpha_bar(t)
    assert len(made) == 1
    with FakeTensorMode():
        assert isinstance(process.alpha_bar(torch.ones(2)), FakeTensor)
    assert type(process.alpha_bar(t)) is Tensor
    assert process.alpha_bar(t.double()).dtype == torch.float64


@each_process
def test_the_time_of_a_sigma_is_the_time_at_which_it_was(name):
    process, n = PROCESSES[name], torch.arange(1, 1001, dtype=torch.float64)
    t = process.grid_time(n)
    signal, noise_level = process.levels(t)
    for time, alpha, sigma in zip(t.tolist(), signal.tolist(), (noise_level / signal).tolist(), strict=True):
        assert process.time_of_sigma(sigma) == pytest.approx(time, rel=1e-9)
        assert process.signal_of_sigma(sigma) == pytest.approx(alpha, rel=1e-9)


@pytest.mark.parametrize("name", BETAS)
def test_between_two_training_times_the_time_goes_with_the_logarithm_of_sigma(name):
    process = PROCESSES[name]
    signal, noise_level = process.levels(torch.tensor([500, 501], dtype=torch.float64))
    sigma = (noise_level / signal).log().mean().exp()
    assert process.time_of_sigma(float(sigma)) == pytest.approx(500.5)


def batch(dtype: torch.dtype = torch.float32, B: int = 6) -> tuple[Tensor, Tensor, Tensor]:
    x0, noise = torch.randn(2, B, 3, 4, 4, dtype=dtype).unbind()
    return x0, noise, torch.linspace(0.0123, 0.9876, B, dtype=dtype)


@each_process
def test_the_loss_is_the_mean_square_by_hand(name):
    x0, noise, u = batch()
    loss = OBJECTIVES[name].loss(lambda x, t, y: torch.tanh(x) + t[:, None, None, None] / 1000, x0, noise, u, None)
    total = 0.0
    for n in range(len(u)):
        if name == "vp-sde":
            t = u[n].item()
            alpha_bar, told = math.exp(-(0.1 * t + 9.95 * t * t)), 999 * t
        else:
            step = math.floor(1000 * u[n].item()) + 1
            told = step if name == "scaled-linear" else step - 1
            alpha_bar = float(np.prod(1 - BETAS[name][:step]))
        x, e = x0[n].double().numpy(), noise[n].double().numpy()
        predicted = np.tanh(math.sqrt(alpha_bar) * x + math.sqrt(1 - alpha_bar) * e) + told / 1000
        total += np.square(e - predicted).mean()
    assert loss.shape == ()
    assert loss.item() == pytest.approx(total / len(u), rel=1e-5)


@each_process
def test_a_model_that_knows_the_image_has_no_loss(name):
    x0, noise, u = batch(torch.float64)
    process = PROCESSES[name]
    alpha_bar = process.alpha_bar(process.draw_time(u))[:, None, None, None]

    def oracle(x, t, y):
        return (x - alpha_bar.sqrt() * x0) / (1 - alpha_bar).sqrt()

    assert OBJECTIVES[name].loss(oracle, x0, noise, u, None).item() < 1e-12


@each_process
def test_a_model_that_predicts_nothing_has_the_loss_of_the_noise(name):
    x0, noise, u = batch()
    loss = OBJECTIVES[name].loss(lambda x, t, y: torch.zeros_like(x), x0, noise, u, None)
    assert loss.item() == pytest.approx(noise.square().mean().item())


def test_labels_reach_the_model_untouched():
    x0, noise, u = batch()
    labels, seen = torch.arange(6), []
    OBJECTIVES["vp-sde"].loss(lambda x, t, y: seen.append(y) or x, x0, noise, u, labels)
    assert seen[0] is labels


def test_the_loss_is_fp32_whatever_the_model_computes_in():
    x0, noise, u = batch()
    loss = OBJECTIVES["vp-sde"].loss(lambda x, t, y: x.bfloat16(), x0, noise, u, None)
    assert loss.dtype == torch.float32


@each_process
@pytest.mark.parametrize("sigma", [0.01, 0.7, 30.0])
def test_a_network_that_knows_the_noise_denoises_to_the_image(name, sigma):
    x0, noise, _ = batch(torch.float64)
    shown = []

    def oracle(x_BCHW: Tensor, t_B: Tensor) -> Tensor:
        shown.append((x_BCHW, t_B))
        return noise

    denoised = OBJECTIVES[name].denoiser(oracle)(x0 + sigma * noise, sigma)
    torch.testing.assert_close(denoised, x0, rtol=0, atol=1e-12 * max(1.0, sigma))
    ((x_BCHW, t_B),) = shown
    # As in training: scaled to what x_t is at the time of this sigma, which each image is told.
    torch.testing.assert_close(x_BCHW, (x0 + sigma * noise) / math.sqrt(1 + sigma**2))
    process = PROCESSES[name]
    expected = process.network_time(torch.tensor(process.time_of_sigma(sigma), dtype=torch.float64))
    torch.testing.assert_close(t_B, expected.expand(len(x0)))


def test_a_network_in_16_bits_denoises_in_the_dtype_of_the_image():
    x0, noise, _ = batch()
    denoised = OBJECTIVES["linear"].denoiser(lambda x, t: noise.bfloat16())(x0 + 0.1 * noise, 0.1)
    assert denoised.dtype == torch.float32
    torch.testing.assert_close(denoised, x0, rtol=0, atol=0.1 * 2**-7)
