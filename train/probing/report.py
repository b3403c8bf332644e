"""What linear probes came to, as a table over blocks and noise levels, as rows, and as a plot."""

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

from scalelong.train.errors import UserError, warn
from scalelong.train.probing.probe import ProbeRow
from scalelong.train.scores.table import table
from scalelong.train.write_whole import staged, write_whole


def best_of(rows: Sequence[ProbeRow]) -> ProbeRow:
    """The first of the highest accuracy, among blocks where there are any."""
    return max([row for row in rows if row.sigma is not None] or rows, key=lambda row: row.accuracy)


def cells_of(rows: Sequence[ProbeRow]) -> list[dict[str, str]]:
    """A line for each block, a column for each noise level; features of plain images stand in the first of them."""
    sigmas = list(dict.fromkeys(row.sigma for row in rows if row.sigma is not None))
    heads = [f"sigma {sigma:g}" for sigma in sigmas] or ["accuracy"]
    lines: dict[str, dict[str, str]] = {}
    for row in rows:
        line = lines.setdefault(
            row.source, {"features": row.source, "width": f"{row.width:,}", **dict.fromkeys(heads, "-")}
        )
        line[heads[0] if row.sigma is None else f"sigma {row.sigma:g}"] = f"{row.accuracy:.1%}"
    return list(lines.values())


def write_probe(rows: Sequence[ProbeRow], known: Mapping[str, object], about: Sequence[str], out: Path) -> None:
    """Prints the table and writes it beside ``out``: .csv, .md, .png.

    Args:
        known: what is the same in all rows.
        about: what has to be known to read the table, a line each.

    Raises:
        UserError: it cannot be written.
    """
    cells, best = cells_of(rows), best_of(rows)
    at = "" if best.sigma is None else f" at sigma {best.sigma:g}"
    notes = [f"best: {best.source}{at}, {best.accuracy:.1%} of held-out images", *about]
    print(table(cells))
    print("\n".join(notes))
    csv_path, markdown, plot = (out.with_suffix(suffix) for suffix in (".csv", ".md", ".png"))
    try:
        write_whole(csv_path, as_csv(rows, known).encode())
        write_whole(markdown, (table(cells, markdown=True) + "\n" + "\n\n".join(notes) + "\n").encode())
        drawn = draw(rows, plot)
    except OSError as error:
        raise UserError(f"cannot write {error.filename or out}: {error.strerror}") from error
    print(f"-> {csv_path}, {markdown}" + (f", {plot}" if drawn else ""))


def as_csv(rows: Sequence[ProbeRow], known: Mapping[str, object]) -> str:
    """A line for each probe."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*ProbeRow._fields, *known])
    writer.writerows([*("" if value is None else value for value in row), *known.values()] for row in rows)
    return text.getvalue()


def draw(rows: Sequence[ProbeRow], path: Path) -> bool:
    """Accuracy over blocks, a line for each noise level; features of plain images across.

    Returns:
        Whether it was drawn; matplotlib may be missing, which is said.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        warn('no plot, for want of matplotlib: pip install "scalelong[scores]"')
        return False
    figure = Figure(figsize=(7, 4), layout="constrained")
    panel = figure.add_subplot(xlabel="block", ylabel="accuracy of a linear probe, %")
    blocks = list(dict.fromkeys(row.source for row in rows if row.sigma is not None))
    for sigma in dict.fromkeys(row.sigma for row in rows if row.sigma is not None):
        line = [row for row in rows if row.sigma == sigma]
        places = [blocks.index(row.source) for row in line]
        panel.plot(places, [100 * row.accuracy for row in line], marker="o", label=f"sigma {sigma:g}")
    for row, style in zip((row for row in rows if row.sigma is None), ("--", ":"), strict=False):
        panel.axhline(100 * row.accuracy, color="black", linestyle=style, label=row.source)
    if blocks:
        panel.set_xticks(range(len(blocks)), blocks, rotation=60, ha="right", fontsize="small")
    panel.grid(alpha=0.3)
    panel.legend()
    with staged(path) as staging:
        figure.savefig(staging, format="png", dpi=120)
    return True
