"""Who solves the reverse process from D(x, sigma) alone: diffusers' schedulers, or our own in sigma.

The names that diffusers serves on its grid of 1000 times are its own wherever the process preserves the variance; for
others, and under the names that it has no sampler of D for, the same methods in sigma are ours (solvers.py).

Shapes: B batch, C channels, H height, W width.
"""

from functools import partial

import torch
from torch import Tensor

from scalelong.train.diffusion.process import Process, VariancePreserving
from scalelong.train.errors import UserError
from scalelong.train.objective import Denoiser
from scalelong.train.objective_config import NUM_TIMES, SAMPLER_NAMES
from scalelong.train.sampling.diffusers_samplers import BY_DIFFUSERS, denoise_by_diffusers
from scalelong.train.sampling.solvers import SOLVERS, heun


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
        denoiser: D(x, sigma), asked at the noise levels of the process.
        noise_BCHW: standard normal.
        steps: evaluations of the denoiser.
        generators: of the noise that stochastic samplers add, one for each image.

    Returns:
        (B, C, H, W), not clamped.

    Raises:
        UserError: an unknown sampler, or one that does not fit the process; too many steps or none.
    """
    if sampler not in SAMPLER_NAMES:
        raise UserError(f"unknown sampler {sampler!r}; there are {', '.join(SAMPLER_NAMES)}")
    if not 1 <= steps <= NUM_TIMES:
        raise UserError(f"a sampler takes 1 to {NUM_TIMES} steps, not {steps}")
    if sampler in BY_DIFFUSERS and isinstance(process, VariancePreserving):
        how = {"sampler": sampler, "steps": steps, "generators": generators}
        return denoise_by_diffusers(denoiser, process, noise_BCHW, **how)
    if sampler not in SOLVERS:
        raise UserError(f"the sampler {sampler} needs a run with --objective vp-sde")
    solver, count = SOLVERS[sampler], steps
    if solver is heun:  # two evaluations a step but for the last and, of an even number, the first
        solver, count = partial(heun, first=steps % 2 == 1), steps // 2 + 1
    x_BCHW = noise_BCHW * process.largest_noise()
    return solver(denoiser, x_BCHW, [*process.sigmas(count), 0.0], partial(_draw, noise_BCHW, generators))


def _draw(like_BCHW: Tensor, generators: list[torch.Generator] | None) -> Tensor:
    """Standard normal noise, of each image from its own generator, so that it is the same in any batch."""
    if generators is None:
        return torch.randn_like(like_BCHW)
    draws = [torch.randn(like_BCHW.shape[1:], generator=g, dtype=like_BCHW.dtype, device=g.device) for g in generators]
    return torch.stack(draws).to(like_BCHW.device)
