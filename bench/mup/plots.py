"""The two pictures of muP: coordinates over the width, and losses over the learning rate."""

import io
from collections.abc import Mapping, Sequence

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from scalelong.bench.lab.plots import COLORS, MARKERS, STYLE
from scalelong.bench.mup.coordinates import Check, Curve, Measure, layer_kind
from scalelong.bench.mup.transfer import Losses

KINDS = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2", "skip_linear", "adaLN_modulation.1", "readout")
"""Kinds of layers that have a colour; the others are grey."""
READOUTS = ("decoder_pred", "final_layer.linear")
LABELS = {"size": "size", "update": "update"}
PANEL = 3.0, 2.5
"""Width and height, in inches."""


def coordinates_picture(shown: Mapping[str, Sequence[Curve]], measure: Measure, check: Check) -> bytes:
    """A PNG: a row for each parametrisation, a panel for each step, a line for each layer."""
    with mpl.rc_context(STYLE):
        figure, axes = _panels(len(shown), check.steps)
        for row, (name, curves) in zip(axes, shown.items(), strict=True):
            for step, panel in enumerate(row, start=1):
                for curve in curves:
                    if curve.measure == measure and curve.step == step:
                        _draw_curve(panel, curve, check)
                panel.set_xscale("log", base=2)
                panel.set_yscale("log", base=2)
                panel.set_xticks(check.widths, [str(width) for width in check.widths])
                panel.minorticks_off()
                panel.set_title(f"{name}, step {step}", loc="left", fontsize=10)
            row[0].set_ylabel(LABELS[measure])
        for panel in axes[-1]:
            panel.set_xlabel("width")
        found = {line.get_label(): line for line in figure.findobj(Line2D) if line.get_label() in KINDS}
        handles = [found[kind] for kind in KINDS if kind in found]
        figure.legend(handles, [kind.removesuffix(".1") for kind in KINDS if kind in found],
                      loc="outside lower center", ncols=7, fontsize=9)  # fmt: skip
        return _png(figure)


def _draw_curve(panel: Axes, curve: Curve, check: Check) -> None:
    kind = layer_kind(curve.layer)
    kind = "readout" if kind in READOUTS else kind
    if kind in KINDS:
        place = KINDS.index(kind)
        panel.plot(check.widths, curve.values, color=COLORS[place], marker=MARKERS[place], ms=4, lw=1.2, label=kind)
    else:
        panel.plot(check.widths, curve.values, color="#BBBBBB", lw=0.8, zorder=1)


def transfer_picture(losses: Mapping[str, Losses]) -> bytes:
    """A PNG: a panel for each parametrisation, loss against rate, a line for each width; stars at the best rates."""
    with mpl.rc_context(STYLE):
        figure, ((*axes,),) = _panels(1, len(losses), (4.2, 3.3))
        for panel, (name, found) in zip(axes, losses.items(), strict=True):
            for place, width in enumerate(found.widths):
                look = {"color": COLORS[place + 1], "marker": MARKERS[place]}
                values_RS = found.of_width(width)
                medians = found.medians(width)
                panel.plot(found.rates, medians, label=f"width {width}", ms=5, **look)
                with np.errstate(invalid="ignore"):
                    low, high = (f(np.where(np.isinf(values_RS), np.nan, values_RS), axis=1) for f in (np.min, np.max))
                panel.fill_between(found.rates, low, high, color=look["color"], alpha=0.15, lw=0)
                if np.isfinite(medians).any():
                    best = int(np.nanargmin(medians))
                    panel.plot(found.rates[best], medians[best], "*", color=look["color"], ms=16, zorder=4)
            panel.set_xscale("log", base=2)
            panel.set_yscale("log")
            panel.set(xlabel="learning rate", title=name)
        axes[0].set_ylabel("final loss")
        axes[0].legend(fontsize=9)
        return _png(figure)


def _panels(rows: int, columns: int, size: tuple[float, float] = PANEL) -> tuple[Figure, np.ndarray]:
    figure = Figure(figsize=(size[0] * columns, size[1] * rows + 0.4), layout="constrained")
    return figure, figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)


def _png(figure: Figure) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=80)
    return file.getvalue()
