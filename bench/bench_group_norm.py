"""skip_group_norm with a learnable scalar scale and SiLU, at the skip concatenations of shapes.py.

On a GPU, in bf16: everything, most informative first, so that a run may be cut short (--stop-after SECONDS).
On a CPU, in fp32 and bf16: a forward with its backward, at the shapes of at least 8 MB in fp32 and two small ones,
compiled in fp32 only; with SCALELONG_BENCH=full, everything. Both layouts.
Each provider gets the output's gradient in the layout and dtype of its own output: where eager turns channels_last
into contiguous, the copy back that a network needs is not held against it. eager-autocast keeps its parameters in
fp32 and hands its output over in bf16, as the convolution after it would take it.
"""

import importlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from scalelong.bench.compare import (
    COMPILE,
    COMPILE_MAX_AUTOTUNE,
    COMPILE_POINTWISE_CAT_0,
    DEVICE,
    DIRECTIONS,
    ON_GPU,
    Provider,
    as_leaves,
    compare,
    kept_note,
    make_case,
)
from scalelong.bench.shapes import GROUPS, LARGE_BYTES, SKIP_CONCATS, SkipConcat
from scalelong.kernels.backend import get_backend
from scalelong.kernels.group_norm import skip_group_norm, skip_group_norm_ref

LAYOUTS = ("contiguous", "channels_last")
IS_FULL = ON_GPU or os.environ.get("SCALELONG_BENCH") == "full"
DTYPES = (torch.bfloat16,) if ON_GPU else (torch.float32, torch.bfloat16)
SMALL = ("ddpm-cifar10-256+256:8", "adm-imagenet64-576+576:16")
# One for each regime: one block holds a group, several do, a group is cut; the last is small.
REPRESENTATIVE = (
    "ddpm-cifar10-256+128:32",
    "adm-imagenet64-576+384:32",
    "sdxl-640+320:128",
    "adm-imagenet64-768+768:8",
)
ALL_COMPILERS = {**COMPILE, **COMPILE_POINTWISE_CAT_0, **COMPILE_MAX_AUTOTUNE}


@dataclass(frozen=True)
class Benchmark:
    concat: SkipConcat
    dtype: torch.dtype
    layout: str
    direction: str
    compilers: Mapping[str, dict[str, Any]]

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        suffix = "-all-compilers" if self.compilers is ALL_COMPILERS else ""
        return f"{self.concat}-{dtype}-{self.layout}-{self.direction}{suffix}"


def num_elements(concat: SkipConcat) -> int:
    return concat.num_elements(concat.gpu_batch if ON_GPU else concat.cpu_batch)


def largest_first() -> list[SkipConcat]:
    """The largest of each network, then the second of each, and so on."""
    rank = {}
    for network in {concat.network for concat in SKIP_CONCATS}:
        of_network = sorted((c for c in SKIP_CONCATS if c.network == network), key=num_elements, reverse=True)
        rank |= {concat: i for i, concat in enumerate(of_network)}
    return sorted(SKIP_CONCATS, key=rank.__getitem__)


def plan() -> Iterator[Benchmark]:
    """Most informative first."""
    concats = largest_first()
    by_name = {str(concat): concat for concat in concats}
    representative, small = ([by_name[name] for name in names] for names in (REPRESENTATIVE, SMALL))
    if not IS_FULL:
        concats = [*(c for c in concats if 4 * num_elements(c) >= LARGE_BYTES), *small]

    def each(concats: Sequence[SkipConcat], directions: Sequence[str], compilers: Mapping[str, Any] | None = None):
        for direction in directions:
            for concat in concats:
                for dtype in DTYPES:
                    for layout in LAYOUTS:
                        default = COMPILE if IS_FULL or dtype == torch.float32 else {}
                        yield Benchmark(concat, dtype, layout, direction, default if compilers is None else compilers)

    yield from each(concats, ("both",))
    if IS_FULL:
        yield from each(representative, ("both",), ALL_COMPILERS)
        yield from each(representative, DIRECTIONS[:2])
        yield from each([c for c in concats if c not in representative], DIRECTIONS[:2])


def ref(h: Tensor, s: Tensor, scale: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return skip_group_norm_ref(h, s, scale, GROUPS, weight, bias)


def ours(h: Tensor, s: Tensor, scale: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return skip_group_norm(h, s, scale, GROUPS, weight, bias)


def under_autocast(h: Tensor, s: Tensor, scale: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    # Not the reference, which gives the parameters the dtype of h.
    with torch.autocast(h.device.type, torch.bfloat16):
        return F.silu(F.group_norm(torch.cat([h, s * scale], dim=1), GROUPS, weight, bias)).to(h.dtype)


def make_inputs(concat: SkipConcat, dtype: torch.dtype, layout: str) -> tuple[Tensor, ...]:
    batch = concat.gpu_batch if ON_GPU else concat.cpu_batch
    generator = torch.Generator(DEVICE).manual_seed(0)
    draw = partial(torch.randn, generator=generator, device=DEVICE)
    h = draw(batch, concat.num_hidden, concat.size, concat.size)
    s = draw(batch, concat.num_skip, concat.size, concat.size)
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


@pytest.mark.parametrize("planned", tuple(plan()), ids=str)
def test_skip_group_norm(benchmark, report, note, planned):
    concat, layout = planned.concat, planned.layout
    inputs = make_inputs(concat, planned.dtype, layout)
    shape = (
        f"{concat.network} N={len(inputs[0])} C={concat.num_hidden}+{concat.num_skip} HW={concat.size}x{concat.size}"
    )
    note(f"ours is the backend {get_backend(inputs[0])!r}")
    others = other_providers(inputs, layout)
    apex = apex_provider(inputs, layout)
    if isinstance(apex, str):
        note(apex)
    elif apex is not None:
        others["apex"] = apex
    case = make_case(
        "skip_group_norm",
        shape,
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
    if planned.direction == "both":
        note(kept_note(case))
    benchmark.group = f"{case.op} {shape} {layout}"
    report(compare(benchmark, case, planned.direction))
