"""Timing on a GPU, against one that counts its own milliseconds; and providers that fail."""

from contextlib import contextmanager, nullcontext

import pytest
import torch

from scalelong.bench import compare, replay, timing
from scalelong.bench.compare import Compiler, Provider, as_leaves, make_case
from scalelong.bench.timing import measure


class CountingGpu:
    """Stands for torch.cuda: work takes the milliseconds that it says; a graph takes again what was captured in it."""

    def __init__(self):
        self.ms, self.capturing, self.replays = 0.0, None, []

    def work(self, ms):
        if self.capturing is None:
            self.ms += ms
        else:
            self.capturing.ms += ms

    def install(self, monkeypatch):
        gpu = self

        class Graph:
            def __init__(self):
                self.ms = 0.0

            def replay(self):
                gpu.ms += self.ms
                gpu.replays.append(self)

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                self.ms = gpu.ms

            def elapsed_time(self, end):
                return end.ms - self.ms

        class Stream:
            def wait_stream(self, other):
                assert gpu.capturing is None

        @contextmanager
        def graph(captured, *, pool, stream):
            gpu.capturing = captured
            try:
                yield
            finally:
                gpu.capturing = None

        replacements = {
            "CUDAGraph": Graph,
            "Event": Event,
            "Stream": Stream,
            "graph": graph,
            "stream": lambda stream: nullcontext(),
            "device": lambda device: nullcontext(),
            "current_stream": Stream,
            "graph_pool_handle": object,
            "synchronize": lambda device=None: None,
            "reset_peak_memory_stats": lambda device: None,
            "memory_allocated": lambda device: 10,
            "max_memory_allocated": lambda device: 2_000_010,
        }
        for name, replacement in replacements.items():
            monkeypatch.setattr(torch.cuda, name, replacement)
        monkeypatch.setattr(timing, "make_flush", lambda device: lambda: self.work(5.0))
        return self


@pytest.fixture
def gpu(monkeypatch):
    return CountingGpu().install(monkeypatch)


def test_a_replay_is_timed_without_its_flush_and_its_setup(gpu):
    functions = {"forward": lambda: gpu.work(2.0), "backward": lambda x: gpu.work(x)}
    setups = {"backward": lambda: gpu.work(7.0) or (3.0,)}
    timings = measure(None, functions, device="cuda", setups=setups, min_rounds=4, max_seconds=0.0)
    assert (timings["forward"].ms_median, timings["backward"].ms_median) == (2.0, 3.0)
    assert timings["forward"].peak_mb == 2.0
    assert all(t.host_us is not None and t.host_us > 0 for t in timings.values())
    # A round: the flush alone, forward, and backward behind its setup.
    assert len(gpu.replays) == 4 * (1 + 4)


def test_calls_that_are_not_to_be_replayed_are_timed_as_they_are(gpu):
    functions = {"step": lambda: gpu.work(2.0), "step-graph": lambda: gpu.work(1.5)}
    timings = measure(None, functions, device="cuda", graphs=["step-graph"], min_rounds=3, max_seconds=0.0)
    assert (timings["step"].ms_median, timings["step-graph"].ms_median) == (2.0, 1.5)


def test_a_call_that_cannot_be_captured_costs_its_own_figures_alone(gpu):
    def synchronises():
        if gpu.capturing is not None:
            raise RuntimeError("operation not permitted when stream is capturing\nand more")

    failures = {}
    functions = {"eager": lambda: gpu.work(1.0), "synchronises": synchronises}
    timings = measure(None, functions, device="cuda", failures=failures, max_seconds=0.0)
    assert list(timings) == ["eager"]
    assert failures == {"synchronises": "RuntimeError: operation not permitted when stream is capturing"}


def test_without_anyone_to_note_it_an_error_is_raised():
    def fails():
        raise ZeroDivisionError("of its own")

    with pytest.raises(ZeroDivisionError):
        measure(None, {"fails": fails}, device="cpu")


def test_flushing_reads_more_than_any_cache_holds(monkeypatch):
    monkeypatch.setattr(replay, "FLUSH_BYTES", 4096)
    flush = replay.make_flush(torch.device("cpu"))
    assert flush() == 0  # type: ignore[comparison-overlap]


def double(x):
    return 2 * x


def test_a_provider_that_fails_has_a_row_that_says_why_and_the_others_have_theirs(monkeypatch):
    def broken(x):
        raise RuntimeError("no kernel image is available\nfor execution")

    monkeypatch.setattr(compare, "COPY_BYTES", 4096)
    monkeypatch.setattr(compare, "MAX_SECONDS", 0.0)
    inputs = (torch.randn(8),)
    others = {"broken": Provider(broken, as_leaves(inputs))}
    # 0.5 % off is beyond the budget.
    case = make_case("double", "8", ref=double, ours=lambda x: 2.01 * x, inputs=inputs, others=others, compilers={})
    rows = {row.provider: row for row in compare.compare(None, case, "backward")}
    assert rows["eager"].ms_median > 0
    assert rows["eager"].error == ""
    assert rows["broken"].error == "RuntimeError: no kernel image is available"
    assert rows["ours"].error.startswith("AssertionError: output: error")


def test_a_compiled_output_is_pinned_to_its_layout(monkeypatch):
    monkeypatch.setattr(compare, "IS_DRY_RUN", True)  # compiles nothing
    pinned = Compiler(memory_format=torch.channels_last)(lambda x: x.contiguous() * 2)
    x = torch.randn(2, 3, 4, 5)
    assert pinned(x).is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(pinned(x), x * 2)


def test_options_that_this_torch_does_not_have_are_named():
    assert Compiler(options={"no_such_option": 1}).unknown_options() == ["no_such_option"]
    assert Compiler(options={"loop_ordering_after_fusion": False}).unknown_options() == []
