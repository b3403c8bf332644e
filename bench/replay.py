"""One call of a function, timed on a GPU: as it is called, or replayed from a CUDA graph so that no host time shows.

L2 is emptied before each call by reading: lines that were written would still go to memory while the function runs.
"""

from collections.abc import Callable
from functools import partial
from typing import Protocol

import torch

# Several times the L2 of an H200; triton.testing.do_bench takes the same.
FLUSH_BYTES = 256 * 2**20

Function = Callable[..., object]
Setup = Callable[[], tuple]
Flush = Callable[[], object]
Milliseconds = Callable[[], float]


class Timed(Protocol):
    def sample(self) -> Milliseconds:
        """Calls once; what is returned gives the milliseconds, on a GPU once it is synchronised."""
        ...


def make_flush(device: torch.device) -> Flush:
    memory, total = torch.zeros(FLUSH_BYTES // 4, device=device), torch.zeros((), device=device)
    return partial(torch.sum, memory, 0, out=total)


class Called:
    """As it is called: where the GPU waits for the host, that shows."""

    def __init__(self, function: Function, setup: Setup, flush: Flush):
        self.function, self.setup, self.flush = function, setup, flush

    def sample(self) -> Milliseconds:
        arguments = self.setup()
        self.flush()
        return _between_events(lambda: self.function(*arguments))


class Replayed:
    """Two graphs: the setup, replayed untimed, and behind a flush the function. The caller takes the flush off.

    They share their memory, as the graphs of a forward and its backward must. Not synchronised in between, so that the
    host runs ahead.
    """

    def __init__(self, function: Function, setup: Setup, flush: Flush):
        stream, pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # handles and workspaces of this stream must be there before
            function(*setup())
        torch.cuda.synchronize()
        self.setup = None if setup is tuple else torch.cuda.CUDAGraph()
        arguments = ()
        if self.setup is not None:
            with torch.cuda.graph(self.setup, pool=pool, stream=stream):
                arguments = setup()
        self.function = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.function, pool=pool, stream=stream):
            flush()
            function(*arguments)
        self.arguments = arguments  # a replay reads them

    def sample(self) -> Milliseconds:
        if self.setup is not None:
            self.setup.replay()
        return _between_events(self.function.replay)


def _between_events(call: Callable[[], object]) -> Milliseconds:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    call()
    end.record()
    return partial(start.elapsed_time, end)
