"""When what is due, and the learning rate, as functions of the images seen."""

from collections.abc import Callable
from typing import NamedTuple

from scalelong.train.config import OptimizerConfig, TrainConfig


def constant(optimizer: OptimizerConfig, images_seen: int) -> float:
    """Linear from 0 over the warm-up, then 1."""
    return min(images_seen / optimizer.warmup_images, 1.0) if optimizer.warmup_images else 1.0


SCHEDULES: dict[str, Callable[[OptimizerConfig, int], float]] = {"constant": constant}
"""What multiplies the learning rate, as functions of the images seen: of nothing else, so that resuming is exact."""


def learning_rate(config: TrainConfig, images_seen: int) -> float:
    return config.optimizer.learning_rate * SCHEDULES["constant"](config.optimizer, images_seen)


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
