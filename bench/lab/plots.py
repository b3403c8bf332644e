"""The pictures of a laboratory: colours that everybody can tell apart, lines told apart by marks too, few words."""

import io
import math
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FormatStrFormatter, MaxNLocator, NullFormatter, NullLocator

from scalelong.bench.lab.cells import number, place_of, sorted_values
from scalelong.bench.lab.groups import Group, contexts_of, depth_of, groups_of, trained, untrained
from scalelong.bench.lab.metrics import STABLE_LOSS
from scalelong.bench.lab.probe_points import TIMES
from scalelong.bench.lab.table import Row

# Okabe and Ito's palette, without its yellow, which white swallows.
COLORS = ("#000000", "#E69F00", "#56B4E9", "#009E73", "#D55E00", "#CC79A7", "#0072B2")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
LINES = ("-", "--", ":")
STYLE: dict[Any, Any] = {
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "lines.linewidth": 2.0,
    "lines.markersize": 6,
    "legend.frameon": False,
    "svg.hashsalt": "scalelong",
}
WIDTH, HEIGHT = 4.6, 3.5
"""Of one panel, in inches."""
MAX_LABELS = 5
"""Of a panel's axis."""
MAX_NAMES = 6
"""In a panel's legend."""
NAMES_WIDTH = 3.0
"""Of a legend beside the panels, in inches."""


def pictures_of(rows: Sequence[Row]) -> dict[str, tuple[bytes, bytes]]:
    """SVG and PNG of every picture that the rows have something for, by the key of the table that has its numbers.

    The same rows give the same bytes.
    """
    drawn: dict[str, Callable[[Sequence[Row]], Figure | None]] = {
        "losses": rate_and_loss,
        "stability": stable_cells,
        "speed": curves,
        "magnitudes": weight_norms,
        "gain": gains,
        "law": depth_and_norm,
    }
    with mpl.rc_context(STYLE):
        figures = {key: draw(rows) for key, draw in drawn.items()}
        return {key: as_bytes(figure) for key, figure in figures.items() if figure is not None}


def as_bytes(figure: Figure) -> tuple[bytes, bytes]:
    for panel in figure.axes:
        label_plainly(panel)
    svg, png = io.BytesIO(), io.BytesIO()
    figure.savefig(svg, format="svg", metadata={"Date": None})
    figure.savefig(png, format="png", dpi=130)
    return svg.getvalue(), png.getvalue()


def looks_of(modes: Sequence[str]) -> dict[str, dict[str, Any]]:
    """A colour, a mark and a line for each mode, the same in every picture of a table."""
    looks = {}
    for n, mode in enumerate(dict.fromkeys(modes)):
        turn, place = divmod(n, len(COLORS))  # colours come again with other marks and lines
        mark, line = MARKERS[(place + turn) % len(MARKERS)], LINES[turn % len(LINES)]
        looks[mode] = {"color": COLORS[place], "marker": mark, "linestyle": line, "label": mode}
    return looks


def panels(titles: Sequence[str], *, share_y: bool = True) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(WIDTH * max(1, len(titles)), HEIGHT), layout="constrained")
    axes = np.atleast_1d(figure.subplots(1, len(titles), sharey=share_y))
    for panel, title in zip(axes, titles, strict=True):
        panel.set_title("" if title == "all" else title, loc="left", fontweight="bold", fontsize=11)
    return figure, list(axes)


def name_modes(figure: Figure, axes: Sequence[Axes], place: int = 0) -> None:
    """In the panel of this place, or beside them all where there are too many for it."""
    pairs = (pair for panel in axes for pair in zip(*panel.get_legend_handles_labels(), strict=True))
    handles = {label: handle for handle, label in pairs}
    if len(handles) <= MAX_NAMES:
        axes[place].legend(handles.values(), handles.keys(), fontsize=9)
        return
    figure.set_figwidth(figure.get_figwidth() + NAMES_WIDTH)
    figure.legend(handles.values(), handles.keys(), loc="outside right upper", fontsize=9)


def label_places(panel: Axes, places: Sequence[float], form: str) -> None:
    """Labels at the values that were measured, and nowhere between."""
    panel.set_xticks(list(places))
    panel.xaxis.set_major_formatter(FormatStrFormatter(form))
    panel.xaxis.set_minor_formatter(NullFormatter())


def label_plainly(panel: Axes) -> None:
    """Numbers in place of powers of ten up an axis that spans less than one of them."""
    low, high = panel.get_ylim()
    if panel.get_yscale() == "log" and high < 10 * low:
        panel.yaxis.set_major_locator(MaxNLocator(MAX_LABELS, steps=[1, 2, 5, 10]))
        panel.yaxis.set_major_formatter(FormatStrFormatter("%g"))
        panel.yaxis.set_minor_locator(NullLocator())


def rate_and_loss(rows: Sequence[Row]) -> Figure | None:
    """Rate against final loss: medians, the range over seeds as a band, crosses where runs diverged."""
    groups = [group for group in groups_of(trained(rows)) if len(group.rates) > 1]
    if not groups:
        return None
    looks, contexts = looks_of([group.mode for group in groups]), contexts_of(groups)
    figure, axes = panels(list(contexts))
    finite = np.concatenate([group.losses[np.isfinite(group.losses)] for group in groups])
    ceiling = max((row.start_loss for group in groups for row in group.rows), default=1.0)
    for panel, modes in zip(axes, contexts.values(), strict=True):
        for place, group in enumerate(modes):
            look = looks[group.mode]
            capped = np.minimum(group.losses, ceiling)
            panel.plot(group.rate_values, np.minimum(group.medians, ceiling), **look)
            panel.fill_between(group.rate_values, np.fmin.reduce(capped, axis=1), np.fmax.reduce(capped, axis=1),
                               alpha=0.15, lw=0, color=look["color"])  # fmt: skip
            lost = group.diverged.sum(axis=1)
            x = group.rate_values[lost > 0] * 2 ** (0.04 * (place - len(modes) / 2))  # side by side
            panel.scatter(x, [ceiling * 1.08] * len(x), marker="x", color=look["color"], s=45, zorder=3)
        panel.set(xscale="log", yscale="log", xlabel="learning rate")
        rates = sorted({float(rate) for group in modes for rate in group.rate_values})
        label_places(panel, rates[:: -(-len(rates) // MAX_LABELS)], "%.2g")
    axes[0].set_ylabel("final loss (x: diverged)")
    axes[0].set_ylim(0.9 * finite.min() if len(finite) else None, 1.2 * ceiling)
    name_modes(figure, axes, place=-1)
    return figure


def stable_cells(rows: Sequence[Row]) -> Figure | None:
    """A map: the share of seeds that survive, outlined where the rate counts as stable."""
    groups = [group for group in groups_of(trained(rows)) if len(group.rates) > 1]
    if not groups:
        return None
    contexts = contexts_of(groups)
    rates = sorted_values([rate for group in groups for rate in group.rates])
    figure, axes = panels(list(contexts), share_y=False)
    colors = ListedColormap(["#D55E00", "#F0C9A0", "#DDE8F3", "#0072B2"])
    for panel, modes in zip(axes, contexts.values(), strict=True):
        best = min(group.best_loss for group in modes)
        image = np.full((len(modes), len(rates)), np.nan)
        for y, group in enumerate(modes):
            for rate, median, lost in zip(group.rates, group.medians, group.diverged, strict=True):
                x, survive = rates.index(rate), 1 - lost.sum() / len(group.at(rate))
                is_stable = median <= STABLE_LOSS * best and survive >= 0.66
                image[y, x] = 3 if is_stable else 2 if survive == 1 else 1 if survive > 0 else 0
        panel.imshow(image, cmap=colors, vmin=-0.5, vmax=3.5, aspect="auto")
        panel.set_xticks(range(len(rates)), [f"{number(rate):.2g}" if rate else "" for rate in rates], fontsize=8)
        panel.set_yticks(range(len(modes)), [group.mode for group in modes], fontsize=9)
        panel.tick_params(axis="x", rotation=45)
        panel.grid(visible=False)
        panel.set_xlabel("learning rate")
    handles = [Patch(color=colors(3 - n)) for n in range(4)]
    labels = ["good (within 1.1 x the best)", "finishes, worse", "some seeds diverge", "all seeds diverge"]
    figure.legend(handles, labels, loc="outside lower center", ncols=2, fontsize=9)
    return figure


def curves(rows: Sequence[Row]) -> Figure | None:
    """Loss, gradient norm and the norm of h_1 over images, of the deepest networks near the edge."""
    groups = groups_of(trained(rows))
    if not groups:
        return None
    contexts = contexts_of(groups)
    context = max(contexts, key=lambda c: depth_of(place_of(contexts[c][0].rows[0].cell)))
    modes = contexts[context]
    rate = edge_rate(modes)
    looks = looks_of([group.mode for group in groups])
    figure, axes = panels([f"{context}, rate {rate}" if rate else context, "", ""], share_y=False)
    for panel, column, label in zip(
        axes, ("curve_loss", "curve_gradient", "curve_hidden"), ("loss", "gradient norm", "norm of h₁"), strict=True
    ):
        for group in modes:
            draw_curves(panel, group.at(rate), column, looks[group.mode])
        panel.set(yscale="log", xlabel="images", ylabel=label)
    name_modes(figure, axes)
    return figure


def weight_norms(rows: Sequence[Row]) -> Figure | None:
    """The norm of all weights over images, of each mode at its own best rate."""
    groups = groups_of([row for row in trained(rows) if any(map(math.isfinite, row.curve_weights))])
    if not groups:
        return None
    looks, contexts = looks_of([group.mode for group in groups]), contexts_of(groups)
    figure, axes = panels(list(contexts))
    for panel, modes in zip(axes, contexts.values(), strict=True):
        for group in modes:
            draw_curves(panel, group.at(group.best_rate), "curve_weights", looks[group.mode])
        panel.set(yscale="log", xlabel="images")
    axes[0].set_ylabel("norm of all weights")
    name_modes(figure, axes)
    return figure


def draw_curves(panel: Axes, rows: Sequence[Row], column: str, look: dict[str, Any]) -> None:
    """Each seed thin, their median thick as far as all came, a cross where one diverged."""
    found = [np.array(getattr(row, column)) for row in rows if getattr(row, column)]
    if not found:
        return
    finite = [np.where(np.isfinite(values), values, np.nan) for values in found]
    for row, values in zip(rows, finite, strict=False):
        panel.plot(row.curve_images[: len(values)], values, color=look["color"], alpha=0.3, lw=0.8)
        if row.state == "diverged" and np.isfinite(values).any():
            place = np.flatnonzero(np.isfinite(values))[-1]
            panel.scatter(row.curve_images[place], values[place], marker="x", color=look["color"], s=50, zorder=3)
    shared = min(map(len, finite))
    middle = np.median([values[:shared] for values in finite], axis=0)
    panel.plot(rows[0].curve_images[:shared], middle, **{**look, "marker": ""})


def edge_rate(groups: Sequence[Group]) -> str:
    """The smallest rate at which the modes differ by half; else that at which they differ most."""
    rates = sorted_values([rate for group in groups for rate in group.rates])
    spread: dict[str, float] = {}
    for rate in rates:
        losses = [group.medians[group.rates.index(rate)] for group in groups if rate in group.rates]
        low, high = min(losses), max(losses)
        spread[rate] = high / low if 0 < low < math.inf else 1.0
    return next((rate for rate in rates if spread[rate] >= 1.5), max(rates, key=lambda rate: spread[rate]))


def gains(rows: Sequence[Row]) -> Figure | None:
    """Perturbation gain over time, at a perturbation of a tenth of the input."""
    groups = groups_of([row for row in rows if row.gain_0_1 and row.state != "start"])
    groups = groups or groups_of([row for row in rows if row.gain_0_1 and any(row.gain_0_1)])
    if not groups:
        return None
    looks, contexts = looks_of([group.mode for group in groups]), contexts_of(groups)
    figure, axes = panels(list(contexts)[-3:])
    for panel, context in zip(axes, list(contexts)[-3:], strict=True):
        for group in contexts[context]:
            found = [row.gain_0_1 for row in group.at(group.best_rate) if row.gain_0_1]
            found = found or [row.gain_0_1 for row in group.rows if row.gain_0_1]
            panel.plot(TIMES, np.median(found, axis=0), **looks[group.mode])
            if len(found) > 1:
                panel.fill_between(TIMES, np.min(found, axis=0), np.max(found, axis=0), alpha=0.12, lw=0,
                                   color=looks[group.mode]["color"])  # fmt: skip
        panel.set(xlabel="time (share of the training times)", yscale="log")
    axes[0].set_ylabel("gain at δ = 0.1 rms")
    name_modes(figure, axes)
    return figure


def depth_and_norm(rows: Sequence[Row]) -> Figure | None:
    """Depth against ||h_0||² / ||x||² of untrained networks, the law beside it as dashes."""
    rows = untrained(rows)
    if not rows:
        return None
    starts = list(dict.fromkeys(place_of(row.cell).get("start", "published") for row in rows))
    looks = looks_of([place_of(row.cell).get("skip-scale", "none") for row in rows])
    titles = {"published": "published weights", "preserving": "norm-preserving projections"}
    figure, axes = panels([titles[start] for start in starts], share_y=False)
    for panel, start in zip(axes, starts, strict=True):
        for mode, look in looks.items():
            points: dict[float, list[Row]] = {}
            for row in rows:
                place = place_of(row.cell)
                if (place.get("start", "published"), place.get("skip-scale", "none")) == (start, mode):
                    points.setdefault(depth_of(place), []).append(row)
            depths = sorted(points)
            panel.plot(depths, [np.median([r.norm_ratio for r in points[d]]) for d in depths], **look)
            if start == "preserving":
                law = [1 + np.median([r.kappa_squares for r in points[d]]) for d in depths]
                panel.plot(depths, law, ls="--", lw=1, color=look["color"])
        panel.set(xlabel="depth (blocks)", yscale="log", xscale="log")
        label_places(panel, sorted({depth_of(place_of(row.cell)) for row in rows}), "%g")
    axes[0].set_ylabel("‖h₀‖² / ‖x‖²")
    if "preserving" in starts:
        axes[starts.index("preserving")].plot([], [], ls="--", lw=1, color="grey", label="1 + Σ κ²")
    name_modes(figure, axes, place=-1)
    return figure
