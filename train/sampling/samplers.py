"""The reverse process, solved by the schedulers of diffusers.

Shapes: B batch, C channels, H height, W width.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from scalelong.train.config import SAMPLER_NAMES
from scalelong.train.errors import UserError
from scalelong.train.objective import NUM_TIMES, VPSDE, Process

Denoiser = Callable[[Tensor, Tensor], Tensor]


def make_scheduler(sampler: str, process: Process):
    """diffusers' scheduler for a sampler, with the process's ᾱ on the grid n = 1 .. 1000.

    Raises:
        UserError: an unknown sampler, or Euler-Maruyama for a process that is no SDE.
    """
    import diffusers

    n = torch.arange(1, NUM_TIMES + 1, dtype=torch.float64)
    alpha_bar = process.alpha_bar(process.grid_time(n))
    betas = 1 - alpha_bar / torch.cat([alpha_bar.new_ones(1), alpha_bar[:-1]])
    grid = {"num_train_timesteps": NUM_TIMES, "trained_betas": betas.tolist(), "timestep_spacing": "trailing"}
    if sampler == "dpm-solver++":
        return diffusers.DPMSolverMultistepScheduler(**grid, algorithm_type="dpmsolver++", solver_order=2)
    if sampler == "ddim":
        # DDIM is DPM-Solver++ of order 1 (arXiv:2211.01095, section 4). diffusers' own DDIMScheduler steps back by
        # 1000 // steps whatever the grid, which is wrong where steps does not divide 1000.
        return diffusers.DPMSolverMultistepScheduler(**grid, algorithm_type="dpmsolver++", solver_order=1)
    if sampler == "euler":
        return diffusers.EulerDiscreteScheduler(**grid)
    if sampler == "euler-ancestral":
        return diffusers.EulerAncestralDiscreteScheduler(**grid)
    if sampler == "euler-maruyama":
        if not isinstance(process, VPSDE):
            raise UserError("the sampler euler-maruyama needs a run with --objective vp-sde")
        # From its own file: the package beside it imports transformers, which nothing here needs.
        from diffusers.schedulers.deprecated.scheduling_sde_vp import ScoreSdeVpScheduler

        return ScoreSdeVpScheduler()
    raise UserError(f"unknown sampler {sampler!r}; there are {', '.join(SAMPLER_NAMES)}")


def denoise(
    denoiser: Denoiser,
    process: Process,
    noise_BCHW: Tensor,
    *,
    sampler: str,
    steps: int,
    generators: list[torch.Generator] | None = None,
) -> Tensor:
    """Solves the reverse process from pure noise.

    Args:
        denoiser: (x_BCHW, network time, a scalar) -> predicted noise.
        noise_BCHW: standard normal.
        steps: network evaluations.
        generators: of the noise that stochastic samplers add, one for each image.

    Returns:
        (B, C, H, W), not clamped.

    Raises:
        UserError: more steps than the grid has points, or a sampler that does not fit the process.
    """
    if not 1 <= steps <= NUM_TIMES:
        raise UserError(f"a sampler takes 1 to {NUM_TIMES} steps, not {steps}")
    scheduler: Any = make_scheduler(sampler, process)
    if sampler == "euler-maruyama":
        return _euler_maruyama(denoiser, process, scheduler, noise_BCHW, steps, generators)
    scheduler.set_timesteps(steps, device=noise_BCHW.device)
    stochastic = {"generator": generators} if sampler == "euler-ancestral" else {}
    x_BCHW = noise_BCHW * scheduler.init_noise_sigma
    for k in scheduler.timesteps:
        # diffusers counts its grid from 0.
        t = process.network_time(process.grid_time(k.to(x_BCHW.dtype) + 1))
        predicted = denoiser(scheduler.scale_model_input(x_BCHW, k), t)
        x_BCHW = scheduler.step(predicted, k, x_BCHW, **stochastic).prev_sample
    return x_BCHW


def _euler_maruyama(
    denoiser: Denoiser,
    process: Process,
    scheduler,
    x_BCHW: Tensor,
    steps: int,
    generators: list[torch.Generator] | None,
) -> Tensor:
    """The reverse SDE of arXiv:2011.13456, eq. 6, on t from 1 to 10⁻³; the last step takes the mean."""
    scheduler.set_timesteps(steps, device=x_BCHW.device)
    mean_BCHW = x_BCHW
    for t in scheduler.timesteps:
        predicted = denoiser(x_BCHW, process.network_time(t))
        x_BCHW, mean_BCHW = scheduler.step_pred(predicted, x_BCHW, t, generator=generators)
    return mean_BCHW
