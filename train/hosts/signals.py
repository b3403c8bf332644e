"""SIGTERM, Ctrl-C and their like as a wish to save and stop, which the loop grants at the next step."""

import signal
import time
from types import FrameType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
"""SIGHUP comes from a terminal that closes; SIGUSR1 and SIGUSR2 from schedulers, some time before the job ends."""


def stop_signals() -> tuple[signal.Signals, ...]:
    """Those of them that this process listens to: under nohup a terminal may close."""
    return tuple(n for n in STOP_SIGNALS if n != signal.SIGHUP or signal.getsignal(n) != signal.SIG_IGN)


def ignore_stop_signals() -> None:
    """For the last moments of a process, in which Python takes its own handlers away."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _do_nothing(_number: int, _frame: FrameType | None) -> None:
    """Unlike SIG_IGN no child inherits it."""


class StopSignals:
    """While entered, remembers that a signal came. Ctrl-C again, two seconds later or more, interrupts at once.

    A launcher passes the terminal's Ctrl-C on as SIGTERM; that second signal must not cut the saving short, nor make a
    death of the end that follows: once a signal has come, those that would kill do nothing afterwards.
    """

    PATIENCE_SECONDS = 2.0

    def __init__(self):
        self.received: str | None = None
        self._time = 0.0
        self._previous = {}

    def __enter__(self) -> "StopSignals":
        self._previous = {number: signal.signal(number, self._handle) for number in stop_signals()}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            kills = handler == signal.SIG_DFL and self.received is not None
            signal.signal(number, _do_nothing if kills else handler)

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if self.received is None:
            self.received, self._time = signal.Signals(number).name, time.monotonic()
        elif number == signal.SIGINT and time.monotonic() - self._time > self.PATIENCE_SECONDS:
            raise KeyboardInterrupt
