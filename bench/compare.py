"""The providers of one op against each other: parity first, then times, then rows.

forward runs as in training, on inputs that require gradients, so it also keeps what backward needs; backward has a
fresh forward before each call, untimed; both is a forward with its backward.
The floor of a direction, from which GB/s follow, is each tensor once: forward reads the inputs and writes the output,
backward reads the inputs and the output's gradient and writes the inputs' gradients, both is their sum. A copy, against
which they are held, counts what it reads and what it writes.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch._dynamo.exc import BackendCompilerFailed
from torch._inductor.exc import GPUTooOldForTriton, TritonMissing

from scalelong.bench.record import Row, environment
from scalelong.bench.timing import Function, Setup, copy_bandwidth, gb_per_s, measure

if TYPE_CHECKING:
    from pytest_benchmark.fixture import BenchmarkFixture

Op = Callable[..., Tensor]
# From inputs and true gradients to what rounding allows the gradients of some inputs, by index, beyond the budget.
Floors = Callable[[Sequence[Tensor], Sequence[Tensor]], Mapping[int, Tensor]]

DIRECTIONS = ("forward", "backward", "both")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ON_GPU = DEVICE.type == "cuda"
DTYPE = torch.bfloat16 if ON_GPU else torch.float32
BATCH = 64 if ON_GPU else 2
# Beyond the last cache, and on a GPU beyond the cost of a launch.
COPY_BYTES = 2**29 if ON_GPU else 2**26
MAX_SECONDS = 0.5 if ON_GPU else 1.0

# Ways to compile the reference, as arguments of torch.compile.
COMPILE: Mapping[str, dict[str, Any]] = {"compile": {}}
COMPILE_MAX_AUTOTUNE: Mapping[str, dict[str, Any]] = {"compile-max-autotune": {"mode": "max-autotune-no-cudagraphs"}}
# Inductor otherwise reads each input of a concatenation again, under a mask, in every kernel that follows.
COMPILE_POINTWISE_CAT_0: Mapping[str, dict[str, Any]] = {
    "compile-pointwise-cat-0": {"options": {"max_pointwise_cat_inputs": 0, "max_complex_pointwise_cat_inputs": 0}}
}


@dataclass(frozen=True)
class Provider:
    """``inputs`` require gradients; a provider may hold them in a layout or dtype of its own."""

    op: Op
    inputs: tuple[Tensor, ...]


@dataclass(frozen=True)
class Case:
    """One op at one shape: its providers, "eager" and "ours" among them, and a line for each that cannot run here."""

    op: str
    shape: str
    layout: str
    providers: dict[str, Provider]
    notes: tuple[str, ...]


def make_case(
    op: str,
    shape: str,
    *,
    ref: Op,
    ours: Op,
    inputs: tuple[Tensor, ...],
    layout: str = "contiguous",
    others: Mapping[str, Provider] | None = None,
    compilers: Mapping[str, dict[str, Any]] = COMPILE,
    floors: Floors | None = None,
) -> Case:
    """``ref`` and ``ours`` take ``inputs``, all of which get gradients. AssertionError where ``ours`` fails parity.

    What an earlier case compiled is forgotten: each shape compiles anew, and torch gives up after a few for one code.
    """
    assert_parity(ours, ref, inputs, floors)
    torch.compiler.reset()
    leaves = as_leaves(inputs)
    providers, notes = {"eager": Provider(ref, leaves), **(others or {})}, []
    for name, how in compilers.items():
        unknown = how.get("options", {}).keys() - set(torch._inductor.list_options())
        if unknown:
            notes.append(f"{op} {shape}: no {name!r}, this torch has no option {', '.join(sorted(unknown))}")
            continue
        try:
            providers[name] = Provider(_compiled(ref, leaves, how), leaves)
        except (BackendCompilerFailed, GPUTooOldForTriton, TritonMissing) as error:
            notes.append(f"{op} {shape}: no {name!r}, torch.compile failed: {str(error).splitlines()[0]}")
    return Case(op, shape, layout, {**providers, "ours": Provider(ours, leaves)}, tuple(notes))


def as_leaves(inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return tuple(x.detach().requires_grad_() for x in inputs)


def compare(benchmark: "BenchmarkFixture", case: Case, direction: str) -> list[Row]:
    """One row for each provider of ``case``; the copy that they are held against runs right before them."""
    copy_gb_per_s = copy_bandwidth(DEVICE, COPY_BYTES)
    functions = {name: _function(provider, direction) for name, provider in case.providers.items()}
    setups = {name: _setup(provider, direction) for name, provider in case.providers.items()}
    timings = measure(benchmark, functions, device=DEVICE, setups=setups, max_seconds=MAX_SECONDS)
    inputs = case.providers["ours"].inputs
    output = case.providers["ours"].op(*inputs).detach()
    floor = floor_bytes(inputs, output, direction)
    return [
        Row(
            **environment(DEVICE),
            op=case.op,
            shape=case.shape,
            dtype=str(inputs[0].dtype).removeprefix("torch."),
            layout=case.layout,
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


def kept_bytes(op: Op, inputs: Sequence[Tensor]) -> int:
    """What a forward keeps for its backward beyond ``inputs``; tensors that share memory count once."""
    storages: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        output = op(*inputs)  # alive, so that no memory is given out twice
    assert output.requires_grad
    return sum(nbytes for address, nbytes in storages.items() if address not in _addresses(inputs))


def kept_note(case: Case) -> str:
    """The bytes that each provider keeps for backward, in percent of the output."""
    ours = case.providers["ours"]
    output = ours.op(*ours.inputs).detach()
    percents = {name: 100 * kept_bytes(p.op, p.inputs) / output.nbytes for name, p in case.providers.items()}
    dtype = str(output.dtype).removeprefix("torch.")
    kept = ", ".join(f"{name} {percent:.3g} %" for name, percent in percents.items())
    return f"{case.op} {case.shape} {dtype} {case.layout}: kept for backward, of the output's bytes: {kept}"


def assert_parity(ours: Op, ref: Op, inputs: tuple[Tensor, ...], floors: Floors | None = None) -> None:
    """Against ``ref`` in fp64, ``ours`` is at most twice as wrong as ``ref``, and its gradients at most three times."""
    truths = _output_and_gradients(ref, tuple(x.double() for x in inputs))
    plain, fused = _output_and_gradients(ref, inputs), _output_and_gradients(ours, inputs)
    floor = floors(inputs, truths[1:]) if floors else {}
    for i, (truth, x, y) in enumerate(zip(truths, plain, fused, strict=True), start=-1):
        # A few fp32 roundings of the largest entry, for where the reference happens to be exact.
        allowed = (2 if i < 0 else 3) * (x - truth).abs().max() + 4 * torch.finfo(torch.float32).eps * truth.abs().max()
        allowed += floor.get(i, 0)
        error = (y - truth).abs().max()
        name = "output" if i < 0 else f"gradient of input {i}"
        assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}"


def _output_and_gradients(op: Op, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    leaves = as_leaves(inputs)
    output = op(*leaves)
    return tuple(x.detach().double() for x in (output, *torch.autograd.grad(output, leaves, _gradient_of(output))))


def _function(provider: Provider, direction: str) -> Function:
    """Takes what ``_setup`` returns."""
    op, inputs = provider.op, provider.inputs
    if direction == "forward":
        return lambda: op(*inputs)
    d_output = _gradient_of(op(*inputs).detach())
    if direction == "backward":
        return lambda output: torch.autograd.grad(output, inputs, d_output)
    return lambda: torch.autograd.grad(op(*inputs), inputs, d_output)


def _setup(provider: Provider, direction: str) -> Setup:
    return (lambda: (provider.op(*provider.inputs),)) if direction == "backward" else tuple


def _compiled(ref: Op, inputs: tuple[Tensor, ...], how: dict[str, Any]) -> Op:
    compiled = torch.compile(ref, fullgraph=True, dynamic=False, **how)
    # Forward and backward each compile at their first call.
    output = compiled(*inputs)
    torch.autograd.grad(output, inputs, _gradient_of(output))
    return compiled


def _gradient_of(output: Tensor) -> Tensor:
    """In the layout of ``output``; drawn in bf16, so that every dtype is sent back the same numbers."""
    generator = torch.Generator(output.device).manual_seed(1)
    drawn = torch.randn(output.shape, generator=generator, dtype=torch.bfloat16, device=output.device)
    return torch.empty_like(output, requires_grad=False).copy_(drawn)


def _addresses(tensors: Sequence[Tensor]) -> set[int]:
    return {x.untyped_storage().data_ptr() for x in tensors}
