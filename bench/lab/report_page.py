"""What a laboratory leaves to be looked at: tables as CSV and Markdown, plots as PNG, and one self-contained page."""

import base64
import html
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from scalelong.bench.lab.cells import number
from scalelong.bench.lab.report_table import Table, Value
from scalelong.bench.lab.summary import tables_of
from scalelong.bench.lab.table import Row
from scalelong.bench.lab.verdicts import Verdict, verdicts_of
from scalelong.train.errors import UserError, warn
from scalelong.train.write_whole import write_whole

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 75rem; margin: 0 auto; padding: 1rem; color: #1a1a1a; }
h1 { font-size: 1.6rem; margin-bottom: 0; } h2 { font-size: 1.2rem; margin-top: 2.5rem; }
.plot { overflow-x: auto; } .plot img { height: auto; width: calc(8rem * var(--inches)); max-width: 100%;
min-width: calc(4.4rem * var(--inches)); }
code { background: #f2f2f2; padding: .1em .3em; overflow-wrap: anywhere; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-size: .85rem; white-space: nowrap; }
th, td { padding: .25rem .6rem; text-align: right; border-bottom: 1px solid #ddd; }
th:first-child, td:first-child, th:nth-child(2), td:nth-child(2) { text-align: left; }
th { background: #f2f2f2; } th button { all: unset; cursor: pointer; font-weight: 600; }
th button:focus-visible { outline: 2px solid #0072B2; } th[aria-sort=ascending] button::after { content: " ▲"; }
th[aria-sort=descending] button::after { content: " ▼"; } .note, .facts { color: #555; font-size: .9rem; }
ul.verdicts { list-style: none; padding: 0; } ul.verdicts li { padding: .3rem .6rem; margin: .3rem 0; }
.holds { border-left: .4rem solid #0072B2; } .fails { border-left: .4rem solid #D55E00; }
.open { border-left: .4rem solid #999; }
"""
SCRIPT = """
for (const button of document.querySelectorAll("th button")) button.onclick = () => {
  const heading = button.parentNode, body = heading.closest("table").tBodies[0], n = heading.cellIndex;
  const down = heading.getAttribute("aria-sort") === "ascending";
  for (const other of heading.parentNode.cells) other.removeAttribute("aria-sort");
  heading.setAttribute("aria-sort", down ? "descending" : "ascending");
  const key = row => row.cells[n].dataset.value ?? row.cells[n].textContent;
  const order = (a, b) => isNaN(key(a)) || isNaN(key(b)) ? key(a).localeCompare(key(b)) : key(a) - key(b);
  body.append(...[...body.rows].sort((a, b) => down ? order(b, a) : order(a, b)));
};
"""
WORDS = {True: ("holds", "reached"), False: ("fails", "not reached"), None: ("open", "cannot be told")}


@dataclass(frozen=True)
class Facts:
    """What stands above everything."""

    title: str
    command: str
    """That made the table, and goes on with it."""
    problems: Mapping[str, str]
    """Why cells have no row, by their names."""


def write_report(folder: Path, rows: Sequence[Row], facts: Facts) -> Path:
    """Writes ``report.html``, ``report.md``, a CSV for each table and a PNG for each plot; returns the page.

    Raises:
        UserError: they cannot be written.
    """
    tables, verdicts = tables_of(rows), verdicts_of(rows)
    pictures = draw(rows)
    page = page_of(rows, tables, verdicts, {key: svg for key, (svg, _) in pictures.items()}, facts)
    files = {"report.html": page.encode(), "report.md": markdown_of(rows, tables, verdicts, pictures, facts).encode()}
    files |= {f"{table.key}.csv": csv_of(table).encode() for table in tables}
    files |= {f"{key}.png": png for key, (_, png) in pictures.items()}
    try:
        for name, data in files.items():
            write_whole(folder / name, data)
    except OSError as error:
        raise UserError(f"cannot write {folder / name}: {error.strerror}") from error
    return folder / "report.html"


def draw(rows: Sequence[Row]) -> dict[str, tuple[bytes, bytes]]:
    """SVG and PNG of each plot, by the key of its table; none where matplotlib is not installed, which is said."""
    try:
        from scalelong.bench.lab.plots import pictures_of
    except ModuleNotFoundError as error:
        warn(f"no plots: {error.name} is not installed (pip install 'scalelong[lab]')")
        return {}
    return pictures_of(rows)


def page_of(
    rows: Sequence[Row],
    tables: Sequence[Table],
    verdicts: Sequence[Verdict],
    pictures: Mapping[str, bytes],
    facts: Facts,
) -> str:
    title, text = html.escape(facts.title), html.escape
    parts = [
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title>',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<style>{STYLE}</style><h1>{title}</h1>",
        f'<p class="facts">{text(where(rows))}</p>',
    ]
    if verdicts:
        items = [
            f'<li class="{WORDS[v.holds][0]}"><b>{WORDS[v.holds][1]}</b>: {text(v.claim)} <br>{text(v.found)}</li>'
            for v in verdicts
        ]
        parts.append(f'<ul class="verdicts">{"".join(items)}</ul>')
    for table in tables:
        parts.append(f'<h2 id="{table.key}">{text(table.title)}</h2>')
        if table.key in pictures:
            parts.append(html_plot(table.title, pictures[table.key]))
        made_by = f"<code>{text(facts.command)}</code>"
        parts.append(f'<p class="note">{text(table.note)} Made by {made_by}.</p>{html_table(table)}')
    if facts.problems:
        items = [f"<li><b>{text(name)}</b>: {text(why)}</li>" for name, why in facts.problems.items()]
        parts.append(f"<h2>Cells without a row</h2><ul>{''.join(items)}</ul>")
    return "\n".join([*parts, f"<script>{SCRIPT}</script></html>\n"])


def html_plot(title: str, svg: bytes) -> str:
    """A plot that shrinks with the page down to where its text can still be read, and is scrolled from there on."""
    (points,) = re.findall(rb'<svg[^>]* width="([\d.]+)pt"', svg)
    data = base64.b64encode(svg).decode()
    image = f'<img alt="{html.escape(title)}, as a plot" src="data:image/svg+xml;base64,{data}"'
    return f'<div class="plot" style="--inches: {float(points) / 72:.3g}">{image}></div>'


def html_table(table: Table) -> str:
    head = "".join(f'<th scope="col"><button>{html.escape(name)}</button></th>' for name in table.header)
    body = "".join(f"<tr>{''.join(map(_html_cell, line))}</tr>" for line in table.lines)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _html_cell(value: Value) -> str:
    if isinstance(value, str):
        rate = f' data-value="{number(value)!r}"' if re.fullmatch(r"2\^-?[\d.]+", value) else ""
        return f"<td{rate}>{html.escape(value)}</td>"
    return f'<td data-value="{-1e300 if math.isnan(value) else min(value, 1e300)!r}">{shown(value)}</td>'


def shown(value: Value) -> str:
    """A value as people read it."""
    if isinstance(value, str):
        return value
    if math.isnan(value):
        return "-"
    if math.isinf(value):
        return "never"
    return f"{value:,.0f}" if abs(value) >= 1000 or float(value).is_integer() else f"{value:.3g}"


def markdown_of(
    rows: Sequence[Row],
    tables: Sequence[Table],
    verdicts: Sequence[Verdict],
    pictures: Mapping[str, object],
    facts: Facts,
) -> str:
    parts = [f"# {facts.title}", where(rows), f"`{facts.command}`"]
    if verdicts:
        parts.append("\n".join(f"- {WORDS[v.holds][1]}: {v.claim}. {v.found}" for v in verdicts))
    for table in tables:
        parts.append(f"## {table.title}")
        if table.key in pictures:
            parts.append(f"![{table.title}]({table.key}.png)")
        parts += [table.note, markdown_table(table)]
    if facts.problems:
        parts += ["## Cells without a row", "\n".join(f"- {name}: {why}" for name, why in facts.problems.items())]
    return "\n\n".join(parts) + "\n"


def markdown_table(table: Table) -> str:
    lines = [table.header, ["---"] * len(table.header), *([shown(value) for value in line] for line in table.lines)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def csv_of(table: Table) -> str:
    def cell(value: Value) -> str:
        text = value if isinstance(value, str) else "" if math.isnan(value) else f"{value:.7g}"
        return f'"{text}"' if "," in text else text

    return "\n".join(",".join(map(cell, line)) for line in [list(table.header), *table.lines]) + "\n"


def where(rows: Sequence[Row]) -> str:
    """Of how many runs, from which commit, where and when."""
    dates = sorted({row.date for row in rows if row.date})
    span = dates[0] if len(set(dates)) == 1 else f"{dates[0]} to {dates[-1]}" if dates else ""
    sets = (sorted({getattr(row, name) for row in rows if getattr(row, name)}) for name in ("commit", "device"))
    hours = sum(row.seconds for row in rows if not math.isnan(row.seconds)) / 3600
    commits, devices = (", ".join(values) for values in sets)
    trained = f"{len(rows)} runs, {hours:.2g} hours of training" if hours else f"{len(rows)} untrained networks"
    return f"{trained}, commit {commits}, {devices}, {span}"
