"""What the Triton kernels of skip_group_norm cost an H100, from their machine code: a table of all shapes of shapes.py.

    make kernel-report                                          prints it and writes docs/kernel-report.md
    python -m scalelong.bench.kernel_report --record COMMIT     also keeps the figures as rows, as those of that commit

Beside each figure stands, in brackets, that of the kernels before them: the rows of ``BEFORE`` in ``ROWS``.
"""

import argparse
import csv
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path

import torch
import triton

from scalelong.bench.against_compile import DIRECTIONS, Key, best_compile, compile_table
from scalelong.bench.issue_model import ISSUE_RATE, Case, ModelledCase, issue_over_floor, modelled
from scalelong.bench.record import RESULTS
from scalelong.bench.shapes import LARGE_BYTES, SKIP_CONCATS

ROWS = RESULTS / "modelled" / "group-norm-h100.csv"
BEFORE = "346b4b8"
PAGE = Path(__file__).resolve().parents[1] / "docs" / "kernel-report.md"
LAYOUTS = ("NCHW", "NHWC")
INTRODUCTION = f"""\
# What the GroupNorm kernels cost an H100, read from their machine code

Written by `make kernel-report`, without a GPU: skip_group_norm with a trainable scale and SiLU in bf16, compiled for
sm_90 by Triton {triton.__version__}. Instructions are those that all launches issue, loops as often as they run, for
each element of the output; registers those of the kernels that move activations. The share of a copy's bandwidth is
modelled: instructions at {100 * ISSUE_RATE:.0f} % of the best issue rate or bytes at 3.0 TB/s, whichever takes longer,
and 3 us a launch (`bench/issue_model.py`). In brackets, the kernels of {BEFORE}.
"""
BESIDE_COMPILE = """\
### Beside torch.compile

Ours / the best of Inductor's options, by the same model. The rows are in `bench/results/modelled/compile-h100.csv`;
`python -m scalelong.bench.inductor_counts` makes them.
"""


@dataclass(frozen=True, kw_only=True)
class Row:
    commit: str
    torch: str
    triton: str
    shape: str
    layout: str
    direction: str
    dtype: str
    num_launches: int
    instructions_per_element: float  # of a thread, all launches together
    registers: str  # of each kernel that moves activations, in their order
    warps_on_an_sm: int  # the fewest of those kernels
    spill_bytes: int  # the most
    issue_us: float  # at ISSUE_RATE
    modelled_us: float
    floor_us: float

    @property
    def key(self) -> Key:
        return Key(self.shape, self.layout, self.direction)


def all_cases() -> list[Case]:
    """In bf16."""
    return [
        Case(concat, layout == "NHWC", direction)
        for layout in LAYOUTS
        for direction in DIRECTIONS
        for concat in SKIP_CONCATS
    ]


def row_of(x: ModelledCase, commit: str) -> Row:
    return Row(
        commit=commit,
        torch=torch.__version__,
        triton=triton.__version__,
        shape=str(x.case.concat),
        layout=x.case.layout,
        direction=x.case.direction,
        dtype=str(x.case.dtype).removeprefix("torch."),
        num_launches=len(x.launches),
        instructions_per_element=round(x.instructions_per_element, 1),
        registers=" ".join(str(kernel.registers) for kernel in x.main_kernels),
        warps_on_an_sm=min(kernel.num_warps_on_an_sm for kernel in x.main_kernels),
        spill_bytes=max(launch.kernel.stack_bytes for launch in x.launches),
        issue_us=round(x.issue_us, 1),
        modelled_us=round(x.us, 1),
        floor_us=round(x.case.floor_us, 1),
    )


def read_rows(commit: str, path: Path = ROWS) -> dict[Key, Row]:
    """The last ones of a commit."""
    types = {field.name: field.type for field in fields(Row)}
    with path.open(newline="") as file:
        rows = [Row(**{k: types[k](v) for k, v in row.items()}) for row in csv.DictReader(file)]  # pyright: ignore
    return {row.key: row for row in rows if row.commit == commit}


def append_rows(rows: Iterable[Row], path: Path = ROWS) -> None:
    is_new = not path.exists()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        if is_new:
            writer.writerow(field.name for field in fields(Row))
        writer.writerows(astuple(row) for row in rows)


def table(rows: Sequence[Row], before: Mapping[Key, Row]) -> list[str]:
    """Of one layout and direction, in Markdown."""
    lines = [
        f"### {rows[0].layout}, {rows[0].direction}",
        "",
        "| shape | instructions per element | registers | warps on an SM | launches | of a copy's bandwidth |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        old = before.get(row.key)
        cells = [_cells(x) for x in (row, old) if x is not None]
        shown = [" ".join((now, *(f"({x})" for x in rest))) for now, *rest in zip(*cells, strict=True)]
        lines.append(f"| {row.shape} | {' | '.join(shown)} |")
    return [*lines, ""]


def _cells(row: Row) -> tuple[str, ...]:
    return (
        f"{row.instructions_per_element:.1f}",
        row.registers.replace(" ", ", "),
        str(row.warps_on_an_sm),
        str(row.num_launches),
        f"{100 * row.floor_us / row.modelled_us:.0f} %",
    )


def last_line(found: Sequence[ModelledCase]) -> str:
    large = [x for x in found if x.case.num_bytes >= LARGE_BYTES]
    ratios = [f"{name} {issue_over_floor(x for x in large if x.case.layout == name):.2f}" for name in LAYOUTS]
    where = f"{len({x.case.concat for x in large})} shapes of {LARGE_BYTES / 1e6:g} MB and more"
    return f"issue over floor at {100 * ISSUE_RATE:.0f} %: {', '.join(ratios)} ({where})"


def report(found: Sequence[ModelledCase], commit: str = "") -> list[str]:
    rows = [row_of(x, commit) for x in found]
    before = read_rows(BEFORE)
    ours, rival = {row.key: row.modelled_us for row in rows}, best_compile()
    lines = [*INTRODUCTION.splitlines(), ""]
    for layout in LAYOUTS:
        for direction in DIRECTIONS:
            lines += table([x for x in rows if (x.layout, x.direction) == (layout, direction)], before)
    lines += [*BESIDE_COMPILE.splitlines(), "", *compile_table(ours, rival)]
    return [*lines, last_line(found)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", metavar="COMMIT", help=f"append the figures to {ROWS.name} as those of this commit")
    parser.add_argument("--write", action="store_true", help=f"write {PAGE.name} in docs/")
    arguments = parser.parse_args()
    found = modelled(all_cases(), num_workers=os.cpu_count() or 1)
    if arguments.record:
        append_rows(row_of(x, arguments.record) for x in found)
    lines = report(found)
    if arguments.write:
        PAGE.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
