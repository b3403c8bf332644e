"""Training times from uniform numbers, one for each image, so that sample number p has its own whatever the batch.

Logit-normal: Esser et al., arXiv:2403.03206. Normal ln sigma: Karras et al., arXiv:2206.00364, table 1.

Shapes: B batch.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from scalelong.train.diffusion.process import Process
from scalelong.train.objective_config import ObjectiveConfig


def standard_normal(u_B: Tensor) -> Tensor:
    """A standard normal number from each uniform one in [0, 1), fp64."""
    # Runs draw multiples of 2^-24: the middle of each one's interval is never 0 or 1.
    return torch.special.ndtri((u_B.double() + 2.0**-25).clamp(max=1 - 2.0**-25))


def uniform(u_B: Tensor, process: Process, config: ObjectiveConfig) -> Tensor:
    """All times of the process alike."""
    return process.draw_time(u_B)


def logit_normal(u_B: Tensor, process: Process, config: ObjectiveConfig) -> Tensor:
    """The share of the process's times that has gone by is the sigmoid of a normal variable (arXiv:2403.03206)."""
    share_B = torch.sigmoid(config.logit_mean + config.logit_std * standard_normal(u_B))
    return process.draw_time(share_B.to(u_B.dtype).clamp(max=1 - 2.0**-24))


def normal_log_sigma(u_B: Tensor, process: Process, config: ObjectiveConfig) -> Tensor:
    """ln sigma is normal (arXiv:2206.00364); a sigma that the process does not reach is the nearest that it does."""
    sigma_B = torch.exp(config.log_sigma_mean + config.log_sigma_std * standard_normal(u_B))
    return process.training_times(sigma_B).to(u_B.dtype)


TIMES: dict[str, Callable[[Tensor, Process, ObjectiveConfig], Tensor]] = {
    "uniform": uniform,
    "logit-normal": logit_normal,
    "edm": normal_log_sigma,
}
"""By the name that --objective.times takes."""
