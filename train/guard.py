"""What a run does about steps that are not finite and about a loss that climbs: nothing unless it is configured."""

import math
from collections import deque
from pathlib import Path
from statistics import median

from scalelong.train.config import GuardConfig
from scalelong.train.errors import DivergedError

LOSSES_REMEMBERED = 100
LOSSES_BEFORE_JUDGING = 20


class Guard:
    """Judges the loss of every step. All ranks give it the same losses, so they come to the same conclusions.

    Args:
        run: run folder, for what it advises.
    """

    def __init__(self, config: GuardConfig, run: Path = Path("RUN")):
        self.config = config
        self._advice = (
            f"a lower --optimizer.learning-rate may help: --branch-from {run} takes it on in a new --run "
            f"from a checkpoint of this one"
        )
        self.left_out = 0
        """Steps left out since the start."""
        self.calm_until: int | None = None
        """Images seen before the loss became too high; None while it is not."""
        self._left_out_in_a_row = 0
        self._too_high_in_a_row = 0
        self._first_too_high = 0, 0
        """The step that followed ``calm_until``, and the images seen after it."""
        self._rolled_back = 0
        self._losses: deque[float] = deque(maxlen=LOSSES_REMEMBERED)

    @property
    def watches(self) -> bool:
        """Whether it has to see every loss at its own step."""
        return self.config.skip_steps > 0 or self.config.roll_back_factor > 0

    def admits(self, loss: float, is_finite: bool, step: int, images: range) -> bool:
        """Whether a step counts; False if it was left out because its loss or its gradient is not finite.

        Args:
            step: its number, the first is 1.
            images: its positions: from the images seen before it to those seen after it.

        Raises:
            DivergedError: one more in a row than may be left out.
        """
        if is_finite and math.isfinite(loss):
            self._left_out_in_a_row = 0
            self._judge(loss, step, images)
            return True
        self.left_out += 1
        self._left_out_in_a_row += 1
        if self._left_out_in_a_row <= self.config.skip_steps:
            return False
        what = "the gradient is not finite" if math.isfinite(loss) else f"the loss is {loss}"
        before = f", as in the {self.config.skip_steps} steps before it" if self.config.skip_steps else ""
        raise DivergedError(
            f"{what} at step {step} ({images.stop:,} images){before}; nothing was saved after it; {self._advice}",
            what=what,
            step=step,
            images_seen=images.stop,
        )

    def _judge(self, loss: float, step: int, images: range) -> None:
        factor = self.config.roll_back_factor
        ready = len(self._losses) >= LOSSES_BEFORE_JUDGING
        if factor and ready and loss > factor * median(self._losses):
            self._too_high_in_a_row += 1
            if self.calm_until is None:
                self.calm_until, self._first_too_high = images.start, (step, images.stop)
        else:
            self._too_high_in_a_row, self.calm_until = 0, None
            self._losses.append(loss)

    @property
    def asks_to_roll_back(self) -> bool:
        """Whether the loss has been too high for as many steps as it may be."""
        return self.calm_until is not None and self._too_high_in_a_row >= self.config.roll_back_steps

    def roll_back(self) -> int:
        """Starts to watch anew; returns the images seen before the loss became too high.

        Raises:
            DivergedError: it has happened too often.
        """
        calm_until = self.calm_until
        assert calm_until is not None
        if self._rolled_back == self.config.roll_backs:
            raise self.diverged(f"after {self._rolled_back} roll-backs")
        self._rolled_back += 1
        self._too_high_in_a_row, self.calm_until = 0, None
        return calm_until

    def diverged(self, why_it_ends: str) -> DivergedError:
        """The loss that has been too high of late, as an error."""
        (step, images_seen), factor = self._first_too_high, self.config.roll_back_factor
        what = f"the loss has been above {factor:g} times its median since step {step} ({images_seen:,} images)"
        message = f"{what}, {why_it_ends}; {self._advice}"
        return DivergedError(message, what=what, step=step, images_seen=images_seen)
