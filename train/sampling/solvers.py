"""Samplers in sigma: the reverse process from D(x, sigma) alone, along any falling sequence of sigmas that ends in 0.

x = x_0 + sigma ε, and dx/dsigma = (x - D) / sigma (Karras et al., arXiv:2206.00364, eq. 1 and 3). Each function is one
sampler, and asks D once at each sigma but the last (Heun twice, but for the last step). Euler-Maruyama alone, which is
of one process, steps through its time.

Shapes: B batch, C channels, H height, W width.
"""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from scalelong.train.diffusion.process import VPSDE
from scalelong.train.objective import Denoiser

Draw = Callable[[], Tensor]
"""Gives standard normal noise (B, C, H, W), anew each time."""
LAST_TIME = 1e-3
"""Where Euler-Maruyama ends: below, the SDE's score grows without bound (arXiv:2011.13456, appendix C)."""
Solver = Callable[[Denoiser, Tensor, Sequence[float], Draw], Tensor]


def euler(denoise: Denoiser, x_BCHW: Tensor, sigmas: Sequence[float], draw: Draw) -> Tensor:
    """Euler's method, which is DDIM (arXiv:2010.02502); first order."""
    for sigma, following in pairwise(sigmas):
        denoised_BCHW = denoise(x_BCHW, sigma)
        x_BCHW = denoised_BCHW + following / sigma * (x_BCHW - denoised_BCHW)
    return x_BCHW


def heun(denoise: Denoiser, x_BCHW: Tensor, sigmas: Sequence[float], draw: Draw, *, first: bool = True) -> Tensor:
    """Heun's method with Euler's last step (arXiv:2206.00364, algorithm 1); second order.

    Args:
        first: whether the first step is corrected too. One of Euler's there leaves the order as it is.
    """
    for n, (sigma, following) in enumerate(pairwise(sigmas)):
        slope_BCHW = (x_BCHW - denoise(x_BCHW, sigma)) / sigma
        euler_BCHW = x_BCHW + (following - sigma) * slope_BCHW
        if following > 0 and (first or n > 0):
            slope_there_BCHW = (euler_BCHW - denoise(euler_BCHW, following)) / following
            x_BCHW = x_BCHW + (following - sigma) / 2 * (slope_BCHW + slope_there_BCHW)
        else:
            x_BCHW = euler_BCHW
    return x_BCHW


def dpm_solver(denoise: Denoiser, x_BCHW: Tensor, sigmas: Sequence[float], draw: Draw) -> Tensor:
    """DPM-Solver++(2M): D goes on as a line in ln sigma (arXiv:2211.01095, algorithm 2); second order."""
    return _two_step(denoise, x_BCHW, sigmas, None)


def euler_ancestral(denoise: Denoiser, x_BCHW: Tensor, sigmas: Sequence[float], draw: Draw) -> Tensor:
    """Euler's method to less noise than the step is to leave, and the rest anew: DDPM's steps (arXiv:2006.11239)."""
    for sigma, following in pairwise(sigmas):
        added = following * math.sqrt(1 - (following / sigma) ** 2)
        left = math.sqrt(following**2 - added**2)
        denoised_BCHW = denoise(x_BCHW, sigma)
        x_BCHW = denoised_BCHW + left / sigma * (x_BCHW - denoised_BCHW)
        if following > 0:
            x_BCHW = x_BCHW + added * draw()
    return x_BCHW


def sde_dpm_solver(denoise: Denoiser, x_BCHW: Tensor, sigmas: Sequence[float], draw: Draw) -> Tensor:
    """SDE-DPM-Solver++(2M): the same for the reverse SDE (arXiv:2211.01095)."""
    return _two_step(denoise, x_BCHW, sigmas, draw)


def euler_maruyama(denoise: Denoiser, process: VPSDE, noise_BCHW: Tensor, steps: int, draw: Draw) -> Tensor:
    """Euler-Maruyama of the reverse SDE in time, without the last noise (arXiv:2011.13456, eq. 6 and 11).

    x is x_t itself here, sqrt(ᾱ) (x_0 + sigma ε): its drift is linear in time, that of x_t / sqrt(ᾱ) is not.
    """
    x_BCHW = mean_BCHW = noise_BCHW
    times = torch.linspace(1, LAST_TIME, steps, dtype=torch.float64)
    signals, noise_levels = process.levels(times)
    for time, signal, noise_level in zip(times.tolist(), signals.tolist(), noise_levels.tolist(), strict=True):
        beta = process.beta_min + time * (process.beta_max - process.beta_min)
        denoised_BCHW = denoise(x_BCHW / signal, noise_level / signal)
        score_BCHW = (signal * denoised_BCHW - x_BCHW) / noise_level**2
        mean_BCHW = x_BCHW + (x_BCHW / 2 + score_BCHW) * beta / steps
        x_BCHW = mean_BCHW + math.sqrt(beta / steps) * draw()
    return mean_BCHW


def _two_step(denoise: Denoiser, x_BCHW: Tensor, sigmas: Sequence[float], draw: Draw | None) -> Tensor:
    """Steps with D as it is in the middle of them, on a line in ln sigma through its last two values.

    Args:
        draw: of the reverse SDE; None: the ODE.
    """
    before_BCHW, length_before = None, math.nan
    for sigma, following in pairwise(sigmas):
        denoised_BCHW = denoise(x_BCHW, sigma)
        expected_BCHW, length = denoised_BCHW, math.log(sigma / following) if following > 0 else math.inf
        # The first step knows of none before it, and the last is infinitely long.
        if before_BCHW is not None and following > 0:
            expected_BCHW = denoised_BCHW + length / length_before / 2 * (denoised_BCHW - before_BCHW)
        kept = (following / sigma) ** (1 if draw is None else 2)
        x_BCHW = kept * x_BCHW + (1 - kept) * expected_BCHW
        if draw is not None and following > 0:
            x_BCHW = x_BCHW + following * math.sqrt(1 - kept) * draw()
        before_BCHW, length_before = denoised_BCHW, length
    return x_BCHW


SOLVERS: dict[str, Solver] = {
    "euler": euler,
    "ddim": euler,
    "heun": heun,
    "dpm-solver++": dpm_solver,
    "euler-ancestral": euler_ancestral,
    "sde-dpm-solver++": sde_dpm_solver,
}
"""By the name that --sample.sampler takes."""
