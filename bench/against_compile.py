"""Modelled times of ours against those of torch.compile, rows that inductor_counts.py made: no test runs Inductor."""

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from scalelong.bench.record import RESULTS

ROWS = RESULTS / "modelled" / "compile-h100.csv"
DIRECTIONS = ("forward", "backward")
LEAST_SPEEDUP = 1.6  # over the best of its options, forward and backward together
LEAST_SPEEDUP_OF_A_DIRECTION = 1.3


class Key(NamedTuple):
    shape: str
    layout: str
    direction: str


def best_compile(path: Path = ROWS) -> dict[Key, float]:
    """Microseconds, with the best of the options for each direction."""
    best: dict[Key, float] = {}
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            key, us = Key(row["shape"], row["layout"], row["direction"]), float(row["modelled_us"])
            best[key] = min(us, best.get(key, us))
    return best


def speedups(ours: Mapping[Key, float], rival: Mapping[Key, float]) -> dict[Key, float]:
    """Of all that the rival has figures for; the direction "both" is forward and backward together."""
    found = {}
    for shape, layout in dict.fromkeys((key.shape, key.layout) for key in rival):
        keys = [Key(shape, layout, direction) for direction in DIRECTIONS]
        found |= {key: rival[key] / ours[key] for key in keys}
        found[Key(shape, layout, "both")] = sum(rival[key] for key in keys) / sum(ours[key] for key in keys)
    return found


def shortfalls(ours: Mapping[Key, float], rival: Mapping[Key, float]) -> list[str]:
    """Where ours is not so much faster as it should be, a line each."""
    least = {"both": LEAST_SPEEDUP, **dict.fromkeys(DIRECTIONS, LEAST_SPEEDUP_OF_A_DIRECTION)}
    return [
        f"{' '.join(key)}: {speedup:.2f} times the best compile, where {least[key.direction]} are wanted"
        for key, speedup in speedups(ours, rival).items()
        if speedup < least[key.direction]
    ]


def compile_table(ours: Mapping[Key, float], rival: Mapping[Key, float]) -> list[str]:
    """In Markdown."""
    lines = ["| shape | forward, us | backward, us | together |", "|---|---|---|---|"]
    for key, speedup in speedups(ours, rival).items():
        if key.direction == "both":
            shown = [f"{ours[x]:.0f} / {rival[x]:.0f}" for x in (key._replace(direction=d) for d in DIRECTIONS)]
            lines.append(f"| {key.shape} {key.layout} | {' | '.join(shown)} | {speedup:.2f}x |")
    return [*lines, ""]
