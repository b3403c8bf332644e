"""Where the ranks of a run meet: a store that rank 0 keeps, and who is still awaited there."""

import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

from torch.distributed import DistError, PrefixStore, Store, TCPStore

from scalelong.train.errors import RankError, UserError
from scalelong.train.hosts.environment import Place

SECONDS_TO_SAY = 5.0
"""After which it is said who is awaited; then again after each time as long as the wait so far."""
SECONDS_TO_MEET = 1800.0
MOST_NAMED = 8


def meet(place: Place) -> Store:
    """Waits until every rank has come, and says for whom.

    Returns:
        The store, for a process group.

    Raises:
        UserError: the port is in use, a rank comes twice, or not in time.
    """
    store = PrefixStore(f"scalelong/start/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", connect(place))
    if store.add(_key(place.rank), 1) > 1:
        raise RankError(f"rank {place.rank} of {place.world_size} has been started twice")
    began, say_at = time.monotonic(), SECONDS_TO_SAY
    missing = list(range(place.world_size))
    while missing := [rank for rank in missing if not store.check([_key(rank)])]:
        waited = time.monotonic() - began
        if waited > SECONDS_TO_MEET:
            raise UserError(f"{name_ranks(missing, place)} did not come within {waited / 60:.0f} minutes")
        if waited > say_at and place.rank == 0:
            say(f"waiting for {name_ranks(missing, place)}")
            say_at = 2 * waited
        time.sleep(0.05)
    return store


def connect(place: Place) -> TCPStore:
    """The store, which rank 0 keeps, or torchrun itself."""
    keeps = place.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    timeout = timedelta(seconds=SECONDS_TO_MEET)
    address, port = place.master_addr, place.master_port
    assert port is not None
    if keeps and is_taken(port):
        raise RankError(f"port {port} of {socket.gethostname()} is in use: take another MASTER_PORT (--master-port)")
    try:
        with says_if_it_takes_long(f"rank {place.rank} waits for rank 0 at {address}:{port}"):
            return TCPStore(address, port, is_master=keeps, wait_for_workers=False, timeout=timeout)
    except DistError as error:
        cause = str(error).splitlines()[0]
        raise RankError(f"rank {place.rank} does not reach rank 0 at {address}:{port}: {cause}") from error


def is_taken(port: int) -> bool:
    """Whether another program listens on a port of this host."""
    with socket.socket() as s:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            s.bind(("", port))
        except OSError:
            return True
    return False


def name_ranks(ranks: list[int], place: Place) -> str:
    named = ", ".join(map(str, ranks[:MOST_NAMED])) + (", ..." if len(ranks) > MOST_NAMED else "")
    return f"{len(ranks)} of {place.world_size} ranks ({named}) at {place.master_addr}:{place.master_port}"


@contextmanager
def says_if_it_takes_long(message: str) -> Iterator[None]:
    timer = threading.Timer(SECONDS_TO_SAY, say, [message])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def _key(rank: int) -> str:
    return f"rank/{rank}"
