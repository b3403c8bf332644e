"""How fast a run gets on, and how long it will take: for the terminal, the log, and a line after its first steps."""

import math
import time
from collections.abc import Callable

SECONDS_OF_A_PACE = 60.0
"""How long it takes a change of speed to show in the time left, about."""
STEPS_TO_WARM_UP = 2
"""Of a start: they allocate, compile and wait for the first images."""
LEAST_STEPS, LEAST_SECONDS = 3, 10.0
"""Beyond them, that an estimate rests on."""


class Pace:
    """How fast a run gets on, grids and checkpoints included: a mean over time that forgets within a minute or so."""

    def __init__(self):
        self._images = self._seconds = 0.0
        self._last: tuple[float, int] | None = None

    def seconds_for(self, images_left: int, *, images_seen: int, speed: float) -> float:
        """How long the images that are left will take.

        Args:
            images_seen: now.
            speed: of the last steps, which is all that is known at the first call.
        """
        now = time.monotonic()
        if self._last is not None:
            seconds = now - self._last[0]
            kept = math.exp(-seconds / SECONDS_OF_A_PACE)
            self._images = kept * self._images + images_seen - self._last[1]
            self._seconds = kept * self._seconds + seconds
        self._last = now, images_seen
        if self._images > 0:
            return images_left * self._seconds / self._images
        return images_left / speed if speed > 0 else 0.0


class Estimate:
    """What a start will take, said once, by the steps behind its first ones; with logs and pictures among them.

    Args:
        images_seen: where it begins.
        total_images: where it ends.
        images_per_step: of all processes together.
    """

    def __init__(self, images_seen: int, total_images: int, images_per_step: int):
        self._warm = images_seen + STEPS_TO_WARM_UP * images_per_step
        self._total, self._batch = total_images, images_per_step
        self._began: tuple[float, int] | None = None
        self._is_said = False

    def line(self, images_seen: int, memory_gb: Callable[[], float]) -> str | None:
        """The line, once it can be said; to be asked for when a step has come to its end on the device too."""
        if self._is_said or images_seen < self._warm:
            return None
        now = time.monotonic()
        if self._began is None:
            self._began = now, images_seen
        seconds, images = now - self._began[0], images_seen - self._began[1]
        if images < LEAST_STEPS * self._batch or seconds < LEAST_SECONDS:
            return None
        self._is_said, left = True, self._total - images_seen
        if left <= 0:
            return None
        return (
            f"{short(images / seconds)} images/s over {images // self._batch:,} steps: about "
            f"{in_words(left * seconds / images)} left, {left:,} images; {memory_gb():.1f} GB of memory"
        )


def clock(seconds: float) -> str:
    """Hours, minutes and seconds."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"


def in_words(seconds: float) -> str:
    """A span of time in its two largest units: 3 h 20 min."""
    for large, small, names in ((86400, 3600, ("d", "h")), (3600, 60, ("h", "min"))):
        if seconds >= large - small / 2:
            whole, rest = divmod(round(seconds / small), large // small)
            return f"{whole} {names[0]} {rest} {names[1]}"
    return f"{round(seconds / 60)} min" if seconds >= 59.5 else f"{max(round(seconds), 1)} s"


def short(number: float) -> str:
    """Three digits of a small number, all of a large one: 0.0712, 3.14, 1,234."""
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


class Meter:
    """How fast a run is, and how much of its time it waits for data; entered for each step, so that logs, grids and
    checkpoints do not count."""

    def __init__(self):
        self._began = self._seconds = 0.0
        self._steps = 0

    def __enter__(self) -> None:
        self._began = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self._seconds += time.perf_counter() - self._began
        self._steps += 1

    def take(self, images_per_step: int, seconds_waited: float) -> dict[str, float]:
        """Images per second, and the share of the time waited for data, since the last call."""
        seconds, steps = self._seconds, self._steps
        self._seconds, self._steps = 0.0, 0
        return {"images_per_second": steps * images_per_step / seconds, "data_wait": seconds_waited / seconds}
