"""What a compiled Triton kernel costs an SM, read from its cubin: no GPU needed.

Registers, stack and shared memory decide how many warps an SM holds; the disassembly (SASS) shows each instruction, and
warp_path.py how often a warp executes it.
"""

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import triton

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"

# Of an SM of compute capability 8.0 or 9.0, from the CUDA C++ Programming Guide.
REGISTERS = 65536
REGISTERS_AT_ONCE = 256  # a warp gets a multiple
MAX_WARPS = 64
MAX_PROGRAMS = 32
SHARED_BYTES = {80: 164 * 1024, 90: 228 * 1024}
SHARED_BYTES_OF_THE_SYSTEM = 1024  # taken by each program

_LINE = re.compile(r"^\s*/\*[0-9a-f]+\*/\s+(?:@(!?)(U?P\w+)\s+)?([A-Z][\w.]*)\s*(.*?)\s*;", re.MULTILINE)
_LABEL = re.compile(r"^\s*([.$][\w.$]+|\w+):$")
_TARGET = re.compile(r"`\((.+?)\)")
_KINDS = {
    "load": ("LDG", "LDGSTS"),
    "store": ("STG",),
    "shared": ("LDS", "STS", "LDSM", "STSM"),
    "stack": ("LDL", "STL"),
    "shuffle": ("SHFL", "REDUX", "VOTE"),
    "special function": ("MUFU",),
    "conversion": ("F2F", "F2FP", "F2I", "I2F", "I2FP", "PRMT"),
    "float": ("FADD", "FMUL", "FFMA", "FSEL", "FMNMX", "FSETP", "FCHK", "HADD2", "HMUL2", "HFMA2", "HMNMX2", "HSETP2"),
    "barrier": ("BAR", "WARPSYNC", "DEPBAR", "LDGDEPBAR"),
    "control": ("BRA", "EXIT", "NOP", "BSSY", "BSYNC", "BREAK", "CALL", "RET", "WARPSYNC"),
}
_KIND_OF = {opcode: kind for kind, opcodes in _KINDS.items() for opcode in opcodes}


class Instruction(NamedTuple):
    guard: str | None  # the predicate that it depends on
    negated: bool
    opcode: str  # with its modifiers: "LDG.E.128"
    operands: tuple[str, ...]
    target: int | None  # of a branch or call: the index of an instruction

    @property
    def kind(self) -> str:
        return _KIND_OF.get(self.opcode.split(".")[0], "integer")

    @property
    def bytes_moved(self) -> int:
        """To or from global memory, by one thread."""
        if self.kind not in ("load", "store"):
            return 0
        if size := re.search(r"\.(128|64|[US]16|[US]8)\b", self.opcode):
            return int(size[1].lstrip("US")) // 8
        return 4


@dataclass(frozen=True)
class MachineCode:
    arch: int
    num_warps: int  # of a program
    registers: int  # of a thread
    stack_bytes: int  # of a thread
    shared_bytes: int  # of a program
    parameter_types: tuple[str, ...]  # "u64" of a pointer, "u32", "f32"
    instructions: tuple[Instruction, ...]

    @cached_property
    def num_programs_on_an_sm(self) -> int:
        registers_of_a_warp = -(-32 * self.registers // REGISTERS_AT_ONCE) * REGISTERS_AT_ONCE
        return min(
            REGISTERS // registers_of_a_warp // self.num_warps,
            MAX_WARPS // self.num_warps,
            MAX_PROGRAMS,
            SHARED_BYTES[self.arch] // (self.shared_bytes + SHARED_BYTES_OF_THE_SYSTEM),
        )

    @property
    def num_warps_on_an_sm(self) -> int:
        return self.num_programs_on_an_sm * self.num_warps

    @cached_property
    def by_kind(self) -> Counter[str]:
        return Counter(x.kind for x in self.instructions)

    def widths(self, kind: str) -> Counter[int]:
        """How many instructions of kind "load" or "store" move so many bytes a thread."""
        return Counter(x.bytes_moved for x in self.instructions if x.kind == kind)


def machine_code(compiled: Any, arch: int) -> MachineCode:
    """Of what ``Launch.compile`` returns."""
    usage = resource_usage(compiled)
    _, _, entry = compiled.asm["ptx"].partition(".entry")
    return MachineCode(
        arch=arch,
        num_warps=compiled.metadata.num_warps,
        registers=usage["REG"],
        stack_bytes=usage["STACK"],
        shared_bytes=compiled.metadata.shared,
        parameter_types=tuple(re.findall(r"\.param \.(\w+)", entry.partition(")")[0])),
        instructions=tuple(_parsed(_shown(compiled, "nvdisasm", "-c"))),
    )


def resource_usage(compiled: Any) -> dict[str, int]:
    """REG and STACK (bytes) of a thread, SHARED (bytes) of a program, ..."""
    shown = _shown(compiled, "cuobjdump", "-res-usage")
    return {name: int(number) for name, number in re.findall(r"([A-Z]+):(\d+)", shown)}


def _parsed(disassembly: str) -> Iterator[Instruction]:
    """Without the padding after the last instruction."""
    lines, labels = [], {}
    for line in disassembly.splitlines():
        if label := _LABEL.match(line):
            labels[label[1]] = len(lines)
        elif instruction := _LINE.match(line):
            lines.append(instruction.groups())
    while lines and (lines[-1][2] == "NOP" or _jumps_to_itself(lines[-1], labels, len(lines) - 1)):
        lines.pop()
    for negation, guard, opcode, rest in lines:
        target = _TARGET.search(rest)
        operands = tuple(x.strip().removesuffix(".reuse") for x in rest.split(",")) if rest else ()
        yield Instruction(guard, negation == "!", opcode, operands, labels[target[1]] if target else None)


def _jumps_to_itself(line: tuple[str, ...], labels: dict[str, int], index: int) -> bool:
    target = _TARGET.search(line[3])
    return line[2] == "BRA" and target is not None and labels[target[1]] == index


def _shown(compiled: Any, tool: str, option: str) -> str:
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        return subprocess.run([TOOLS / tool, option, cubin], capture_output=True, text=True, check=True).stdout
