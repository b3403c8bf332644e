"""Signs of life between hosts, so that the loss of one ends the run within a minute on all of them.

A launcher notices processes that die, and ssh a host that is gone; but a host that was cut off is reached by neither,
and its processes would wait in a collective until that times out, after ten minutes or more. So the first process of
each host counts up a number in the store that rank 0 keeps, and looks whether the others still do.
"""

import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from scalelong.train.errors import EXIT_USER_ERROR, UserError
from scalelong.train.hosts.processes import Processes

BEAT_SECONDS = 5.0
LOST_SECONDS = 40.0
SECONDS_TO_NOTE = 5.0


class Heartbeat:
    """While entered, ends this process when another host gives no sign of life any more.

    Rank 0 watches the first process of every host; those watch rank 0. On one host nothing is done.

    Args:
        beat_seconds: between two signs.
        lost_seconds: without one, after which a host counts as lost.
        on_loss: what is done then, given the host's name.
    """

    def __init__(
        self,
        processes: Processes,
        *,
        beat_seconds: float = BEAT_SECONDS,
        lost_seconds: float = LOST_SECONDS,
        on_loss: Callable[[str, float], None] | None = None,
    ):
        self.rank, self.beat_seconds, self.lost_seconds = processes.rank, beat_seconds, lost_seconds
        self.on_loss = on_loss or end_process
        hosts = processes.gather((processes.local_rank, socket.gethostname()))
        leaders = {rank: name for rank, (local_rank, name) in enumerate(hosts) if local_rank == 0}
        takes_part = self.rank in leaders and len(leaders) > 1
        watched = (set(leaders) - {0}) if self.rank == 0 else {0}
        self.watched = {rank: leaders[rank] for rank in watched} if takes_part else {}
        self._counts: dict[int, int] = {}
        self._seen: dict[int, float] = {}
        self._ended = threading.Event()

    def __enter__(self) -> "Heartbeat":
        self._seen = dict.fromkeys(self.watched, time.monotonic())
        if self.watched:
            # Two threads: asking the store of a host that is gone takes as long as the network pleases.
            threading.Thread(target=self._beat, args=(connect_to_store(),), daemon=True).start()
            threading.Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()

    def _beat(self, store: Any) -> None:
        while not self._ended.wait(self.beat_seconds):
            try:
                store.add(_key(self.rank), 1)
                for rank in self.watched:
                    count = store.add(_key(rank), 0)
                    if count != self._counts.get(rank):
                        self._counts[rank], self._seen[rank] = count, time.monotonic()
            except RuntimeError:
                return  # the store has gone with its host; the other thread will notice

    def _watch(self) -> None:
        while True:
            before = time.monotonic()
            if self._ended.wait(self.beat_seconds):
                return
            now = time.monotonic()
            if now - before > 2 * self.beat_seconds:
                # This process itself stood still; it cannot tell what the others did.
                self._seen = dict.fromkeys(self._seen, now)
            for rank, seen in self._seen.items():
                if now - seen > self.lost_seconds and not self._ended.is_set():
                    self.on_loss(self.watched[rank], now - seen)
                    return


def connect_to_store() -> Any:
    """A connection of its own to the store that rank 0 keeps: the process group's would be blocked by ours."""
    from torch.distributed import TCPStore

    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return TCPStore(address, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=LOST_SECONDS))


def end_process(host: str, seconds: float, note: Callable[[UserError], None] | None = None) -> None:
    """At once, from whatever thread: the main one may wait in a collective.

    Args:
        note: is told why, before.
    """
    error = UserError(
        f"no sign of life from {host} for {seconds:.0f} s: the host or the network is down; "
        f"the same command goes on from the last checkpoint"
    )
    print(f"error: {error}", file=sys.stderr, flush=True)
    if note is not None:
        # On a thread of its own: the file system may have gone with the host.
        noting = threading.Thread(target=note, args=(error,), daemon=True)
        noting.start()
        noting.join(SECONDS_TO_NOTE)
    os._exit(EXIT_USER_ERROR)


def _key(rank: int) -> str:
    return f"scalelong/heartbeat/{rank}"
