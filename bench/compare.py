"""The providers of one op against each other: parity first, then times, then rows.

forward runs as in training, on inputs that require gradients, so it also keeps what backward needs; backward has a
fresh forward before each call, untimed; both is a forward with its backward.
The floor of a direction, from which GB/s follow, is each tensor once: forward reads the inputs and writes the output,
backward reads the inputs and the output's gradient and writes the inputs' gradients, both is their sum.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch._dynamo.exc import BackendCompilerFailed
from torch._inductor.exc import GPUTooOldForTriton, TritonMissing

from scalelong.bench.record import Row, environment
from scalelong.bench.timing import Function, Setup, copy_bandwidth, gb_per_s, measure

if TYPE_CHECKING:
    from pytest_benchmark.fixture import BenchmarkFixture

Op = Callable[..., Tensor]

DIRECTIONS = ("forward", "backward", "both")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ON_GPU = DEVICE.type == "cuda"
DTYPE = torch.bfloat16 if ON_GPU else torch.float32
BATCH = 64 if ON_GPU else 2
# Beyond the last cache, and on a GPU beyond the cost of a launch.
COPY_BYTES = 2**29 if ON_GPU else 2**26
MAX_SECONDS = 0.5 if ON_GPU else 1.0


@dataclass(frozen=True)
class Case:
    """One op at one shape: its inputs, its providers, and a line for each provider that cannot run here."""

    op: str
    shape: str
    inputs: tuple[Tensor, ...]
    providers: dict[str, Op]
    notes: tuple[str, ...]


def make_case(op: str, shape: str, *, ref: Op, ours: Op, inputs: tuple[Tensor, ...]) -> Case:
    """``ref`` and ``ours`` take ``inputs``, all of which get gradients. AssertionError where ``ours`` fails parity."""
    assert_parity(ours, ref, inputs)
    leaves = tuple(x.detach().requires_grad_() for x in inputs)
    providers, notes = {"eager": ref}, ()
    try:
        providers["compile"] = _compiled(ref, leaves)
    except (BackendCompilerFailed, GPUTooOldForTriton, TritonMissing) as error:
        notes = (f"{op} {shape}: no 'compile', torch.compile failed: {str(error).splitlines()[0]}",)
    return Case(op, shape, leaves, providers | {"ours": ours}, notes)


def compare(benchmark: "BenchmarkFixture", case: Case, direction: str) -> list[Row]:
    """One row for each provider of ``case``; the copy that they are held against runs right before them."""
    copy_gb_per_s = copy_bandwidth(DEVICE, COPY_BYTES)
    with torch.no_grad():
        output = case.providers["eager"](*case.inputs)
    d_output = _gradient_of(output)
    functions = {name: _function(op, case.inputs, d_output, direction) for name, op in case.providers.items()}
    setups = {name: _setup(op, case.inputs, direction) for name, op in case.providers.items()}
    timings = measure(benchmark, functions, device=DEVICE, setups=setups, max_seconds=MAX_SECONDS)
    floor = floor_bytes(case.inputs, output, direction)
    return [
        Row(
            **environment(DEVICE),
            op=case.op,
            shape=case.shape,
            dtype=str(DTYPE).removeprefix("torch."),
            layout="contiguous",
            direction=direction,
            provider=name,
            ms_median=timing.ms_median,
            ms_p20=timing.ms_p20,
            ms_p80=timing.ms_p80,
            gb_per_s=gb_per_s(floor, timing.ms_median),
            percent_of_copy=100 * gb_per_s(floor, timing.ms_median) / copy_gb_per_s,
            peak_mb=timing.peak_mb,
        )
        for name, timing in timings.items()
    ]


def floor_bytes(inputs: tuple[Tensor, ...], output: Tensor, direction: str) -> int:
    num_input_bytes = sum(x.nbytes for x in inputs)
    forward, backward = num_input_bytes + output.nbytes, num_input_bytes + output.nbytes + num_input_bytes
    return {"forward": forward, "backward": backward, "both": forward + backward}[direction]


def assert_parity(ours: Op, ref: Op, inputs: tuple[Tensor, ...]) -> None:
    """Against ``ref`` in fp64, output and gradients of ``ours`` are at most twice as wrong as those of ``ref``."""
    truths = _output_and_gradients(ref, tuple(x.double() for x in inputs))
    plain, fused = _output_and_gradients(ref, inputs), _output_and_gradients(ours, inputs)
    names = ("output", *(f"gradient of input {i}" for i in range(len(inputs))))
    for name, truth, x, y in zip(names, truths, plain, fused, strict=True):
        # A few fp32 roundings of the largest entry, for where the reference happens to be exact.
        allowed = 2 * (x - truth).abs().max() + 4 * torch.finfo(torch.float32).eps * truth.abs().max()
        error = (y - truth).abs().max()
        assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}"


def _output_and_gradients(op: Op, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    leaves = tuple(x.detach().requires_grad_() for x in inputs)
    output = op(*leaves)
    return tuple(x.detach().double() for x in (output, *torch.autograd.grad(output, leaves, _gradient_of(output))))


def _function(op: Op, inputs: tuple[Tensor, ...], d_output: Tensor, direction: str) -> Function:
    """Takes what ``_setup`` returns."""
    if direction == "forward":
        return lambda: op(*inputs)
    if direction == "backward":
        return lambda output: torch.autograd.grad(output, inputs, d_output)
    return lambda: torch.autograd.grad(op(*inputs), inputs, d_output)


def _setup(op: Op, inputs: tuple[Tensor, ...], direction: str) -> Setup:
    return (lambda: (op(*inputs),)) if direction == "backward" else tuple


def _compiled(ref: Op, inputs: tuple[Tensor, ...]) -> Op:
    compiled = torch.compile(ref, fullgraph=True, dynamic=False)
    # Forward and backward each compile at their first call.
    output = compiled(*inputs)
    torch.autograd.grad(output, inputs, _gradient_of(output))
    return compiled


def _gradient_of(output: Tensor) -> Tensor:
    """Drawn in bf16, so that every dtype is sent back the same numbers."""
    generator = torch.Generator(output.device).manual_seed(1)
    return torch.randn(output.shape, generator=generator, dtype=torch.bfloat16, device=output.device).to(output.dtype)
