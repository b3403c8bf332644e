"""Batches made on a thread of their own, ahead of the steps that take them."""

import threading
import time
import weakref
from collections.abc import Iterator
from queue import Empty, Queue
from typing import Generic, TypeVar

T = TypeVar("T")
BATCHES_AHEAD = 2


class ReadAhead(Generic[T]):
    """An iterator over what another one gives, a few items ahead, that knows how long it was waited for.

    An error on the thread is raised where its item would have come. The thread ends with this object, or with the
    program.
    """

    def __init__(self, batches: Iterator[T]):
        self._ready: Queue[T | BaseException] = Queue(BATCHES_AHEAD)
        self._seconds = 0.0
        ended = threading.Event()
        # Without a reference to this object, which could not end otherwise.
        thread = threading.Thread(target=_fill, args=(batches, self._ready, ended), daemon=True, name="read-ahead")
        thread.start()
        # Also before the interpreter is taken down: readers in C++ do not survive that.
        weakref.finalize(self, _end, self._ready, ended, thread)

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        began = time.perf_counter()
        item = self._ready.get()
        self._seconds += time.perf_counter() - began
        if isinstance(item, BaseException):
            self._ready.put(item)  # and again, if somebody asks again
            raise item
        return item

    def take_seconds(self) -> float:
        """Seconds waited since the last call."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds


def _fill(batches: Iterator[T], ready: "Queue[T | BaseException]", ended: threading.Event) -> None:
    try:
        for batch in batches:
            ready.put(batch)
            if ended.is_set():
                return
        ready.put(StopIteration())
    except BaseException as error:
        ready.put(error)


def _end(ready: Queue, ended: threading.Event, thread: threading.Thread) -> None:
    ended.set()
    while thread.is_alive():
        try:
            ready.get_nowait()  # a full queue would hold the thread
        except Empty:
            thread.join(0.05)
