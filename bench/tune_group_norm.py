"""Times the candidates for the tables of kernels/group_norm_tilings.py on a GPU and prints the best, to be pasted.

    python -m scalelong.bench.tune_group_norm --max-seconds 1500
    python -m scalelong.bench.tune_group_norm --dry-run      only compiles every candidate for sm_90; needs no GPU

Each candidate of a form runs at the shapes of shapes.py that it can take. Of those for one entry of a table, that with
the smallest mean of its times over the best of the shape is printed; then the best form and step for each shape.
"""

import argparse
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import date
from itertools import product
from statistics import fmean

import torch
from triton.testing import do_bench

from scalelong.bench.ahead_of_time import distinct, launches_of, spill_bytes
from scalelong.bench.shapes import GROUPS, SKIP_CONCATS, SkipConcat
from scalelong.kernels import group_norm_tilings as tilings
from scalelong.kernels import group_norm_triton
from scalelong.kernels.group_norm_tilings import Tile, Tiling, next_power_of_two

# Compilation takes most of the time: about a second for each kernel of a candidate.
RESIDENT_WARPS = (2, 4, 8, 16)
LARGEST_RESIDENT = 65536
LOOPED = (Tile(4096, 4), Tile(4096, 8), Tile(8192, 8), Tile(8192, 16), Tile(16384, 16))
SPLIT = (Tile(4096, 4), Tile(4096, 8), Tile(8192, 8), Tile(16384, 8))
WALK_MIB = (24, 10_000)  # the second is more than any input here: one step
REPEATS_MS = 20
DIRECTIONS = ("forward", "backward")
Key = tuple[str, bool, int]


@dataclass(frozen=True)
class Candidate:
    form: str
    tile: Tile
    walk_mib: int = 24

    def __str__(self) -> str:
        step = f", {self.walk_mib} MiB" if self.form == "split" else ""
        return f"{self.form} {self.tile.num_elements}/{self.tile.num_warps}{step}"


@contextmanager
def forced(key: Key, candidate: Candidate) -> Iterator[None]:
    """The launchers take this form and tile wherever they can."""
    table = tilings.TABLES[key]
    before = (tilings.TABLES, tilings.LOOP_BYTES, tilings.WALK_BYTES, tilings.MIN_FILL)
    resident = (candidate.tile,) if candidate.form == "resident" else ()
    chosen = replace(table, resident=resident, **({} if resident else {candidate.form: candidate.tile}))
    tilings.TABLES = {**tilings.TABLES, key: chosen}
    tilings.LOOP_BYTES = sys.maxsize if candidate.form == "looped" else -1
    tilings.WALK_BYTES = candidate.walk_mib * 2**20
    tilings.MIN_FILL = 0.0
    tilings.choose_tiling.cache_clear()
    try:
        yield
    finally:
        tilings.TABLES, tilings.LOOP_BYTES, tilings.WALK_BYTES, tilings.MIN_FILL = before
        tilings.choose_tiling.cache_clear()


def candidates_for(key: Key, concat: SkipConcat, num_multiprocessors: int) -> Iterator[Candidate]:
    direction, channels_last, itemsize = key
    shape = (concat.gpu_batch, concat.num_channels, GROUPS, concat.size**2)

    def tiling_of(candidate: Candidate) -> Tiling:
        with forced(key, candidate):
            return tilings.choose_tiling(direction, channels_last, itemsize, *shape, num_multiprocessors)

    for candidate in (
        *(Candidate("resident", Tile(LARGEST_RESIDENT, warps)) for warps in RESIDENT_WARPS),
        *(Candidate("looped", tile) for tile in LOOPED),
        *(Candidate("split", tile, walk_mib) for tile, walk_mib in product(SPLIT, WALK_MIB)),
    ):
        tiling = tiling_of(candidate)
        if tiling.form != candidate.form:
            continue
        size = tiling.block_c * tiling.block_p
        if candidate.form == "resident":
            if not 4 <= size // (32 * tiling.num_warps) <= 128:
                continue
            candidate = replace(candidate, tile=Tile(max(1024, next_power_of_two(size)), tiling.num_warps))
        yield candidate


def call(key: Key, concat: SkipConcat) -> Callable[[], tuple[torch.Tensor, ...]]:
    """A launch on fixed tensors; returns what it fills."""
    direction, channels_last, itemsize = key
    N, Ch, Cs, size = concat.gpu_batch, concat.num_hidden, concat.num_skip, concat.size
    C = Ch + Cs
    generator = torch.Generator("cuda").manual_seed(0)

    def image(channels: int) -> torch.Tensor:
        x = torch.randn(N, channels, size, size, device="cuda", generator=generator)
        x = x.to(torch.bfloat16 if itemsize == 2 else torch.float32)
        return x.to(memory_format=torch.channels_last) if channels_last else x

    h, s, y, dy = image(Ch), image(Cs), image(C), image(C)
    dh, ds = torch.empty_like(h), torch.empty_like(s)
    weight, bias = torch.randn(2, C, device="cuda", generator=generator).unbind()
    mean, rstd = torch.empty(2, N, GROUPS, device="cuda").unbind()
    inputs = (h, s, torch.full((), 0.7, device="cuda"), 1.0, weight, bias, None, None)

    def forward() -> tuple[torch.Tensor, ...]:
        group_norm_triton.forward(*inputs, GROUPS, 1e-5, "silu", channels_last, y, mean, rstd)
        return y, mean, rstd

    def backward() -> tuple[torch.Tensor, ...]:
        small = group_norm_triton.backward(dy, *inputs, mean, rstd, GROUPS, "silu", channels_last, dh, ds)
        return dh, ds, *(x for x in small[1:] if x is not None)  # dscale cancels

    forward()
    return forward if direction == "forward" else backward


def agree(found: tuple[torch.Tensor, ...], expected: list[torch.Tensor]) -> bool:
    return all((x - y).norm() <= 1e-2 * y.norm() for x, y in zip((x.float() for x in found), expected, strict=True))


def tune(max_seconds: float) -> None:
    deadline = time.monotonic() + max_seconds
    device = torch.cuda.get_device_properties(0)
    entries: dict[tuple[Key, str, int], dict[Candidate, list[float]]] = defaultdict(lambda: defaultdict(list))
    # Those of 2 bytes first: that is what networks train in.
    for itemsize, concat, direction, channels_last in product((2, 4), SKIP_CONCATS, DIRECTIONS, (False, True)):
        key = (direction, channels_last, itemsize)
        if time.monotonic() > deadline:
            print(f"# out of time before {key} {concat}")
            break
        run = call(key, concat)
        expected = [x.float().clone() for x in run()]
        ms: dict[Candidate, float] = {}
        for candidate in candidates_for(key, concat, device.multi_processor_count):
            with forced(key, candidate):
                if not agree(run(), expected):
                    raise SystemExit(f"{key} {concat}: {candidate} gives other numbers")
                ms[candidate] = float(do_bench(run, warmup=5, rep=REPEATS_MS, return_mode="median"))  # pyright: ignore
        report(key, concat, ms)
        for form in ("resident", "looped", "split"):
            times = {candidate: t for candidate, t in ms.items() if candidate.form == form}
            for candidate, t in times.items():
                entry = candidate.tile.num_elements if form == "resident" else 0
                entries[key, form, entry][candidate].append(t / min(times.values()))
    print_tables(entries, f"{device.name}, {date.today()}, bench/tune_group_norm.py")


def report(key: Key, concat: SkipConcat, ms: dict[Candidate, float]) -> None:
    best = sorted(ms, key=ms.__getitem__)
    by_form = {form: next((c for c in best if c.form == form), None) for form in ("resident", "looped", "split")}
    shown = "; ".join(f"{c} {1e3 * ms[c]:.1f} us" for c in by_form.values() if c is not None)
    layout = "channels_last" if key[1] else "contiguous"
    print(f"# {key[0]} {layout} {8 * key[2]} bits {concat}: {shown}", flush=True)


def print_tables(entries: dict[tuple[Key, str, int], dict[Candidate, list[float]]], source: str) -> None:
    def best_tile(times: dict[Candidate, list[float]]) -> Tile:
        most = max(map(len, times.values()))
        return min((c for c in times if len(times[c]) == most), key=lambda c: fmean(times[c])).tile

    for key, table in tilings.TABLES.items():
        resident = [
            best_tile(times) for (of, form, _), times in sorted(entries.items()) if (of, form) == (key, "resident")
        ]
        tiles = {form: best_tile(entries[key, form, 0]) for form in ("looped", "split") if (key, form, 0) in entries}
        print(f"    {key}: {replace(table, source=source, resident=tuple(resident) or table.resident, **tiles)},")


def dry_run() -> None:
    for key, concat in product(tilings.TABLES, SKIP_CONCATS):
        direction, channels_last, itemsize = key
        shape = (concat.gpu_batch, concat.num_hidden, concat.num_skip, GROUPS, concat.size, concat.size)
        for candidate in candidates_for(key, concat, 132):
            with forced(key, candidate):
                dtype = torch.bfloat16 if itemsize == 2 else torch.float32
                launches = launches_of(direction, shape, channels_last=channels_last, dtype=dtype)
            spills = max(spill_bytes(launch.compile(90)) for launch in distinct(launches) if launch.stage)
            print(f"{direction} {'channels_last' if channels_last else 'contiguous'} {concat}: {candidate}, {spills} B")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--max-seconds", type=float, default=1500.0)
    parser.add_argument("--dry-run", action="store_true")
    arguments = parser.parse_args()
    if arguments.dry_run:
        dry_run()
    elif torch.cuda.is_available():
        tune(arguments.max_seconds)
    else:
        parser.exit(1, "tune_group_norm: torch sees no GPU; --dry-run compiles the candidates without one\n")


if __name__ == "__main__":
    main()
