"""The Triton kernels of skip_group_norm, compiled ahead of time: registers and vector loads show without a GPU."""

import math
import os
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from scalelong.bench.ahead_of_time import Launch, distinct, launches_of, spill_bytes
from scalelong.bench.shapes import GROUPS, SKIP_CONCATS
from scalelong.kernels import group_norm_tilings, group_norm_triton
from scalelong.kernels.group_norm_flat import Pieces
from scalelong.kernels.group_norm_tilings import (
    TABLES,
    VECTOR_BYTES,
    Flat,
    FlatTiling,
    SplitTiling,
    Table,
    Tiles,
    WholeTiling,
    choose_tiling,
)
from scalelong.kernels.group_norm_walks import Tile
from scalelong.kernels.launches import Kept

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing"),
]

VECTOR = r"\.global[\w.:]*\.(v4\.[bf]32|v2\.[bf]64)"
VECTOR_LOAD, VECTOR_STORE = re.compile("ld" + VECTOR), re.compile("st" + VECTOR)
SHAPES = [(x.gpu_batch, x.num_hidden, x.num_skip, GROUPS, x.size, x.size) for x in SKIP_CONCATS]
SHAPES += [(1, 320, 320, 32, 64, 64)]
ODD_SHAPES = [
    (3, 20, 16, 4, 7, 5),  # no vectors: a thread may hold one element
    (2, 7, 3, 1, 9, 9),
    (1, 1280, 1280, 1, 8, 8),  # a group of thousands of channels
    (5, 6, 6, 12, 1, 3),
    (2, 36, 18, 6, 3, 2),  # vectors of two elements
    (1, 1, 1, 1, 1, 1),
    (2, 1, 1, 2, 1, 1),  # a piece of one element
]
DTYPES = {2: torch.bfloat16, 4: torch.float32}
LAYOUTS = [pytest.param(False, id="contiguous"), pytest.param(True, id="channels_last")]
each_direction = pytest.mark.parametrize("direction", ["forward", "backward"])
each_layout = pytest.mark.parametrize("channels_last", LAYOUTS)


def is_small(launch: Launch) -> bool:
    """Whether it holds no activations."""
    return any(word in launch.name for word in ("combine", "parameters"))


def entries() -> Iterator[Any]:
    for (direction, channels_last), table in TABLES.items():
        layout = "channels_last" if channels_last else "contiguous"
        for itemsize in DTYPES:
            marks = [] if itemsize == 2 else [pytest.mark.exhaustive]
            for form, entry in (
                *(("flat", flat) for flat in table.flat),
                ("whole", table.whole),
                ("split", table.split),
            ):
                if entry is not None:
                    name = f"{direction}-{layout}-{8 * itemsize}-{form}-{entry.num_warps}"
                    yield pytest.param(direction, channels_last, itemsize, form, entry, id=name, marks=marks)


def force_entry(monkeypatch: pytest.MonkeyPatch, key: tuple[str, bool], form: str, entry: Flat | Tiles) -> None:
    """The launchers find nothing else in the table."""
    before = TABLES[key]
    table = Table(
        "test",
        flat=(entry,) if isinstance(entry, Flat) else (),
        whole=entry if form == "whole" and isinstance(entry, Tiles) else None,
        split=entry if form == "split" and isinstance(entry, Tiles) else before.split,
    )
    monkeypatch.setattr(group_norm_tilings, "TABLES", {**TABLES, key: table})
    force(monkeypatch, choose_tiling.__wrapped__)


def force(monkeypatch: pytest.MonkeyPatch, choose: Any) -> None:
    monkeypatch.setattr(group_norm_triton, "choose_tiling", choose)
    monkeypatch.setattr(group_norm_triton, "_plans", Kept())


def positions_that_fill(form: str, entry: Flat | Tiles, itemsize: int, D: int) -> int:
    vec = VECTOR_BYTES // itemsize
    if isinstance(entry, Flat):
        return entry.max_pieces * entry.num_warps * 32 * vec // D
    if form == "split":
        return 4096
    return entry.max_tiles * entry.rows_of_thread * 32 * entry.num_warps * VECTOR_BYTES // entry.bytes_of_row


def has_vectors(launch: Launch, ptx: str) -> bool:
    return bool(VECTOR_LOAD.search(ptx)) and ("sums" in launch.name or bool(VECTOR_STORE.search(ptx)))


@pytest.mark.parametrize(("direction", "channels_last", "itemsize", "form", "entry"), list(entries()))
def test_an_entry_spills_no_more_than_it_states_and_moves_vectors(
    direction, channels_last, itemsize, form, entry, monkeypatch
):
    force_entry(monkeypatch, (direction, channels_last), form, entry)
    D = 16
    shape = (8, 256, 256, 32, positions_that_fill(form, entry, itemsize, D), 1)
    launches = distinct(
        launches_of(direction, shape, channels_last=channels_last, dtype=DTYPES[itemsize], is_adaptive=True)
    )
    assert any(form in launch.name for launch in launches)
    for launch in launches:
        compiled = launch.compile(90)
        assert spill_bytes(compiled) <= (0 if is_small(launch) else entry.spill_bytes), launch.name
        assert is_small(launch) or has_vectors(launch, compiled.asm["ptx"]), launch.name


@each_direction
@each_layout
@pytest.mark.parametrize(
    ("arch", "act", "dtype"),
    [
        (80, None, torch.bfloat16),
        (90, "gelu", torch.float32),
        (90, "gelu-tanh", torch.bfloat16),
        pytest.param(80, "gelu", torch.float16, marks=pytest.mark.exhaustive),
        pytest.param(80, None, torch.float32, marks=pytest.mark.exhaustive),
        pytest.param(90, "gelu", torch.bfloat16, marks=pytest.mark.exhaustive),
        pytest.param(90, "silu", torch.float16, marks=pytest.mark.exhaustive),
    ],
    ids=str,
)
def test_odd_shapes_compile(arch, act, dtype, channels_last, direction):
    launches = [
        launch
        for shape in ODD_SHAPES
        for launch in launches_of(direction, shape, channels_last=channels_last, dtype=dtype, act=act)
    ]
    for launch in {launch.key(arch): launch for launch in launches}.values():
        launch.compile(arch)


@each_direction
@each_layout
@pytest.mark.parametrize(
    ("arch", "dtype"), [(90, torch.bfloat16), pytest.param(80, torch.float32, marks=pytest.mark.exhaustive)], ids=str
)
def test_odd_shapes_compile_when_split(arch, dtype, channels_last, direction, monkeypatch):
    table = Table("test", flat=(), whole=None, split=TABLES[direction, channels_last].split)
    monkeypatch.setattr(group_norm_tilings, "TABLES", {**TABLES, (direction, channels_last): table})
    force(monkeypatch, choose_tiling.__wrapped__)
    test_odd_shapes_compile(arch, None, dtype, channels_last, direction)


@pytest.mark.exhaustive
@each_direction
@each_layout
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_shapes_of_public_networks_compile(shape, arch, dtype, channels_last, direction):
    table = TABLES[direction, channels_last]
    worst = max(entry.spill_bytes for entry in (*table.flat, table.whole, table.split) if entry is not None)
    for launch in distinct(launches_of(direction, shape, channels_last=channels_last, dtype=dtype)):
        compiled = launch.compile(arch)
        assert arch != 90 or spill_bytes(compiled) <= worst, launch.name


FIXED = [
    pytest.param(FlatTiling(Pieces(2, 128, 8, False, 8), 4, None), False, id="flat"),
    pytest.param(WholeTiling(Tile(16, 64, True, 8, True), 2, 4, None, 16, 2, 4), True, id="whole"),
    pytest.param(SplitTiling(Tile(16, 64, False, 8, True), 4, 64, 2, 8), False, id="split-contiguous"),
    pytest.param(SplitTiling(Tile(16, 64, True, 8, True), 4, 64, 2, 8), True, id="split-channels_last"),
]


@each_direction
@pytest.mark.parametrize(("tiling", "channels_last"), FIXED)
def test_numbers_are_arguments_and_recompile_nothing(tiling, channels_last, direction, monkeypatch):
    """The least of them, 1, included; and batches between two powers of two."""
    force(monkeypatch, lambda *_: tiling)
    keys = {
        (launch.name, launch.key(90))
        for shape in ((7, 32, 32, 8, 8, 16), (5, 48, 16, 8, 8, 16), (8, 16, 48, 8, 1, 128))
        for launch in launches_of(direction, shape, channels_last=channels_last, dtype=torch.bfloat16)
    }
    assert len(keys) == len({name for name, _ in keys})


@each_direction
@each_layout
@pytest.mark.parametrize("itemsize", [2, 4])
def test_every_shape_gets_a_tile_of_its_table(itemsize, channels_last, direction):
    table, forms = TABLES[direction, channels_last], set()
    for N, Ch, Cs, G, height, width in (*SHAPES, *ODD_SHAPES):
        P, runs = height * width, ((Ch, Cs) if channels_last else (height * width,))
        vec = math.gcd(VECTOR_BYTES // itemsize, *runs)
        tiling = choose_tiling(direction, channels_last, itemsize, vec, N, Ch, Cs, G, P, 132)
        forms.add(type(tiling))
        if isinstance(tiling, FlatTiling):
            check_flat(tiling, table, (Ch + Cs) // G, P, vec)
        elif isinstance(tiling, WholeTiling):
            check_whole(tiling, table, itemsize, N, Ch, Cs, G, P)
        else:
            check_split(tiling, table, itemsize, N, Ch, Cs, P)
    assert forms == {WholeTiling if channels_last else FlatTiling, SplitTiling}


def check_flat(tiling: FlatTiling, table: Table, D: int, P: int, vec: int) -> None:
    number, rows, width, masked, segment = tiling.pieces
    entry = next(flat for flat in table.flat if flat.num_warps == tiling.num_warps)
    assert (number <= entry.max_pieces, rows <= 32 * entry.num_warps) == (True, True)
    assert width == vec
    assert number * rows * vec >= D * P > (number - 1) * rows * vec
    assert masked == (number * rows * vec > D * P)
    assert (P // vec % segment, rows % segment) == (0, 0)
    assert tiling.max_registers == entry.max_registers


def check_tile(tile: Tile, entry: Tiles, itemsize: int) -> None:
    assert tile.channels * tile.positions * itemsize <= entry.rows_of_thread * 32 * entry.num_warps * VECTOR_BYTES
    assert (tile.channels if tile.channels_last else tile.positions) % tile.vec == 0


def check_whole(tiling: WholeTiling, table: Table, itemsize: int, N: int, Ch: int, Cs: int, G: int, P: int) -> None:
    assert table.whole is not None
    check_tile(tiling.tile, table.whole, itemsize)
    D, positions = (Ch + Cs) // G, tiling.tile.positions
    assert tiling.num_tiles <= table.whole.max_tiles
    assert tiling.num_tiles * positions >= P > (tiling.num_tiles - 1) * positions
    assert [x % tiling.block for x in (Ch, Cs)] == [0, 0]
    assert tiling.block % D == 0
    assert tiling.block <= tiling.tile.channels
    assert tiling.block // D <= tiling.groups
    assert tiling.num_programs * tiling.block == N * (Ch + Cs)
    assert tiling.tile.masked or (tiling.block == tiling.tile.channels and P % positions == 0)


def check_split(tiling: SplitTiling, table: Table, itemsize: int, N: int, Ch: int, Cs: int, P: int) -> None:
    check_tile(tiling.tile, table.split, itemsize)
    channels, positions = tiling.tile.channels, tiling.tile.positions
    assert tiling.num_chunks * tiling.walk >= P > (tiling.num_chunks - 1) * tiling.walk
    assert tiling.walk % positions == 0
    assert tiling.walk <= table.split.max_tiles * positions
    assert tiling.num_programs == N * sum(math.ceil(x / channels) for x in (Ch, Cs)) * tiling.num_chunks
    assert tiling.tile.masked or [Ch % channels, Cs % channels, P % positions] == [0, 0, 0]
