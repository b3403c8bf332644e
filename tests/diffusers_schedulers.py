"""The samplers of diffusers, set up for a process that preserves the variance: what ours are held against."""

from typing import Any

import torch
from torch import Tensor

from scalelong.train.diffusion.process import VPSDE, VariancePreserving
from scalelong.train.objective_config import NUM_TIMES

BY_DIFFUSERS = ("dpm-solver++", "ddim", "euler", "euler-ancestral", "euler-maruyama")


def make_scheduler(sampler: str, process: VariancePreserving) -> Any:
    """For a sampler of ``BY_DIFFUSERS``, with the sigmas of the process on the grid n = 1 .. 1000."""
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
    assert isinstance(process, VPSDE)
    # From its own file: the package beside it imports transformers, which nothing here needs.
    from diffusers.schedulers.deprecated.scheduling_sde_vp import ScoreSdeVpScheduler

    return ScoreSdeVpScheduler()


def _grid(process: VariancePreserving) -> Tensor:
    """The times of n = 1 .. 1000, fp64."""
    return process.grid_time(torch.arange(1, NUM_TIMES + 1, dtype=torch.float64))


def _sigmas(process: VariancePreserving, times: Tensor) -> Tensor:
    signal, noise_level = process.levels(times)
    return noise_level / signal
