"""Tables of documents made of the rows of one device; the rows are made up."""

from pathlib import Path
from typing import Any

import pytest

from scalelong.bench.measured import norms, norms_of_layout, steps, table_of
from scalelong.bench.record import Row, append_rows
from scalelong.train.errors import UserError

WHERE = {"date": "2026-11-27", "commit": "0123abc", "device": "A GPU", "torch": "2.11", "triton": "3.6"}


def row(provider: str, ms: float, direction: str = "forward", **changes) -> Row:
    what: dict[str, Any] = {
        "op": "skip_group_norm",
        "shape": "net N=2",
        "layout": "contiguous",
        "dtype": "bfloat16",
        **WHERE,
        **changes,
    }
    figures: dict[str, Any] = {
        "ms_p20": 0.9 * ms,
        "ms_p80": 1.1 * ms,
        "gb_per_s": 100.0 / ms,
        "percent_of_copy": 50.0 / ms,
        "peak_mb": 2e3,
    }
    return Row(**what, direction=direction, provider=provider, ms_median=ms, **figures)


def pair(ours: float, others: dict[str, float], **changes) -> list[Row]:
    rows = [row("ours", ours, direction, **changes) for direction in ("forward", "backward")]
    for name, ms in others.items():
        rows += [row(name, ms, direction, **changes) for direction in ("forward", "backward")]
    return rows


def test_times_are_of_the_newest_rows_and_of_the_fastest_compiler():
    rows = pair(2.0, {"eager": 8.0, "compile": 9.0, "compile-loops-in-order": 6.0})
    rows += [row("ours", 1.0), row("eager", 3.0, error="RuntimeError: no memory")]
    line = norms_of_layout("contiguous")(rows).lines[0]
    assert line == ["net N=2", "1000.0", "50", "8.00", "6.00", "2000.0", "25", "4.00", "3.00"]


def test_channels_last_is_held_against_what_hands_over_channels_last():
    rows = pair(2.0, {"eager": 8.0, "compile": 3.0, "compile-to-channels-last": 5.0}, layout="channels_last")
    assert norms_of_layout("channels_last")(rows).lines[0][4] == "2.50"


def test_small_tensors_count_for_no_median():
    rows = pair(1.0, {"eager": 4.0}) + pair(2.0, {"eager": 4.0}, shape="net N=4")
    small = [row(name, ms, direction, shape="small") for name, ms in (("ours", 1e-3), ("eager", 1.0)) for direction in
             ("forward", "backward")]  # fmt: skip
    small = [Row(**{**vars(x), "gb_per_s": 1.0}) for x in small]
    forward = norms(rows + small).lines[0]
    assert forward[1:5] == ["forward", 2, "38 (25 to 50)", "3.00 (2.00 to 4.00)"]


def test_steps_are_listed_from_the_fastest_on():
    step = {"op": "unet_step", "direction": "step", "shape": "adm B=64 cs"}
    rows = [row(name, ms, **step) for name, ms in (("eager", 200.0), ("ours", 100.0))]
    assert steps(rows).lines == [
        ["adm B=64 cs, bfloat16", "ours", "100.0 (90.0 to 110.0)", "640", "2.0", "1.00"],
        ["adm B=64 cs, bfloat16", "eager", "200.0 (180.0 to 220.0)", "320", "2.0", "2.00"],
    ]


def test_an_unknown_table_or_device_is_named(tmp_path: Path):
    append_rows(pair(1.0, {"eager": 2.0}), tmp_path)
    table, where = table_of(tmp_path, "a-gpu", "norms")
    assert table.key == "norms"
    assert where == "commits 0123abc; A GPU, torch 2.11, Triton 3.6, 2026-11-27"
    with pytest.raises(UserError, match="no table of benchmarks 'speed'; there are norms"):
        table_of(tmp_path, "a-gpu", "speed")
    with pytest.raises(UserError, match="no rows of 'another'"):
        table_of(tmp_path, "another", "norms")
