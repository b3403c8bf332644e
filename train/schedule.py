"""When what is due, and the learning rate, as functions of the images seen."""

from typing import NamedTuple

from scalelong.train.config import TrainConfig


def learning_rate(config: TrainConfig, images_seen: int) -> float:
    """Linear from 0 over the warm-up, then constant."""
    warmup = config.optimizer.warmup_images
    return config.optimizer.learning_rate * (min(images_seen / warmup, 1.0) if warmup else 1.0)


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
    last: bool
    """It was the last step of the run."""


def what_is_due(config: TrainConfig, images_seen: int) -> Due:
    """After the step that begins at ``images_seen``. At the end all is."""
    now = images_seen + config.images_per_step
    last = now >= config.total_images

    def is_due(every: int) -> bool:
        return last or passes(images_seen, now, every)

    return Due(
        log=config.images_per_log == 0 or is_due(config.images_per_log),
        grid=is_due(config.images_per_grid),
        averages=bool(config.optimizer.ema_stds) and is_due(config.images_per_average),
        checkpoint=is_due(config.images_per_checkpoint),
        last=last,
    )
