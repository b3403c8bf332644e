"""When what is due, and the learning rate, as functions of the images seen."""

from scalelong.train.config import TrainConfig


def learning_rate(config: TrainConfig, images_seen: int) -> float:
    """Linear from 0 over the warm-up, then constant."""
    warmup = config.optimizer.warmup_images
    return config.optimizer.learning_rate * (min(images_seen / warmup, 1.0) if warmup else 1.0)


def passes(previous: int, now: int, every: int) -> bool:
    """Whether a multiple of ``every`` lies in (previous, now]; never for 0."""
    return every > 0 and now // every > previous // every
