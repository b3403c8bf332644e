"""When what is due, and the learning rate, as functions of the images seen."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

from scalelong.train.config import OptimizerConfig, TrainConfig
from scalelong.train.errors import UserError


def constant(optimizer: OptimizerConfig, images_seen: int) -> float:
    """Linear from 0 over the warm-up, then 1."""
    return min(images_seen / optimizer.warmup_images, 1.0) if optimizer.warmup_images else 1.0


def cosine(optimizer: OptimizerConfig, images_seen: int) -> float:
    """After the warm-up half a cosine from 1 to the final factor at the horizon (arXiv:1608.03983, eq. 5)."""
    gone = _share(images_seen, optimizer.warmup_images, optimizer.horizon_images)
    falling = 0.5 * (1 + math.cos(math.pi * gone))
    return constant(optimizer, images_seen) * _towards_final(optimizer, falling)


def inverse_sqrt(optimizer: OptimizerConfig, images_seen: int) -> float:
    """1 / sqrt(images_seen / stable_images) from those images on (EDM2, arXiv:2312.02696)."""
    stable = max(optimizer.stable_images or optimizer.warmup_images, 1)
    return constant(optimizer, images_seen) / math.sqrt(max(images_seen / stable, 1.0))


def warmup_stable_decay(optimizer: OptimizerConfig, images_seen: int) -> float:
    """1 until the decay begins, then 1 - sqrt of the share of it that is gone (arXiv:2405.18392)."""
    begin = optimizer.horizon_images - decay_length(optimizer)
    falling = 1 - math.sqrt(_share(images_seen, begin, optimizer.horizon_images))
    return constant(optimizer, images_seen) * _towards_final(optimizer, falling)


def _share(images_seen: int, begin: int, end: int) -> float:
    """How much of the images from begin to end has been seen, in [0, 1]."""
    return min(max((images_seen - begin) / (end - begin), 0.0), 1.0) if end > begin else float(images_seen >= end)


def _towards_final(optimizer: OptimizerConfig, falling: float) -> float:
    return optimizer.final_factor + (1 - optimizer.final_factor) * falling


def decay_length(optimizer: OptimizerConfig) -> int:
    """Of warmup-stable-decay, in images: a fifth of the horizon unless it is given (arXiv:2405.18392)."""
    return optimizer.decay_images or optimizer.horizon_images // 5


SCHEDULES: dict[str, Callable[[OptimizerConfig, int], float]] = {
    "constant": constant,
    "cosine": cosine,
    "inverse-sqrt": inverse_sqrt,
    "warmup-stable-decay": warmup_stable_decay,
}
"""What multiplies the learning rate, as functions of the images seen: of nothing else, so that resuming is exact."""
WITH_HORIZON = ("cosine", "warmup-stable-decay")


def learning_rate(config: TrainConfig, images_seen: int) -> float:
    """The rate of the step that begins there; of a configuration that ``with_horizon`` has given one."""
    return config.optimizer.learning_rate * SCHEDULES[config.optimizer.schedule](config.optimizer, images_seen)


def with_horizon(config: TrainConfig) -> TrainConfig:
    """The configuration with the horizon of its schedule as a number, which is then on record with the run.

    Raises:
        UserError: the schedule ends too early, or its parts do not fit into it.
    """
    optimizer = config.optimizer
    if optimizer.schedule not in WITH_HORIZON:
        return config
    optimizer = replace(optimizer, horizon_images=optimizer.horizon_images or config.total_images)
    horizon, decay = optimizer.horizon_images, decay_length(optimizer)
    if optimizer.final_factor == 0 and horizon < config.total_images:
        raise UserError(
            f"the learning rate is 0 from --optimizer.horizon-images {horizon} on, and --total-images are "
            f"{config.total_images}; raise the horizon, or --optimizer.final-factor"
        )
    falls = decay if optimizer.schedule == "warmup-stable-decay" else 0
    if optimizer.warmup_images + falls > horizon:
        parts = f"--optimizer.warmup-images {optimizer.warmup_images}"
        parts += f" and --optimizer.decay-images {decay}" if falls else ""
        raise UserError(f"{parts} do not fit into --optimizer.horizon-images {horizon}")
    return replace(config, optimizer=optimizer)


def check_rates(there: TrainConfig, config: TrainConfig, images_seen: int) -> None:
    """A run goes on under another schedule, or another horizon, as if it had been asked for at once, or not at all.

    Args:
        there: what the run was made with, of the same images_per_step.
        images_seen: of the checkpoint that it resumes from.

    Raises:
        UserError: a step that was taken would have had another learning rate.
    """
    if there.optimizer == config.optimizer:
        return
    for position in range(0, images_seen, config.images_per_step):
        before, now = learning_rate(there, position), learning_rate(config, position)
        if before != now:
            raise UserError(
                f"{config.run} has taken the step at {position:,} images with the learning rate {before:g}, which "
                f"would now be {now:g}: {_change(there.optimizer, config.optimizer)}; take them back, or another "
                f"--run, with --branch-from {config.run} to go on from there"
            )


def _change(there: OptimizerConfig, optimizer: OptimizerConfig) -> str:
    """What differs of the two schedules, as "flag old -> new"."""
    names = ("schedule", "horizon_images", "decay_images", "stable_images", "final_factor")
    changed = [(name, getattr(there, name), getattr(optimizer, name)) for name in names]
    shown = [f"--optimizer.{n.replace('_', '-')} {old} -> {new}" for n, old, new in changed if old != new]
    return ", ".join(shown)


def passes(previous: int, now: int, every: int) -> bool:
    """Whether a multiple of ``every`` lies in (previous, now]; never for 0."""
    return every > 0 and now // every > previous // every


class Due(NamedTuple):
    """What is due after a step."""

    log: bool
    grid: bool
    averages: bool
    """Power-function averages are kept."""
    checkpoint: bool
    validation: bool
    evaluation: bool
    """Samples are scored."""
    last: bool
    """It was the last step of the run."""


def what_is_due(config: TrainConfig, images_seen: int) -> Due:
    """After the step that begins at ``images_seen``. At the end all is."""
    now = images_seen + config.images_per_step
    last = now >= config.total_images

    def is_due(every: int) -> bool:
        return last or passes(images_seen, now, every)

    validation = config.num_validation_images > 0 and is_due(config.images_per_validation)
    evaluation = config.images_per_evaluation > 0 and is_due(config.images_per_evaluation)
    return Due(
        # What is found out is logged, in a row of its own if need be.
        log=config.images_per_log == 0 or is_due(config.images_per_log) or validation or evaluation,
        grid=is_due(config.images_per_grid),
        averages=bool(config.optimizer.ema_stds) and is_due(config.images_per_average),
        checkpoint=is_due(config.images_per_checkpoint),
        validation=validation,
        evaluation=evaluation,
        last=last,
    )
