"""What happened when a run spikes or diverges: in which step and block, in which images, and what grew first.

Losses and gradients are judged as the spike score of OLMo 2 judges them (arXiv:2501.00656), by robust deviations of
their logarithms from those of the logged steps before; features, which a norm may keep from the loss, by those and by a
jump. A report is a line for people and an object in ``spikes.jsonl``.
"""

import json
import math
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Literal

from scalelong.train.errors import DivergedError, UserError, warn

WINDOW = 100
"""Logged steps that one is compared with."""
ROWS_BEFORE_JUDGING = 20
ROWS_LOOKED_BACK = 10
"""How long before a spike something may have grown that is said to have grown first; and how long a spike lasts at most
before it is reported again."""
THRESHOLD = 5.0
"""Robust deviations above the median that make a spike."""
SMALLEST_DEVIATION = 0.01
"""Of logarithms: what hardly moves spikes at 5 % above its median, not at less."""
JUDGED = ("loss", "grad_norm")
JUMP = math.log(2.0)
"""How far the logarithm of a norm of features must lie above all of the rows looked back at."""
NUM_SHOWN = 5


@dataclass(frozen=True, kw_only=True)
class Spike:
    """What there is to say of a spike, or of the end of a run that diverged."""

    kind: Literal["spike", "divergence"]
    step: int
    images_seen: int
    """After that step."""
    what: str
    """"the loss is 3.1, 8.2 deviations above its median", say."""
    first: str | None
    """The figure of the log that grew first; None if none was measured or none stands out."""
    first_step: int | None
    """The logged step in which it did."""
    block: str | None
    """The name of its block; None of figures that belong to none."""
    deviations: dict[str, float | None]
    """The figures that stand out most in that step, in robust deviations above their medians; None: not finite."""
    images: tuple[int, int]
    """The positions of the step's images: the first, and the one behind the last."""
    outliers: list[int]
    """Positions of images whose features are much larger than those of the others of the batch; empty if none are."""

    def line(self) -> str:
        """One line for people."""
        grew = "nothing that is measured stood out before"
        if self.first is not None:
            block = f" (block {self.block})" if self.block else ""
            grew = f"{self.first}{block} grew first, in step {self.first_step}"
        odd = f", images {', '.join(map(str, self.outliers))} stand out" if self.outliers else ""
        positions = f"{self.images[0]:,} to {self.images[1] - 1:,}"
        return f"{self.kind} in step {self.step}: {self.what}; {grew}; images at positions {positions}{odd}"


class SpikeWatch:
    """Looks at the rows of the log: losses and gradients, the same on all ranks, and each rank's own features.

    Args:
        blocks: their names, by their numbers in the log.
        rows: of the log before this start.
    """

    def __init__(self, blocks: Sequence[str], rows: Iterable[Mapping[str, float | None]] = ()):
        self._blocks = blocks
        self._rows: deque[dict[str, float]] = deque(maxlen=WINDOW)
        self._steps_since = ROWS_LOOKED_BACK
        for row in rows:
            self._rows.append(_logarithms(row))

    def look(self, row: Mapping[str, float]) -> str | None:
        """What stands out in a logged step, in words; None for a calm step, and for one that follows closely on a
        spike. The row joins those that later ones are compared with."""
        found, logs = None, _logarithms(row)
        if len(self._rows) >= ROWS_BEFORE_JUDGING:
            z = self._deviations(logs, [*JUDGED, *self._jumps(logs)])
            worst = max(z, key=lambda name: z[name], default=None)
            if worst is not None and z[worst] > THRESHOLD:
                said = {"loss": "the loss", "grad_norm": "the gradient's norm"}.get(worst, worst)
                found = f"{said} is {row[worst]:.3g}, {z[worst]:.1f} robust deviations above its median"
        self._rows.append(logs)
        is_new = found is not None and self._steps_since >= ROWS_LOOKED_BACK
        self._steps_since = 0 if found is not None else self._steps_since + 1
        return found if is_new else None

    def _jumps(self, logs: Mapping[str, float]) -> list[str]:
        """The norms of blocks' features that are twice as large as in any of the last rows."""
        recent = list(self._rows)[-ROWS_LOOKED_BACK:]
        names = (name for name in logs if name.startswith("block/") and name.endswith("feature_norm"))
        return [name for name in names if logs[name] > JUMP + max(row.get(name, math.inf) for row in recent)]

    def describe(
        self,
        kind: Literal["spike", "divergence"],
        what: str,
        row: Mapping[str, float],
        *,
        images: range,
        outliers: list[int],
    ) -> Spike:
        """Everything about a step: ``look`` was given its row, or the run ended in it and ``row`` is all there is."""
        logs, before = _logarithms(row), [known for known in self._rows if known["step"] < row["step"]]
        logs = next((known for known in self._rows if known["step"] == row["step"]), logs)
        first, first_step = self._grew_first([*before, logs])
        z = self._deviations(logs, logs, before)
        standing_out = sorted((name for name in z if z[name] > THRESHOLD), key=lambda name: -z[name])[:NUM_SHOWN]
        return Spike(
            kind=kind,
            step=int(row["step"]),
            images_seen=images.stop,
            what=what,
            first=first,
            first_step=first_step,
            block=None if first is None else self._block_of(first),
            deviations={name: round(z[name], 1) if math.isfinite(z[name]) else None for name in standing_out},
            images=(images.start, images.stop),
            outliers=outliers,
        )

    def _grew_first(self, rows: list[dict[str, float]]) -> tuple[str | None, int | None]:
        """What has stood out without a break until the last row for longest, and since which step.

        Of what began in the same step, the figure that is computed first: features before gradients, blocks in the
        order of forward, gradients in that of backward.
        """
        onset = dict.fromkeys((name for name in rows[-1] if name not in ("step", *JUDGED)), len(rows))
        for place in range(len(rows) - 1, max(len(rows) - 1 - ROWS_LOOKED_BACK, -1), -1):
            still = [name for name, since in onset.items() if since == place + 1]
            z = self._deviations(rows[place], still, rows[:place])
            for name in still:
                if z.get(name, 0.0) > THRESHOLD:
                    onset[name] = place
        began = {name: place for name, place in onset.items() if place < len(rows)}
        if not began:
            return None, None
        first = min(began, key=lambda name: (began[name], self._order_in_step(name)))
        return first, int(rows[began[first]]["step"])

    def _deviations(
        self, logs: Mapping[str, float], names: Iterable[str], before: Sequence[Mapping[str, float]] | None = None
    ) -> dict[str, float]:
        """Robust deviations of logarithms above their medians over the rows before."""
        history = list(self._rows if before is None else before)
        found: dict[str, float] = {}
        for name in names:
            if name not in logs or name == "step":
                continue
            values = [value for row in history if (value := row.get(name, math.inf)) != math.inf]
            if logs[name] == math.inf:
                found[name] = math.inf
            elif len(values) >= ROWS_BEFORE_JUDGING:
                middle = median(values)
                deviation = 1.4826 * median([abs(value - middle) for value in values])
                found[name] = (logs[name] - middle) / max(deviation, SMALLEST_DEVIATION)
        return found

    def _order_in_step(self, name: str) -> tuple[int, int]:
        parts = name.split("/")
        number = int(parts[1]) if len(parts) == 3 and parts[1].isdigit() else len(self._blocks)
        if parts[0] == "block" and parts[-1] == "feature_norm":
            return 0, number
        if parts[-1] == "gradient_norm":
            return 2, -number
        return 1, -number  # skips, the innermost first

    def _block_of(self, name: str) -> str | None:
        parts = name.split("/")
        if parts[0] == "block" and parts[1].isdigit():
            return self._blocks[int(parts[1])]
        # The block that takes skip i in: the outermost is the last.
        return self._blocks[len(self._blocks) - int(parts[1])] if parts[0] == "skip" else None


def outlying_positions(found: Iterable[tuple[float, int]], *, factor: float = 2.0, count: int = 3) -> list[int]:
    """The positions of images that stand out by so much, those that stand out most first, from all ranks' findings."""
    return [position for ratio, position in sorted(found, reverse=True)[:count] if ratio > factor]


def of_divergence(error: DivergedError, row: Mapping[str, float]) -> dict[str, float]:
    """The row of a step that ended its run, which is in no log."""
    return {**row, "step": error.step}


def append_spike(path: Path, spike: Spike) -> None:
    """
    Raises:
        UserError: the file cannot be written.
    """
    try:
        with path.open("a") as file:
            file.write(json.dumps(asdict(spike)) + "\n")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error


def last_rows(path: Path, images_seen: int) -> list[dict[str, float | None]]:
    """The rows of a log that a run which goes on at ``images_seen`` has behind it, as many as count."""
    rows: deque[dict[str, float | None]] = deque(maxlen=WINDOW)
    try:
        for line in path.read_text().splitlines():
            row = json.loads(line)
            if row["images_seen"] <= images_seen:
                rows.append(row)
    except FileNotFoundError:
        return []
    except (OSError, ValueError, TypeError, KeyError) as error:
        warn(f"{path} cannot be read, so that spikes are found only after some more steps: {error}")
    return list(rows)


FIGURES = ("loss", "grad_norm", "skip/", "block/")
NOT_WATCHED = ("magnitude", "kappa_eff", "gradient_alignment")
"""Another form of a figure that is, or of no size: a cosine passes through zero."""


def _logarithms(row: Mapping[str, float | None]) -> dict[str, float]:
    """Of the figures that are watched, infinite for those that are not finite; and the number of the step."""
    logs = {"step": float(row["step"] or 0)}
    for name, value in row.items():
        if name.startswith(FIGURES) and not name.endswith(NOT_WATCHED):
            is_finite = value is not None and math.isfinite(value)
            logs[name] = math.log(max(value, 1e-30)) if is_finite and value is not None else math.inf
    return logs
