"""How long the launches of a direction take on an H100, modelled from their machine code: no GPU needed.

A launch takes as long as the larger of two: its instructions, of which an H100 issues 132 SM x 4 warps x 1.755 GHz at
best and 60 % of that in practice, and its bytes at 3.0 TB/s, what a copy reaches; and 3 us beside. No latency and no
sector that is read in vain: what is modelled is a floor under what will be measured.
"""

from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from multiprocessing import get_context

import torch

from scalelong.bench.ahead_of_time import Launch, launches_of
from scalelong.bench.machine_code import MachineCode, machine_code
from scalelong.bench.memory_traffic import L2, LEAST_BYTES, Access, Traffic, accesses
from scalelong.bench.shapes import GROUPS, SkipConcat
from scalelong.bench.summary import NUM_PASSES
from scalelong.bench.warp_path import LaunchTotals, WarpPath

NUM_MULTIPROCESSORS = 132
WARPS_AT_ONCE = 4  # that issue an instruction in a cycle of an SM
CYCLES_PER_US = 1755.0
ISSUE_RATE = 0.6
BYTES_PER_US = 3.0e6
LAUNCH_US = 3.0
LEAST_US = 1.0  # of a kernel between two launches


@dataclass(frozen=True)
class KernelFigures:
    """What a compiled kernel is, whichever launch uses it."""

    name: str
    num_warps: int
    registers: int
    stack_bytes: int
    num_programs_on_an_sm: int
    accesses: tuple[Access, ...]
    goes_backwards: bool  # its programs, from the end of the tensors to their start

    @staticmethod
    def of(name: str, code: MachineCode, ttir: str) -> "KernelFigures":
        return KernelFigures(
            name=name,
            num_warps=code.num_warps,
            registers=code.registers,
            stack_bytes=code.stack_bytes,
            num_programs_on_an_sm=code.num_programs_on_an_sm,
            accesses=tuple(accesses(ttir)),
            goes_backwards="tt.get_num_programs" in ttir,
        )

    @property
    def num_warps_on_an_sm(self) -> int:
        return self.num_programs_on_an_sm * self.num_warps


@dataclass(frozen=True)
class ModelledLaunch:
    kernel: KernelFigures
    num_programs: int
    totals: LaunchTotals
    traffic: Traffic

    @property
    def issue_us(self) -> float:
        return self.totals.instructions / (NUM_MULTIPROCESSORS * WARPS_AT_ONCE * CYCLES_PER_US * ISSUE_RATE)

    @property
    def memory_us(self) -> float:
        at_once = NUM_MULTIPROCESSORS * self.kernel.num_programs_on_an_sm
        return self.traffic.from_dram(min(1.0, at_once / self.num_programs)) / BYTES_PER_US

    @property
    def us(self) -> float:
        return LAUNCH_US + max(LEAST_US, self.issue_us, self.memory_us)


@dataclass(frozen=True)
class Case:
    """One direction of skip_group_norm at a shape."""

    concat: SkipConcat
    channels_last: bool
    direction: str
    dtype: torch.dtype = torch.bfloat16
    arch: int = 90

    @property
    def layout(self) -> str:
        return "NHWC" if self.channels_last else "NCHW"

    @property
    def num_elements(self) -> int:
        return self.concat.num_elements(self.concat.gpu_batch)

    @property
    def num_bytes(self) -> int:
        return self.num_elements * self.dtype.itemsize

    @property
    def floor_us(self) -> float:
        return NUM_PASSES[self.direction] * self.num_bytes / BYTES_PER_US

    def launches(self) -> list[Launch]:
        c = self.concat
        shape = (c.gpu_batch, c.num_hidden, c.num_skip, GROUPS, c.size, c.size)
        return launches_of(self.direction, shape, channels_last=self.channels_last, dtype=self.dtype)


@dataclass(frozen=True)
class ModelledCase:
    case: Case
    launches: tuple[ModelledLaunch, ...]

    @property
    def us(self) -> float:
        return sum(launch.us for launch in self.launches)

    @property
    def issue_us(self) -> float:
        return sum(launch.issue_us for launch in self.launches)

    @property
    def issue_over_floor(self) -> float:
        return self.issue_us / self.case.floor_us

    @property
    def share_of_copy(self) -> float:
        return self.case.floor_us / self.us

    @property
    def instructions_per_element(self) -> float:
        """Of a thread."""
        return 32 * sum(launch.totals.instructions for launch in self.launches) / self.case.num_elements

    @cached_property
    def main_kernels(self) -> list[KernelFigures]:
        """Those that read or write activations: all but the small ones between and after them."""
        large = {x.kernel.name: x.kernel for x in self.launches if x.traffic.in_use >= LEAST_BYTES}
        most = max(self.launches, key=lambda x: x.totals.instructions).kernel
        return list(large.values()) or [most]


def modelled(cases: Sequence[Case], num_workers: int = 1) -> list[ModelledCase]:
    """Compiles each distinct kernel once, in so many processes."""
    launches = [case.launches() for case in cases]
    keys = [[x.key(case.arch) for x in of_case] for case, of_case in zip(cases, launches, strict=True)]
    uses: dict[str, dict[tuple[int, int], int]] = {}  # by kernel: in which case, of how many programs, which launch
    for i, (of_case, of_keys) in enumerate(zip(launches, keys, strict=True)):
        for j, (launch, key) in enumerate(zip(of_case, of_keys, strict=True)):
            uses.setdefault(key, {}).setdefault((i, launch.num_programs), j)
    tasks = [[(cases[i], j) for (i, _), j in places.items()] for places in uses.values()]
    if num_workers == 1:
        results = map(_figures, tasks)
    else:
        with get_context("spawn").Pool(num_workers) as pool:
            results = pool.map(_figures, tasks, chunksize=1)
    found = {
        (key, *place): (kernel, of_launch)
        for (key, places), (kernel, totals) in zip(uses.items(), results, strict=True)
        for place, of_launch in zip(places, totals, strict=True)
    }
    return [
        _modelled_case(
            case, of_case, of_keys, [found[key, i, x.num_programs] for key, x in zip(of_keys, of_case, strict=True)]
        )
        for i, (case, of_case, of_keys) in enumerate(zip(cases, launches, keys, strict=True))
    ]


def _figures(task: Sequence[tuple[Case, int]]) -> tuple[KernelFigures, list[LaunchTotals]]:
    """Of a kernel and of each of its launches."""
    launches = [(case.launches()[index], case.arch) for case, index in task]
    launch, arch = launches[0]
    compiled = launch.compile(arch)
    code = machine_code(compiled, arch)
    path = WarpPath(code)
    totals = [path.totals_of_a_launch(x.parameters(arch), x.num_programs) for x, arch in launches]
    return KernelFigures.of(launch.name, code, compiled.asm["ttir"]), totals


def _modelled_case(
    case: Case,
    launches: Sequence[Launch],
    keys: Sequence[str],
    figures: Sequence[tuple[KernelFigures, LaunchTotals]],
) -> ModelledCase:
    """Launches of one kernel are steps through the batch, each of a part of it."""
    l2, modelled = L2(), []
    num_programs, steps = Counter[str](), Counter[str]()
    for launch, key in zip(launches, keys, strict=True):
        num_programs[key] += launch.num_programs
    for launch, key, (kernel, totals) in zip(launches, keys, figures, strict=True):
        part = launch.num_programs / num_programs[key]
        tensors = _tensors(launch, case, steps[key], part)
        loaded, backwards = totals.loaded_in_vectors, kernel.goes_backwards
        traffic = l2.launch(kernel.accesses, tensors, loaded=loaded, backwards=backwards)
        steps[key] += 1
        modelled.append(ModelledLaunch(kernel, launch.num_programs, totals, traffic))
    return ModelledCase(case, tuple(modelled))


def _tensors(launch: Launch, case: Case, step: int, part: float) -> dict[int, tuple[Hashable, float]]:
    """By parameter: the memory, and how many bytes of it the launch touches."""
    tensors = {}
    for i, x in enumerate(launch.parameters(case.arch)):
        if isinstance(x, torch.Tensor):
            is_of_batch = x.dim() > 0 and x.shape[0] == case.concat.gpu_batch
            memory = (x.untyped_storage()._cdata, x.storage_offset(), step if part < 1 else 0)
            tensors[i] = (memory, x.nbytes * (part if is_of_batch else 1))
    return tensors


def issue_over_floor(cases: Iterable[ModelledCase]) -> float:
    cases = list(cases)
    return sum(x.issue_us for x in cases) / sum(x.case.floor_us for x in cases)
