"""Which tile the Triton products of ``skip_linear`` take, by size of an element and rough shape.

Nothing is tuned at run time. A table runs from its largest tile down, and the first that makes enough programs is
taken: a larger tile reads each operand fewer times. None of this has been timed on a GPU yet.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache


@dataclass(frozen=True)
class Tile:
    """Of a product (num_rows, K) @ (K, num_cols)."""

    block_rows: int
    block_cols: int
    block_k: int
    num_warps: int
    num_stages: int  # of loads under way
    spill_bytes: int = 0  # of registers, per thread, at most, on sm_80; none on sm_90


@dataclass(frozen=True)
class Table:
    source: str
    tiles: tuple[Tile, ...]


_HALF = "usual tiles of 16-bit GEMMs on Hopper; spills of Triton 3.6.0 and 3.7.1 compiling them; not yet timed"
_WIDE = "those of 16 bits, with fp32 operands in shared memory, as far as Triton 3.7.1 compiles them; not yet timed"
_SINGLE = "IEEE fp32 has no tensor cores: what Triton 3.6.0 and 3.7.1 compile without spills; not yet timed"

# By product, bytes of its elements, and bytes of the elements that its first operand is read in.
TABLES: Mapping[tuple[str, int, int], Table] = {
    ("forward", 2, 2): Table(
        _HALF, (Tile(128, 256, 64, 8, 3, spill_bytes=56), Tile(128, 128, 64, 8, 3), Tile(64, 64, 64, 4, 4))
    ),
    ("inputs", 2, 2): Table(
        _HALF, (Tile(256, 128, 64, 8, 3, spill_bytes=24), Tile(128, 128, 64, 8, 3), Tile(64, 64, 64, 4, 4))
    ),
    ("weight", 2, 2): Table(
        _HALF, (Tile(128, 256, 64, 8, 3, spill_bytes=152), Tile(128, 128, 64, 8, 3), Tile(64, 64, 64, 4, 4))
    ),
    ("forward", 2, 4): Table(
        _WIDE, (Tile(128, 256, 64, 8, 3, spill_bytes=56), Tile(128, 128, 64, 8, 3), Tile(64, 64, 64, 4, 4))
    ),
    # A tile twice as large holds too much when it writes fp32 and reads an fp32 skip for the gradient of its scale.
    ("inputs", 2, 4): Table(_WIDE, (Tile(128, 128, 64, 8, 3), Tile(64, 64, 64, 4, 4))),
    ("weight", 2, 4): Table(
        _WIDE, (Tile(128, 256, 64, 8, 3, spill_bytes=168), Tile(128, 128, 64, 8, 3), Tile(64, 64, 64, 4, 4))
    ),
    ("forward", 4, 4): Table(_SINGLE, (Tile(128, 64, 16, 4, 3),)),
    ("inputs", 4, 4): Table(_SINGLE, (Tile(128, 64, 16, 4, 3),)),
    ("weight", 4, 4): Table(_SINGLE, (Tile(128, 64, 16, 4, 3),)),
}

# Neighbouring programs take a column of so many tiles before the next one, so that they share operands in L2.
GROUP_ROWS = 8
# The sum of the weight gradient runs over all tokens and its result is small, so it is cut where that fills the GPU.
# What a program costs beside its tokens, in the time of one token: an estimate, at 23 GB/s and 4.5 TFLOP/s for each
# multiprocessor of an H100. A program that writes a partial sum in fp32, to be read again, costs more.
WHOLE_COST = 400
PARTIAL_COST = 1000
MAX_SPLITS = 5


def num_tiles(tile: Tile, num_rows: tuple[int, ...], num_cols: tuple[int, ...]) -> int:
    """Of a result that is put together from blocks of so many rows and columns; a tile lies within one block."""
    rows = sum(math.ceil(n / tile.block_rows) for n in num_rows)
    return rows * sum(math.ceil(n / tile.block_cols) for n in num_cols)


@cache
def choose_tile(
    product: str,
    itemsize: int,
    read_itemsize: int,
    num_rows: tuple[int, ...],
    num_cols: tuple[int, ...],
    num_programs: int,
) -> Tile:
    """``product`` is "forward", "inputs" or "weight"; its result is as in ``num_tiles``."""
    tiles = TABLES[product, itemsize, read_itemsize].tiles
    return next((tile for tile in tiles if num_tiles(tile, num_rows, num_cols) >= num_programs), tiles[-1])


@cache
def choose_num_splits(tiles: int, M: int, num_multiprocessors: int) -> int:
    """In how many partial sums, each over a part of M tokens, ``tiles`` tiles of the weight gradient are made."""

    def cost(splits: int) -> int:
        waves = math.ceil(tiles * splits / num_multiprocessors)
        return waves * (math.ceil(M / splits) + (WHOLE_COST if splits == 1 else PARTIAL_COST))

    return min(range(1, MAX_SPLITS + 1), key=cost)
