"""What rows amount to: ours against the other providers where memory decides, and where ours is not the fastest."""

from collections import defaultdict
from collections.abc import Iterable
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
        tests[row.op, row.dtype, row.layout, row.direction, row.shape][row.provider] = row
    tests = {key: test for key, test in tests.items() if "ours" in test}
    large: dict[tuple[str, ...], list[Test]] = defaultdict(list)
    for key, test in tests.items():
        if _size(test["ours"]) >= LARGE_BYTES:
            large[key[:-1]].append(test)
    lines = [f"ours, median over shapes of at least {LARGE_BYTES / 1e6:g} MB:"] if large else []
    lines += [f"  {' '.join(key)} ({len(group)} shapes): {_medians(group)}" for key, group in large.items()]
    slower = [f"  {' '.join(key)}: {_faster(test)}" for key, test in tests.items() if _faster(test)]
    if slower:
        lines += ["ours is slower than:", *slower]
    elif tests:
        lines += ["ours is the fastest everywhere."]
    return lines


def _size(row: Row) -> float:
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
