"""Samplers in sigma against exact solutions: their moments on Gaussians, their orders, and diffusers' same methods."""

import math
from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from scalelong.train.diffusion.process import OWN_PROCESSES, PROCESSES
from scalelong.train.errors import UserError
from scalelong.train.sampling import samplers
from scalelong.train.sampling.solvers import SOLVERS

MEAN, STD = 0.3, 0.5
"""Of the data, whose pixels are independent."""
ORDERS = {"euler": 1, "ddim": 1, "heun": 2, "dpm-solver++": 2, "euler-ancestral": 1, "sde-dpm-solver++": 2}
ALL = {**PROCESSES, **OWN_PROCESSES}


class Noises:
    """Noise as coefficients: number n is the n-th of so many independent standard normal numbers.

    What a solver makes of a linear denoiser is then exact: the first coefficient is the mean, the rest the noises'.
    """

    def __init__(self, count: int):
        self.count, self.drawn = count, 0

    def draw(self) -> Tensor:
        self.drawn += 1
        noise = torch.zeros(1, 1, 1, self.count + 1, dtype=torch.float64)
        noise[..., self.drawn] = 1
        return noise

    def denoise(self, x: Tensor, sigma: float) -> Tensor:
        mean = torch.zeros_like(x)
        mean[..., 0] = MEAN
        return mean + STD**2 / (STD**2 + sigma**2) * (x - mean)


def moments(sampler: str, sigmas: Sequence[float]) -> tuple[float, float]:
    """Mean and standard deviation of what a solver makes of x at the first sigma, which is N(MEAN, STD² + sigma²)."""
    noises = Noises(len(sigmas) + 1)
    x = noises.draw() * math.sqrt(STD**2 + sigmas[0] ** 2)
    x[..., 0] = MEAN
    x = SOLVERS[sampler](noises.denoise, x, sigmas, noises.draw).flatten()
    return float(x[0]), float(x[1:].norm())


def error_of_std(sampler: str, sigmas: Sequence[float]) -> float:
    mean, std = moments(sampler, sigmas)
    assert mean == pytest.approx(MEAN, rel=1e-12)
    exact = math.sqrt(STD**2 + sigmas[-1] ** 2)
    return abs(std / exact - 1)


@pytest.mark.parametrize("sampler", SOLVERS)
def test_each_converges_with_its_order(sampler):
    """From sigma 80 to 0.002: the steps become finer evenly, unlike the last one to 0."""
    errors = [error_of_std(sampler, OWN_PROCESSES["edm"].sigmas(count)) for count in (201, 401, 801)]
    orders = [math.log2(coarse / fine) for coarse, fine in pairwise(errors)]
    assert orders == pytest.approx([ORDERS[sampler]] * 2, abs=0.1)


@pytest.mark.parametrize(
    ("process", "sampler", "steps", "within"),
    [
        *((name, "dpm-solver++", 50, 0.01) for name in ("flow", "edm")),
        *((name, "sde-dpm-solver++", 200, 0.01) for name in ALL),
        *((name, "heun", 50, 0.01) for name in ALL if name != "edm"),
        *(("flow", name, 200, 0.01) for name in ("euler", "ddim")),
        # EDM's sigmas are meant for images: those near STD are wide apart. Of first order, ancestral steps err twice.
        ("edm", "heun", 80, 0.01),
        *(("edm", name, 300, 0.01) for name in ("euler", "ddim")),
        ("flow", "euler-ancestral", 350, 0.01),
        ("edm", "euler-ancestral", 620, 0.01),
    ],
)
def test_moments_of_gaussians(process, sampler, steps, within, monkeypatch):
    """Mean and standard deviation at these evaluations, from the exact x at the process's largest sigma to 0."""
    noises, largest = Noises(steps + 1), ALL[process].largest_sigma
    monkeypatch.setattr(samplers, "_draw", lambda like, generators: noises.draw())
    start = noises.draw() * math.sqrt(STD**2 + largest**2)
    start[..., 0] = MEAN
    asked = []
    counted = lambda x, sigma: asked.append(sigma) or noises.denoise(x, sigma)  # noqa: E731
    drawn = samplers.denoise(
        counted, ALL[process], start / ALL[process].largest_noise(), sampler=sampler, steps=steps
    ).flatten()
    assert len(asked) == steps
    assert asked[0] == pytest.approx(largest)
    assert float(drawn[0]) == pytest.approx(MEAN, rel=1e-9)
    assert float(drawn[1:].norm()) == pytest.approx(STD, rel=within)


class Plain:
    """diffusers' schedulers as their documentation has them, asked for the noise on a grid of the VP-SDE's sigmas."""

    def __init__(self, name: str, **options: Any):
        import diffusers

        betas = PROCESSES["linear"].betas().tolist()  # pyright: ignore[reportAttributeAccessIssue]
        self.scheduler = getattr(diffusers, name)(
            trained_betas=betas, timestep_spacing="trailing", prediction_type="epsilon", **options
        )

    def sigmas(self, steps: int) -> list[float]:
        self.scheduler.set_timesteps(steps)
        found = self.scheduler.sigmas.double().tolist()
        return [sigma for n, sigma in enumerate(found) if n == 0 or sigma != found[n - 1]]  # Heun's are there twice

    def draw(self, x: Tensor, generators: list[torch.Generator]) -> Tensor:
        """From x at the first sigma."""
        keeps_x = "Euler" in type(self.scheduler).__name__ or "Heun" in type(self.scheduler).__name__
        first = self.scheduler.sigmas[0].item()
        x = x if keeps_x else x / math.sqrt(1 + first**2)
        for n, t in enumerate(self.scheduler.timesteps):
            sigma = self.scheduler.sigmas[n].item()
            unscaled = x if keeps_x else x * math.sqrt(1 + sigma**2)
            self.scheduler.scale_model_input(x, t)
            noise = (unscaled - denoise_exactly(unscaled, sigma)) / sigma
            takes_noise = "Heun" not in type(self.scheduler).__name__
            x = self.scheduler.step(noise, t, x, **({"generator": generators} if takes_noise else {})).prev_sample
        return x


def denoise_exactly(x: Tensor, sigma: float) -> Tensor:
    return MEAN + STD**2 / (STD**2 + sigma**2) * (x - MEAN)


@pytest.mark.parametrize(
    ("sampler", "scheduler"),
    [
        ("euler", ("EulerDiscreteScheduler", {})),
        ("heun", ("HeunDiscreteScheduler", {})),
        ("dpm-solver++", ("DPMSolverMultistepScheduler", {})),
        ("euler-ancestral", ("EulerAncestralDiscreteScheduler", {})),
        ("sde-dpm-solver++", ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"})),
    ],
)
def test_along_the_same_sigmas_diffusers_come_to_the_same(sampler, scheduler):
    pytest.importorskip("diffusers")
    plain = Plain(scheduler[0], **scheduler[1])
    sigmas = plain.sigmas(20)
    x = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(0)) * sigmas[0]
    expected = plain.draw(x, generators(2))
    ours = partial(samplers._draw, x, generators(2))
    found = SOLVERS[sampler](denoise_exactly, x, sigmas, ours)
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-4)


def generators(count: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(n) for n in range(count)]


@pytest.mark.parametrize("process", OWN_PROCESSES)
@pytest.mark.parametrize("sampler", SOLVERS)
def test_an_image_is_the_same_in_any_batch(process, sampler):
    noise = torch.randn(3, 1, 4, 4)
    how: Any = {"sampler": sampler, "steps": 7}
    together = samplers.denoise(denoise_exactly, ALL[process], noise, generators=generators(3), **how)
    alone = samplers.denoise(denoise_exactly, ALL[process], noise[1:2], generators=[generators(2)[1]], **how)
    assert torch.equal(together[1:2], alone)


@pytest.mark.parametrize("process", OWN_PROCESSES)
@pytest.mark.parametrize("steps", [1, 2, 3, 30])
@pytest.mark.parametrize("sampler", SOLVERS)
def test_the_denoiser_is_asked_so_many_times_downwards(process, steps, sampler):
    asked = []
    counted = lambda x, sigma: asked.append(sigma) or denoise_exactly(x, sigma)  # noqa: E731
    samplers.denoise(counted, ALL[process], torch.randn(1, 1, 2, 2), sampler=sampler, steps=steps)
    assert len(asked) == steps
    assert asked == sorted(asked, reverse=True)


@pytest.mark.parametrize("process", OWN_PROCESSES)
def test_euler_maruyama_is_of_the_vp_sde(process):
    with pytest.raises(UserError, match="euler-maruyama needs a run with --objective vp-sde"):
        samplers.denoise(denoise_exactly, ALL[process], torch.randn(1, 1, 2, 2), sampler="euler-maruyama", steps=5)


def test_edm_has_the_published_sigmas():
    """arXiv:2206.00364, eq. 5, with the values of table 1."""
    expected = [(80 ** (1 / 7) + i / 17 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7 for i in range(18)]
    np.testing.assert_allclose(OWN_PROCESSES["edm"].sigmas(18), expected, rtol=1e-12)


def test_flow_has_even_times():
    sigmas = np.array(OWN_PROCESSES["flow"].sigmas(10))
    np.testing.assert_allclose(sigmas / (1 + sigmas), 0.999 * np.linspace(1, 0.1, 10), rtol=1e-12)
