"""What a run does about steps that are not finite and about a loss that climbs: nothing unless it is configured."""

import math
from collections import deque
from statistics import median

from scalelong.train.config import GuardConfig
from scalelong.train.errors import UserError

LOSSES_REMEMBERED = 100
LOSSES_BEFORE_JUDGING = 20


class Guard:
    """Judges the loss of every step. All ranks give it the same losses, so they come to the same conclusions."""

    def __init__(self, config: GuardConfig):
        self.config = config
        self.left_out = 0
        """Steps left out since the start."""
        self.calm_until: int | None = None
        """Images seen before the loss became too high; None while it is not."""
        self._left_out_in_a_row = 0
        self._too_high_in_a_row = 0
        self._rolled_back = 0
        self._losses: deque[float] = deque(maxlen=LOSSES_REMEMBERED)

    @property
    def watches(self) -> bool:
        """Whether it has to see every loss at its own step."""
        return self.config.skip_steps > 0 or self.config.roll_back_factor > 0

    def admits(self, loss: float, is_finite: bool, step: int, images_per_step: int) -> bool:
        """Whether a step counts; False if it was left out because its loss or its gradient is not finite.

        Raises:
            UserError: one more in a row than may be left out.
        """
        if is_finite and math.isfinite(loss):
            self._left_out_in_a_row = 0
            self._judge(loss, (step - 1) * images_per_step)
            return True
        self.left_out += 1
        self._left_out_in_a_row += 1
        if self._left_out_in_a_row <= self.config.skip_steps:
            return False
        what = "the gradient is not finite" if math.isfinite(loss) else f"the loss is {loss}"
        before = f", as in the {self.config.skip_steps} steps before it" if self.config.skip_steps else ""
        raise UserError(
            f"{what} at step {step} ({step * images_per_step:,} images){before}; "
            f"nothing was saved after it; a lower --optimizer.learning-rate may help"
        )

    def _judge(self, loss: float, images_seen_before: int) -> None:
        factor = self.config.roll_back_factor
        ready = len(self._losses) >= LOSSES_BEFORE_JUDGING
        if factor and ready and loss > factor * median(self._losses):
            self._too_high_in_a_row += 1
            if self.calm_until is None:
                self.calm_until = images_seen_before
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
            UserError: it has happened too often.
        """
        calm_until = self.calm_until
        assert calm_until is not None
        if self._rolled_back == self.config.roll_backs:
            raise UserError(
                f"the loss has been above {self.config.roll_back_factor:g} times its median since {calm_until:,} "
                f"images, after {self._rolled_back} roll-backs; a lower --optimizer.learning-rate may help"
            )
        self._rolled_back += 1
        self._too_high_in_a_row, self.calm_until = 0, None
        return calm_until
