"""Scores as people read them: one table for the terminal, for Markdown and for the plot's legend."""

import math
from collections.abc import Sequence

from scalelong.train.scores.judge import Scores


def cells(scores: Scores) -> dict[str, str]:
    """The columns of a row, each with its heading; what could not be estimated is a dash."""
    return {
        "images": f"{scores.num_images:,}",
        "kernel distance": with_error(scores.kernel_distance, scores.kernel_distance_error),
        "precision": f"{scores.precision:.3f}",
        "recall": f"{scores.recall:.3f}",
        "Frechet distance": "-" if scores.distance is None else f"{scores.distance:.4g}",
        "label accuracy": "-" if scores.accuracy is None else f"{scores.accuracy:.1%}",
    }


def with_error(value: float, error: float) -> str:
    """A figure and its standard error, to two digits of the error."""
    decimals = min(12, max(0, 1 - math.floor(math.log10(error)))) if 0 < error < math.inf else 4
    return f"{value:.{decimals}f} ± {error:.{decimals}f}"


def table(rows: Sequence[dict[str, str]], *, markdown: bool = False) -> str:
    """Rows of cells by heading, the same headings in each, aligned: text to the left in the first column, then to the
    right."""
    heads = list(rows[0])
    lines = [heads, *([row[head] for head in heads] for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(heads))]
    padded = [
        [line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))] for line in lines
    ]
    if not markdown:
        return "\n".join("  ".join(line).rstrip() for line in padded)
    padded.insert(1, ["-" * widths[0], *("-" * (w - 1) + ":" for w in widths[1:])])
    return "\n".join(f"| {' | '.join(line)} |" for line in padded) + "\n"


def notes(features: str, num_train: int, *, held_out_from_training: bool, why_no_distance: str | None) -> list[str]:
    """What has to be known to read a table, a line each."""
    lines = [f"features: {features}; kernel distance, precision and recall are to {num_train:,} training images"]
    if why_no_distance is None:
        lines.append("Frechet distance is to the held-out images; theirs is between two halves of them")
    else:
        lines.append(why_no_distance)
    if held_out_from_training:
        lines.append("the held-out images were among those that the model was trained on")
    return lines
