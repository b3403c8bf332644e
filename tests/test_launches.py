"""Launches without Triton's path to them; the driver is stubbed, so that compiled kernels go nowhere."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest.mock import patch

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs
from triton.runtime import driver

from scalelong.bench import host
from scalelong.kernels import launches
from scalelong.kernels.launches import Kept, Launch, Plan, Slot, places, signature

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing")


class Pair(NamedTuple):
    a: Any
    b: Any


@triton.jit
def _flat_kernel(x_ptr, bias_ptr, y_ptr, num, BLOCK: tl.constexpr, ACT: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, mask=i < num)
    if bias_ptr is not None:
        x += tl.load(bias_ptr + i, mask=i < num)
    tl.store(y_ptr + i, x, mask=i < num)


@triton.jit
def _bundled_kernel(pair, y_ptr, num, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + i, tl.load(pair.a + i, mask=i < num) + pair.b, mask=i < num)


class StubbedDriver(host.StubbedDriver):
    """Notes launches, and calls their hooks as the real one does."""

    def __init__(self) -> None:
        super().__init__(self._launch)
        self.launches: list[tuple[Any, ...]] = []
        self.device = 0

    def _launch(self, *arguments: Any) -> None:
        enter, leave, metadata = arguments[7], arguments[8], arguments[6]
        if enter is not None:
            enter(metadata)
        self.launches.append(arguments)
        if leave is not None:
            leave(metadata)

    def get_current_stream(self, device: int) -> int:
        return self.stream + 100 * device


@pytest.fixture
def gpu() -> Iterator[StubbedDriver]:
    # Whoever asks for the active driver first would look for a GPU.
    before, stub = driver._active, StubbedDriver()
    driver.set_active(stub)  # type: ignore[arg-type]
    for kernel in (_flat_kernel, _bundled_kernel):
        kernel.device_caches.clear()
    yield stub
    driver._active = before


FLAT = Launch(_flat_kernel, 3, (Slot(0), Slot(1), Slot(2), 192), {"BLOCK": 64, "ACT": "silu"}, 4, {"num_stages": 2})


def zeros(*sizes: int) -> list[Tensor]:
    return [torch.zeros(size) for size in sizes]


def shown(arguments: tuple[Any, ...]) -> list[Any]:
    """Tensors by their addresses, tuples as tuples."""
    return [
        tuple(shown(x)) if isinstance(x, tuple) else x.data_ptr() if isinstance(x, Tensor) else x for x in arguments
    ]


@pytest.mark.parametrize("has_bias", [False, True])
def test_the_second_launch_is_what_triton_would_launch(gpu, has_bias):
    first, second = ([x, bias if has_bias else None, y] for x, bias, y in (zeros(192, 192, 192), zeros(192, 192, 192)))
    plan = Plan([FLAT])
    plan.run(first)
    FLAT.through_triton(second)
    with patch.object(triton.JITFunction, "run", side_effect=AssertionError("through Triton")):
        plan.run(second)
    _, expected, found = gpu.launches
    assert plan.is_compiled
    assert shown(found[9:]) == shown(expected[9:])
    assert found[:6] == expected[:6]
    assert found[:4] == (3, 1, 1, 11)
    assert found[-2:] == (64, "silu")


def test_tensors_inside_tuples_are_replaced(gpu):
    a, b, y = zeros(64, 64, 64)
    plan = Plan([Launch(_bundled_kernel, (1, 2), (Pair(Slot(0), 0.5), Slot(1), 64), {"BLOCK": 64}, 1)])
    plan.run((a, y))
    plan.run((b, y))
    first, second = gpu.launches
    assert first[:2] == second[:2] == (1, 2)
    assert shown(second[9:]) == [(b.data_ptr(), 0.5), y.data_ptr(), 64, 64]


def test_a_slot_starts_at_an_element(gpu):
    x, y = torch.zeros(256, dtype=torch.float64), torch.zeros(256)
    plan = Plan(
        [
            FLAT._replace(arguments=(Slot(0), None, Slot(1, 32), 192)),
            FLAT._replace(arguments=(Slot(0, 16), None, Slot(1), 192)),
        ]
    )
    for _ in range(2):
        plan.run((x, y))
    for pair in (gpu.launches[:2], gpu.launches[2:]):
        assert [shown(launch[9:13]) for launch in pair] == [
            [x.data_ptr(), None, y.data_ptr() + 32 * 4, 192],
            [x.data_ptr() + 16 * 8, None, y.data_ptr(), 192],
        ]


def test_a_launch_goes_to_the_current_stream(gpu):
    x, plan = torch.zeros(192), Plan([FLAT])
    plan.run((x, None, x))
    gpu.stream = 12
    plan.run((x, None, x))
    assert [launch[3] for launch in gpu.launches] == [11, 12]


def test_a_launch_goes_to_the_device_that_it_was_compiled_on(gpu):
    class Device:
        def __init__(self, index: int) -> None:
            self.index = index

        def __enter__(self) -> None:
            self.before, gpu.device = gpu.device, self.index

        def __exit__(self, *_: object) -> None:
            gpu.device = self.before

    x, plan = torch.zeros(192), Plan([FLAT])
    gpu.device = 1
    plan.run((x, None, x))
    gpu.device = 0
    with patch.object(torch.cuda, "device", Device):
        plan.run((x, None, x))
    assert [launch[3] for launch in gpu.launches] == [111, 111]
    assert gpu.device == 0


def test_hooks_see_each_launch(gpu):
    x, seen, plan = torch.zeros(192), [], Plan([FLAT])
    plan.run((x, None, x))
    before = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
    try:
        knobs.runtime.launch_enter_hook = lambda metadata: seen.append(metadata.get()["name"])  # type: ignore[assignment]
        knobs.runtime.launch_exit_hook = lambda metadata: seen.append("end")  # type: ignore[assignment]
        plan.run((x, None, x))
    finally:
        knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook = before
    plan.run((x, None, x))
    assert seen == ["_flat_kernel", "end"]
    assert gpu.launches[-1][6:9] == (None, None, None)


def test_what_is_recorded_instead_of_launched_stays_with_triton_until_it_is_compiled(gpu):
    x, plan = torch.zeros(192), Plan([FLAT])
    with patch.object(triton.JITFunction, "run", lambda *_, **__: None):
        plan.run((x, None, x))
    assert not plan.is_compiled
    plan.run((x, None, x))
    assert plan.is_compiled
    plan.run((x, None, x))
    assert len(gpu.launches) == 2


def test_no_tensor_is_kept(gpu):
    import gc
    import weakref

    x = torch.zeros(192)
    alive, plan = weakref.ref(x), Plan([FLAT])
    plan.run((x, None, x))
    plan.run((x, None, x))
    gpu.launches.clear()
    del x
    gc.collect()
    assert alive() is None
    assert plan.is_compiled


def test_what_triton_specialises_on_is_in_the_key():
    x = torch.zeros(4, 8)
    same = torch.zeros(4, 8)
    others = (x.t(), x[:2], x.double(), torch.zeros(33)[1:].view(4, 8), None)
    assert signature(x) == signature(same)
    assert len({signature(x), *map(signature, others)}) == 6


def test_what_hooks_on_saved_tensors_may_change_is_in_the_key_of_backward():
    x, matrix = torch.zeros(33), torch.zeros(4, 4)
    assert places((x, None, matrix)) == places((x.clone(), None, matrix.clone()))
    assert places((x[1:], None, matrix)) != places((x[:-1], None, matrix)) != places((x[:-1], matrix, None))
    assert places((matrix,)) != places((matrix.t(),))


def test_what_is_kept_does_not_grow_without_end(monkeypatch):
    monkeypatch.setattr(Kept, "MAX_KEPT", 2)
    kept = Kept()
    for key in range(5):
        assert kept.keep(key, key) == kept.get(key) == key
    assert len(kept._kept) <= 2


def test_a_plan_makes_its_launches_on_the_device_of_its_tensors(monkeypatch):
    order: list[Any] = []

    @contextmanager
    def current_device(x: Tensor) -> Iterator[None]:
        order.append(x)
        yield
        order.append("left")

    monkeypatch.setattr(launches, "current_device", current_device)
    monkeypatch.setattr(Launch, "through_triton", lambda launch, tensors: order.append(tensors))
    x = torch.zeros(8)
    Plan([FLAT]).run((None, x))
    assert order[0] is x
    assert order[1] == (None, x)
    assert order[2:] == ["left"]
