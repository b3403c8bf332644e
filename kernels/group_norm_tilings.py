"""Which form and tile the Triton kernels of ``skip_group_norm`` take, by shape: plain numbers, no tuning at run time.

- flat: a program holds a whole group of contiguous tensors in registers and reads each input once;
- whole: so it holds a few groups of channels_last tensors with few positions;
- split: a group is cut into tiles for several programs, which takes three launches and a second read.

Clusters would let more groups be held on the chip, but a sum over the blocks of a cluster compiles from Triton 3.8 on.
bench/tune_group_norm.py measures the tables on a GPU and prints them anew.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

from scalelong.kernels.group_norm_flat import Pieces
from scalelong.kernels.group_norm_walks import Tile


@dataclass(frozen=True)
class Flat:
    """Each thread takes a row of every piece."""

    num_warps: int
    max_pieces: int
    max_registers: int | None = None  # of a thread, so that an SM holds 16 warps
    spill_bytes: int = 0  # of a thread, at most


@dataclass(frozen=True)
class Tiles:
    num_warps: int
    max_tiles: int  # of a program
    bytes_of_row: int = 128  # of a tile: of its channels where channels_last, else of its positions
    rows_of_thread: int = 2  # of 16 bytes, in a tile
    max_registers: int | None = None
    spill_bytes: int = 0
    min_warps: int = 7  # on a multiprocessor: to hide the latency of memory, split programs walk over fewer tiles


@dataclass(frozen=True)
class Table:
    source: str
    flat: tuple[Flat, ...]  # the first that holds a group is taken
    whole: Tiles | None
    split: Tiles


_TIMED = "NVIDIA H200, Triton 3.6.0, bf16, 2026-11-27: bench/tune_group_norm.py, then bench/bench_group_norm.py"
# What was fast with the smallest groups before they were tuned stays: one, two, four and eight warps.
_FORWARD = (Flat(1, 6), Flat(2, 6), Flat(4, 6), Flat(8, 6), Flat(16, 12, spill_bytes=64))
_BACKWARD = (
    *(Flat(warps, 6, max_registers=128, spill_bytes=64) for warps in (1, 2, 4, 8)),
    Flat(16, 8, max_registers=128, spill_bytes=184),
)

# By direction and channels_last.
TABLES: Mapping[tuple[str, bool], Table] = {
    ("forward", False): Table(_TIMED, flat=_FORWARD, whole=None, split=Tiles(num_warps=2, max_tiles=8, min_warps=56)),
    ("forward", True): Table(
        _TIMED,
        flat=(),
        whole=Tiles(num_warps=2, max_tiles=4),
        split=Tiles(num_warps=2, max_tiles=8, rows_of_thread=4, min_warps=7),
    ),
    ("backward", False): Table(
        _TIMED, flat=_BACKWARD, whole=None, split=Tiles(num_warps=4, max_tiles=8, rows_of_thread=1, min_warps=56)
    ),
    ("backward", True): Table(
        _TIMED,
        flat=(),
        whole=Tiles(num_warps=2, max_tiles=4, max_registers=128, spill_bytes=328),  # Triton 3.7.1: 304
        split=Tiles(num_warps=2, max_tiles=16, min_warps=14),
    ),
}

VECTOR_BYTES = 16
# Where whole groups would leave more of the GPU idle than this, inputs from this size on are split.
MIN_FILL = 0.25
MIN_SPLIT_BYTES = 4 * 2**20
MAX_SEGMENT = 8  # rows whose sums the flat backward stores as one: three steps of shuffling


@dataclass(frozen=True)
class FlatTiling:
    pieces: Pieces
    num_warps: int
    max_registers: int | None


@dataclass(frozen=True)
class WholeTiling:
    tile: Tile
    num_tiles: int
    num_warps: int
    max_registers: int | None
    block: int  # channels of a program: whole groups, of h or of s
    groups: int  # of a block, up to a power of two
    num_programs: int


@dataclass(frozen=True)
class SplitTiling:
    tile: Tile
    num_warps: int
    walk: int  # positions of a chunk
    num_chunks: int
    num_programs: int


@cache
def choose_tiling(
    direction: str,
    channels_last: bool,
    itemsize: int,
    vec: int,
    N: int,
    Ch: int,
    Cs: int,
    G: int,
    P: int,
    num_multiprocessors: int,
) -> FlatTiling | WholeTiling | SplitTiling:
    """For N images of Ch + Cs channels in G groups and P positions, whose rows of ``vec`` elements are aligned."""
    table = TABLES[direction, channels_last]
    fill = N * G / num_multiprocessors
    if fill >= MIN_FILL or N * (Ch + Cs) * P * itemsize < MIN_SPLIT_BYTES:
        rows = (Ch + Cs) // G * P // vec
        for flat in table.flat:
            if flat.max_pieces * flat.num_warps * 32 >= rows:
                return _flat_tiling(flat, rows, P // vec, vec)
        tiling = None if table.whole is None else _whole_tiling(table.whole, itemsize, vec, N, Ch, Cs, G, P)
        if tiling is not None:
            return tiling
    return _split_tiling(table.split, channels_last, itemsize, vec, N, Ch, Cs, P, num_multiprocessors)


def _flat_tiling(flat: Flat, rows: int, rows_of_channel: int, vec: int) -> FlatTiling:
    rows_of_piece = min(32 * flat.num_warps, next_power_of_two(rows))
    segment = math.gcd(rows_of_channel, MAX_SEGMENT, rows_of_piece)
    masked = rows % rows_of_piece != 0
    pieces = Pieces(math.ceil(rows / rows_of_piece), rows_of_piece, vec, masked, segment)
    return FlatTiling(pieces, flat.num_warps, flat.max_registers)


def _whole_tiling(
    whole: Tiles, itemsize: int, vec: int, N: int, Ch: int, Cs: int, G: int, P: int
) -> WholeTiling | None:
    """None where no block of whole groups is made of vectors, divides h and s, and fits."""
    D, common = (Ch + Cs) // G, math.gcd(Ch, Cs)
    blocks = [x for x in range(D, whole.bytes_of_row // itemsize + 1, D) if common % x == 0 and x % vec == 0]
    if not blocks:
        return None
    tile = _tile(whole, True, itemsize, vec, blocks[-1], P)
    num_tiles = math.ceil(P / tile.positions)
    if num_tiles > whole.max_tiles:
        return None
    return WholeTiling(
        tile=tile._replace(masked=tile.channels != blocks[-1] or P % tile.positions != 0),
        num_tiles=num_tiles,
        num_warps=whole.num_warps,
        max_registers=whole.max_registers,
        block=blocks[-1],
        groups=next_power_of_two(blocks[-1] // D),
        num_programs=N * (Ch + Cs) // blocks[-1],
    )


def _tile(tiles: Tiles, channels_last: bool, itemsize: int, vec: int, channels: int, P: int) -> Tile:
    """At most ``channels`` wide, up to a power of two; as if they and the positions filled it."""
    size = tiles.rows_of_thread * 32 * tiles.num_warps * VECTOR_BYTES // itemsize
    row = tiles.bytes_of_row // itemsize
    if channels_last:
        channels = max(vec, min(row, next_power_of_two(channels)))
        positions = min(size // channels, next_power_of_two(P))
    else:
        positions = max(vec, min(row, next_power_of_two(P)))
        channels = min(size // positions, next_power_of_two(channels))
    return Tile(channels, positions, channels_last, vec, masked=False)


def _split_tiling(
    split: Tiles,
    channels_last: bool,
    itemsize: int,
    vec: int,
    N: int,
    Ch: int,
    Cs: int,
    P: int,
    num_multiprocessors: int,
) -> SplitTiling:
    tile = _tile(split, channels_last, itemsize, vec, max(Ch, Cs), P)
    channels, positions = tile.channels, tile.positions
    blocks = math.ceil(Ch / channels) + math.ceil(Cs / channels)
    tiles = math.ceil(P / positions)
    walk = min(split.max_tiles, tiles)
    while walk > 1 and N * blocks * math.ceil(tiles / walk) * split.num_warps < (split.min_warps * num_multiprocessors):
        walk = math.ceil(walk / 2)
    num_chunks = math.ceil(tiles / walk)
    walk = math.ceil(tiles / num_chunks)
    masked = any(x % channels for x in (Ch, Cs)) or P % positions != 0
    return SplitTiling(
        tile=tile._replace(masked=masked),
        num_warps=split.num_warps,
        walk=walk * positions,
        num_chunks=num_chunks,
        num_programs=N * blocks * num_chunks,
    )


def next_power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()
