"""The counter of instructions, on kernels whose loops are known, compiled without a GPU."""
# pyright: reportGeneralTypeIssues=false
# (to a type checker, tl.static_range is no iterator)

import os
from typing import Any

import pytest
import torch
import triton
import triton.language as tl

from scalelong.bench.ahead_of_time import Launch
from scalelong.bench.machine_code import Instruction, MachineCode, machine_code
from scalelong.bench.sass import WORD, Step
from scalelong.bench.warp_path import WarpPath

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing"),
]
each_arch = pytest.mark.parametrize("arch", [pytest.param(80, marks=pytest.mark.exhaustive), 90])
BLOCK = 1024


@triton.jit
def _term(x_ptr, start, n, BLOCK: tl.constexpr):
    i = start + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, mask=i < n, other=0.0)
    for _ in tl.static_range(8):  # enough work that what surrounds a loop does not count
        x = x * tl.sigmoid(x)
    return x


@triton.jit(do_not_specialize=["n"])
def _sum_kernel(x_ptr, y_ptr, n, NUM_TRIPS: tl.constexpr, UNROLL: tl.constexpr, BLOCK: tl.constexpr):
    total = tl.zeros((BLOCK,), tl.float32)
    if UNROLL:
        for trip in tl.static_range(NUM_TRIPS):
            total += _term(x_ptr, trip * BLOCK, n, BLOCK)
    else:
        for start in range(0, n, BLOCK):
            total += _term(x_ptr, start, n, BLOCK)
    tl.store(y_ptr + tl.arange(0, BLOCK), total)


@triton.jit(do_not_specialize=["outer", "inner", "n"])
def _nested_kernel(x_ptr, y_ptr, outer, inner, n, BLOCK: tl.constexpr):
    for row in range(outer):
        total = tl.zeros((BLOCK,), tl.float32)
        for column in range(inner):
            total += _term(x_ptr, (row * inner + column) * BLOCK, n, BLOCK)
        tl.store(y_ptr + row * BLOCK + tl.arange(0, BLOCK), total)


@triton.jit(do_not_specialize=["first", "second", "n"])
def _successive_kernel(x_ptr, y_ptr, first, second, n, BLOCK: tl.constexpr):
    total = tl.zeros((BLOCK,), tl.float32)
    for trip in range(first):
        total += _term(x_ptr, trip * BLOCK, n, BLOCK)
    total = total / tl.sum(total, 0)
    for trip in range(tl.cdiv(second, n // second), -1, -1):
        total += _term(x_ptr, trip * BLOCK, n, BLOCK)
    tl.store(y_ptr + tl.arange(0, BLOCK), total)


@triton.jit(do_not_specialize=["size", "divisor", "n"])
def _striding_kernel(x_ptr, y_ptr, size, divisor, n, BLOCK: tl.constexpr):
    """Program p takes tiles p, p + num_programs, ...; the counter has 64 bits."""
    total = tl.zeros((BLOCK,), tl.float32)
    for tile in range(tl.program_id(0).to(tl.int64), size // divisor, tl.num_programs(0)):
        total += _term(x_ptr, tile * BLOCK, n, BLOCK)
    tl.store(y_ptr + tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), total)


@triton.jit
def _divided_kernel(x_ptr, y_ptr, n, PRECISE: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    x, y = tl.load(x_ptr + i), tl.load(y_ptr + i)
    tl.store(y_ptr + i, tl.sqrt_rn(tl.div_rn(x, y)) if PRECISE else tl.sqrt(x / y))


def compiled(kernel: Any, *numbers: Any, arch: int) -> tuple[MachineCode, list[Any]]:
    x = torch.empty(1, device="meta")
    launch = Launch(kernel, (x, x, *numbers, BLOCK), {"num_warps": 4})
    return machine_code(launch.compile(arch), arch), launch.parameters(arch)


def executed(kernel: Any, *numbers: Any, arch: int, program: int = 0, num_programs: int = 1) -> tuple[int, int]:
    """By a warp: instructions in all, and bytes loaded by a thread."""
    code, parameters = compiled(kernel, *numbers, arch=arch)
    counts = WarpPath(code).executions(parameters, program, num_programs)
    loads = sum(times * code.instructions[i].bytes_moved for i, times in counts.items() if is_load(code, i))
    return counts.total(), loads


def is_load(code: MachineCode, index: int) -> bool:
    return code.instructions[index].kind == "load"


def bytes_of(num_tiles: int) -> int:
    return num_tiles * BLOCK * 4 // (4 * 32)


@each_arch
@pytest.mark.parametrize("num_trips", [1, 2, 3, 7, 16])
def test_a_loop_counts_as_much_as_the_same_work_unrolled(num_trips, arch):
    unrolled, unrolled_bytes = executed(_sum_kernel, num_trips * BLOCK, num_trips, True, arch=arch)
    looped, looped_bytes = executed(_sum_kernel, num_trips * BLOCK, num_trips, False, arch=arch)
    assert looped_bytes == unrolled_bytes == bytes_of(num_trips)
    assert looped == pytest.approx(unrolled, rel=0.06)


@each_arch
@pytest.mark.parametrize("last", [1, BLOCK - 1])
def test_the_last_trip_of_a_loop_may_be_partial(last, arch):
    whole = executed(_sum_kernel, 5 * BLOCK, 5, False, arch=arch)
    assert executed(_sum_kernel, 4 * BLOCK + last, 5, False, arch=arch) == whole


@each_arch
def test_a_loop_of_no_trips_loads_nothing(arch):
    total, num_bytes = executed(_sum_kernel, 0, 1, False, arch=arch)
    assert num_bytes == 0
    assert total < executed(_sum_kernel, 1, 1, False, arch=arch)[0]


@each_arch
@pytest.mark.parametrize(("outer", "inner"), [(1, 1), (3, 5), (5, 3), (4, 4), (2, 9)])
def test_nested_loops_multiply(outer, inner, arch):
    one, _ = executed(_nested_kernel, 1, 1, 10**6, arch=arch)
    total, num_bytes = executed(_nested_kernel, outer, inner, 10**6, arch=arch)
    assert num_bytes == bytes_of(outer * inner)
    assert total <= outer * inner * one
    assert total >= 0.8 * outer * inner * one


@each_arch
@pytest.mark.parametrize(("first", "second"), [(1, 1), (2, 11), (11, 2), (6, 7)])
def test_successive_loops_add_and_bounds_may_be_quotients(first, second, arch):
    n = 10**6 + 1
    trips = first + triton.cdiv(second, n // second) + 1
    _, num_bytes = executed(_successive_kernel, first, second, n, arch=arch)
    assert num_bytes == bytes_of(trips)


@each_arch
@pytest.mark.parametrize("program", [0, 6, 12])
def test_a_loop_may_start_at_the_program_and_stride_over_the_grid(program, arch):
    size, divisor, num_programs = 1000, 9, 13
    _, num_bytes = executed(
        _striding_kernel, size, divisor, 10**6, arch=arch, program=program, num_programs=num_programs
    )
    assert num_bytes == bytes_of(len(range(program, size // divisor, num_programs)))


@each_arch
def test_the_slow_paths_of_division_and_root_do_not_count(arch):
    code, parameters = compiled(_divided_kernel, 5, True, arch=arch)
    assert any(x.opcode.startswith("CALL") for x in code.instructions)
    counts = WarpPath(code).executions(parameters, 0, 1)
    assert not any(code.instructions[i].opcode.startswith(("CALL", "RET")) for i in counts)
    fast, _ = executed(_divided_kernel, 5, False, arch=arch)
    assert fast < counts.total() < len(code.instructions)


def after(state: dict[str, Any], *lines: tuple[str | None, str, str]) -> dict[str, Any]:
    """Of guards, opcodes and operands."""
    for guard, opcode, operands in lines:
        Step(Instruction(guard, False, opcode, tuple(operands.split(", ")), None))(state)
    return state


def test_a_register_may_be_known_in_part():
    state = after(
        {"R1": 0b0001, "P0": None},
        ("P0", "LOP3.LUT", "R1, R1, 0x4, RZ, 0xfc, !PT"),
        (None, "LOP3.LUT", "P1, RZ, R1, 0x1, RZ, 0xc0, !PT"),
        (None, "LOP3.LUT", "P2, RZ, R1, 0x2, RZ, 0xc0, !PT"),
        (None, "LOP3.LUT", "P3, RZ, R1, 0x4, RZ, 0xc0, !PT"),
        (None, "LOP3.LUT", "R1, R1, 0x3, RZ, 0xc0, !PT"),
    )
    assert [state[f"P{i}"] for i in (1, 2, 3)] == [1, 0, None]
    assert state["R1"] == 0b0001


@pytest.mark.parametrize("divisor", [1, 3, 7, 576, 65535, 2**31 - 1])
@pytest.mark.parametrize("number", [0, 1, 575, 576, 10**9 + 7, 2**31 - 1])
def test_the_steps_of_a_division_give_the_quotient(number, divisor):
    state = after(
        {"R0": number, "R1": divisor},
        (None, "I2F.U32.RP", "R2, R1"),
        (None, "MUFU.RCP", "R2, R2"),
        (None, "VIADD", "R2, R2, 0xffffffe"),
        (None, "F2I.FTZ.U32.TRUNC.NTZ", "R3, R2"),
        (None, "IADD3", "R4, RZ, -R3, RZ"),
        (None, "IMAD", "R5, R4, R1, RZ"),
        (None, "MOV", "R2, RZ"),
        (None, "IMAD.HI.U32", "R3, R3, R5, R2"),
        (None, "IMAD.HI.U32", "R6, R3, R0, RZ"),
        (None, "IADD3", "R4, -R6, RZ, RZ"),
        (None, "IMAD", "R5, R1, R4, R0"),
        (None, "ISETP.GE.U32.AND", "P0, PT, R5, R1, PT"),
        ("P0", "IADD3", "R5, -R1, R5, RZ"),
        ("P0", "VIADD", "R6, R6, 0x1"),
        (None, "ISETP.GE.U32.AND", "P0, PT, R5, R1, PT"),
        ("P0", "VIADD", "R6, R6, 0x1"),
    )
    assert state["R6"] == number // divisor


@pytest.mark.parametrize(("x", "y"), [(0, 0), (5, 3), (3, 5), (2**32, 1), (1, 2**32), (2**63, 2**31), (2**40 + 7, 7)])
def test_differences_and_comparisons_of_64_bits(x, y):
    low, high = (lambda number: number & WORD), (lambda number: number >> 32)
    state = after(
        {"R0": low(x), "R1": high(x), "R2": low(y), "R3": high(y)},
        (None, "IADD3", "R4, P0, R0, -R2, RZ"),
        (None, "IADD3.X", "R5, R1, ~R3, RZ, P0, !PT"),
        (None, "ISETP.LT.U32.AND", "P1, PT, R0, R2, PT"),
        (None, "ISETP.LT.U32.AND.EX", "P1, P2, R1, R3, PT, P1"),
    )
    assert state["R5"] << 32 | state["R4"] == (x - y) % 2**64
    assert (state["P1"], state["P2"]) == (x < y, x >= y)


@each_arch
def test_a_launch_issues_the_instructions_of_all_its_warps(arch):
    code, parameters = compiled(_sum_kernel, 3 * BLOCK, 3, True, arch=arch)
    total = WarpPath(code).instructions_of_a_launch(parameters, 10)
    assert total == 10 * 4 * executed(_sum_kernel, 3 * BLOCK, 3, True, arch=arch)[0]
