"""The integer instructions of SASS, as far as branches depend on them: what they write, read and compute.

nvdisasm documents their names and no more; what they compute was found from code whose result is known
(tests/test_machine_code.py). None stands for a value that is not known: from memory, or of an instruction not below.
"""

import math
import operator
import re
import struct
from collections.abc import Callable, Sequence
from functools import cache
from itertools import product
from typing import NamedTuple

import numpy as np

from scalelong.bench.machine_code import Instruction


class Partial(NamedTuple):
    """A register of which some bits are known: predicates of loops and of data are kept side by side."""

    value: int
    unknown: int  # the bits that are not


Value = int | Partial | None
Values = Sequence[Value]
State = dict[str, Value]  # registers, predicates as 0 or 1, "c0x210" of constant bank 0, a stack slot as "[R1+0x8]"
Modifiers = frozenset[str]

WORD = 0xFFFFFFFF
_PREDICATES = tuple(f"P{i}" for i in range(7))
_PREDICATE = re.compile(r"!?U?P[\dT]$")
_CONSTANT = re.compile(r"c\[0x0\]\[(0x[0-9a-f]+)\]")
_NO_RESULT = {"STG", "STS", "BAR", "BRA", "EXIT", "RET", "CALL", "MEMBAR", "NOP", "BSSY", "BSYNC", "BREAK", "WARPSYNC"}
_COMPARE = {name.upper(): getattr(operator, name) for name in ("lt", "le", "gt", "ge", "eq", "ne")}
_COMBINE = {"AND": operator.and_, "OR": operator.or_, "XOR": operator.xor}
_COMPUTE: dict[str, Callable[..., Values]] = {}


class Step:
    """One instruction, ready to change a state."""

    def __init__(self, instruction: Instruction):
        name, *modifiers = instruction.opcode.split(".")
        if name[0] == "U" and name[1:] in _COMPUTE:  # the same, of the uniform datapath
            name = name[1:]
        self.name, self.modifiers = name, frozenset(modifiers)
        self.results, sources = self._split(instruction.operands)
        self._guard = _reader(("!" if instruction.negated else "") + (instruction.guard or "PT"))
        self._sources = [_reader(x) for x in sources]
        self._predicates = [_reader(x) for x in sources if _PREDICATE.match(x)]
        if name == "IMAD" and self.modifiers & {"WIDE", "HI"}:  # what is added has 64 bits
            self._sources[2] = _pair_reader(sources[2])
            sources = (*sources, _next(sources[2]))
        self.reads = {name for x in (*sources, instruction.guard or "") for name in _names(x)}
        self._compute = _COMPUTE.get(name)

    def __call__(self, state: State) -> None:
        guard = self._guard(state)
        if guard == 0:
            return
        values: Values = ()
        if self._compute:
            values = self._compute(self.modifiers, *(read(state) for read in self._sources))
        for i, name in enumerate(self.results):
            value = values[i] if i < len(values) else None
            state[name] = value if guard else _either(value, state.get(name, 0))

    def conditions(self, state: State) -> Values:
        """Of a branch: those that must all hold."""
        return [self._guard(state), *(read(state) for read in self._predicates)]

    def _split(self, operands: tuple[str, ...]) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """What is written, registers first, and what is read."""
        name = self.name
        if name in _NO_RESULT or not operands:
            return (), operands
        if name == "STL":
            return self._all(operands[0]), self._all(operands[1])
        if name in ("LDL", "LDC"):
            return self._all(operands[0]), self._all(operands[1])
        if name == "P2R":  # P2R R0, PR, R1, 0x7f
            return operands[:1], (*_PREDICATES, *operands[2:])
        if name == "R2P":  # R2P PR, R0, 0x7f
            return tuple(x for i, x in enumerate(_PREDICATES) if int(operands[2], 16) >> i & 1), operands[1:]
        if name == "HFMA2" and operands[1] == "-RZ":  # a constant of two 16-bit floats
            return operands[:1], (_two_halves(operands[3:]),)
        num_predicates = next((i for i, x in enumerate(operands) if not _PREDICATE.match(x)), 1)
        if name in ("LOP3", "SHFL") and num_predicates:  # LOP3.LUT P0, RZ, ...
            return (operands[1], operands[0]), operands[2:]
        if num_predicates:
            count = 2 if name.endswith(("SETP", "SETP2", "PLOP3")) else 1
            return operands[:count], operands[count:]
        count = 1
        if name in ("IADD3", "IMAD", "LEA"):  # carries
            count = next(i for i, x in enumerate(operands) if i and not _PREDICATE.match(x))
        return (*self._all(operands[0]), *operands[1:count]), operands[count:]

    def _all(self, first: str) -> tuple[str, ...]:
        """The registers, constants or stack slots that an operand stands for."""
        count = 1
        if "128" in self.modifiers:
            count = 4
        elif self.modifiers & {"64", "WIDE"} or (self.name == "CS2R" and "32" not in self.modifiers):
            count = 2
        names = [first]
        while len(names) < count:
            names.append(_next(names[-1]))
        return tuple(names)


def _names(operand: str) -> list[str]:
    return re.findall(r"\[R1\+?\w*\]", operand) or re.findall(r"U?[RP]\d+", operand)


def _next(operand: str) -> str:
    """The upper half of a pair."""
    if match := _CONSTANT.search(operand):
        return f"c[0x0][{int(match[1], 16) + 4:#x}]"
    if match := re.fullmatch(r"\[R1(?:\+(0x[0-9a-f]+))?\]", operand):
        return f"[R1+{int(match[1] or '0', 16) + 4:#x}]"
    match = re.search(r"(U?R)(\d+)", operand)
    return f"{match[1]}{int(match[2]) + 1}" if match else operand


def _two_halves(floats: Sequence[str]) -> str:
    high, low = (struct.pack("<e", float(x.lower().replace("qnan", "nan"))) for x in floats)
    return f"{int.from_bytes(low + high, 'little'):#x}"


@cache
def _reader(operand: str) -> Callable[[State], Value]:
    """A negated register is its complement plus one, which keeps the carry of a subtraction."""
    if operand in ("RZ", "URZ", "SRZ", "PT", "UPT"):
        return lambda state: int(operand[-1] == "T")
    if re.fullmatch(r"-?0x[0-9a-f]+", operand):
        number = int(operand, 16) & WORD
        return lambda state: number
    if operand[0] in "-~":
        inner, one = _reader(operand[1:]), operand[0] == "-"
        return lambda state: (x ^ WORD) + one if isinstance(x := inner(state), int) else None
    if operand[0] == "!":
        inner = _reader(operand[1:])
        return lambda state: 1 - x if isinstance(x := inner(state), int) else None
    name = f"c{match[1]}" if (match := _CONSTANT.fullmatch(operand)) else operand
    # What was never written is undefined: bits of it are kept beside those of predicates, and masked away.
    default = 0 if re.fullmatch(r"U?[RP]\d+", operand) else None
    return lambda state: state.get(name, default)


@cache
def _pair_reader(operand: str) -> Callable[[State], Value]:
    low, high = _reader(operand), _reader(_next(operand))

    def read(state: State) -> Value:
        x, y = low(state), high(state)
        return y << 32 | x if isinstance(x, int) and isinstance(y, int) else None

    return read


def _bits(x: Value) -> Partial:
    return Partial(0, WORD) if x is None else Partial(x, 0) if isinstance(x, int) else x


def _value(x: Partial) -> Value:
    return x.value if x.unknown == 0 else None if x.unknown == WORD else x


def _either(x: Value, y: Value) -> Value:
    a, b = _bits(x), _bits(y)
    return _value(Partial(a.value, a.unknown | b.unknown | a.value ^ b.value))


def _signed(x: int, bits: int = 32) -> int:
    x &= (1 << bits) - 1
    return x - (1 << bits) if x >> (bits - 1) else x


def _computes(*names: str, even_from_unknown: bool = False) -> Callable[[Callable[..., Values]], Callable[..., Values]]:
    """Otherwise the results of an unknown source are unknown."""

    def register(function: Callable[..., Values]) -> Callable[..., Values]:
        def strict(modifiers: Modifiers, *values: Value) -> Values:
            return function(modifiers, *values) if all(isinstance(x, int) for x in values) else ()

        _COMPUTE.update(dict.fromkeys(names, function if even_from_unknown else strict))
        return function

    return register


@_computes("MOV", "R2UR", "S2R", "S2UR", "LDC", "STL", "LDL", "HFMA2")
def _copy(modifiers: Modifiers, *values: int) -> Values:
    return [x & WORD for x in values]


@_computes("CS2R")
def _clear(modifiers: Modifiers, x: int) -> Values:
    return x, 0


@_computes("IADD3", "VIADD")
def _add(modifiers: Modifiers, *values: int) -> Values:
    total = sum(values)
    return total & WORD, int(total > WORD), int(total > 2 * WORD + 1)


@_computes("IMAD")
def _multiply_add(modifiers: Modifiers, a: int, b: int, c: int, carry: int = 0) -> Values:
    if not modifiers & {"WIDE", "HI"}:
        return ((a * b + c + carry) & WORD,)
    if "U32" not in modifiers:
        a, b = _signed(a), _signed(b)
    total = a * b + c + carry
    low, high = total & WORD, total >> 32 & WORD
    return (high,) if "HI" in modifiers else (low, high, int(total >> 64 > 0))


@_computes("SHF")
def _funnel_shift(modifiers: Modifiers, low: int, count: int, high: int) -> Values:
    x = (high & WORD) << 32 | low & WORD
    if "W" in modifiers:
        count &= 31
    if "L" in modifiers:
        x <<= count
    else:
        x = _signed(x, 64) >> count if modifiers & {"S32", "S64"} else x >> count
    return (x >> (32 if "HI" in modifiers else 0) & WORD,)


@_computes("LEA")
def _scaled_add(modifiers: Modifiers, a: int, b: int, *rest: int) -> Values:
    if "HI" not in modifiers:
        total = (a << rest[0] & WORD) + b
    elif "SX32" in modifiers:
        total = (_signed(a) << rest[0] >> 32 & WORD) + b + sum(rest[1:])
    else:
        high, count, *carry = rest
        total = (((high & WORD) << 32 | a & WORD) << count >> 32 & WORD) + b + sum(carry)
    return total & WORD, int(total > WORD)


@_computes("LOP3", even_from_unknown=True)
def _logic(modifiers: Modifiers, a: Value, b: Value, c: Value, table: int, *_: Value) -> Values:
    sources = [_bits(x) for x in (a, b, c)]
    # A bit of the result is known where it is the same whatever the unknown bits are.
    results = [
        _lookup(table, *(x.value ^ x.unknown * flipped for x, flipped in zip(sources, flips, strict=True)))
        for flips in product((0, 1), repeat=3)
    ]
    unknown = results[0] & 0
    for x in results:
        unknown |= x ^ results[0]
    is_set = int(results[0] != 0) if not unknown else 1 if results[0] & ~unknown else None
    return _value(Partial(results[0], unknown)), is_set


def _lookup(table: int, a: int, b: int, c: int) -> int:
    minterms = ((a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c) for i in range(8))
    return sum(x & WORD for i, x in enumerate(minterms) if table >> i & 1)


@_computes("PLOP3", even_from_unknown=True)
def _predicate_logic(modifiers: Modifiers, a: Value, b: Value, c: Value, *tables: int) -> Values:
    known = [(x,) if isinstance(x, int) else (0, 1) for x in (a, b, c)]
    results = [[table >> (4 * x + 2 * y + z) & 1 for table in tables] for x, y, z in product(*known)]
    return [column[0] if len(set(column)) == 1 else None for column in zip(*results, strict=True)]


@_computes("ISETP")
def _compare(modifiers: Modifiers, a: int, b: int, condition: int, lower_half: int = 0) -> Values:
    a, b = (a & WORD, b & WORD) if "U32" in modifiers else (_signed(a), _signed(b))
    (compare,) = (function for name, function in _COMPARE.items() if name in modifiers)
    (combine,) = (function for name, function in _COMBINE.items() if name in modifiers)
    holds = lower_half if "EX" in modifiers and a == b else int(compare(a, b))
    return combine(holds, condition), combine(1 - holds, condition)


@_computes("SEL", even_from_unknown=True)
def _select(modifiers: Modifiers, a: Value, b: Value, condition: Value) -> Values:
    return (None,) if condition is None else (a if condition else b,)


@_computes("IMNMX", "VIMNMX")
def _extreme(modifiers: Modifiers, a: int, b: int, is_minimum: int, *_: int) -> Values:
    a, b = (a & WORD, b & WORD) if "U32" in modifiers else (_signed(a), _signed(b))
    return (min(a, b) & WORD if is_minimum else max(a, b) & WORD,)


@_computes("VIADDMNMX")
def _extreme_of_sum(modifiers: Modifiers, a: int, b: int, c: int, is_minimum: int, *_: int) -> Values:
    return _extreme(modifiers, a + b & WORD, c, is_minimum)


@_computes("IABS")
def _absolute(modifiers: Modifiers, x: int) -> Values:
    return (abs(_signed(x)) & WORD,)


@_computes("SGXT")
def _extend(modifiers: Modifiers, x: int, bits: int) -> Values:
    return (x & ((1 << bits) - 1) if "U32" in modifiers else _signed(x, bits) & WORD,)


@_computes("PRMT")
def _permute(modifiers: Modifiers, a: int, selector: int, b: int) -> Values:
    source = ((b & WORD) << 32 | a & WORD).to_bytes(8, "little")
    nibbles = [selector >> (4 * i) & 15 for i in range(4)]
    chosen = [source[x & 7] if x < 8 else 255 * (source[x & 7] >> 7) for x in nibbles]  # from 8 on, copies of the sign
    return (int.from_bytes(bytes(chosen), "little"),)


def _byte(modifiers: Modifiers) -> int:
    """The first bit of a register that takes predicates: 8 in P2R.B1."""
    return next((8 * i for i in range(4) if f"B{i}" in modifiers), 0)


@_computes("P2R", even_from_unknown=True)
def _pack(modifiers: Modifiers, *values: Value) -> Values:
    *predicates, x, mask = values
    at, register = _byte(modifiers), _bits(x)
    assert isinstance(mask, int)
    chosen = [(at + i, p) for i, p in enumerate(predicates) if mask >> i & 1]
    value = register.value & ~(mask << at) & WORD | sum(p << i for i, p in chosen if isinstance(p, int))
    unknown = register.unknown & ~(mask << at) & WORD | sum(1 << i for i, p in chosen if p is None)
    return (_value(Partial(value, unknown)),)


@_computes("R2P", even_from_unknown=True)
def _unpack(modifiers: Modifiers, x: Value, mask: int) -> Values:
    value, unknown = _bits(x)
    bits = [_byte(modifiers) + i for i in range(7) if mask >> i & 1]
    return [None if unknown >> i & 1 else value >> i & 1 for i in bits]


@_computes("SHFL")
def _shuffle(modifiers: Modifiers, x: int, lane: int, *_: int) -> Values:
    return (x if "IDX" in modifiers and lane == 0 else None,)


@_computes("FCHK", even_from_unknown=True)
def _division_is_hard(modifiers: Modifiers, *_: Value) -> Values:
    return (0,)


# The steps of an integer division: a reciprocal in fp32, whose bits are then adjusted as an integer.


@_computes("I2F", "I2FP")
def _to_float(modifiers: Modifiers, x: int) -> Values:
    if modifiers & {"S64", "U64", "S16", "U16", "S8", "U8"}:
        return (None,)
    x = x & WORD if "U32" in modifiers else _signed(x)
    rounded = np.float32(x)
    if "RP" in modifiers and float(rounded) < x:
        rounded = np.nextafter(rounded, np.float32(math.inf))
    return (int(rounded.view(np.uint32)),)


@_computes("MUFU")
def _reciprocal(modifiers: Modifiers, x: int) -> Values:
    value = np.uint32(x).view(np.float32)
    return (int((1 / value).view(np.uint32)) if "RCP" in modifiers and value else None,)


@_computes("F2I")
def _to_integer(modifiers: Modifiers, x: int) -> Values:
    value = float(np.uint32(x).view(np.float32))
    return (min(max(int(value), 0), WORD) if "U32" in modifiers and math.isfinite(value) else None,)
