"""How fast a run gets on: the time left, smoothed, and the line that says what a run will take."""

from types import SimpleNamespace

import pytest

from scalelong.train import pace
from scalelong.train.pace import Estimate, Pace, in_words


@pytest.fixture
def clock(monkeypatch):
    """Set ``now`` to move it."""
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(pace, "time", SimpleNamespace(monotonic=lambda: clock.now))
    return clock


def test_the_time_left_does_not_jump_with_the_speed_of_the_moment(clock):
    pace, left = Pace(), []
    for second in range(300):
        clock.now += 1
        # Two speeds by turns, 100 images a second on the whole.
        left.append(pace.seconds_for(30_000, images_seen=100 * second, speed=(10, 1000)[second % 2]))
    assert all(seconds == pytest.approx(300) for seconds in left[1:])
    for second in range(300, 420):
        clock.now += 2  # from here on it is half as fast
        left.append(pace.seconds_for(30_000, images_seen=100 * second, speed=50))
    assert left[-1] == pytest.approx(600, rel=0.05)


def test_what_a_run_takes_is_said_once_without_its_first_steps(clock):
    estimate, said = Estimate(640, 640 + 128_000, 128), []
    for step in range(1, 20):
        clock.now += 60 if step <= 2 else 4  # compiled, say
        said.append(estimate.line(640 + 128 * step, lambda: 5.25))
    assert [line for line in said if line] == [
        "32 images/s over 3 steps: about 1 h 6 min left, 127,360 images; 5.2 GB of memory"
    ]
    assert said[4] is not None


def test_of_a_run_that_ends_first_nothing_is_said(clock):
    estimate = Estimate(0, 6 * 64, 64)
    for step in range(1, 7):
        clock.now += 3
        assert estimate.line(64 * step, lambda: 1.0) is None


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.2, "1 s"),
        (59.4, "59 s"),
        (59.6, "1 min"),
        (3569, "59 min"),
        (3599, "1 h 0 min"),
        (12_000, "3 h 20 min"),
        (86_390, "1 d 0 h"),
        (172_700, "2 d 0 h"),
    ],
)
def test_spans_are_said_in_their_two_largest_units(seconds, words):
    assert in_words(seconds) == words
