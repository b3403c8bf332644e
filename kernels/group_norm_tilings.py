"""Which form and tile the Triton kernels of ``skip_group_norm`` take, by shape: plain numbers, no tuning at run time.

- resident: a program holds whole groups in registers and reads each input once;
- looped: a program walks twice through whole groups, and the second read finds them in L1 or L2;
- split: a group is cut into tiles for several programs, which takes three launches for each few images.

Clusters would let more groups be resident, but a sum over the blocks of a cluster compiles from Triton 3.8 on only.
bench/tune_group_norm.py measures the tables on a GPU and prints them anew.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache


@dataclass(frozen=True)
class Tile:
    num_elements: int  # a power of two
    num_warps: int
    spill_bytes: int = 0  # of registers, per thread, at most


@dataclass(frozen=True)
class Table:
    source: str
    resident: tuple[Tile, ...]  # the smallest that holds whole groups is taken
    looped: Tile
    split: Tile


_COMPILED = "spills of Triton 3.6.0 and 3.7.1 compiling for sm_90; not yet timed"
_SMALL_FORWARD = (Tile(1024, 2), Tile(4096, 4, spill_bytes=16), Tile(16384, 8))
_SMALL_BACKWARD = (Tile(1024, 4), Tile(2048, 4), Tile(8192, 8))

# By direction, channels_last and bytes of an element.
TABLES: Mapping[tuple[str, bool, int], Table] = {
    ("forward", False, 2): Table(
        _COMPILED,
        resident=(*_SMALL_FORWARD, Tile(32768, 16, spill_bytes=200)),
        looped=Tile(8192, 8),
        split=Tile(8192, 8),
    ),
    ("forward", False, 4): Table(_COMPILED, resident=_SMALL_FORWARD, looped=Tile(8192, 8), split=Tile(8192, 8)),
    ("forward", True, 2): Table(
        _COMPILED,
        resident=(*_SMALL_FORWARD, Tile(32768, 16, spill_bytes=264)),
        looped=Tile(8192, 8),
        split=Tile(8192, 8),
    ),
    ("forward", True, 4): Table(_COMPILED, resident=_SMALL_FORWARD, looped=Tile(8192, 8), split=Tile(8192, 8)),
    ("backward", False, 2): Table(
        _COMPILED,
        resident=(*_SMALL_BACKWARD, Tile(16384, 16, spill_bytes=136)),
        looped=Tile(8192, 8),
        split=Tile(4096, 8),
    ),
    ("backward", False, 4): Table(_COMPILED, resident=_SMALL_BACKWARD, looped=Tile(8192, 8), split=Tile(4096, 8)),
    ("backward", True, 2): Table(
        _COMPILED,
        resident=(*_SMALL_BACKWARD, Tile(16384, 8, spill_bytes=272)),
        looped=Tile(8192, 8),
        split=Tile(4096, 8),
    ),
    ("backward", True, 4): Table(
        _COMPILED, resident=_SMALL_BACKWARD, looped=Tile(8192, 8, spill_bytes=32), split=Tile(4096, 8)
    ),
}

# What the looped form may keep in use at once, and what a step of the split form may read, so that the second read
# hits L2: that of an H100 or H200 has 50 MB in two halves.
LOOP_BYTES = 40 * 2**20
WALK_BYTES = 24 * 2**20
# Of a looped tile, so that groups of thousands of channels do not become a walk in small steps.
MIN_LOOPED_POSITIONS = 16
# Of a contiguous split tile, so that the partial sums of a channel stay few.
MAX_SPLIT_POSITIONS = 2048
# Where whole groups would leave more of the GPU idle than this, inputs from this size on are split.
MIN_FILL = 0.25
MIN_SPLIT_BYTES = 4 * 2**20
# A tile of channels_last reads pieces of rows, and memory moves bursts. The best choice of whole groups may waste some
# of them, because neighbouring programs soon use the rest; below this part of useful bytes, the split form is taken.
BURST_BYTES = 64
MIN_BURST_EFFICIENCY = 0.6
GOOD_BURST_EFFICIENCY = 0.75
LINE_BYTES = 128  # of L2, and of a row of a split tile


@dataclass(frozen=True, kw_only=True)
class Tiling:
    form: str  # "resident", "looped" or "split"
    block_channels: int  # of a tile; whole groups unless split
    block_c: int  # the next power of two
    block_p: int  # positions of a tile; all of them where resident
    num_groups: int  # of a tile, up to a power of two
    num_warps: int
    num_programs: int  # per image
    num_chunks: int  # tiles along the positions, where split
    images: int  # per step, where split


@cache
def choose_tiling(
    direction: str, channels_last: bool, itemsize: int, N: int, C: int, G: int, P: int, num_multiprocessors: int
) -> Tiling:
    """For N images of C channels in G groups and P positions; ``direction`` is "forward" or "backward"."""
    table = TABLES[direction, channels_last, itemsize]
    reads = 1 if direction == "forward" else 2
    candidates = []
    for groups in _divisors(G) if channels_last else (1,):
        channels = groups * (C // G)
        num_programs = N * (G // groups)
        fill = min(1.0, num_programs / num_multiprocessors)
        efficiency = 1.0
        if channels_last and channels < C:
            efficiency = _burst_efficiency(channels * itemsize)
        if fill < MIN_FILL and N * C * P * itemsize >= MIN_SPLIT_BYTES:
            continue
        if efficiency < MIN_BURST_EFFICIENCY:
            continue
        num_elements = next_power_of_two(channels) * next_power_of_two(P)
        tile = next((tile for tile in table.resident if tile.num_elements >= num_elements), None)
        bytes_in_use = min(num_programs, num_multiprocessors) * reads * channels * P * itemsize
        looped_positions = table.looped.num_elements // next_power_of_two(channels)
        if tile is None and (bytes_in_use > LOOP_BYTES or looped_positions < MIN_LOOPED_POSITIONS):
            continue
        preference = (tile is not None, fill, min(efficiency, GOOD_BURST_EFFICIENCY), -channels)
        candidates.append((preference, channels, groups, tile))
    if not candidates:
        return _split_tiling(table.split, channels_last, itemsize, reads, N, C, P)
    _, channels, groups, tile = max(candidates, key=lambda candidate: candidate[0])
    block_c = next_power_of_two(channels)
    return Tiling(
        form="resident" if tile else "looped",
        block_channels=channels,
        block_c=block_c,
        block_p=next_power_of_two(P) if tile else table.looped.num_elements // block_c,
        num_groups=next_power_of_two(groups),
        num_warps=(tile or table.looped).num_warps,
        num_programs=G // groups,
        num_chunks=1,
        images=N,
    )


def _split_tiling(tile: Tile, channels_last: bool, itemsize: int, reads: int, N: int, C: int, P: int) -> Tiling:
    if channels_last:
        block_c = min(LINE_BYTES // itemsize, next_power_of_two(C))
        block_p = min(tile.num_elements // block_c, next_power_of_two(P))
    else:
        block_p = min(MAX_SPLIT_POSITIONS, next_power_of_two(P))
        block_c = min(tile.num_elements // block_p, next_power_of_two(C))
    images = min(N, max(1, WALK_BYTES // (reads * C * P * itemsize)))
    num_chunks = math.ceil(P / block_p)
    return Tiling(
        form="split",
        block_channels=block_c,
        block_c=block_c,
        block_p=block_p,
        num_groups=1,
        num_warps=tile.num_warps,
        num_programs=num_chunks * math.ceil(C / block_c),
        num_chunks=num_chunks,
        images=math.ceil(N / math.ceil(N / images)),  # steps of one size
    )


def next_power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()


def _divisors(n: int) -> Iterator[int]:
    return (k for k in range(1, n + 1) if n % k == 0)


def _burst_efficiency(piece_bytes: int) -> float:
    """The bytes of a piece of a row over those of the bursts that it touches, on average over its places in the row."""
    overhang = 0 if piece_bytes % BURST_BYTES == 0 else BURST_BYTES - math.gcd(piece_bytes, BURST_BYTES)
    return piece_bytes / (piece_bytes + overhang)
