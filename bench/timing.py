"""Times several functions interleaved in one process, so that noise falls on all alike.

On a GPU: events, with the L2 cache emptied before each call. On a CPU: the wall clock, with caches as the calls leave
them and with freed memory kept by the allocator, for all functions alike.
"""

import random
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

from scalelong.train.host_memory import keep_freed_memory

if TYPE_CHECKING:
    from pytest_benchmark.fixture import BenchmarkFixture

Function = Callable[..., object]
Setup = Callable[[], tuple]

NUM_WARM_UP_ROUNDS = 3
NUM_SHOWN_ROUNDS = 5
MAX_ROUNDS = 1000
# Several times the L2 of an H200; triton.testing.do_bench takes the same.
FLUSH_BYTES = 256 * 2**20


@dataclass(frozen=True, kw_only=True)
class Timing:
    ms_median: float
    ms_p20: float
    ms_p80: float
    peak_mb: float | None = None


def measure(
    benchmark: "BenchmarkFixture | None",
    functions: Mapping[str, Function],
    *,
    device: torch.device | str,
    setups: Mapping[str, Setup] | None = None,
    min_rounds: int = 10,
    max_seconds: float = 1.0,
) -> dict[str, Timing]:
    """Calls each function once a round, in a new order each round.

    Args:
        benchmark: the fixture of pytest-benchmark. It times one function a test: the last one, a few times more.
        functions: by provider.
        setups: by provider; runs untimed before each call of the function and returns its arguments.
        min_rounds: are run even where they take longer than ``max_seconds``.

    Returns:
        By provider, the quantiles over the rounds and the memory that one call takes at its peak beyond what was
        taken before it (MB of 10^6 bytes).
    """
    device = torch.device(device)
    on_gpu = device.type == "cuda"
    if not on_gpu:
        _keep_freed_memory_once()
    calls = [_Call(name, function, (setups or {}).get(name, tuple)) for name, function in functions.items()]
    num_rounds = max(min_rounds, min(MAX_ROUNDS, int(max_seconds / _warm_up(calls, device))))
    samples_ms = (_sample_on_gpu if on_gpu else _sample_on_cpu)(_interleaved(calls, num_rounds), device)
    peaks_mb = {call.name: peak_bytes(call.function, call.setup(), device) / 1e6 for call in calls}
    timings = {call.name: summarise(samples_ms[call.name], peaks_mb[call.name]) for call in calls}
    if benchmark is not None:
        _show(benchmark, calls[-1], timings, device)
    return timings


def summarise(samples_ms: Sequence[float], peak_mb: float | None = None) -> Timing:
    p20, median, p80 = (float(q) for q in np.percentile(samples_ms, [20, 50, 80]))
    return Timing(ms_median=median, ms_p20=p20, ms_p80=p80, peak_mb=peak_mb)


def peak_bytes(function: Function, arguments: tuple, device: torch.device | str) -> int:
    """What torch's allocator holds at the peak of one call, beyond what it held before."""
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function(*arguments)
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function(*arguments)
    results: Any = profiler.profiler.kineto_results  # type: ignore[union-attr]
    events = [event for event in results.events() if event.name() == "[memory]"]
    changes = (event.nbytes() for event in sorted(events, key=lambda event: event.start_ns()))
    return max(accumulate(changes), default=0)


def copy_bandwidth(device: torch.device | str, nbytes: int) -> float:
    """GB/s (10^9 bytes, read and written) of copying ``nbytes``; take more than the caches hold."""
    source = torch.ones(nbytes, dtype=torch.uint8, device=device)  # ones: pages of zeros may share one real page
    target = torch.empty_like(source)
    timing = measure(None, {"copy": lambda: target.copy_(source)}, device=device, max_seconds=0.2)["copy"]
    return gb_per_s(2 * nbytes, timing.ms_median)


def gb_per_s(nbytes: int, ms: float) -> float:
    return nbytes / ms / 1e6


@dataclass(frozen=True)
class _Call:
    name: str
    function: Function
    setup: Setup


@cache
def _keep_freed_memory_once() -> None:
    keep_freed_memory()


def _warm_up(calls: Sequence[_Call], device: torch.device) -> float:
    """Seconds of the last round, setups included."""
    seconds = 0.0
    for _ in range(NUM_WARM_UP_ROUNDS):
        start = time.perf_counter()
        for call in calls:
            call.function(*call.setup())
        _synchronize(device)
        seconds = time.perf_counter() - start
    return seconds


def _interleaved(calls: Sequence[_Call], num_rounds: int) -> Iterator[_Call]:
    """Shuffled: in a fixed order each function would always find the caches as the same other one left them."""
    order = random.Random(0)
    for _ in range(num_rounds):
        yield from order.sample(calls, len(calls))


def _sample_on_cpu(calls: Iterable[_Call], device: torch.device) -> dict[str, list[float]]:
    samples_ms = defaultdict(list)
    for call in calls:
        arguments = call.setup()
        start = time.perf_counter()
        call.function(*arguments)
        samples_ms[call.name].append(1e3 * (time.perf_counter() - start))
    return samples_ms


def _sample_on_gpu(calls: Iterable[_Call], device: torch.device) -> dict[str, list[float]]:
    events = defaultdict(list)
    with torch.cuda.device(device):
        flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device)
        # Not synchronised in between, so that the host can run ahead and the GPU seldom waits for a launch.
        for call in calls:
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            arguments = call.setup()
            flush.zero_()
            start.record()
            call.function(*arguments)
            end.record()
            events[call.name].append((start, end))
        torch.cuda.synchronize(device)
    return {name: [start.elapsed_time(end) for start, end in pairs] for name, pairs in events.items()}


def _show(benchmark: "BenchmarkFixture", shown: _Call, timings: Mapping[str, Timing], device: torch.device) -> None:
    def synchronized(*arguments: object) -> None:
        shown.function(*arguments)
        _synchronize(device)

    benchmark.extra_info |= {f"{name}_ms_median": timing.ms_median for name, timing in timings.items()}
    benchmark.pedantic(synchronized, setup=lambda: (shown.setup(), {}), rounds=NUM_SHOWN_ROUNDS)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
