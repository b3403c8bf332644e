"""Which bytes the launches of a kernel move to and from DRAM, from its Triton IR and the sizes of its tensors.

A launch reads a tensor from DRAM once, unless the launches just before it left it in L2. Where it reads it a second
time, in another loop, that comes from L2 as long as the programs that run at once have less than L2 in use. Tensors
below a megabyte do not count. A launch whose programs go backwards finds in L2 what the one before it read last.
"""

import re
from collections import defaultdict
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from math import inf
from typing import NamedTuple

L2_BYTES = 30e6  # in use at once, of the 50 MB of an H100, whose halves keep copies
LEAST_BYTES = 1e6

_NAME = re.compile(r"%[\w.$-]+")
_RESULT = re.compile(r"^\s*(%[\w.$-]+)(?::\d+)? = (.*)")
_ITER_ARG = re.compile(r"(%[\w.$-]+) = (%[\w.$-]+)")


class Access(NamedTuple):
    parameter: int  # its place among the parameters of the kernel
    is_store: bool
    segment: int  # the stretch of code between the starts and ends of loops


@dataclass
class Traffic:
    """Bytes of a launch."""

    reads: float = 0  # from DRAM
    reads_from_l2: float = 0  # that earlier launches have left there
    second_reads: float = 0
    writes: float = 0

    @property
    def in_use(self) -> float:
        return self.reads + self.reads_from_l2 + self.writes

    def from_dram(self, fraction_at_once: float) -> float:
        """``fraction_at_once``: of the programs, that which runs at the same time."""
        stays_in_l2 = fraction_at_once * self.in_use <= L2_BYTES
        return self.reads + self.writes + (0 if stays_in_l2 else self.second_reads)


@dataclass
class L2:
    """What a sequence of launches leaves in L2 for those after it."""

    clock: float = 0  # bytes moved so far
    last_use: dict[Hashable, float] = field(default_factory=dict)
    last_in_use: float = 0  # by the last launch

    def launch(
        self,
        accesses: Iterable[Access],
        tensors: Mapping[int, tuple[Hashable, float]],
        *,
        loaded: float = inf,
        backwards: bool = False,
    ) -> Traffic:
        """``tensors``: by parameter, which memory it is and how many bytes of it the launch touches.

        ``loaded``: bytes of all its loads, where they are known: a second read may be of the first tiles alone.
        """
        traffic, segments = Traffic(), defaultdict[Hashable, set[int]](set)
        written: set[int] = set()
        used = {}
        for access in accesses:
            tensor, num_bytes = tensors.get(access.parameter, (None, 0.0))
            if num_bytes < LEAST_BYTES:
                continue
            used[tensor] = num_bytes
            seen = segments[tensor]
            if access.is_store:
                if access.parameter not in written:
                    written.add(access.parameter)
                    traffic.writes += num_bytes
            elif access.segment not in seen:
                if seen:
                    traffic.second_reads += num_bytes
                else:
                    held = self._held(tensor, num_bytes, backwards)
                    traffic.reads_from_l2 += held
                    traffic.reads += num_bytes - held
            seen.add(access.segment)
        again = max(0.0, loaded - traffic.reads - traffic.reads_from_l2)
        traffic.second_reads = min(traffic.second_reads, again)
        self.last_in_use = traffic.in_use
        self.clock += traffic.in_use
        self.last_use.update(dict.fromkeys(used, self.clock))
        return traffic

    def _held(self, tensor: Hashable, num_bytes: float, backwards: bool) -> float:
        """How many of its bytes are in L2."""
        if tensor not in self.last_use:
            return 0.0
        since = self.clock - self.last_use[tensor]
        if since + num_bytes <= L2_BYTES:
            return num_bytes
        if not backwards or not self.last_in_use:
            return 0.0
        return num_bytes * min(1.0, max(0.0, L2_BYTES - since) / self.last_in_use)


def accesses(ttir: str) -> list[Access]:
    """The loads and stores of a kernel, in their order, once for each parameter that their pointers may come from."""
    roots: dict[str, frozenset[int]] = {}  # the parameters that a value was computed from, by loading nothing
    found: list[Access] = []
    regions: list[_Region] = []
    segment = 0
    for line in re.sub(r" ?\bloc\((?:[^()]|\([^()]*\))*\)", "", ttir).splitlines():
        if "tt.func public" in line:
            parameters = re.findall(r"(%[\w.$-]+): ([!\w.]+)", line)
            roots = {x: frozenset({i} if kind == "!tt.ptr" else ()) for i, (x, kind) in enumerate(parameters)}
            continue
        indentation = len(line) - len(line.lstrip())
        if regions and indentation == regions[-1].indentation and re.match(r"\s*\}(?! else| do)", line):
            segment += regions.pop().is_loop
        result = _RESULT.match(line)
        name, body = result.groups() if result else ("", line)
        sources = frozenset().union(*(roots.get(x.partition("#")[0], ()) for x in _NAME.findall(body)))
        if region := re.search(r"\bscf\.(for|while|if)\b", body):
            regions.append(_Region(indentation, name, region[1] != "if"))
            segment += regions[-1].is_loop
            roots |= {x: roots.get(start, frozenset()) for x, start in _ITER_ARG.findall(body)}
        if access := re.search(r"\btt\.(load|store|atomic_\w+) (%[\w.$-]+)", body):
            found += [Access(i, access[1] != "load", segment) for i in sorted(roots.get(access[2], ()))]
        elif "scf.yield" in body and regions:
            roots[regions[-1].result] = roots.get(regions[-1].result, frozenset()) | sources
        elif name:
            roots[name] = sources
    return found


class _Region(NamedTuple):
    indentation: int
    result: str
    is_loop: bool
