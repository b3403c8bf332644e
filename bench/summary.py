"""What rows amount to: ours against the other providers where memory decides, and where ours is not the fastest."""

import re
from collections import defaultdict
from collections.abc import Iterable
from math import isnan
from statistics import median

from scalelong.bench.record import Row
from scalelong.bench.shapes import LARGE_BYTES

# Of its floor, a direction reads and writes this many tensors of the size of the output, where that is as large as the
# inputs together: forward reads and writes it; backward reads it twice and writes it once.
NUM_PASSES = {"forward": 2, "backward": 3, "both": 5}

Test = dict[str, Row]  # by provider


def summary_lines(rows: Iterable[Row]) -> list[str]:
    """Of what was measured twice, the later figures count."""
    tests: dict[tuple[str, ...], Test] = defaultdict(dict)
    for row in rows:
        if row.error:
            continue
        tests[row.op, row.dtype, row.layout, row.direction, row.shape][row.provider] = row
    tests = {key: test for key, test in tests.items() if "ours" in test}
    large: dict[tuple[str, ...], list[Test]] = defaultdict(list)
    for key, test in tests.items():
        if output_bytes(test["ours"]) >= LARGE_BYTES:
            large[key[:-1]].append(test)
    lines = [f"ours, median over shapes of at least {LARGE_BYTES / 1e6:g} MB:"] if large else []
    lines += [f"  {' '.join(key)} ({len(group)} shapes): {_medians(group)}" for key, group in large.items()]
    slower = [f"  {' '.join(key)}: {_faster(test)}" for key, test in tests.items() if _faster(test)]
    if slower:
        lines += ["ours is slower than:", *slower]
    elif tests:
        lines += ["ours is the fastest everywhere."]
    return lines


def table_lines(rows: Iterable[Row]) -> list[str]:
    """A line for each shape, as short as it goes; figures of a shape's directions side by side, then what failed."""
    groups: dict[tuple[str, ...], dict[str, dict[str, Test]]] = defaultdict(
        lambda: defaultdict(lambda: defaultdict(dict))
    )
    failed: dict[str, None] = {}
    for row in rows:
        shapes = groups.setdefault((row.op, row.dtype, row.layout), {})
        shapes.setdefault(row.shape, {}).setdefault(row.direction, {})[row.provider] = row
        if row.error:
            failed[f"  {row.op} {row.shape} {row.layout} {row.direction} {row.provider}: {row.error[:120]}"] = None
    lines = []
    for key, shapes in groups.items():
        if not any("ours" in test for tests in shapes.values() for test in tests.values()):
            lines += [f"{' '.join(key)} {shape}: {_plain(tests)}" for shape, tests in shapes.items()]
            continue
        directions = list(dict.fromkeys(direction for tests in shapes.values() for direction in tests))
        providers = dict.fromkeys(name for tests in shapes.values() for test in tests.values() for name in test)
        others = [name for name in providers if name != "ours"]
        width = max(map(len, shapes))
        times = f", times as fast as {', '.join(others)}" if others else ""
        lines.append(f"{' '.join(key)}; {' | '.join(directions)}: us of ours, % of a copy, us of the host{times}")
        for shape, tests in shapes.items():
            cells = (_cells(tests.get(direction, {}), others) for direction in directions)
            lines.append(f"{shape.ljust(width)}  {' | '.join(cells)}".rstrip(" |"))
    return [*lines, *(["failed:", *failed] if failed else [])]


def _plain(tests: dict[str, Test]) -> str:
    rows = [row for test in tests.values() for row in test.values() if not row.error]
    return ", ".join(
        f"{row.provider} {_short(1e3 * row.ms_median)} us" + (f" ({_short(row.gb_per_s)} GB/s)" if row.gb_per_s else "")
        for row in rows
    )


# Of what Nsight Compute prints on a kernel: its heading, and the figures that say what binds it.
NCU_KERNEL = re.compile(r"^\s+(\w+).* \(\d+, \d+, \d+\)x\(\d+, \d+, \d+\)")
NCU_FIGURES = "Duration|DRAM Throughput|L2 Hit Rate|Executed Ipc Active|Registers Per Thread|Achieved Occupancy"
NCU_FIGURE = re.compile(rf"^\s+({NCU_FIGURES})\s+(\S+ +\S+)$")


def ncu_lines(text: str) -> list[str]:
    """A line for each kernel in the output of ``ncu --set full``."""
    lines: list[str] = []
    for line in text.splitlines():
        if kernel := NCU_KERNEL.match(line):
            lines.append(kernel[1])
        elif lines and (figure := NCU_FIGURE.match(line)):
            lines[-1] += f", {figure[1]} {' '.join(figure[2].split())}"
    return lines


def _cells(test: Test, others: Iterable[str]) -> str:
    ours = test.get("ours")
    if ours is None:
        figures = "      -    -    -"
    else:
        figures = f"{_short(1e3 * ours.ms_median):>7} {_short(ours.percent_of_copy):>4} {_short(ours.host_us):>4}"
    ratios = (_short(test[name].ms_median / ours.ms_median) if ours and name in test else "-" for name in others)
    return figures + "".join(f" {ratio:>4}" for ratio in ratios)


def _short(x: float | None) -> str:
    return "-" if x is None or isnan(x) else f"{x:.0f}" if x >= 99.5 else f"{x:.1f}" if x >= 9.95 else f"{x:.2f}"


def output_bytes(row: Row) -> float:
    """Bytes of the output, from the floor; 0 where a row has none."""
    return 0 if row.gb_per_s is None else row.gb_per_s * row.ms_median * 1e6 / NUM_PASSES[row.direction]


def _medians(tests: Iterable[Test]) -> str:
    speedups, percents = defaultdict(list), []
    for test in tests:
        percents.append(test["ours"].percent_of_copy or 0)
        for provider, row in test.items():
            speedups[provider].append(row.ms_median / test["ours"].ms_median)
    del speedups["ours"]
    parts = [f"{median(ratios):.2f}x as fast as {provider}" for provider, ratios in speedups.items()]
    return ", ".join([*parts, f"{median(percents):.0f} % of a copy"])


def _faster(test: Test) -> str:
    """The providers that beat ours, and by how much."""
    ms = test["ours"].ms_median
    return ", ".join(f"{name} ({ms / row.ms_median:.2f}x)" for name, row in test.items() if row.ms_median < ms)
