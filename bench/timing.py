"""Times several functions interleaved in one process, so that noise falls on all alike.

On a GPU: replays of CUDA graphs (replay.py), each begun with L2 emptied; what emptying takes, measured in the same
rounds, is taken off, and what a call takes on the host is a figure of its own. On a CPU: the wall clock, with caches as
the calls leave them and with freed memory kept by the allocator, for all functions alike.
"""

import os
import random
import time
from collections import defaultdict
from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

from scalelong.bench.replay import Called, Flush, Function, Milliseconds, Replayed, Setup, Timed, make_flush
from scalelong.train.hosts.host_memory import keep_freed_memory

if TYPE_CHECKING:
    from pytest_benchmark.fixture import BenchmarkFixture

IS_DRY_RUN = os.environ.get("SCALELONG_DRY_RUN") == "1"
NUM_WARM_UP_ROUNDS = 1 if IS_DRY_RUN else 3
MIN_ROUNDS = 1 if IS_DRY_RUN else 10
MAX_ROUNDS = 1 if IS_DRY_RUN else 1000
NUM_SHOWN_ROUNDS = 1 if IS_DRY_RUN else 5
NUM_HOST_CALLS = 5
KINETO_SILENT = "6"  # above all its levels: the profiler notes on stderr when it starts and when it stops
FLUSH = "flush"


@dataclass(frozen=True, kw_only=True)
class Timing:
    ms_median: float
    ms_p20: float
    ms_p80: float
    peak_mb: float | None = None
    host_us: float | None = None


def measure(
    benchmark: "BenchmarkFixture | None",
    functions: Mapping[str, Function],
    *,
    device: torch.device | str,
    setups: Mapping[str, Setup] | None = None,
    min_rounds: int = MIN_ROUNDS,
    max_seconds: float = 1.0,
    graphs: Container[str] | None = None,
    failures: dict[str, str] | None = None,
    peak: bool = True,
) -> dict[str, Timing]:
    """Calls each function once a round, in a new order each round.

    Args:
        benchmark: the fixture of pytest-benchmark. It times one function a test: the last one, a few times more.
        functions: by provider.
        setups: by provider; runs untimed before each call of the function and returns its arguments.
        min_rounds: are run even where they take longer than ``max_seconds``.
        graphs: the providers that a GPU replays from CUDA graphs; None: all.
        failures: takes, by provider, the first line of what a function raises, which then has no timing. Without it
            the function's error is raised.
        peak: whether to measure memory, by one more call.

    Returns:
        By provider, the quantiles over the rounds, the memory that one call takes at its peak beyond what was taken
        before it (MB of 10^6 bytes), and on a GPU what one call takes on the host (us).
    """
    device = torch.device(device)
    on_gpu = device.type == "cuda"
    if not on_gpu:
        _keep_freed_memory_once()
    calls = {name: _Call(function, (setups or {}).get(name, tuple)) for name, function in functions.items()}
    noted = _Failures(failures)
    with torch.cuda.device(device) if on_gpu else nullcontext():
        for _ in range(NUM_WARM_UP_ROUNDS):
            for name in noted.without(calls):
                with noted(name):
                    calls[name].function(*calls[name].setup())
        timed = _timed_on_gpu(calls, graphs, noted, device) if on_gpu else dict(calls)
        samples_ms = _sample(timed, noted, device, min_rounds, max_seconds)
        timings: dict[str, Timing] = {}
        for name in noted.without(calls):
            with noted(name):
                peak_mb = peak_bytes(calls[name].function, calls[name].setup(), device) / 1e6 if peak else None
                timings[name] = summarise(samples_ms[name], peak_mb, _host_us(calls[name]) if on_gpu else None)
    if benchmark is not None and timings:
        _show(benchmark, calls[list(timings)[-1]], timings, device)
    return timings


def summarise(samples_ms: Sequence[float], peak_mb: float | None = None, host_us: float | None = None) -> Timing:
    p20, p50, p80 = (float(q) for q in np.percentile(samples_ms, [20, 50, 80]))
    return Timing(ms_median=p50, ms_p20=p20, ms_p80=p80, peak_mb=peak_mb, host_us=host_us)


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
    os.environ.setdefault("KINETO_LOG_LEVEL", KINETO_SILENT)
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
    max_seconds = 0.2 if source.device.type == "cpu" else 0.02
    timing = measure(None, {"copy": lambda: target.copy_(source)}, device=device, max_seconds=max_seconds)["copy"]
    return gb_per_s(2 * nbytes, timing.ms_median)


def gb_per_s(nbytes: int, ms: float) -> float:
    return nbytes / ms / 1e6


def first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


@dataclass(frozen=True)
class _Call:
    function: Function
    setup: Setup

    def sample(self) -> Milliseconds:
        arguments = self.setup()
        start = time.perf_counter()
        self.function(*arguments)
        ms = 1e3 * (time.perf_counter() - start)
        return lambda: ms


class _Failures:
    """Notes what a provider raises, or lets it pass where nobody takes notes."""

    def __init__(self, notes: dict[str, str] | None):
        self.notes = notes

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            if self.notes is None:
                raise
            self.notes[name] = first_line(error)

    def without(self, names: Mapping[str, Any]) -> list[str]:
        return [name for name in names if name not in (self.notes or {})]


@cache
def _keep_freed_memory_once() -> None:
    keep_freed_memory()


def _timed_on_gpu(
    calls: Mapping[str, _Call], graphs: Container[str] | None, noted: _Failures, device: torch.device
) -> dict[str, Timed]:
    flush: Flush = make_flush(device)
    timed: dict[str, Timed] = {FLUSH: Replayed(lambda: None, tuple, flush)}
    for name in noted.without(calls):
        kind = Replayed if graphs is None or name in graphs else Called
        with noted(name):
            timed[name] = kind(calls[name].function, calls[name].setup, flush)
    return timed


def _sample(
    timed: Mapping[str, Timed], noted: _Failures, device: torch.device, min_rounds: int, max_seconds: float
) -> dict[str, list[float]]:
    """Shuffled: in a fixed order each function would always find the caches as the same other one left them."""
    order, samples = random.Random(0), defaultdict(list)

    def one_round() -> None:
        for name in order.sample(names := noted.without(timed), len(names)):
            with noted(name):
                samples[name].append(timed[name].sample())

    start = time.perf_counter()
    one_round()
    _synchronize(device)
    seconds = time.perf_counter() - start
    samples.clear()
    for _ in range(max(min_rounds, min(MAX_ROUNDS, int(max_seconds / seconds)))):
        one_round()
    _synchronize(device)
    samples_ms = {name: [ms() for ms in of_name] for name, of_name in samples.items()}
    flush_ms = median(samples_ms.pop(FLUSH, [0.0]))
    for name, call in timed.items():
        if isinstance(call, Replayed) and name in samples_ms:
            samples_ms[name] = [max(0.0, ms - flush_ms) for ms in samples_ms[name]]
    return samples_ms


def _host_us(call: _Call) -> float:
    """Of a call that finds the GPU idle, until its last launch is made."""
    seconds = []
    for _ in range(NUM_HOST_CALLS):
        arguments = call.setup()
        torch.cuda.synchronize()
        start = time.perf_counter()
        call.function(*arguments)
        seconds.append(time.perf_counter() - start)
    torch.cuda.synchronize()
    return 1e6 * median(seconds)


def _show(benchmark: "BenchmarkFixture", shown: _Call, timings: Mapping[str, Timing], device: torch.device) -> None:
    def synchronized(*arguments: object) -> None:
        shown.function(*arguments)
        _synchronize(device)

    benchmark.extra_info |= {f"{name}_ms_median": timing.ms_median for name, timing in timings.items()}
    benchmark.pedantic(synchronized, setup=lambda: (shown.setup(), {}), rounds=NUM_SHOWN_ROUNDS)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
