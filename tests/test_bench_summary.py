"""What a run of benchmarks says at its end, and the shapes and kept bytes that it stands on."""

from dataclasses import replace

import torch
import torch.nn.functional as F
from test_bench_record import ROW

from scalelong.bench.compare import kept_bytes
from scalelong.bench.shapes import GROUPS, SKIP_CONCATS
from scalelong.bench.summary import ncu_lines, summary_lines, table_lines


def rows_of(shape, ms_by_provider, size=100e6):
    """A forward, which reads and writes ``size`` bytes."""
    for provider, ms in ms_by_provider.items():
        gb_per_s = 2 * size / ms / 1e6
        figures = {"ms_median": ms, "gb_per_s": gb_per_s, "percent_of_copy": gb_per_s / 2}
        yield replace(ROW, shape=shape, provider=provider, **figures)


def test_medians_are_over_the_large_shapes_and_the_latest_figures():
    lines = summary_lines(
        [
            *rows_of("a", {"eager": 1.0, "ours": 1.0}),
            *rows_of("a", {"eager": 4.0, "ours": 2.0}),
            *rows_of("b", {"eager": 6.0, "ours": 2.0, "compile": 5.0}),
            *rows_of("c", {"eager": 16.0, "ours": 4.0}),
            *rows_of("small", {"eager": 9.0, "ours": 1.0}, size=7e6),
        ]
    )
    assert lines == [
        "ours, median over shapes of at least 8 MB:",
        "  attention float32 contiguous forward (3 shapes): "
        "3.00x as fast as eager, 2.50x as fast as compile, 50 % of a copy",
        "ours is the fastest everywhere.",
    ]


def test_shapes_where_ours_is_slower_are_named_small_ones_too():
    lines = summary_lines([*rows_of("small", {"eager": 1.0, "compile": 3.0, "ours": 2.0}, size=1e6)])
    assert lines == ["ours is slower than:", "  attention float32 contiguous forward small: eager (2.00x)"]


def test_rows_without_ours_have_no_summary():
    assert summary_lines(rows_of("a", {"eager": 1.0})) == []


def test_the_table_has_a_line_a_shape_with_its_directions_side_by_side():
    forward = list(rows_of("a", {"eager": 0.3, "ours": 0.1}))
    backward = [replace(row, direction="backward", host_us=12.0) for row in rows_of("a", {"eager": 0.5, "ours": 0.25})]
    failed = replace(ROW, shape="a", provider="compile", ms_median=float("nan"), error="RuntimeError: no kernel")
    assert table_lines([*forward, *backward, failed]) == [
        "attention float32 contiguous; forward | backward: us of ours, % of a copy, us of the host, "
        "times as fast as eager, compile",
        "a      100 1000    - 3.00    - |     250  400 12.0 2.00    -",
        "failed:",
        "  attention a contiguous forward compile: RuntimeError: no kernel",
    ]


def test_the_table_shows_what_has_no_rival_as_it_is():
    rows = [replace(ROW, op="copy", shape="8 B", provider="eager", ms_median=0.002, gb_per_s=3000.0)]
    assert table_lines(rows) == ["copy float32 contiguous 8 B: eager 2.00 us (3000 GB/s)"]


def test_failed_rows_are_no_figures():
    rows = [*rows_of("a", {"eager": 2.0, "ours": 1.0}), replace(ROW, shape="a", provider="compile", error="no")]
    assert summary_lines(rows)[-1] == "ours is the fastest everywhere."


def test_what_ncu_prints_becomes_a_line_a_kernel():
    text = """==PROF== Connected
  _skip_group_norm_fwd_kernel (128, 32, 1)x(256, 1, 1), Context 1, Stream 7, Device 0, CC 9.0
    Section: GPU Speed Of Light Throughput
    DRAM Throughput                     %        81.20
    Duration                           us       112.30
    Registers Per Thread             register/thread              80
"""
    figures = "DRAM Throughput % 81.20, Duration us 112.30, Registers Per Thread register/thread 80"
    assert ncu_lines(text) == [f"_skip_group_norm_fwd_kernel, {figures}"]


def test_kept_bytes_leave_out_inputs_and_count_shared_memory_once():
    x, weight = torch.ones(10, requires_grad=True), torch.ones(10, requires_grad=True)
    assert kept_bytes(torch.mul, (x, weight)) == 0
    assert kept_bytes(lambda x: (x * 2).sin() * x, (x,)) == 2 * x.nbytes
    assert kept_bytes(lambda x: F.silu(y := x * 2) + y.view(2, 5).cos().flatten(), (x,)) == x.nbytes


def test_skip_concats_have_whole_groups_and_stand_once():
    assert len(set(map(str, SKIP_CONCATS))) == len(SKIP_CONCATS) == 31
    assert all(concat.num_channels % GROUPS == 0 for concat in SKIP_CONCATS)
    large = [4 * concat.num_elements(concat.cpu_batch) for concat in SKIP_CONCATS]
    assert max(large) < 64e6
