"""``--skip-scale profiled``: the factors of the skips are measured once, when a new run starts, and are part of it."""

import copy
from dataclasses import replace

import torch

from scalelong.model.architectures import make_backbone
from scalelong.model.skip_profile import profile_skips
from scalelong.model.skip_scale import ProfiledScale
from scalelong.train.checks import Start
from scalelong.train.errors import UserError
from scalelong.train.objective import make_objective
from scalelong.train.validation import Validation

NUM_IMAGES = 64
"""That are looked at, at times spread evenly; the validation images of a run that has so many."""


def with_profiled_skips(start: Start) -> Start:
    """The start with the factors in its configuration, if they are yet to be measured; they are rank 0's on all ranks.

    Raises:
        UserError: the network's features give no factors, or the images cannot be read.
    """
    policy = start.config.skip_scale
    if not isinstance(policy, ProfiledScale) or policy.factors:
        return start
    factors = start.processes.on_main(lambda: _measure(start, policy.share))
    return replace(start, config=replace(start.config, skip_scale=replace(policy, factors=factors)))


def _measure(start: Start, share: float) -> tuple[float, ...]:
    config = start.config
    torch.manual_seed(config.seed)
    network = make_backbone(config.model, skip_scale=config.skip_scale)
    if start.initial is not None:
        copy.deepcopy(start.initial).put_into(network, config)
    batch = Validation(_with_images(start, NUM_IMAGES)).first_batch()
    images = batch.images_BCHW, batch.noise_BCHW, batch.time_u_B, batch.condition
    try:
        return profile_skips(
            network.eval(), lambda: make_objective(config.objective).loss(network, *images), share=share
        )
    except ValueError as error:
        raise UserError(f"--skip-scale profiled: {error}") from error


def _with_images(start: Start, count: int) -> Start:
    return replace(start, config=replace(start.config, num_validation_images=count))
