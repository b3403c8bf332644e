"""The rows of the benchmarks: their columns, their files, their table, and the figures in them."""

import csv
import math
import subprocess
from dataclasses import fields, replace

import pytest
import torch

from scalelong.bench.compare import floor_bytes
from scalelong.bench.record import (
    RESULTS,
    Row,
    append_rows,
    commit,
    device_name,
    environment,
    print_table,
    read_rows,
    slug,
)
from scalelong.bench.timing import copy_bandwidth, gb_per_s, measure, summarise

COLUMNS = [
    "date",
    "commit",
    "device",
    "torch",
    "triton",
    "op",
    "shape",
    "dtype",
    "layout",
    "direction",
    "provider",
    "ms_median",
    "ms_p20",
    "ms_p80",
    "gb_per_s",
    "percent_of_copy",
    "peak_mb",
    "host_us",
    "error",
]
ROW = Row(
    date="2026-11-21",
    commit="abc1234+dirty",
    device="NVIDIA H200",
    torch="2.13.0",
    triton="",
    op="attention",
    shape="B=2 T=257 D=512 H=8",
    dtype="float32",
    layout="contiguous",
    direction="forward",
    provider="ours",
    ms_median=12.34567,
    ms_p20=0.001234567,
    ms_p80=1234.567,
    gb_per_s=3.0,
    percent_of_copy=None,
    peak_mb=None,
)


def read(path):
    with path.open(newline="") as file:
        return list(csv.reader(file))


def test_columns_are_those_of_the_contract():
    assert [field.name for field in fields(Row)] == COLUMNS


def test_appending_twice_gives_one_header(tmp_path):
    append_rows([ROW], tmp_path / "results")
    append_rows([replace(ROW, provider="eager"), ROW], tmp_path / "results")
    lines = read(tmp_path / "results" / "nvidia-h200.csv")
    assert lines[0] == COLUMNS
    assert [line[COLUMNS.index("provider")] for line in lines[1:]] == ["ours", "eager", "ours"]


def test_figures_have_four_digits_and_what_was_not_measured_is_blank(tmp_path):
    append_rows([ROW], tmp_path)
    line = dict(zip(*read(tmp_path / "nvidia-h200.csv"), strict=True))
    assert [line[name] for name in COLUMNS[-8:]] == ["12.35", "0.001235", "1235", "3", "", "", "", ""]
    assert line["triton"] == ""


def test_each_device_has_its_file(tmp_path):
    append_rows([ROW, replace(ROW, device="AMD EPYC, 2 threads")], tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["amd-epyc-2-threads.csv", "nvidia-h200.csv"]


def test_a_file_from_before_the_last_columns_is_read_and_appended_to(tmp_path):
    path = tmp_path / "nvidia-h200.csv"
    append_rows([ROW], path.parent)
    old = [line[:-2] for line in read(path)]
    with path.open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(old)
    assert [(row.ms_median, row.peak_mb, row.host_us, row.error) for row in read_rows(path)] == [
        (12.35, None, None, "")
    ]
    append_rows([replace(ROW, host_us=17.0)], path.parent)
    assert [row.host_us for row in read_rows(path)] == [None, 17.0]
    assert [len(line) for line in read(path)] == [len(COLUMNS)] * 3


def test_the_committed_rows_are_readable():
    assert all(row.ms_median > 0 or row.error for path in RESULTS.glob("*.csv") for row in read_rows(path))


def test_a_provider_that_failed_has_a_row_without_figures(tmp_path):
    failed = Row(**{**{name: getattr(ROW, name) for name in COLUMNS[:11]}, "error": "RuntimeError: no kernel"})
    append_rows([failed], tmp_path)
    (found,) = read_rows(tmp_path / "nvidia-h200.csv")
    assert math.isnan(found.ms_median)
    assert (found.gb_per_s, found.error) == (None, "RuntimeError: no kernel")


def test_a_line_that_was_never_finished_is_left_out(tmp_path):
    append_rows([ROW, ROW], tmp_path)
    path = tmp_path / "nvidia-h200.csv"
    path.write_bytes(path.read_bytes()[:-40])
    assert len(read_rows(path)) == 1
    assert read_rows(tmp_path / "absent.csv") == []


def test_a_file_with_other_columns_is_left_alone(tmp_path):
    path = tmp_path / "nvidia-h200.csv"
    path.write_text("op,ms\n")
    with pytest.raises(ValueError, match=r"nvidia-h200\.csv has other columns"):
        append_rows([ROW], tmp_path)
    assert path.read_text() == "op,ms\n"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("NVIDIA H200", "nvidia-h200"),
        ("Intel(R) Xeon(R) CPU @ 2.20GHz, 4 threads", "intel-r-xeon-r-cpu-2-20ghz-4-threads"),
    ],
)
def test_slug(name, expected):
    assert slug(name) == expected


def test_a_cpu_is_named_with_its_threads():
    assert device_name("cpu").endswith(f", {torch.get_num_threads()} threads")
    assert environment("cpu").keys() == set(COLUMNS[:5])


def test_table_is_aligned(capsys):
    print_table([ROW, replace(ROW, provider="eager", ms_median=1.0, percent_of_copy=99.5)])
    shared, *lines = capsys.readouterr().out.splitlines()
    assert "device NVIDIA H200 | torch 2.13.0 | triton - | dtype float32" in shared
    assert lines[0].split() == [name for name in COLUMNS[5:] if name not in ("dtype", "layout")]
    for name in ("shape", "provider"):
        start = lines[0].index(name)
        assert all(line[start - 1] == " " and line[start] != " " for line in lines)
    end = lines[0].index("ms_median") + len("ms_median")
    assert [line[:end].split()[-1] for line in lines] == ["ms_median", "12.35", "1"]
    assert all(line[end] == " " for line in lines)


def test_table_shows_where_rows_differ(capsys):
    print_table([ROW, replace(ROW, device="NVIDIA H100")])
    shared, header, *_ = capsys.readouterr().out.splitlines()
    assert "device" not in shared
    assert header.split()[0] == "device"


def test_commit_is_the_one_that_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("SCALELONG_COMMIT", "0123abc")
    assert commit(tmp_path) == "0123abc"


def test_commit_says_whether_the_tree_has_changes(tmp_path, monkeypatch):
    monkeypatch.delenv("SCALELONG_COMMIT", raising=False)

    def git(*command):
        identity = ("-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false")
        subprocess.run(["git", "-C", tmp_path, *identity, *command], check=True, capture_output=True)

    assert commit(tmp_path) == "unknown"
    git("init")
    assert commit(tmp_path) == "unknown"
    git("commit", "--allow-empty", "-m", "first")
    clean = commit(tmp_path)
    assert int(clean, 16)
    append_rows([ROW], tmp_path / "bench" / "results")
    assert commit(tmp_path) == clean
    (tmp_path / "kernel.py").touch()
    assert commit(tmp_path) == f"{clean}+dirty"


def test_quantiles_of_known_samples():
    timing = summarise([5.0, 1.0, 3.0, 2.0, 4.0, 6.0])
    assert (timing.ms_p20, timing.ms_median, timing.ms_p80, timing.peak_mb) == (2.0, 3.5, 5.0, None)


def test_every_function_is_called_once_a_round_with_what_its_setup_returns():
    seen = []
    functions = {"plain": lambda: seen.append("plain"), "doubled": lambda x: seen.append(2 * x)}
    timings = measure(None, functions, device="cpu", setups={"doubled": lambda: (21,)}, min_rounds=7, max_seconds=0.0)
    assert list(timings) == ["plain", "doubled"]
    rounds = list(zip(seen[::2], seen[1::2], strict=True))
    assert all(set(round_) == {"plain", 42} for round_ in rounds)
    assert len(rounds) >= 7
    assert len(set(rounds)) == 2


def test_bandwidths():
    assert gb_per_s(3_000_000, 1.5) == pytest.approx(2.0)
    assert copy_bandwidth("cpu", 2**16) > 0


def test_the_floor_counts_each_tensor_once():
    inputs, output = (torch.empty(10), torch.empty(5)), torch.empty(3)
    assert floor_bytes(inputs, output, "forward") == 4 * (15 + 3)
    assert floor_bytes(inputs, output, "backward") == 4 * (15 + 3 + 15)
    assert floor_bytes(inputs, output, "both") == 4 * (15 + 3 + 15 + 3 + 15)
