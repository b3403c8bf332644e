"""How often a warp executes each instruction of a kernel: the way of its first thread through the machine code.

Kernel arguments, program ids and loop counters are computed as the GPU would, so loops count as they run, however they
were unrolled, rotated or cloned, with remainders and early exits. Where a branch depends on data, the side that calls a
subroutine, the slow path of a division or a root, is not taken; where that does not decide, ValueError. An instruction
whose own guard is false takes its issue slot all the same, and counts.
"""

import math
import struct
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from typing import Any, NamedTuple

from scalelong.bench.machine_code import Instruction, MachineCode
from scalelong.bench.sass import WORD, State, Step, Values

PARAMETERS_AT = {80: 0x160, 90: 0x210}  # in constant bank 0
GRID_AT = 0xC
MAX_STEPS = 10_000_000
NUM_SAMPLES = 4
VECTOR_BYTES = 8  # that an instruction moves for a thread, and more
_LEAPS = ("BRA", "EXIT", "CALL", "RET")


class WarpPath:
    """Of one kernel, for any of its launches."""

    def __init__(self, code: MachineCode):
        self.code = code
        self._steps = _steps_of_control(code.instructions)

    def executions(self, parameters: Sequence[Any], program: int, grid: int | tuple[int, ...]) -> Counter[int]:
        """How often the first warp of a program executes each instruction, by its index.

        ``parameters`` are those of the launch: ``ahead_of_time.Launch.parameters``.
        """
        state = _state_at_start(self.code, parameters, program, grid)
        instructions, steps = self.code.instructions, self._steps
        counts: Counter[int] = Counter()
        returns: list[int] = []
        index = 0
        for _ in range(MAX_STEPS):
            step = steps.get(index)
            counts[index] += 1
            following = index + 1
            if step and step.name in _LEAPS:
                if _is_taken(instructions, index, step.conditions(state)):
                    if step.name == "EXIT":
                        return counts
                    if step.name == "CALL":
                        returns.append(following)
                    target = returns.pop() if step.name == "RET" else instructions[index].target
                    assert target is not None
                    following = target
            elif step:
                step(state)
            index = following
        raise ValueError(f"a warp executes more than {MAX_STEPS} instructions")

    def instructions_of_a_launch(self, parameters: Sequence[Any], grid: int | tuple[int, ...]) -> float:
        """That all its warps issue, from a few programs spread over the grid."""
        return self.totals_of_a_launch(parameters, grid).instructions

    def totals_of_a_launch(self, parameters: Sequence[Any], grid: int | tuple[int, ...]) -> "LaunchTotals":
        """Of all its warps, from a few programs spread over the grid."""
        num_programs = grid if isinstance(grid, int) else math.prod(grid)
        programs = {(2 * i + 1) * num_programs // (2 * NUM_SAMPLES) for i in range(NUM_SAMPLES)}
        counts = sum((self.executions(parameters, program, grid) for program in programs), Counter[int]())
        num_warps = num_programs * self.code.num_warps / len(programs)
        moved: Counter[tuple[str, int]] = Counter()
        for i, x in enumerate(self.code.instructions):
            if x.kind in ("load", "store"):
                moved[x.kind, x.bytes_moved] += 32 * x.bytes_moved * counts[i]
        return LaunchTotals(num_warps * counts.total(), {key: num_warps * n for key, n in moved.items()})


class LaunchTotals(NamedTuple):
    """What the warps of a launch do."""

    instructions: float
    moved: Mapping[tuple[str, int], float]
    """Bytes that they ask for, by "load" or "store" and by how many of them an instruction moves for a thread."""

    @property
    def loaded_in_vectors(self) -> float:
        return sum(n for (kind, width), n in self.moved.items() if kind == "load" and width >= VECTOR_BYTES)

    def part_in_vectors(self, kind: str) -> float:
        """1.0 where nothing is moved."""
        widths = {width: n for (of, width), n in self.moved.items() if of == kind}
        vectors = sum(n for width, n in widths.items() if width >= VECTOR_BYTES)
        return vectors / sum(widths.values()) if widths else 1.0


def _state_at_start(code: MachineCode, parameters: Sequence[Any], program: int, grid: int | tuple[int, ...]) -> State:
    x, y, z = (*((grid,) if isinstance(grid, int) else grid), 1, 1)[:3]
    words = {GRID_AT: x, GRID_AT + 4: y, GRID_AT + 8: z}
    words |= parameter_words(code.parameter_types, parameters, code.arch)
    place = {"SR_CTAID.X": program % x, "SR_CTAID.Y": program // x % y, "SR_CTAID.Z": program // (x * y)}
    zeros = dict.fromkeys(("SR_TID.X", "SR_LANEID", "SR_CgaCtaId"), 0)
    return {**{f"c{at:#x}": word for at, word in words.items()}, **place, **zeros}


def parameter_words(types: Sequence[str], values: Sequence[Any], arch: int) -> dict[int, int]:
    """Where constant bank 0 holds the parameters of a kernel, of PTX types such as "u64"; addresses are made up."""
    at, words = PARAMETERS_AT[arch], {}
    for i, (kind, value) in enumerate(zip_longest(types, values)):  # Triton adds two for scratch memory
        size = int(kind[1:]) // 8
        at = -(-at // size) * size
        if hasattr(value, "data_ptr") or value is None:
            value = (i + 1) << 40
        elif isinstance(value, float):
            value = int.from_bytes(struct.pack("<f" if size == 4 else "<d", value), "little")
        for offset in range(0, size, 4):
            words[at + offset] = int(value) >> 8 * offset & WORD
        at += size
    return words


def _steps_of_control(instructions: Sequence[Instruction]) -> dict[int, Step]:
    """Branches, and what computes their conditions, directly or not, by index."""
    steps = [Step(x) for x in instructions]
    found = {i for i, step in enumerate(steps) if step.name in _LEAPS}
    needed: set[str] = set()
    while more := set().union(*(steps[i].reads for i in found)) - needed:
        needed |= more
        found |= {i for i, step in enumerate(steps) if not needed.isdisjoint(step.results)}
    return {i: steps[i] for i in found}


def _is_taken(instructions: Sequence[Instruction], index: int, conditions: Values) -> bool:
    instruction = instructions[index]
    if instruction.opcode.startswith(("BRA.DIV", "BRA.CONV")):  # the threads of a warp stay together
        return False
    if 0 in conditions or None not in conditions:
        return 0 not in conditions
    easy = [not _calls(instructions, i) for i in (index + 1, instruction.target) if i is not None]
    if sorted(easy) != [False, True]:
        raise ValueError(f"whether instruction {index} is taken depends on data: {instruction}")
    return easy[1]


def _calls(instructions: Sequence[Instruction], start: int) -> bool:
    """Before any other leap."""
    names = (x.opcode.split(".")[0] for x in instructions[start:])
    return next((name for name in names if name in _LEAPS), None) == "CALL"
