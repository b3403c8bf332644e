"""Launches without Triton's path to them; the driver is stubbed, so that compiled kernels go nowhere."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest.mock import patch

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from scalelong.kernels import plans
from scalelong.kernels.launches import Launch, Plans, prepare, signature

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


class StubbedDriver:
    """As triton.backends.nvidia.driver.CudaDriver, with launches that are noted."""

    def __init__(self) -> None:
        self.launches: list[tuple[Any, ...]] = []
        self.device, self.stream = 0, 11
        self.launcher_cls = lambda source, metadata: lambda *arguments: self._launch(*arguments)
        self.utils = SimpleNamespace(
            load_binary=lambda *_: (1, 2, 32, 0, 1024),
            get_device_properties=lambda _: {"max_shared_mem": 232448, "multiprocessor_count": 132, "warpSize": 32},
        )

    def _launch(self, *arguments: Any) -> None:
        enter, leave, metadata = arguments[7], arguments[8], arguments[6]
        if enter is not None:
            enter(metadata)
        self.launches.append(arguments)
        if leave is not None:
            leave(metadata)

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return self.stream + 100 * device

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


@pytest.fixture
def gpu() -> Iterator[StubbedDriver]:
    # Whoever asks for the active driver first would look for a GPU.
    before, stub = driver._active, StubbedDriver()
    driver.set_active(stub)  # type: ignore[arg-type]
    for kernel in (_flat_kernel, _bundled_kernel):
        kernel.device_caches.clear()
    yield stub
    driver._active = before


def flat_launch(x: Tensor, bias: Tensor | None, y: Tensor) -> Launch:
    constants = {"BLOCK": 64, "ACT": "silu"}
    return Launch(_flat_kernel, 3, (x, bias, y, x.numel()), constants, 4, {"num_stages": 2})


def shown(arguments: tuple[Any, ...]) -> list[Any]:
    """Tensors by their addresses, tuples as tuples."""
    return [
        tuple(shown(x)) if isinstance(x, tuple) else x.data_ptr() if isinstance(x, Tensor) else x for x in arguments
    ]


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("as_address", [False, True])
def test_the_second_launch_is_what_triton_would_launch(gpu, has_bias, as_address):
    first, second = ([torch.zeros(192) for _ in range(3)] for _ in range(2))

    def launch(x, bias, y):
        return flat_launch(x, bias if has_bias else None, y)

    prepared = prepare(launch(*first))
    launch(*second).through_triton()
    pointers = second if has_bias else (second[0], second[2])
    with patch.object(triton.JITFunction, "run", side_effect=AssertionError("through Triton")):
        prepared(*(x.data_ptr() if as_address else x for x in pointers))
    _, expected, found = gpu.launches
    assert prepared.takes_addresses
    assert shown(found[9:]) == shown(expected[9:])
    assert found[:6] == expected[:6]
    assert found[:4] == (3, 1, 1, 11)
    assert found[-2:] == (64, "silu")


def test_tensors_inside_tuples_are_replaced(gpu):
    a, b, y = (torch.zeros(64) for _ in range(3))
    prepared = prepare(Launch(_bundled_kernel, (1, 2), (Pair(a, 0.5), y, 64), {"BLOCK": 64}, 1))
    prepared(b, y)
    first, second = gpu.launches
    assert first[:2] == second[:2] == (1, 2)
    assert shown(second[9:]) == [(b.data_ptr(), 0.5), y.data_ptr(), 64, 64]


def test_a_launch_goes_to_the_current_stream(gpu):
    x = torch.zeros(192)
    prepared = prepare(flat_launch(x, None, x))
    gpu.stream = 12
    prepared(x, x)
    assert [launch[3] for launch in gpu.launches] == [11, 12]


def test_a_launch_goes_to_the_device_that_it_was_prepared_on(gpu):
    class Device:
        def __init__(self, index: int) -> None:
            self.index = index

        def __enter__(self) -> None:
            self.before, gpu.device = gpu.device, self.index

        def __exit__(self, *_: object) -> None:
            gpu.device = self.before

    x = torch.zeros(192)
    gpu.device = 1
    prepared = prepare(flat_launch(x, None, x))
    gpu.device = 0
    with patch.object(torch.cuda, "device", Device):
        prepared(x, x)
    assert [launch[3] for launch in gpu.launches] == [111, 111]
    assert gpu.device == 0


def test_hooks_see_each_launch(gpu):
    x, seen = torch.zeros(192), []
    prepared = prepare(flat_launch(x, None, x))
    before = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
    try:
        knobs.runtime.launch_enter_hook = lambda metadata: seen.append(metadata.get()["name"])  # type: ignore[assignment]
        knobs.runtime.launch_exit_hook = lambda metadata: seen.append("end")  # type: ignore[assignment]
        prepared(x, x)
    finally:
        knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook = before
    prepared(x, x)
    assert seen == ["_flat_kernel", "end"]
    assert gpu.launches[-1][6:9] == (None, None, None)


def test_what_is_recorded_instead_of_launched_stays_with_triton_until_it_is_compiled(gpu):
    x = torch.zeros(192)
    with patch.object(triton.JITFunction, "run", lambda *_, **__: None):
        prepared = prepare(flat_launch(x, None, x))
    assert not prepared.takes_addresses
    prepared(x, x)
    assert prepared.takes_addresses
    prepared(x, x)
    assert len(gpu.launches) == 2


def test_no_tensor_is_kept(gpu):
    import gc
    import weakref

    x = torch.zeros(192)
    alive = weakref.ref(x)
    prepared = prepare(flat_launch(x, None, x))
    gpu.launches.clear()
    del x
    gc.collect()
    assert alive() is None
    assert prepared.takes_addresses


def test_what_triton_specialises_on_is_in_the_key():
    x = torch.zeros(4, 8)
    same = torch.zeros(4, 8)
    others = (x.t(), x[:2], x.double(), torch.zeros(33)[1:].view(4, 8), None)
    assert signature(x) == signature(same)
    assert len({signature(x), *map(signature, others)}) == 6


def test_plans_launch_through_triton_once_for_each_signature(gpu):
    plans, made = Plans(), []

    def launch(x: Tensor, bias: Tensor | None, y: Tensor) -> None:
        tensors = (x, bias, y)
        plans.launch("flat", lambda: made.append(tensors) or flat_launch(*tensors), tensors)

    for _ in range(3):
        launch(torch.zeros(192), None, torch.zeros(192))
    assert len(made) == 1
    launch(torch.zeros(192), torch.zeros(192), torch.zeros(192))
    launch(torch.zeros(193)[1:], None, torch.zeros(192))  # no multiple of 16
    launch(torch.zeros(192).double(), None, torch.zeros(192))
    assert len(made) == 4
    assert len(gpu.launches) == 6


def test_plans_keep_no_launch_that_was_not_compiled(gpu):
    plans, x = Plans(), torch.zeros(192)
    with patch.object(triton.JITFunction, "run", lambda *_, **__: None):
        plans.launch("flat", lambda: flat_launch(x, None, x), (x, None, x))
    plans.launch("flat", lambda: flat_launch(x, None, x), (x, None, x))
    assert len(gpu.launches) == 1


def test_plans_do_not_grow_without_end(gpu, monkeypatch):
    monkeypatch.setattr(Plans, "MAX_KEPT", 2)
    plans, x = Plans(), torch.zeros(192)
    for key in range(5):
        plans.launch(key, lambda: flat_launch(x, None, x), (x, None, x))
    assert len(plans._kept) <= 2


def test_a_plan_makes_its_launches_on_the_device_of_its_tensors(monkeypatch):
    order: list[Any] = []

    @contextmanager
    def current_device(x: Tensor) -> Iterator[None]:
        order.append(x)
        yield
        order.append("left")

    monkeypatch.setattr(plans, "current_device", current_device)

    def prepare(launch: Launch) -> Any:
        order.append(launch.arguments)
        return SimpleNamespace(takes_addresses=False)

    monkeypatch.setattr(plans, "prepare", prepare)
    x = torch.zeros(8)
    launch = Launch(_flat_kernel, 1, (plans.Slot(1), None, plans.Slot(1, 2), 8), {"BLOCK": 64, "ACT": "silu"}, 4)
    plans.Plan([launch]).run((None, x))
    assert order[0] is x
    assert order[1][2].data_ptr() == x.data_ptr() + 8
    assert order[2:] == ["left"]
