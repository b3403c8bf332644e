"""The Triton kernels of skip_group_norm, compiled ahead of time: registers and vector loads show without a GPU."""

import os
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from scalelong.bench.ahead_of_time import Launch, distinct, launches_of, spill_bytes
from scalelong.bench.shapes import GROUPS, SKIP_CONCATS
from scalelong.kernels import group_norm_triton
from scalelong.kernels.group_norm_tilings import TABLES, Tile, Tiling, choose_tiling, next_power_of_two

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing"),
]

VECTOR = r"\.global[\w.:]*\.(v4\.[bf]32|v2\.[bf]64)"
VECTOR_LOAD, VECTOR_STORE = re.compile("ld" + VECTOR), re.compile("st" + VECTOR)
SHAPES = [(x.gpu_batch, x.num_hidden, x.num_skip, GROUPS, x.size, x.size) for x in SKIP_CONCATS]
SHAPES += [(1, 320, 320, 32, 64, 64)]
ODD_SHAPES = [
    (3, 20, 16, 4, 7, 5),
    (2, 7, 3, 1, 9, 9),
    (1, 1280, 1280, 1, 8, 8),  # a group of thousands of channels
    (5, 6, 6, 12, 1, 3),
]
LAYOUTS = [pytest.param(False, id="contiguous"), pytest.param(True, id="channels_last")]
each_direction = pytest.mark.parametrize("direction", ["forward", "backward"])
each_layout = pytest.mark.parametrize("channels_last", LAYOUTS)


def tiles_of(key: tuple[str, bool, int]) -> list[tuple[str, Tile]]:
    table = TABLES[key]
    return [*(("resident", tile) for tile in table.resident), ("looped", table.looped), ("split", table.split)]


def entries() -> Iterator[Any]:
    for direction, channels_last, itemsize in TABLES:
        for form, tile in tiles_of((direction, channels_last, itemsize)):
            layout = "channels_last" if channels_last else "contiguous"
            name = f"{direction}-{layout}-{8 * itemsize}-{form}-{tile.num_elements}"
            marks = [] if itemsize == 2 else [pytest.mark.exhaustive]
            yield pytest.param(direction, channels_last, itemsize, form, tile, id=name, marks=marks)


def force(monkeypatch: pytest.MonkeyPatch, form: str, tile: Tile, channels_last: bool, itemsize: int, D: int) -> Tiling:
    """A full tile of groups of D channels, of one line of memory if channels_last."""
    groups = max(1, 128 // itemsize // D) if channels_last and form != "split" else 1
    channels = groups * D
    if form == "split":
        channels = 128 // itemsize if channels_last else 4
    block_c = next_power_of_two(channels)
    tiling = Tiling(
        form=form,
        block_channels=channels,
        block_c=block_c,
        block_p=tile.num_elements // block_c,
        num_groups=next_power_of_two(groups),
        num_warps=tile.num_warps,
        num_programs=1,
        num_chunks=1,
        images=1,
    )
    monkeypatch.setattr(group_norm_triton, "choose_tiling", lambda *_: tiling)
    return tiling


def has_vectors(launch: Launch, ptx: str) -> bool:
    return bool(VECTOR_LOAD.search(ptx)) and (launch.stage == "sums" or bool(VECTOR_STORE.search(ptx)))


@pytest.mark.parametrize(("direction", "channels_last", "itemsize", "form", "tile"), list(entries()))
def test_an_entry_spills_no_more_than_it_states_and_moves_vectors(
    direction, channels_last, itemsize, form, tile, monkeypatch
):
    dtype = torch.bfloat16 if itemsize == 2 else torch.float32
    tiling = force(monkeypatch, form, tile, channels_last, itemsize, D=16)
    spatial = (tiling.block_p // 2, 2) if form == "resident" else (64, 64)
    shape = (8, 256, 256, 32, *spatial)
    for launch in distinct(launches_of(direction, shape, channels_last=channels_last, dtype=dtype, is_adaptive=True)):
        compiled = launch.compile(90)
        assert spill_bytes(compiled) <= (tile.spill_bytes if launch.stage else 0), launch.name
        assert launch.stage is None or has_vectors(launch, compiled.asm["ptx"]), launch.name


@each_direction
@each_layout
@pytest.mark.parametrize(("arch", "act"), [(80, None), (90, "gelu")])
def test_odd_shapes_compile(arch, act, channels_last, direction):
    for shape in ODD_SHAPES:
        for launch in distinct(
            launches_of(direction, shape, channels_last=channels_last, dtype=torch.float32, act=act)
        ):
            launch.compile(arch)


@pytest.mark.exhaustive
@each_direction
@each_layout
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_shapes_of_public_networks_compile(shape, arch, dtype, channels_last, direction):
    worst = max(tile.spill_bytes for _, tile in tiles_of((direction, channels_last, dtype.itemsize)))
    for launch in distinct(launches_of(direction, shape, channels_last=channels_last, dtype=dtype)):
        compiled = launch.compile(arch)
        assert arch != 90 or spill_bytes(compiled) <= worst, launch.name


def test_numbers_are_arguments_and_recompile_nothing(monkeypatch):
    force(monkeypatch, "looped", Tile(4096, 4), False, 2, D=16)
    shapes = ((2, 32, 32, 4, 8, 8), (1, 16, 48, 4, 16, 16))
    compiled = [
        launches_of("forward", shape, channels_last=False, dtype=torch.bfloat16)[0].compile(90) for shape in shapes
    ]
    assert compiled[0].hash == compiled[1].hash


@each_direction
@each_layout
@pytest.mark.parametrize("itemsize", [2, 4])
def test_every_shape_gets_a_tile_of_its_table(itemsize, channels_last, direction):
    allowed = {
        (form, tile.num_warps): tile.num_elements for form, tile in tiles_of((direction, channels_last, itemsize))
    }
    for N, Ch, Cs, G, height, width in (*SHAPES, *ODD_SHAPES):
        C, P = Ch + Cs, height * width
        tiling = choose_tiling(direction, channels_last, itemsize, N, C, G, P, 132)
        assert tiling.block_c * tiling.block_p <= allowed[tiling.form, tiling.num_warps]
        assert tiling.block_channels <= tiling.block_c
        if tiling.form != "split":
            assert tiling.block_channels % (C // G) == 0
            assert tiling.num_programs * tiling.block_channels == C
        if tiling.form == "resident":
            assert tiling.block_p >= P
