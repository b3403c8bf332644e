"""skip_group_norm with a learnable scalar scale and SiLU, at the skip concatenations of shapes.py, largest first.

On a GPU, in bf16: forward and backward at each shape; then beside every compiler at eight of them; then both together,
and with the slower compilers, at four. A run may be cut short (--stop-after SECONDS).
On a CPU, in fp32 and bf16: a forward with its backward, at the shapes of at least 8 MB in fp32 and two small ones,
compiled in fp32 only; with SCALELONG_BENCH=full, everything. Both layouts.
Each provider gets the output's gradient in the layout and dtype of its own output: where eager turns channels_last
into contiguous, the copy back that a network needs is not held against it; against compile-to-channels-last it is.
eager-autocast keeps its parameters in fp32 and hands its output over in bf16, as the convolution after it takes it.
"""

import importlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from scalelong.bench.compare import (
    COMPILE,
    COMPILE_LOOPS,
    COMPILE_MAX_AUTOTUNE,
    COMPILE_POINTWISE_CAT_0,
    COMPILE_TO_CHANNELS_LAST,
    DEVICE,
    ON_GPU,
    Compiler,
    Provider,
    as_leaves,
    compare,
    is_warm,
    kept_note,
    make_case,
)
from scalelong.bench.shapes import GROUPS, LARGE_BYTES, SKIP_CONCATS, SkipConcat
from scalelong.bench.timing import IS_DRY_RUN
from scalelong.kernels.backend import backend_of
from scalelong.kernels.group_norm import skip_group_norm, skip_group_norm_ref

LAYOUTS = ("contiguous", "channels_last")
IS_FULL = ON_GPU or os.environ.get("SCALELONG_BENCH") == "full"
DTYPES = (torch.bfloat16,) if ON_GPU else (torch.float32, torch.bfloat16)
SMALL = ("ddpm-cifar10-256+256:8", "adm-imagenet64-576+576:16")
# What a decoder spends its time on, and the sizes between.
COMPILED = (
    "adm-imagenet64-384+192:64",
    "ddpm-cifar10-256+128:32",
    "sd-1.5-640+320:64",
    "sdxl-640+320:128",
    "adm-imagenet64-384+384:32",
    "adm-imagenet64-576+384:32",
    "sd-1.5-1280+640:32",
    "adm-imagenet64-768+576:16",
)
# One for each regime: one block holds a group, several do, a group is cut; the last is small.
REPRESENTATIVE = (
    "ddpm-cifar10-256+128:32",
    "adm-imagenet64-576+384:32",
    "sdxl-640+320:128",
    "adm-imagenet64-768+768:8",
)
# By kind of benchmark.
COMPILERS: Mapping[str, Mapping[str, Compiler]] = {
    "plain": {},
    "compiled": {**COMPILE, **COMPILE_TO_CHANNELS_LAST, **(COMPILE_LOOPS if ON_GPU else {})},
    "all-compilers": {**COMPILE, **COMPILE_POINTWISE_CAT_0, **COMPILE_MAX_AUTOTUNE},
}


@dataclass(frozen=True)
class Benchmark:
    concat: SkipConcat
    dtype: torch.dtype
    layout: str
    directions: tuple[str, ...]
    kind: str

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.concat}-{dtype}-{self.layout}-{'-'.join(self.directions)}-{self.kind}"

    @property
    def compilers(self) -> dict[str, Compiler]:
        found = COMPILERS[self.kind]
        return {
            name: compiler
            for name, compiler in found.items()
            if self.layout == "channels_last" or compiler.memory_format is None
        }


def num_elements(concat: SkipConcat) -> int:
    return concat.num_elements(concat.gpu_batch if ON_GPU else concat.cpu_batch)


def plan() -> Iterator[Benchmark]:
    """Most informative first."""
    concats = sorted(SKIP_CONCATS, key=num_elements, reverse=True)
    by_name = {str(concat): concat for concat in concats}
    compiled, representative, small = ([by_name[name] for name in names] for names in (COMPILED, REPRESENTATIVE, SMALL))

    def each(concats: Sequence[SkipConcat], directions: tuple[str, ...], kind: str) -> Iterator[Benchmark]:
        for concat, dtype, layout in product(concats, DTYPES, LAYOUTS):
            is_default = kind == "compiled" and dtype != torch.float32 and not IS_FULL
            yield Benchmark(concat, dtype, layout, directions, "plain" if is_default else kind)

    if not IS_FULL:
        yield from each([*(c for c in concats if 4 * num_elements(c) >= LARGE_BYTES), *small], ("both",), "compiled")
        return
    if ON_GPU:
        yield from each(concats, ("forward", "backward"), "plain")
        yield from each(compiled, ("forward", "backward"), "compiled")
    else:
        yield from each(concats, ("both",), "compiled")
        yield from each(concats, ("forward", "backward"), "plain")
    yield from each(representative, ("both",), "all-compilers")


def ref(h: Tensor, s: Tensor, scale: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return skip_group_norm_ref(h, s, scale, GROUPS, weight, bias)


def ours(h: Tensor, s: Tensor, scale: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return skip_group_norm(h, s, scale, GROUPS, weight, bias)


def under_autocast(h: Tensor, s: Tensor, scale: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    # Not the reference, which gives the parameters the dtype of h.
    with torch.autocast(h.device.type, torch.bfloat16):
        return F.silu(F.group_norm(torch.cat([h, s * scale], dim=1), GROUPS, weight, bias)).to(h.dtype)


def make_inputs(concat: SkipConcat, dtype: torch.dtype, layout: str) -> tuple[Tensor, ...]:
    batch, size = (1, 2) if IS_DRY_RUN else (concat.gpu_batch if ON_GPU else concat.cpu_batch, concat.size)
    generator = torch.Generator(DEVICE).manual_seed(0)
    draw = partial(torch.randn, generator=generator, device=DEVICE)
    h = draw(batch, concat.num_hidden, size, size)
    s = draw(batch, concat.num_skip, size, size)
    weight, bias = draw(2, concat.num_channels)
    scale = torch.tensor(0.7, device=DEVICE)
    memory_format = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    h, s = (x.to(dtype, memory_format=memory_format) for x in (h, s))
    return h, s, *(x.to(dtype, copy=True) for x in (scale, weight, bias))


def rounding_of_dscale(inputs: Sequence[Tensor], grads: Sequence[Tensor]) -> dict[int, Tensor]:
    """A group that lies inside the skip cancels its scale: the gradient is the rest of terms of this size."""
    s, scale, ds = inputs[1].double(), inputs[2].double(), grads[1]
    return {2: torch.finfo(torch.float32).eps * (ds * s / scale).abs().sum()}


def other_providers(inputs: tuple[Tensor, ...], layout: str) -> dict[str, Provider]:
    h, s, *parameters = inputs
    others = {}
    if layout == "contiguous":
        h_last, s_last = (x.to(memory_format=torch.channels_last) for x in (h, s))
        others["eager-channels-last"] = Provider(ref, as_leaves((h_last, s_last, *parameters)))
    if h.dtype == torch.bfloat16:
        others["eager-autocast"] = Provider(under_autocast, as_leaves((h, s, *(p.float() for p in parameters))))
    return others


def apex_provider(inputs: tuple[Tensor, ...], layout: str) -> Provider | str | None:
    """mul, cat and NVIDIA's GroupNorm; a line where it cannot take these; None where it is not installed."""
    if not ON_GPU or layout != "channels_last":
        return None
    try:
        apex_group_norm = importlib.import_module("apex.contrib.group_norm").GroupNorm
    except (ImportError, AttributeError):  # on PyPI, apex is another project
        return None
    weight = inputs[3]
    C = len(weight)
    if C not in apex_group_norm.SUPPORTED_CHANNELS or GROUPS not in apex_group_norm.SUPPORTED_GROUPS:
        return f"apex has no kernel for {C} channels in {GROUPS} groups"
    norm = apex_group_norm(GROUPS, C, act="silu", device=DEVICE, dtype=weight.dtype)

    def op(h: Tensor, s: Tensor, scale: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        norm._parameters.update(weight=weight, bias=bias)  # torch.func.functional_call takes longer than small kernels
        return norm(torch.cat([h, s * scale], dim=1))

    return Provider(op, as_leaves(inputs))


def shape_of(concat: SkipConcat, inputs: Sequence[Tensor]) -> str:
    batch, _, height, width = inputs[0].shape
    return f"{concat.network} N={batch} C={concat.num_hidden}+{concat.num_skip} HW={height}x{width}"


@pytest.mark.parametrize("planned", tuple(plan()), ids=str)
def test_skip_group_norm(benchmark, report, note, planned):
    if planned.kind == "compiled" and not is_warm(str(planned)):
        pytest.skip("its compilers were not warm in time")
    concat, layout = planned.concat, planned.layout
    inputs = make_inputs(concat, planned.dtype, layout)
    note(f"ours is the backend {backend_of(inputs[0])!r}")
    others = other_providers(inputs, layout)
    apex = apex_provider(inputs, layout)
    if isinstance(apex, str):
        note(apex)
    elif apex is not None:
        others["apex"] = apex
    case = make_case(
        "skip_group_norm",
        shape_of(concat, inputs),
        ref=ref,
        ours=ours,
        inputs=inputs,
        layout=layout,
        others=others,
        compilers=planned.compilers,
        floors=rounding_of_dscale,
    )
    for line in case.notes:
        note(line)
    if planned.directions == ("both",):
        note(kept_note(case))
    benchmark.group = f"{case.op} {case.shape} {layout}"
    *first, last = planned.directions
    report(row for direction in first for row in compare(None, case, direction))
    report(compare(benchmark, case, last))
