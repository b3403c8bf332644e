"""What the model makes of launches: bytes through L2, times, ratios; and what it says of two launchers' kernels."""

import os
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl

from scalelong.bench.against_compile import Key, best_compile, shortfalls, speedups
from scalelong.bench.ahead_of_time import Launch
from scalelong.bench.issue_model import Case, ModelledCase, modelled
from scalelong.bench.kernel_report import ROWS, append_rows, last_line, read_rows, row_of
from scalelong.bench.memory_traffic import L2, Access, accesses
from scalelong.bench.shapes import SKIP_CONCATS

compiles = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing")
MB = 1e6
READ, READ_AGAIN, WRITE = Access(0, False, 0), Access(0, False, 2), Access(1, True, 2)


def tensors(megabytes: float, name: str = "x") -> dict[int, tuple[str, float]]:
    return {0: (name, megabytes * MB), 1: ("y", megabytes * MB)}


@triton.jit
def _twice_kernel(x_ptr, s_ptr, y_ptr, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, n, BLOCK):
        pointers = tl.where(i < 7, x_ptr, s_ptr) + start + i
        total += tl.load(pointers)
    for start in range(0, n, BLOCK):
        tl.store(y_ptr + start + i, tl.load(x_ptr + start + i) - tl.sum(total, 0))


@compiles
@pytest.mark.slow
def test_accesses_are_found_behind_selected_pointers_and_in_each_loop():
    x = torch.empty(1, device="meta")
    launch = Launch(_twice_kernel, (x, x.clone(), x.clone(), 4096, 128), {"num_warps": 4})
    found = accesses(launch.compile(90).asm["ttir"])
    first, second = sorted({x.segment for x in found})
    assert found == [
        Access(0, False, first),
        Access(1, False, first),
        Access(0, False, second),
        Access(2, True, second),
    ]


def test_a_second_read_costs_nothing_where_l2_holds_what_is_in_use():
    traffic = L2().launch([READ, READ_AGAIN, WRITE], tensors(100))
    assert (traffic.reads, traffic.second_reads, traffic.writes) == (100 * MB, 100 * MB, 100 * MB)
    assert traffic.from_dram(0.1) == 200 * MB
    assert traffic.from_dram(1.0) == 300 * MB


def test_a_launch_finds_in_l2_what_the_one_before_it_has_read():
    for megabytes, is_held in ((20, True), (40, False)):
        l2 = L2()
        l2.launch([READ], tensors(megabytes))
        traffic = l2.launch([READ, WRITE], tensors(megabytes))
        assert bool(traffic.reads_from_l2) == is_held
        assert traffic.from_dram(1.0) == (1 if is_held else 2) * megabytes * MB


def test_what_came_between_drives_it_out_of_l2():
    l2 = L2()
    l2.launch([READ], tensors(10, "first"))
    l2.launch([READ], tensors(25, "second"))
    assert l2.launch([READ], tensors(10, "first")).reads == 10 * MB


def test_small_tensors_do_not_count():
    assert L2().launch([READ, WRITE], tensors(0.9)).in_use == 0


def test_speedups_and_shortfalls_against_the_best_of_the_options(tmp_path: Path):
    path = tmp_path / "rows.csv"
    path.write_text(
        "shape,layout,direction,options,modelled_us\n"
        "a,NCHW,forward,default,150\na,NCHW,forward,other,130\na,NCHW,backward,default,200\n"
        "b,NHWC,forward,default,100\nb,NHWC,backward,default,100\n"
    )
    rival = best_compile(path)
    assert rival[Key("a", "NCHW", "forward")] == 130
    ours = dict.fromkeys(rival, 100.0) | {Key("b", "NHWC", "forward"): 60.0, Key("b", "NHWC", "backward"): 65.0}
    assert speedups(ours, rival)[Key("a", "NCHW", "both")] == pytest.approx(330 / 200)
    assert shortfalls(ours, rival) == []
    ours[Key("b", "NHWC", "backward")] = 80.0
    assert len(shortfalls(ours, rival)) == 2  # backward alone, and both together
    assert shortfalls(dict.fromkeys(rival, 1.0), rival) == []


def test_the_rows_of_compile_cover_the_stated_shapes():
    rival = best_compile()
    assert len({(key.shape, key.layout) for key in rival}) == 16
    assert {key.shape for key in rival} <= {str(concat) for concat in SKIP_CONCATS}


def test_the_rows_of_the_kernels_before_cover_all_shapes():
    rows = read_rows("346b4b8", ROWS)
    assert len(rows) == 4 * len(SKIP_CONCATS)
    assert all(row.modelled_us >= max(row.issue_us, row.floor_us * 0.6) for row in rows.values())


@pytest.fixture(scope="module")
def small() -> list[ModelledCase]:
    (concat,) = (x for x in SKIP_CONCATS if str(x) == "ddpm-cifar10-256+256:8")
    return modelled([Case(concat, channels_last, "forward") for channels_last in (False, True)])


@compiles
@pytest.mark.slow
def test_a_direction_is_the_sum_of_its_launches(small: list[ModelledCase]):
    for case in small:
        assert case.us == pytest.approx(sum(x.us for x in case.launches))
        assert case.us >= 3 * len(case.launches) + case.case.num_bytes * 2 / 3.0e6
        assert 5 < case.instructions_per_element < 200
        assert 1 <= min(kernel.num_warps_on_an_sm for kernel in case.main_kernels) <= 64


@compiles
@pytest.mark.slow
def test_rows_come_back_as_they_were_written_and_the_last_line_states_the_ratios(small, tmp_path: Path):
    rows = [row_of(case, "abc1234") for case in small]
    append_rows(rows, tmp_path / "rows.csv")
    append_rows([row_of(small[0], "another")], tmp_path / "rows.csv")
    assert list(read_rows("abc1234", tmp_path / "rows.csv").values()) == rows
    ratios = [f"{case.issue_us / case.case.floor_us:.2f}" for case in small]
    expected = f"issue over floor at 60 %: NCHW {ratios[0]}, NHWC {ratios[1]} (1 shapes of 8 MB and more)"
    assert last_line(small) == expected
