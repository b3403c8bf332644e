"""The providers of one op against each other: parity first, then times, then rows.

A provider that fails, ours where it fails parity too, has a row that says why, and the others have theirs.
forward runs as in training, on inputs that require gradients, so it also keeps what backward needs; backward has a
fresh forward before each call, untimed; both is a forward with its backward.
The floor of a direction, from which GB/s follow, is each tensor once: forward reads the inputs and writes the output,
backward reads the inputs and the output's gradient and writes the inputs' gradients, both is their sum. A copy, against
which they are held, counts what it reads and what it writes.
"""

import os
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from scalelong.bench.record import Row, environment
from scalelong.bench.replay import Function, Setup
from scalelong.bench.timing import IS_DRY_RUN, copy_bandwidth, first_line, gb_per_s, measure

if TYPE_CHECKING:
    from pytest_benchmark.fixture import BenchmarkFixture

Op = Callable[..., Tensor]
# From inputs and true gradients to what rounding allows the gradients of some inputs, by index, beyond the budget.
Floors = Callable[[Sequence[Tensor], Sequence[Tensor]], Mapping[int, Tensor]]

DIRECTIONS = ("forward", "backward", "both")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# With SCALELONG_DRY_RUN=1 the plans are those of a GPU, at sizes that a CPU walks through in seconds.
ON_GPU = DEVICE.type == "cuda" or IS_DRY_RUN
DTYPE = torch.bfloat16 if ON_GPU else torch.float32
BATCH = 1 if IS_DRY_RUN else 64 if ON_GPU else 2
# Beyond the last cache, and on a GPU beyond the cost of a launch.
COPY_BYTES = 2**16 if IS_DRY_RUN else 2**29 if ON_GPU else 2**26
MAX_SECONDS = 0.15 if ON_GPU else 1.0


@dataclass(frozen=True)
class Compiler:
    """A way to compile the reference; with ``memory_format`` its output is pinned to that layout, as a network's is."""

    mode: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    memory_format: torch.memory_format | None = None

    def unknown_options(self) -> list[str]:
        return sorted(self.options.keys() - set(torch._inductor.list_options()))

    def __call__(self, ref: Op) -> Op:
        memory_format = self.memory_format

        def pinned(*inputs: Tensor) -> Tensor:
            output = ref(*inputs)
            return output if memory_format is None else output.contiguous(memory_format=memory_format)

        how: dict[str, Any] = {"mode": self.mode, "options": dict(self.options) or None}
        if IS_DRY_RUN:
            how = {"backend": "aot_eager"}
        return torch.compile(pinned, fullgraph=True, dynamic=False, **how)


COMPILE = {"compile": Compiler()}
# On a GPU the strongest: Inductor then fuses two of backward's kernels more. It leaves loops on a CPU as they are.
COMPILE_LOOPS = {
    "compile-loops-in-order": Compiler(options={"loop_ordering_after_fusion": False}),
    "compile-no-reindexing": Compiler(options={"loop_reindexing_after_fusion": False}),
}
# Alone, a compiled norm may hand over contiguous tensors for channels_last ones, which saves it a pass or two.
COMPILE_TO_CHANNELS_LAST = {"compile-to-channels-last": Compiler(memory_format=torch.channels_last)}
COMPILE_MAX_AUTOTUNE = {"compile-max-autotune": Compiler(mode="max-autotune-no-cudagraphs")}
# Inductor otherwise reads each input of a concatenation again, under a mask, in every kernel that follows.
COMPILE_POINTWISE_CAT_0 = {
    "compile-pointwise-cat-0": Compiler(options={"max_pointwise_cat_inputs": 0, "max_complex_pointwise_cat_inputs": 0})
}


@dataclass(frozen=True)
class Provider:
    """``inputs`` require gradients; a provider may hold them in a layout or dtype of its own."""

    op: Op
    inputs: tuple[Tensor, ...]


@dataclass(frozen=True)
class Case:
    """One op at one shape: its providers, "eager" and "ours" among them, and why others failed before they were timed.

    A note is a line on a provider that this machine cannot have.
    """

    op: str
    shape: str
    layout: str
    providers: dict[str, Provider]
    failures: dict[str, str]
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
    compilers: Mapping[str, Compiler] = COMPILE,
    floors: Floors | None = None,
    checked: Container[str] = ("ours",),
) -> Case:
    """``ref`` and ``ours`` take ``inputs``, all of which get gradients. Those ``checked`` must be within the budget.

    What an earlier case compiled is forgotten: each shape compiles anew, and torch gives up after a few for one code.
    """
    torch.compiler.reset()
    leaves = as_leaves(inputs)
    providers, failures, notes = {"eager": Provider(ref, leaves), **(others or {})}, {}, []
    for name, compiler in compilers.items():
        if unknown := compiler.unknown_options():
            notes.append(f"{op} {shape}: no {name!r}, this torch has no option {', '.join(unknown)}")
            continue
        providers[name] = Provider(compiler(ref), leaves)
    providers["ours"] = Provider(ours, leaves)
    for name, provider in providers.items():
        try:
            _run_once(provider)
            if name in checked:
                assert_parity(provider.op, ref, inputs, floors)
        except Exception as error:
            failures[name] = first_line(error)
    return Case(op, shape, layout, providers, failures, tuple(notes))


def as_leaves(inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return tuple(x.detach().requires_grad_() for x in inputs)


def compare(benchmark: "BenchmarkFixture | None", case: Case, direction: str) -> list[Row]:
    """One row for each provider of ``case``; the copy that they are held against runs right before them."""
    copy_gb_per_s = copy_bandwidth(DEVICE, COPY_BYTES)
    failures = dict(case.failures)
    able = {name: provider for name, provider in case.providers.items() if name not in failures}
    functions = {name: _function(provider, direction) for name, provider in able.items()}
    setups = {name: _setup(provider, direction) for name, provider in able.items()}
    timings = measure(benchmark, functions, device=DEVICE, setups=setups, max_seconds=MAX_SECONDS, failures=failures)
    inputs = case.providers["ours"].inputs
    floor = floor_bytes(inputs, case.providers["eager"].op(*inputs).detach(), direction)
    what: dict[str, Any] = {"op": case.op, "shape": case.shape, "layout": case.layout, "direction": direction}
    what |= {**environment(DEVICE), "dtype": str(inputs[0].dtype).removeprefix("torch.")}
    return [
        *(
            Row(
                **what,
                provider=name,
                **asdict(timing),
                gb_per_s=gb_per_s(floor, timing.ms_median),
                percent_of_copy=100 * gb_per_s(floor, timing.ms_median) / copy_gb_per_s,
            )
            for name, timing in timings.items()
        ),
        *(Row(**what, provider=name, error=error) for name, error in failures.items()),
    ]


def is_warm(name: str) -> bool:
    """Whether a warm-up (warm_cache.py) has compiled this already, where the compiled ones are to wait for one."""
    folder = os.environ.get("SCALELONG_WARM")
    return folder is None or (Path(folder) / name).exists()


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
    eager = case.providers["eager"]
    output = eager.op(*eager.inputs).detach()
    able = {name: p for name, p in case.providers.items() if name not in case.failures}
    percents = {name: 100 * kept_bytes(p.op, p.inputs) / output.nbytes for name, p in able.items()}
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


def _run_once(provider: Provider) -> None:
    """Forward and backward each compile at their first call."""
    output = provider.op(*provider.inputs)
    torch.autograd.grad(output, provider.inputs, _gradient_of(output))


def _gradient_of(output: Tensor) -> Tensor:
    """In the layout of ``output``; drawn in bf16, so that every dtype is sent back the same numbers."""
    generator = torch.Generator(output.device).manual_seed(1)
    drawn = torch.randn(output.shape, generator=generator, dtype=torch.bfloat16, device=output.device)
    return torch.empty_like(output, requires_grad=False).copy_(drawn)


def _addresses(tensors: Sequence[Tensor]) -> set[int]:
    return {x.untyped_storage().data_ptr() for x in tensors}
