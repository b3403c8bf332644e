"""The reverse process of what preserves the variance, from D(x, sigma) alone, by the schedulers of diffusers.

They step through a grid of 1000 times; each keeps the image scaled in its own way and
takes the prediction in its own form, which are made here of x = x_0 + sigma ε and D (Karras et al., arXiv:2206.00364).

Shapes: B batch, C channels, H height, W width.
"""

import math
from typing import Any

import torch
from torch import Tensor

from scalelong.train.diffusion.process import VPSDE, VariancePreserving
from scalelong.train.errors import UserError
from scalelong.train.objective import Denoiser
from scalelong.train.objective_config import NUM_TIMES

BY_DIFFUSERS = ("dpm-solver++", "ddim", "euler", "euler-ancestral", "euler-maruyama")
TAKE_NOISE = ("euler-ancestral", "euler-maruyama")
"""Samplers whose schedulers take (x - D) / sigma, the noise; the others take D."""
KEEP_X = ("euler", "euler-ancestral")
"""Samplers whose schedulers keep x; the others keep x / √(1 + sigma²)."""


def make_scheduler(sampler: str, process: VariancePreserving) -> Any:
    """diffusers' scheduler for a sampler of ``BY_DIFFUSERS``, with the sigmas of the process on the grid n = 1 .. 1000.

    Raises:
        UserError: Euler-Maruyama for a process that is no SDE.
    """
    import diffusers

    alpha_bar = 1 / (1 + _sigmas(process, _grid(process)) ** 2)
    betas = 1 - alpha_bar / torch.cat([alpha_bar.new_ones(1), alpha_bar[:-1]])
    grid = {"num_train_timesteps": NUM_TIMES, "trained_betas": betas.tolist(), "timestep_spacing": "trailing"}
    if sampler == "dpm-solver++":
        return diffusers.DPMSolverMultistepScheduler(**grid, prediction_type="sample", solver_order=2)
    if sampler == "ddim":
        # DDIM is DPM-Solver++ of order 1 (arXiv:2211.01095, section 4). diffusers' own DDIMScheduler steps back by
        # 1000 // steps whatever the grid, which is wrong where steps does not divide 1000.
        return diffusers.DPMSolverMultistepScheduler(**grid, prediction_type="sample", solver_order=1)
    if sampler == "euler":
        return diffusers.EulerDiscreteScheduler(**grid, prediction_type="sample")
    if sampler == "euler-ancestral":
        return diffusers.EulerAncestralDiscreteScheduler(**grid)
    assert sampler == "euler-maruyama", sampler
    if not isinstance(process, VPSDE):
        raise UserError("the sampler euler-maruyama needs a run with --objective vp-sde")
    # From its own file: the package beside it imports transformers, which nothing here needs.
    from diffusers.schedulers.deprecated.scheduling_sde_vp import ScoreSdeVpScheduler

    return ScoreSdeVpScheduler()


def denoise_by_diffusers(
    denoiser: Denoiser,
    process: VariancePreserving,
    noise_BCHW: Tensor,
    *,
    sampler: str,
    steps: int,
    generators: list[torch.Generator] | None = None,
) -> Tensor:
    """As ``samplers.denoise``, by a sampler of ``BY_DIFFUSERS``.

    Raises:
        UserError: a sampler that does not fit the process.
    """
    scheduler = make_scheduler(sampler, process)
    scheduler.set_timesteps(steps)
    scheduler.is_scale_input_called = True  # Euler's warn otherwise, but it is done here
    is_sde = sampler == "euler-maruyama"
    if is_sde:  # eq. 6 of arXiv:2011.13456, on t from 1 to 10⁻³
        times = scheduler.timesteps.double()
    else:  # diffusers counts its grid from 0
        times = _grid(process)[scheduler.timesteps.long()]
    x_BCHW = mean_BCHW = noise_BCHW if is_sde else noise_BCHW * scheduler.init_noise_sigma
    for t, sigma in zip(scheduler.timesteps, _sigmas(process, times).tolist(), strict=True):
        unscaled_BCHW = x_BCHW if sampler in KEEP_X else x_BCHW * math.sqrt(1 + sigma**2)
        predicted_BCHW = denoiser(unscaled_BCHW, sigma)
        if sampler in TAKE_NOISE:
            predicted_BCHW = (unscaled_BCHW - predicted_BCHW) / sigma
        if is_sde:
            time = t.to(x_BCHW.device)
            x_BCHW, mean_BCHW = scheduler.step_pred(predicted_BCHW, x_BCHW, time, generator=generators)
        else:
            x_BCHW = mean_BCHW = scheduler.step(predicted_BCHW, t, x_BCHW, generator=generators).prev_sample
    return mean_BCHW  # the SDE's last step adds no noise


def _grid(process: VariancePreserving) -> Tensor:
    """The times of n = 1 .. 1000, fp64."""
    return process.grid_time(torch.arange(1, NUM_TIMES + 1, dtype=torch.float64))


def _sigmas(process: VariancePreserving, times: Tensor) -> Tensor:
    signal, noise_level = process.levels(times)
    return noise_level / signal
