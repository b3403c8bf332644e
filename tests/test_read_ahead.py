"""Items made on another thread: the same ones, ahead of time, with errors in their place and no thread left behind."""

import gc
import itertools
import subprocess
import sys
import threading
import time

import pytest
from programs import environment

from scalelong.train.data.read_ahead import BATCHES_AHEAD, ReadAhead
from scalelong.train.errors import RankError


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "read-ahead"]


def test_items_come_in_order():
    assert list(itertools.islice(ReadAhead(itertools.count()), 100)) == list(range(100))


def test_it_stays_a_few_items_ahead():
    made = []

    def items():
        for n in itertools.count():
            made.append(n)
            yield n

    ahead = ReadAhead(items())
    next(ahead)
    time.sleep(0.2)
    # One more waits for room in the queue.
    assert len(made) == BATCHES_AHEAD + 2


def test_an_error_comes_in_its_place_and_stays():
    def items():
        yield 1
        raise RankError("no more")

    ahead = ReadAhead(items())
    assert next(ahead) == 1
    for _ in range(2):
        with pytest.raises(RankError, match="no more"):
            next(ahead)


def test_an_end_is_an_end():
    assert list(ReadAhead(iter("abc"))) == ["a", "b", "c"]


def test_the_time_waited_is_counted_once():
    def items():
        while True:
            time.sleep(0.05)
            yield 0

    ahead = ReadAhead(items())
    for _ in range(4):
        next(ahead)
    assert 0.15 < ahead.take_seconds() < 1
    assert ahead.take_seconds() == 0


def test_the_thread_ends_with_its_object():
    before = len(threads())
    ahead = ReadAhead(itertools.count())
    next(ahead)
    assert len(threads()) == before + 1
    del ahead
    gc.collect()
    assert len(threads()) == before


def test_a_program_that_fails_ends_all_the_same():
    code = (
        "import itertools\n"
        "from scalelong.train.data.read_ahead import ReadAhead\n"
        "ahead = ReadAhead(itertools.count())\n"
        "next(ahead)\n"
        "raise SystemExit(7)\n"
    )
    assert subprocess.run([sys.executable, "-c", code], env=environment(), timeout=60).returncode == 7
