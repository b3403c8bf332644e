"""Times the candidates for the tables of kernels/group_norm_tilings.py on a GPU and prints the best, to be pasted.

    python -m scalelong.bench.tune_group_norm --max-seconds 1500
    python -m scalelong.bench.tune_group_norm --dry-run      only compiles the candidates for sm_90; needs no GPU

Candidates run at the shapes of shapes.py that they can take, all sizes alike however soon time is over, without those
that the machine code rules out: with large spills, or with so many registers that few warps fit on an SM. A table gets
the candidates with the smallest mean of their times over the best of the shape; small groups are held whole as long as
that is the fastest. What comes next is compiled on the other cores meanwhile.
"""

import argparse
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import date
from functools import partial
from itertools import groupby, product
from statistics import fmean
from typing import NamedTuple

import torch
from torch import Tensor
from triton.testing import do_bench

from scalelong.bench.ahead_of_time import compiling_processes, launches_of
from scalelong.bench.machine_code import machine_code
from scalelong.bench.shapes import GROUPS, SKIP_CONCATS, SkipConcat
from scalelong.kernels import group_norm_tilings as tilings
from scalelong.kernels import group_norm_triton
from scalelong.kernels.group_norm_arguments import Options, Tensors, Wanted
from scalelong.kernels.group_norm_tilings import Flat, FlatTiling, SplitTiling, Table, Tiles, WholeTiling
from scalelong.kernels.launches import Kept

# Compilation takes most of the time: about a second for each kernel of a candidate.
FLAT = tuple(Flat(warps, 12, registers) for warps, registers in product((1, 2, 4, 8, 16), (None, 128)))
WHOLE = tuple(
    Tiles(warps, 12, rows_of_thread=rows, max_registers=registers)
    for warps, rows, registers in product((1, 2, 4), (1, 2, 4), (None, 128))
)
SPLIT = tuple(
    Tiles(warps, tiles, rows_of_thread=rows, min_warps=fewest)
    for warps, rows, tiles, fewest in product((2, 4, 8), (1, 2, 4), (8, 16, 32), (7, 14, 28, 56))
)
MAX_SPILL_BYTES = 256  # of a thread
MIN_WARPS = 16  # on an SM, to hide the latency of memory
TOLERANCE = 1.03  # of the best time: as good
REPEATS_MS = 8
TILINGS = {"flat": FlatTiling, "whole": WholeTiling, "split": SplitTiling}
Key = tuple[str, bool]


class Candidate(NamedTuple):
    form: str
    entry: Flat | Tiles

    def __str__(self) -> str:
        entry = self.entry
        registers = "" if entry.max_registers is None else f", {entry.max_registers} registers"
        if isinstance(entry, Flat):
            return f"flat {entry.num_warps} warps{registers}"
        tiles = f", {entry.max_tiles} tiles, {entry.min_warps} warps on an SM" if self.form == "split" else ""
        return f"{self.form} {entry.num_warps} warps, {entry.rows_of_thread} rows{tiles}{registers}"


@dataclass(frozen=True)
class Case:
    itemsize: int
    concat: SkipConcat
    key: Key  # direction and channels_last

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.itemsize == 2 else torch.float32

    @property
    def rows_of_group(self) -> int:
        return self.concat.num_channels // GROUPS * self.concat.size**2 * self.itemsize // tilings.VECTOR_BYTES

    def __str__(self) -> str:
        return (
            f"{self.key[0]} {'channels_last' if self.key[1] else 'contiguous'} {8 * self.itemsize} bits {self.concat}"
        )


class Timed(NamedTuple):
    """A candidate at a shape."""

    ms: float
    num_tiles: int  # of a program, where it holds whole groups
    spill_bytes: int


Times = dict[Case, dict[Candidate, Timed]]
Tiling = FlatTiling | WholeTiling | SplitTiling


def cases() -> list[Case]:
    """Those of 2 bytes first: that is what networks train in. Every fourth size, then those between."""
    by_size = sorted(SKIP_CONCATS, key=lambda x: x.num_elements(x.gpu_batch), reverse=True)
    concats = [concat for first in (0, 2, 1, 3) for concat in by_size[first::4]]
    keys = product(("forward", "backward"), (False, True))
    return [Case(*x) for x in product((2, 4), concats, list(keys))]


@contextmanager
def forced(key: Key, candidate: Candidate) -> Iterator[None]:
    """The launchers take this candidate wherever they can."""
    form, entry = candidate
    table = Table(
        source="",
        flat=(entry,) if isinstance(entry, Flat) else (),
        whole=entry if form == "whole" and isinstance(entry, Tiles) else None,
        split=entry if form == "split" and isinstance(entry, Tiles) else tilings.TABLES[key].split,
    )
    before = (tilings.TABLES, tilings.MIN_FILL, group_norm_triton._plans)
    tilings.TABLES, tilings.MIN_FILL = {**tilings.TABLES, key: table}, 0.0
    group_norm_triton._plans = Kept()
    tilings.choose_tiling.cache_clear()
    try:
        yield
    finally:
        tilings.TABLES, tilings.MIN_FILL, group_norm_triton._plans = before
        tilings.choose_tiling.cache_clear()


def candidates_for(case: Case, num_multiprocessors: int) -> dict[Tiling, list[Candidate]]:
    """By what they come to at the shape of the case: walks over fewer tiles than are allowed are the same, for one."""
    c, (direction, channels_last) = case.concat, case.key
    vec = tilings.VECTOR_BYTES // case.itemsize
    sizes = (c.gpu_batch, c.num_hidden, c.num_skip, GROUPS, c.size**2, num_multiprocessors)
    forms = {"flat": () if channels_last else FLAT, "whole": WHOLE if channels_last else (), "split": SPLIT}
    found: dict[Tiling, list[Candidate]] = {}
    for candidate in (Candidate(form, entry) for form, entries in forms.items() for entry in entries):
        with forced(case.key, candidate):
            tiling = tilings.choose_tiling(direction, channels_last, case.itemsize, vec, *sizes)
        if isinstance(tiling, TILINGS[candidate.form]):
            found.setdefault(tiling, []).append(candidate)
    return found


def compiled(case: Case, candidate: Candidate, arch: int) -> tuple[int, int]:
    """Of the kernels that hold activations: the most spilled bytes of a thread, the fewest warps on an SM."""
    c, (direction, channels_last) = case.concat, case.key
    shape = (c.gpu_batch, c.num_hidden, c.num_skip, GROUPS, c.size, c.size)
    with forced(case.key, candidate):
        launches = launches_of(direction, shape, channels_last=channels_last, dtype=case.dtype)
    codes = [
        machine_code(launch.compile(arch), arch)
        for launch in launches
        if not any(word in launch.name for word in ("combine", "parameters"))
    ]
    return max(code.stack_bytes for code in codes), min(code.num_warps_on_an_sm for code in codes)


def num_tiles(tiling: Tiling) -> int:
    return tiling.num_tiles if isinstance(tiling, WholeTiling) else 1


def is_ruled_out(spill_bytes: int, num_warps: int) -> bool:
    return spill_bytes > MAX_SPILL_BYTES or num_warps < MIN_WARPS


def call(case: Case) -> Callable[[], tuple[Tensor, ...]]:
    """A launch on fixed tensors; returns what it fills."""
    c, (direction, channels_last) = case.concat, case.key
    generator = torch.Generator("cuda").manual_seed(0)

    def image(channels: int) -> Tensor:
        x = torch.randn(c.gpu_batch, channels, c.size, c.size, device="cuda", generator=generator)
        return x.to(case.dtype, memory_format=torch.channels_last if channels_last else torch.contiguous_format)

    h, s, y, dy = (image(channels) for channels in (c.num_hidden, c.num_skip, c.num_channels, c.num_channels))
    weight, bias = torch.randn(2, c.num_channels, device="cuda", generator=generator).unbind()
    mean, rstd = torch.empty(2, c.gpu_batch, GROUPS, device="cuda").unbind()
    tensors = Tensors(h, s, torch.full((), 0.7, device="cuda"), weight, bias, None, None)
    options, wanted = Options(1.0, GROUPS, 1e-5, "silu"), Wanted(gain=False, shift=False)

    def forward() -> tuple[Tensor, ...]:
        group_norm_triton.forward(tensors, options, channels_last, y, mean, rstd)
        return y, mean, rstd

    def backward() -> tuple[Tensor, ...]:
        dh, ds, _, *grads = group_norm_triton.backward(dy, tensors, mean, rstd, options, channels_last, wanted)
        return tuple(x for x in (dh, ds, *grads) if x is not None)  # that of the scale cancels

    forward()
    return forward if direction == "forward" else backward


def agree(found: Sequence[Tensor], expected: Sequence[Tensor]) -> bool:
    return all((x.float() - y).norm() <= 1e-2 * y.norm() for x, y in zip(found, expected, strict=True))


class Job(NamedTuple):
    case: Case
    tiling: Tiling
    candidates: tuple[Candidate, ...]
    """All that come to this tiling."""


def tune(max_seconds: float) -> None:
    deadline = time.monotonic() + max_seconds
    device = torch.cuda.get_device_properties(0)
    jobs = [
        Job(case, tiling, tuple(candidates))
        for case in cases()
        for tiling, candidates in candidates_for(case, device.multi_processor_count).items()
    ]
    times: Times = {}
    with compiling_processes() as pool:
        codes = pool.imap(partial(compiled_job, arch=90 if device.major >= 9 else 80), jobs)
        for case, of_case in groupby(zip(jobs, codes, strict=True), key=lambda pair: pair[0].case):
            if time.monotonic() > deadline:
                print(f"# out of time before {case}")
                break
            times[case] = timed(case, of_case)
    source = f"{device.name}, {date.today()}, bench/tune_group_norm.py"
    for key, table in tables(times, source).items():
        print(f"    {key}: {table},")


def compiled_job(job: Job, arch: int) -> tuple[int, int]:
    return compiled(job.case, job.candidates[0], arch)


def timed(case: Case, jobs: Iterable[tuple[Job, tuple[int, int]]]) -> dict[Candidate, Timed]:
    """Of the candidates that their machine code does not rule out."""
    run, found = call(case), {}
    expected = [x.float().clone() for x in run()]
    before = 1e3 * _ms(run)
    for job, (spill_bytes, num_warps) in jobs:
        if is_ruled_out(spill_bytes, num_warps):
            continue
        with forced(case.key, job.candidates[0]):
            if not agree(run(), expected):
                print(f"# {case}: {job.candidates[0]} GIVES OTHER NUMBERS", flush=True)
                continue
            found |= dict.fromkeys(job.candidates, Timed(_ms(run), num_tiles(job.tiling), spill_bytes))
    print(f"# {case}: {before:.1f} us by today's table; {fastest_of_each_form(found)}", flush=True)
    return found


def _ms(run: Callable[[], object]) -> float:
    return float(do_bench(run, warmup=4, rep=REPEATS_MS, return_mode="median"))  # pyright: ignore


def fastest_of_each_form(timed: Mapping[Candidate, Timed]) -> str:
    best = sorted(timed, key=lambda candidate: timed[candidate].ms)
    by_form = {candidate.form: candidate for candidate in reversed(best)}
    return "; ".join(f"{x} {1e3 * timed[x].ms:.1f} us" for x in sorted(by_form.values(), key=best.index))


def tables(times: Times, source: str) -> dict[Key, Table]:
    """What was not timed stays as it is."""
    found = {}
    for key, table in tilings.TABLES.items():
        timed = {case: of_case for case, of_case in times.items() if case.key == key and of_case}
        if not timed:
            continue
        changes = {form: tiles for form in ("whole", "split") if (tiles := best_tiles(timed, form)) is not None}
        flat = () if key[1] else flat_entries(timed)
        flat = (*smaller_than(timed, table.flat), *flat) if flat else table.flat
        found[key] = replace(table, source=source, flat=flat, **changes)  # type: ignore[arg-type]
    return found


def slowdowns(timed: Times, candidate: Candidate) -> dict[Case, float]:
    """Over the best of all candidates, at each shape where it ran."""
    return {
        case: of_case[candidate].ms / min(x.ms for x in of_case.values())
        for case, of_case in timed.items()
        if candidate in of_case
    }


def best_tiles(timed: Times, form: str) -> Tiles | None:
    """At the most shapes, and there the least slow; of whole groups as many tiles as are not slower than splitting."""
    candidates = {x for of_case in timed.values() for x in of_case if x.form == form}
    if not candidates:
        return None
    ratios = {candidate: slowdowns(timed, candidate) for candidate in candidates}
    if form == "whole":
        most = {x: [case for case, ratio in ratios[x].items() if ratio <= TOLERANCE] for x in candidates}
        best = max(candidates, key=lambda x: (len(most[x]), -fmean(ratios[x].values())))
        used = most[best]
        if not used:
            return None
        max_tiles = max(timed[case][best].num_tiles for case in used)
    else:
        best = min(candidates, key=lambda x: (-len(ratios[x]), fmean(ratios[x].values())))
        used, max_tiles = list(ratios[best]), best.entry.max_tiles  # type: ignore[union-attr]
    spill_bytes = max(timed[case][best].spill_bytes for case in used)
    return replace(best.entry, max_tiles=max_tiles, spill_bytes=spill_bytes)  # type: ignore[return-value]


def smaller_than(timed: Times, entries: Sequence[Flat]) -> Iterator[Flat]:
    """Those that hold no group that was timed: a run cut short has not come to them."""
    smallest = min(case.rows_of_group for case in timed)
    return (flat for flat in entries if 32 * flat.num_warps * flat.max_pieces < smallest)


def flat_entries(timed: Times) -> tuple[Flat, ...]:
    """From the smallest groups to the largest, the fewest warps that are as good as anything else."""
    left = sorted(timed, key=lambda case: case.rows_of_group)
    entries = []
    for num_warps in sorted({flat.num_warps for flat in FLAT}):
        found: list[tuple[int, float, Flat, list[Case]]] = []
        for flat in (x for x in FLAT if x.num_warps == num_warps):
            ratios = slowdowns(timed, Candidate("flat", flat))
            taken = _while_good(left, ratios)
            if taken:
                found.append((len(taken), -fmean(ratios[case] for case in taken), flat, taken))
        if not found:
            continue
        _, _, flat, taken = max(found, key=lambda x: x[:2])
        left = left[len(taken) :]
        spill_bytes = max(timed[case][Candidate("flat", flat)].spill_bytes for case in taken)
        max_pieces = math.ceil(taken[-1].rows_of_group / (32 * num_warps))
        entries.append(replace(flat, max_pieces=max_pieces, spill_bytes=spill_bytes))
    return tuple(entries)


def _while_good(cases: Sequence[Case], ratios: Mapping[Case, float]) -> list[Case]:
    taken = []
    for case in cases:
        if ratios.get(case, math.inf) > TOLERANCE:
            break
        taken.append(case)
    return taken


def dry_run(max_seconds: float) -> None:
    deadline = time.monotonic() + max_seconds
    for case in cases():
        for candidate, *_ in candidates_for(case, 132).values():
            if time.monotonic() > deadline:
                print(f"out of time before {case}: {candidate}")
                return
            spill_bytes, num_warps = compiled(case, candidate, 90)
            verdict = ", ruled out" if is_ruled_out(spill_bytes, num_warps) else ""
            print(f"{case}: {candidate}: {spill_bytes} B spilled, {num_warps} warps on an SM{verdict}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--max-seconds", type=float, default=1500.0)
    parser.add_argument("--dry-run", action="store_true")
    arguments = parser.parse_args()
    if arguments.dry_run:
        dry_run(arguments.max_seconds)
    elif torch.cuda.is_available():
        tune(arguments.max_seconds)
    else:
        parser.exit(1, "tune_group_norm: torch sees no GPU; --dry-run compiles the candidates without one\n")


if __name__ == "__main__":
    main()
