"""Who solves the reverse process from D(x, sigma) alone, and through which sigmas.

Where the process preserves the variance, the methods that diffusers has step through its grid of 1000 times, as its
schedulers do with trailing spacing (arXiv:2305.08891, table 2), and give what those give; the others, and all of them
for other processes, step through the sigmas of the process.

Shapes: B batch, C channels, H height, W width.
"""

from functools import partial

import numpy as np
import torch
from torch import Tensor

from scalelong.train.diffusion.process import VPSDE, Process, VariancePreserving
from scalelong.train.errors import UserError
from scalelong.train.objective import Denoiser
from scalelong.train.objective_config import NUM_TIMES, SAMPLER_NAMES
from scalelong.train.sampling.solvers import SOLVERS, euler_maruyama, heun

ON_GRID = ("dpm-solver++", "ddim", "euler", "euler-ancestral")
"""Samplers that step through the grid where the process preserves the variance."""
FROM_NOISE_ALONE = ("euler", "euler-ancestral")
"""Those of them that start from sigma ε; the others from sqrt(1 + sigma²) ε, of the variance that x has there."""


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
    draw = partial(_draw, noise_BCHW, generators)
    if sampler == "euler-maruyama":
        if not isinstance(process, VPSDE):
            raise UserError("the sampler euler-maruyama needs a run with --objective vp-sde")
        return euler_maruyama(denoiser, process, noise_BCHW, steps, draw)
    solver = SOLVERS[sampler]
    if isinstance(process, VariancePreserving) and sampler in ON_GRID:
        sigmas = grid_sigmas(process, steps)
        start = sigmas[0] if sampler in FROM_NOISE_ALONE else process.largest_noise()
        return solver(denoiser, noise_BCHW * start, [*sigmas, 0.0], draw)
    count = steps
    if solver is heun:  # two evaluations a step but for the last and, of an even number, the first
        solver, count = partial(heun, first=steps % 2 == 1), steps // 2 + 1
    return solver(denoiser, noise_BCHW * process.largest_noise(), [*process.sigmas(count), 0.0], draw)


def grid_sigmas(process: VariancePreserving, steps: int) -> list[float]:
    """So many sigmas of the grid n = 1 .. 1000, at equal distances of n down from the last."""
    places = np.arange(NUM_TIMES, 0, -NUM_TIMES / steps)[:steps].round()
    signal, noise_level = process.levels(process.grid_time(torch.from_numpy(places)))
    return (noise_level / signal).tolist()


def _draw(like_BCHW: Tensor, generators: list[torch.Generator] | None) -> Tensor:
    """Standard normal noise, of each image from its own generator, so that it is the same in any batch."""
    if generators is None:
        return torch.randn_like(like_BCHW)
    draws = [torch.randn(like_BCHW.shape[1:], generator=g, dtype=like_BCHW.dtype, device=g.device) for g in generators]
    return torch.stack(draws).to(like_BCHW.device)
