"""The Triton kernels of skip_linear, compiled ahead of time: what limits a GEMM shows without a GPU."""

import os
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from scalelong.bench.ahead_of_time import Launch, recorded_launches, spill_bytes
from scalelong.kernels import skip_linear_triton
from scalelong.kernels.launches import Kept
from scalelong.kernels.skip_linear_tilings import TABLES, Tile

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing"),
]

TENSOR_CORES = {80: re.compile(r"mma\.sync"), 90: re.compile(r"wgmma\.mma_async")}
SHARED_BYTES = {80: 163 * 1024, 90: 227 * 1024}  # that a program may have
COPY_BYTES = re.compile(r"cp\.async\.c[ag]\.shared\.global [^;]*?, (0x\w+)")
VECTOR_STORE = re.compile(r"st\.global[\w.:]*\.v4\.[bf]32")
PRODUCTS = ("forward", "inputs", "weight")
SHAPE = (4096, 512, 768, 1024)  # tokens, widths of x, s and y


def launch_of(
    product: str,
    dtype: torch.dtype,
    shape: tuple[int, ...] = SHAPE,
    *,
    has_scale: bool = True,
    read_dtype: torch.dtype | None = None,
) -> Launch:
    """``read_dtype`` is that of x, s and their gradients, and then fp32 that of the weights' gradient."""
    M, D1, D2, OUT = shape

    def empty(*size: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(size, dtype=dtype, device="meta")

    x, s = (empty(M, D, dtype=read_dtype or dtype) for D in (D1, D2))
    y, weight, dweight = empty(M, OUT), empty(OUT, D1 + D2), empty(OUT, D1 + D2, dtype=read_dtype or dtype)
    row_scale, drow = (empty(M), empty(M).float()) if has_scale else (None, None)
    halves = (weight[:, :D1], weight[:, D1:])
    with recorded_launches() as launches:
        if product == "forward":
            skip_linear_triton.forward(x, s, row_scale, *halves, empty(OUT), y)
        elif product == "inputs":
            skip_linear_triton.backward_inputs(y, *halves, s, row_scale, x, s, drow)
        else:
            skip_linear_triton.backward_weight(y, x, s, row_scale, dweight)
    (launch,) = launches
    return launch


def entries() -> Iterator[Any]:
    for (product, itemsize, read_itemsize), table in TABLES.items():
        read_dtype = torch.float32 if read_itemsize > itemsize else None
        for dtype in (torch.bfloat16, torch.float16) if itemsize == 2 else (torch.float32,):
            for arch, has_scale in ((90, True), (90, False), (80, True), (80, False)):
                is_quick = dtype == torch.bfloat16 and (arch == 90 or has_scale)
                for tile in table.tiles:
                    read = "-reads-fp32" if read_dtype else ""
                    name = f"{product}-{dtype}{read}-{tile.block_rows}x{tile.block_cols}-sm_{arch}-scale={has_scale}"
                    marks = [] if is_quick else [pytest.mark.exhaustive]
                    yield pytest.param(product, dtype, read_dtype, tile, arch, has_scale, id=name, marks=marks)


@pytest.fixture(autouse=True)
def _plans_of_each_test(monkeypatch):
    monkeypatch.setattr(skip_linear_triton, "_plans", Kept())


@pytest.mark.parametrize(("product", "dtype", "read_dtype", "tile", "arch", "has_scale"), list(entries()))
def test_an_entry_fits_the_gpu_and_feeds_its_tensor_cores(
    product, dtype, read_dtype, tile, arch, has_scale, monkeypatch
):
    monkeypatch.setattr(skip_linear_triton, "choose_tile", lambda *_: tile)
    compiled = launch_of(product, dtype, has_scale=has_scale, read_dtype=read_dtype).compile(arch)
    ptx = compiled.asm["ptx"]
    assert spill_bytes(compiled) <= (tile.spill_bytes if arch == 80 else 0)
    assert compiled.metadata.shared <= SHARED_BYTES[arch]
    assert bool(TENSOR_CORES[arch].search(ptx)) == (dtype != torch.float32)
    # The weight gradient also brings in the scales of its tokens, one at a time.
    scales = {"0x4"} if product == "weight" and has_scale else set()
    assert set(COPY_BYTES.findall(ptx)) == {"0x10"} | scales
    assert VECTOR_STORE.search(ptx)


@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize(
    ("arch", "dtype", "shape"),
    [(80, torch.float32, (5, 1, 3, 1)), (90, torch.bfloat16, (67, 33, 24, 70))],
    ids=str,
)
def test_odd_shapes_compile(product, arch, dtype, shape):
    launch_of(product, dtype, shape).compile(arch)


@pytest.mark.parametrize("wanted", ["dx", "ds", "drow"])
def test_gradients_that_nobody_needs_compile_away(wanted):
    M, D, OUT = 64, 48, 32
    x, y, weight = (
        torch.empty(M, D, device="meta"),
        torch.empty(M, OUT, device="meta"),
        torch.empty(OUT, D, device="meta"),
    )
    gradients = {"dx": x, "ds": x, "drow": x[:, 0]}
    given = (gradients[name] if name == wanted else None for name in gradients)
    with recorded_launches() as launches:
        skip_linear_triton.backward_inputs(y, weight, weight, x, None, *given)  # type: ignore[arg-type]
    launches[0].compile(90)


@pytest.mark.parametrize("product", PRODUCTS)
def test_numbers_are_arguments_and_recompile_nothing(product, monkeypatch):
    monkeypatch.setattr(skip_linear_triton, "choose_tile", lambda *_: Tile(64, 64, 64, 4, 4))
    shapes = ((64 * 257, 512, 512, 512), (4095, 768, 96, 1024))
    compiled = [launch_of(product, torch.bfloat16, shape).compile(90) for shape in shapes]
    assert compiled[0].hash == compiled[1].hash
