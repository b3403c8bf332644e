"""What a call of an operator costs the host (``python -m scalelong.bench.host``; no GPU is needed).

A stubbed driver makes launches free: what is left is Python, autograd and allocations, on CPU tensors of tiny shapes.
A bare ``autograd.Function`` with the same inputs, output and gradients runs in turn with each operator, in one process:
what an operator takes beyond it is its own.
"""

import os
from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import count
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import torch
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from scalelong.bench.record import Row, append_rows, environment
from scalelong.bench.timing import Function, Timing, measure
from scalelong.kernels import add_layer_norm_triton, backend, gelu_linear_triton, group_norm_triton, skip_linear_triton
from scalelong.kernels.add_layer_norm import add_layer_norm
from scalelong.kernels.attention import attention
from scalelong.kernels.gelu_linear import gelu_linear
from scalelong.kernels.group_norm import skip_group_norm
from scalelong.kernels.skip_linear import skip_linear

if TYPE_CHECKING:
    from pytest_benchmark.fixture import BenchmarkFixture

Op = Callable[..., Tensor | tuple[Tensor, ...]]

NO_GRAD = "forward-no-grad"
DIRECTIONS = (NO_GRAD, "forward", "both")
CALLS = 5  # in a row to a sample, which is short enough for few to be interrupted
SCALES = ("float", "tensor")
PROVIDERS = {"bare": "host-bare", "ours": "host"}  # in rows, where "ours" is held against eager and compile
# What keeps plans, made for the driver that was active.
_PLANNERS = (add_layer_norm_triton, gelu_linear_triton, group_norm_triton, skip_linear_triton)
_DEVICES = count(1000)


class StubbedDriver:
    """Stands in for Triton's driver of a GPU of compute capability 9.0; ``launch`` is called instead of it."""

    def __init__(self, launch: Callable[..., None] = lambda *_: None) -> None:
        # A number that no GPU and no other stub has: by it Triton keeps compiled kernels and what launches them.
        self.device, self.stream = next(_DEVICES), 11
        self.launcher_cls = lambda source, metadata: launch
        self.utils = SimpleNamespace(
            load_binary=lambda *_: (1, 2, 32, 0, 1024),
            get_device_properties=lambda _: {"max_shared_mem": 232448, "multiprocessor_count": 132, "warpSize": 32},
        )

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return self.stream

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


@contextmanager
def stubbed_launches(launch: Callable[..., None] = lambda *_: None) -> Iterator[None]:
    """Inside, operators on CPU tensors take their Triton kernels, which are compiled but go nowhere.

    Raises:
        RuntimeError: Triton interprets its kernels.
    """
    if backend._interprets:
        raise RuntimeError("with TRITON_INTERPRET=1 there are no launches; unset it")
    before: Any = driver._active  # not driver.active, which would look for a GPU
    driver.set_active(StubbedDriver(launch))  # type: ignore[arg-type]
    patches = [patch.object(backend, "_interprets", True)]
    patches += [patch.object(module, "_plans", type(module._plans)()) for module in _PLANNERS]
    try:
        for each in patches:
            each.start()
        yield
    finally:
        for each in reversed(patches):
            each.stop()
        driver._active = before


@dataclass(frozen=True)
class Case:
    """An operator and inputs that require gradients."""

    op: str
    shape: str
    layout: str
    call: Op
    inputs: tuple[Tensor, ...]


def make_cases() -> dict[str, Case]:
    cases = {}
    for scale in SCALES:
        cases[f"resident-{scale}"] = _group_norm_case(scale, size=8, channels_last=False)
        cases[f"split-{scale}"] = _group_norm_case(scale, size=32, channels_last=True)
        cases[f"skip_linear-{scale}"] = _skip_linear_case(scale)
    norm = (*_inputs((2, 4, 64), (2, 4, 64)), *_inputs((64,), (64,), dtype=torch.float32))
    cases["add_layer_norm"] = Case("add_layer_norm", "B=2 T=4 D=64", "contiguous", add_layer_norm, norm)
    # Their products run, and here those of 16 bits take milliseconds.
    x, weight, bias = _inputs((2, 4, 64), (32, 64), (32,), dtype=torch.float32)
    cases["gelu_linear"] = Case("gelu_linear", "B=2 T=4 D=64 O=32", "contiguous", gelu_linear, (x, weight, bias))
    qkv = _inputs((2, 4, 192), dtype=torch.float32)
    cases["attention"] = Case("attention", "B=2 T=4 D=64 H=2", "contiguous", lambda qkv: attention(qkv, 2), (*qkv,))
    return cases


def _group_norm_case(scale: str, size: int, channels_last: bool) -> Case:
    h, s = _inputs((2, 32, size, size), (2, 32, size, size))
    weight, bias = _inputs((64,), (64,), dtype=torch.float32)  # as under autocast
    if channels_last:
        h, s = (x.detach().to(memory_format=torch.channels_last).requires_grad_() for x in (h, s))
    shape = f"N=2 C=32+32 HW={size}x{size} scale={scale}"
    layout = "channels_last" if channels_last else "contiguous"
    if scale == "float":
        return Case(
            "skip_group_norm",
            shape,
            layout,
            lambda h, s, *rest: skip_group_norm(h, s, 0.7, 32, *rest),
            (h, s, weight, bias),
        )
    inputs = (h, s, *_inputs((), dtype=torch.float32), weight, bias)
    return Case(
        "skip_group_norm", shape, layout, lambda h, s, scale, *rest: skip_group_norm(h, s, scale, 32, *rest), inputs
    )


def _skip_linear_case(scale: str) -> Case:
    x, s, weight, bias = _inputs((2, 4, 32), (2, 4, 32), (32, 64), (32,))
    shape = f"B=2 T=4 D=32 scale={scale}"
    if scale == "float":
        return Case(
            "skip_linear", shape, "contiguous", lambda x, s, *rest: skip_linear(x, s, 0.7, *rest), (x, s, weight, bias)
        )
    inputs = (x, s, *_inputs((2, 4, 1)), weight, bias)
    return Case("skip_linear", shape, "contiguous", skip_linear, inputs)


def _inputs(*shapes: tuple[int, ...], dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    return [torch.zeros(shape, dtype=dtype, requires_grad=True) for shape in shapes]


def time_case(case: Case, direction: str, benchmark: "BenchmarkFixture | None" = None) -> dict[str, Timing]:
    """By provider, "bare" and "ours", what one call takes; inside ``stubbed_launches``."""
    providers = {"bare": _bare(case), "ours": case.call}
    functions = {name: partial(_in_a_row, _function(op, case.inputs, direction)) for name, op in providers.items()}
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # threads that wait for one another would be all of gelu_linear's time
    try:
        timings = measure(benchmark, functions, device="cpu", min_rounds=50, max_seconds=0.5, peak=False)
    finally:
        torch.set_num_threads(num_threads)
    return {name: _of_one_call(timing) for name, timing in timings.items()}


def _bare(case: Case) -> Op:
    """An ``autograd.Function`` that keeps its inputs and allocates its outputs and its gradients."""
    like = [y.detach() for y in _outputs(case.call, case.inputs)]

    class Bare(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Tensor) -> Any:
            ctx.save_for_backward(*inputs)
            return torch.empty_like(like[0]) if len(like) == 1 else tuple(torch.empty_like(y) for y in like)

        @staticmethod
        def backward(ctx: Any, *dy: Tensor) -> Any:
            return tuple(torch.empty_like(x) for x in ctx.saved_tensors)

    return Bare.apply  # type: ignore[return-value]


def _function(op: Op, inputs: tuple[Tensor, ...], direction: str) -> Function:
    if direction == "both":
        return forward_and_backward(op, inputs)
    return torch.no_grad()(lambda: op(*inputs)) if direction == NO_GRAD else lambda: op(*inputs)


def forward_and_backward(op: Op, inputs: tuple[Tensor, ...]) -> Callable[[], tuple[Tensor, ...]]:
    dy = [torch.zeros_like(y) for y in _outputs(op, inputs)]
    return lambda: torch.autograd.grad(op(*inputs), inputs, dy)


def _outputs(op: Op, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    outputs = op(*inputs)
    return (outputs,) if isinstance(outputs, Tensor) else outputs


def _in_a_row(function: Function) -> None:
    for _ in range(CALLS):
        function()


def _of_one_call(timing: Timing) -> Timing:
    return Timing(
        ms_median=timing.ms_median / CALLS, ms_p20=timing.ms_p20 / CALLS, ms_p80=timing.ms_p80 / CALLS, peak_mb=None
    )


def rows_of(case: Case, direction: str, timings: dict[str, Timing]) -> list[Row]:
    return [
        Row(
            **environment("cpu"),
            op=case.op,
            shape=case.shape,
            dtype=str(case.inputs[0].dtype).removeprefix("torch."),
            layout=case.layout,
            direction=direction,
            provider=PROVIDERS[name],
            ms_median=timing.ms_median,
            ms_p20=timing.ms_p20,
            ms_p80=timing.ms_p80,
            gb_per_s=None,
            percent_of_copy=None,
            peak_mb=None,
        )
        for name, timing in timings.items()
    ]


def beyond_bare_us(timings: dict[str, Timing]) -> float:
    return 1e3 * (timings["ours"].ms_median - timings["bare"].ms_median)


def main(only: Container[str] | None = None, directions: Sequence[str] = DIRECTIONS) -> None:
    """Prints a table, and last what GroupNorm takes beyond a bare Function; SCALELONG_RECORD=1 keeps the rows."""
    beyond_us, rows = {}, []
    print("us of a call, medians (20 to 80 %), beside a bare autograd.Function")
    with stubbed_launches():
        for name, case in make_cases().items():
            if only is not None and name not in only:
                continue
            for direction in directions:
                timings = time_case(case, direction)
                beyond_us[name, direction] = beyond_bare_us(timings)
                rows += rows_of(case, direction, timings)
                shown = "".join(f"{provider:>8s}{_shown(timing):>18s}" for provider, timing in timings.items())
                print(f"{name:20s}{direction:18s}{shown}  beyond{beyond_us[name, direction]:7.1f}", flush=True)
    if os.environ.get("SCALELONG_RECORD") == "1":
        append_rows(rows)
    resident, split = (beyond_us[f"{form}-float", "both"] for form in ("resident", "split"))
    print(f"forward + backward beyond a bare autograd.Function: resident {resident:.0f} us, split {split:.0f} us")


def _shown(timing: Timing) -> str:
    return f"{1e3 * timing.ms_median:.1f} ({1e3 * timing.ms_p20:.0f}-{1e3 * timing.ms_p80:.0f})"


if __name__ == "__main__":
    main()
