"""Tables of documents, made of the rows that benchmarks have left of one device (``bench/results/<device>.csv``)."""

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from statistics import median

from scalelong.bench.lab.report_table import Table, Value
from scalelong.bench.record import Row, read_rows
from scalelong.bench.shapes import LARGE_BYTES
from scalelong.bench.summary import output_bytes
from scalelong.train.errors import UserError

LAYOUTS = {"contiguous": "contiguous (NCHW)", "channels_last": "channels_last (NHWC)"}
DIRECTIONS = ("forward", "backward")
EAGER, AUTOCAST, COMPILE = "eager", "eager-autocast", "compile"
NORM, STEPS = "skip_group_norm", ("unet_step", "uvit_step", "dit_step", "unet_patched")

Tests = dict[tuple[str, str, str], dict[str, Row]]
"""By layout, direction and shape, by provider: the newest row of each."""


def tests_of(rows: Iterable[Row], op: str) -> Tests:
    found: Tests = defaultdict(dict)
    for row in rows:
        if row.op == op and not row.error:
            found[row.layout, row.direction, row.shape][row.provider] = row
    return {key: test for key, test in found.items() if "ours" in test}


def norms(rows: list[Row]) -> Table:
    """What GroupNorm's kernels amount to where memory decides."""
    lines: list[list[Value]] = []
    tests = {key: test for key, test in tests_of(rows, NORM).items() if output_bytes(test["ours"]) >= LARGE_BYTES}
    for layout, direction in ((layout, direction) for layout in LAYOUTS for direction in DIRECTIONS):
        group = [test for key, test in tests.items() if key[:2] == (layout, direction)]
        if not group:
            continue
        percents = [test["ours"].percent_of_copy or 0.0 for test in group]
        others = (_spread([_times(test, name) for test in group]) for name in (EAGER, AUTOCAST))
        of_best = [times for test in group if (times := _times_of_best(test)) is not None]
        best = f"{_spread(of_best)}, {len(of_best)} shapes" if of_best else "-"
        lines.append([LAYOUTS[layout], direction, len(group), _range(percents, "{:.0f}"), *others, best])
    header = ("layout", "direction", "shapes", "% of a copy's bandwidth")
    header += ("times eager", "times eager under autocast", "times torch.compile at its best")
    note = (
        "skip_group_norm with a learnable scale and SiLU in bf16, at the decoders' shapes of DDPM, ADM, Stable "
        "Diffusion 1.5 and SDXL from 8 MB on: the median, and from the least to the most; how many times as fast as "
        "the others. torch.compile by the fastest of its ways that keeps the layout"
    )
    return Table("norms", "GroupNorm", note, header, lines)


def norms_of_layout(layout: str) -> Callable[[list[Row]], Table]:
    def table(rows: list[Row]) -> Table:
        tests = tests_of(rows, NORM)
        lines: list[list[Value]] = []
        for shape in dict.fromkeys(shape for of_layout, _, shape in tests if of_layout == layout):
            line: list[Value] = [shape]
            for direction in DIRECTIONS:
                test = tests[layout, direction, shape]
                ours = test["ours"]
                best = _times_of_best(test)
                line += [
                    f"{1e3 * ours.ms_median:.1f}",
                    f"{ours.percent_of_copy or 0:.0f}",
                    f"{_times(test, EAGER):.2f}",
                ]
                line.append("-" if best is None else f"{best:.2f}")
            lines.append(line)
        columns = ("{}, µs", "{}, % of a copy", "{}, times eager", "{}, times compile")
        header = ("shape", *(column.format(direction) for direction in DIRECTIONS for column in columns))
        note = "A share above 100 % is of inputs that lie in L2 in part"
        return Table(f"norms {layout}", f"GroupNorm, {LAYOUTS[layout]}", note, header, lines)

    return table


def steps(rows: list[Row]) -> Table:
    """Whole training steps."""
    lines: list[list[Value]] = []
    for op in STEPS:
        for (_, _, shape), test in tests_of(rows, op).items():
            for provider, row in sorted(test.items(), key=lambda item: item[1].ms_median):
                images = int(re.findall(r"B=(\d+)", shape)[0]) / row.ms_median * 1e3
                spread = f"{row.ms_median:.1f} ({row.ms_p20:.1f} to {row.ms_p80:.1f})"
                memory = "-" if row.peak_mb is None else f"{row.peak_mb / 1e3:.1f}"
                times = f"{row.ms_median / test['ours'].ms_median:.2f}"
                lines.append([f"{shape}, {row.dtype}", provider, spread, f"{images:.0f}", memory, times])
    header = ("step", "provider", "ms (20 % to 80 %)", "images/s", "GB beyond the weights", "times ours")
    note = "forward, backward, AdamW and EMA; -graph: the whole step replayed from a CUDA graph"
    return Table("steps", "Training steps", note, header, lines)


TABLES: Mapping[str, Callable[[list[Row]], Table]] = {
    "norms": norms,
    **{f"norms {layout}": norms_of_layout(layout) for layout in LAYOUTS},
    "steps": steps,
}


def table_of(results: Path, device: str, name: str) -> tuple[Table, str]:
    """A table, and where its rows come from.

    Args:
        device: the name of a file in ``results``, without ".csv".

    Raises:
        UserError: no such table, or no such device.
    """
    if name not in TABLES:
        raise UserError(f"no table of benchmarks {name!r}; there are {', '.join(TABLES)}")
    rows = read_rows(results / f"{device}.csv")
    if not rows:
        raise UserError(f"{results} has no rows of {device!r}")
    used = [row for row in rows if row.op in (STEPS if name == "steps" else (NORM,))]

    def of_all(column: str) -> str:
        return ", ".join(sorted({getattr(row, column) for row in used}))

    where = f"commits {of_all('commit')}; {of_all('device')}, torch {of_all('torch')}, Triton {of_all('triton')}"
    return TABLES[name](used), f"{where}, {of_all('date')}"


def _times(test: Mapping[str, Row], provider: str) -> float | None:
    return test[provider].ms_median / test["ours"].ms_median if provider in test else None


def _times_of_best(test: Mapping[str, Row]) -> float | None:
    compiled = [_times(test, name) for name in _compiled(test)]
    return min((times for times in compiled if times is not None), default=None)


def _compiled(test: Mapping[str, Row]) -> Iterator[str]:
    """Of channels_last, those whose output is so too: alone, a compiled norm may hand over contiguous tensors."""
    is_last = any(row.layout == "channels_last" for row in test.values())
    return (name for name in test if name.startswith(COMPILE) and (not is_last or name.endswith("channels-last")))


def _spread(values: Iterable[float | None]) -> str:
    return _range([value for value in values if value is not None], "{:.2f}")


def _range(values: list[float], form: str) -> str:
    if not values:
        return "-"
    return f"{form.format(median(values))} ({form.format(min(values))} to {form.format(max(values))})"
