"""One cell of a grid, in a process of its own: trains its run, unless it ended before, and measures what came of it."""

import json
import math
import os
import signal
import sys
import threading
from collections.abc import Sequence
from dataclasses import asdict
from multiprocessing import connection, parent_process
from pathlib import Path
from typing import Any

import numpy as np
import torch

from scalelong.bench.lab.cells import STARTS, Cell, digest_of
from scalelong.bench.lab.linear_probes import probe_accuracies
from scalelong.bench.lab.metrics import oscillation_range, smoothed, spike_score
from scalelong.bench.lab.probes import operators_speedup, preserve_norms, probe
from scalelong.bench.lab.table import Row
from scalelong.bench.record import provenance
from scalelong.model.architectures import make_backbone
from scalelong.train import report
from scalelong.train.checkpoint import list_checkpoints, load_model
from scalelong.train.config import TrainConfig
from scalelong.train.errors import DivergedError, UserError
from scalelong.train.loop import train
from scalelong.train.outcome import Outcome, read_outcome
from scalelong.train.resources import flops_of_training
from scalelong.train.run_folder import log_path
from scalelong.train.write_whole import write_whole

CURVE_POINTS = 60
STEPS_OF_THE_START = 5
MIN_VALIDATIONS = 5
"""Below which the curve of a run is its training loss, though it ends with a validation loss."""

LogRow = dict[str, Any]


def row_path(run: Path) -> Path:
    """The row of a finished cell, until it is in the table."""
    return run / "cell.json"


def run_cell(cell: Cell, run: Path, output: Path, *, trains: bool) -> None:
    """The whole of the process. Its exit code is 0 if ``row_path`` has the row; what it prints goes to ``output``.

    Args:
        trains: whether there is any training; else the network is measured as it begins.
    """
    _end_with_parent()
    log = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    os.dup2(log, 1)
    os.dup2(log, 2)
    try:
        config = cell.config(run)
        row = measure_trained(cell, config) if trains else measure_start(cell, config)
        if row is not None:
            run.mkdir(parents=True, exist_ok=True)
            write_whole(row_path(run), json.dumps(asdict(row)).encode())
    except UserError as error:
        print(f"error: {error}", flush=True)
        sys.exit(2)
    sys.exit(0 if row is not None else 75)


def _end_with_parent() -> None:
    """Ends this process at once when the one that runs the grid has died, whatever way."""
    parent = parent_process()
    assert parent is not None

    def watch() -> None:
        connection.wait([parent.sentinel])
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True, name="end-with-parent").start()


def measure_start(cell: Cell, config: TrainConfig) -> Row:
    """The row of a network that is not trained."""
    torch.manual_seed(config.seed)
    model = make_backbone(config.model, skip_scale=config.skip_scale)
    if cell.start == "preserving":
        preserve_norms(model)
    return _row(cell, config, state="start", images=0.0, **probe(model, config))


def measure_trained(cell: Cell, config: TrainConfig) -> Row | None:
    """The row of a run, which is trained to its end; None if a signal stopped it.

    Raises:
        UserError: a run that could not be trained.
    """
    if cell.start != STARTS[0]:
        raise UserError(f"start={cell.start} is of networks that are not trained: --images 0")
    report.SINKS.pop("TensorBoard folder", None)  # nobody looks at so many
    outcome = read_outcome(config.run)
    if outcome is None or not has_ended(config.run, outcome):
        try:
            if train(config) != 0:
                return None
        except DivergedError as error:
            print(f"diverged: {error}", flush=True)
        outcome = read_outcome(config.run)
    assert outcome is not None
    rows = [json.loads(line) for line in log_path(config.run).read_text().splitlines()]
    found: dict[str, Any] = measures_of(rows, config, outcome)
    if found["state"] == "finished":
        model, _ = load_model(config.run, weights="model")
        found |= probe(model, config) | {"operators_speedup": operators_speedup(model, config)}
        if cell.is_probed:
            found["probe_accuracy"] = probe_accuracies(config.run)
    return _row(cell, config, **found)


def has_ended(run: Path, outcome: Outcome) -> bool:
    """Whether there is nothing left to train, and what there is to measure has not been tidied away."""
    return outcome.state == "diverged" or (outcome.state == "finished" and bool(list_checkpoints(run)))


def _row(cell: Cell, config: TrainConfig, **found: Any) -> Row:
    values = {name.replace(".", "_"): value for name, value in found.items()}
    made_by = provenance("cuda" if torch.cuda.is_available() else "cpu")
    return Row(
        cell=cell.name,
        digest=digest_of(cell, config),
        preset=cell.preset,
        images_per_step=float(config.images_per_step),
        command=cell.command(),
        **{name: made_by[name] for name in ("date", "commit", "device")},
        **values,
    )


def measures_of(rows: Sequence[LogRow], config: TrainConfig, outcome: Outcome) -> dict[str, Any]:
    """What the log of a run amounts to, by the columns of the table."""
    losses_T, gradients_T = _column(rows, "loss"), _column(rows, "grad_norm")
    speeds_T = _column(rows, "images_per_second")
    found: dict[str, Any] = {
        "state": outcome.state,
        "images": float(outcome.images_seen),
        "start_loss": float(losses_T[:STEPS_OF_THE_START].mean()) if len(rows) else math.nan,
        "spikes_loss": spike_score(losses_T),
        "spikes_gradient": spike_score(gradients_T),
        "spikes_both": spike_score(losses_T, gradients_T),
        "largest_gradient": float(gradients_T.max()) if len(rows) else math.nan,
        "images_per_second": float(np.median(speeds_T)) if len(rows) else math.nan,
        "seconds": float((config.images_per_step / speeds_T).sum()),
    }
    if outcome.diverged is not None:
        found |= {"reason": outcome.diverged.what, "diverged_step": float(outcome.diverged.step)}
    if not rows:
        return found
    hidden = {name: _column(rows, name) for name in rows[0] if name.endswith("/hidden_norm")}
    swings = [oscillation_range(norms_T[len(rows) // 2 :]) for norms_T in hidden.values()]
    found["oscillation"] = max((s for s in swings if not math.isnan(s)), default=math.nan)
    outermost_T = hidden.get("skip/1/hidden_norm", np.full(len(rows), math.nan))
    found["hidden_norm"] = float(np.median(outermost_T[-_quarter(rows) :]))
    weights_T = _weight_norms(rows)
    found |= magnitudes_of(rows, weights_T)
    scored = [row for row in rows if row.get("kernel_distance") is not None]
    found["curve_scored_images"] = [float(row["images_seen"]) for row in scored]
    found["curve_kernel_distance"] = [float(row["kernel_distance"]) for row in scored]
    found["kernel_distance"] = found["curve_kernel_distance"][-1] if scored else math.nan
    if outcome.state == "finished":
        found |= dict(zip(("final_loss", "final_is"), final_loss(rows), strict=True))
        if not found["final_loss"] < found["start_loss"]:  # training has undone what there was
            found |= {"state": "diverged", "reason": f"the loss ended at {found['final_loss']:.3g}, above its start"}
    found |= curves_of(rows, losses_T, gradients_T, outermost_T, weights_T)
    return {**found, "curve_flops": flops_at(found["curve_images"], config)}


def flops_at(images: Sequence[float], config: TrainConfig) -> list[float]:
    """Of training up to so many images; none of a network that does not count them."""
    with torch.device("meta"):
        model = make_backbone(config.model, skip_scale=config.skip_scale)
    try:
        return [float(flops_of_training(model, config, int(count))) for count in images]
    except NotImplementedError:
        return []


def magnitudes_of(rows: Sequence[LogRow], weights_T: np.ndarray) -> dict[str, float]:
    """The features of blocks, the weights of the network, and how their gradients lie to them."""
    magnitudes = [_column(rows, name)[-_quarter(rows) :] for name in rows[0] if name.endswith("/magnitude")]
    largest = max((float(np.median(values)) for values in magnitudes), default=math.nan)
    lengths = _of_blocks(rows, "weight_norm") * _of_blocks(rows, "gradient_norm")
    products_T = (_of_blocks(rows, "gradient_alignment") * lengths).sum(axis=0)
    with np.errstate(divide="ignore", invalid="ignore"):
        cosines_T = np.abs(products_T) / (weights_T * _norm_of_blocks(rows, "gradient_norm"))
        growth = float(weights_T[-1] / weights_T[0])
    return {
        "magnitude": largest,
        "weight_norm": float(weights_T[-1]),
        "weight_growth": growth,
        "gradient_alignment": float(np.median(cosines_T[-_quarter(rows) :])),
    }


def _weight_norms(rows: Sequence[LogRow]) -> np.ndarray:
    """Of the whole network; NaN where a log has none."""
    return _norm_of_blocks(rows, "weight_norm")


def _norm_of_blocks(rows: Sequence[LogRow], name: str) -> np.ndarray:
    """(T,): the norm over all blocks and what lies outside of them."""
    parts = _of_blocks(rows, name)
    return np.sqrt(np.square(parts).sum(axis=0)) if len(parts) else np.full(len(rows), math.nan)


def _of_blocks(rows: Sequence[LogRow], name: str) -> np.ndarray:
    """(blocks and what lies outside of them, T)."""
    names = [found for found in rows[0] if found.startswith("block/") and found.endswith(f"/{name}")]
    return np.array([_column(rows, found) for found in names]).reshape(len(names), len(rows))


def final_loss(rows: Sequence[LogRow]) -> tuple[float, str]:
    """The last validation loss where there is one, or the mean training loss of the last quarter of the steps."""
    validation = [row["validation_loss"] for row in rows if row.get("validation_loss") is not None]
    if validation:
        return float(validation[-1]), "validation"
    return float(_column(rows, "loss")[-_quarter(rows) :].mean()), "training"


def curves_of(
    rows: Sequence[LogRow],
    losses_T: np.ndarray,
    gradients_T: np.ndarray,
    outermost_T: np.ndarray,
    weights_T: np.ndarray,
) -> dict[str, list[float]]:
    """Curves of few points: the loss is the validation loss where it was taken often, or the smoothed training loss."""
    images_T = _column(rows, "images_seen")
    validated = [t for t, row in enumerate(rows) if row.get("validation_loss") is not None]
    if len(validated) >= MIN_VALIDATIONS:
        places, loss_T = validated, _column(rows, "validation_loss")
    else:
        places = sorted({round(t) for t in np.linspace(0, len(rows) - 1, CURVE_POINTS)})
        loss_T = smoothed(losses_T, max(1, len(rows) // 20))
    columns = {"images": images_T, "loss": loss_T, "gradient": gradients_T, "hidden": outermost_T, "weights": weights_T}
    return {f"curve_{name}": [float(values_T[t]) for t in places] for name, values_T in columns.items()}


def _column(rows: Sequence[LogRow], name: str) -> np.ndarray:
    """Of every row; infinite where the log has none because it was not finite."""
    return np.array([math.inf if row.get(name) is None else row[name] for row in rows], dtype=float)


def _quarter(rows: Sequence[LogRow]) -> int:
    return max(1, len(rows) // 4)
