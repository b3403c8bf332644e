"""The training loop: ``train`` is one visible function; what it calls stands below it."""

import os
import shlex
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from scalelong.train.checks import Start, check_before_training
from scalelong.train.command_line import TRAIN_PROGRAM, without_local_rank
from scalelong.train.config import TrainConfig
from scalelong.train.errors import EXIT_SAVED_AFTER_SIGNAL
from scalelong.train.hosts.heartbeat import Heartbeat
from scalelong.train.hosts.processes import join_processes
from scalelong.train.hosts.signals import StopSignals
from scalelong.train.hosts.workers import GIVEN_COMMAND, command_of_launcher
from scalelong.train.objective import OBJECTIVES
from scalelong.train.report import Meter, QuietReport, Report
from scalelong.train.run import Run, describe, keep_averages, note_bad_samples, roll_back, save, start_run
from scalelong.train.run_folder import grid_path
from scalelong.train.run_lock import RunLock
from scalelong.train.sampling.grid import make_grid
from scalelong.train.schedule import learning_rate, what_is_due
from scalelong.train.zero import engine as zero
from scalelong.train.zero.rows import apply_to_rows


def train(config: TrainConfig) -> int:
    """Trains to ``config.total_images``, resuming from the run's newest whole checkpoint; returns the exit code.

    Raises:
        UserError: bad input, before anything is written; or a run that cannot go on, its last checkpoint intact.
    """
    processes = join_processes()
    with RunLock(config.run) as lock:
        processes.agree(lambda: lock.take_if_there() if processes.is_main else None)
        start = check_before_training(config, processes)
        if start.is_finished:
            announce_finished(start)
            return 0
        processes.agree(lambda: lock.take(is_new=start.checkpoint is None) if processes.is_main else None)
        return train_on(start)


def train_on(start: Start) -> int:
    """Trains from a start, which nothing is wrong with, to the end or a signal; returns the exit code."""
    config, processes = start.config, start.processes
    run, meter = start_run(start), Meter()
    note_bad_samples(run)
    with StopSignals() as signals, Heartbeat(processes), processes.agree(lambda: open_report(run)) as report:
        report.say(describe(run))
        while True:
            due = what_is_due(config, run.images_seen)
            with meter:
                measured = train_step(run, measures=due.log)
                stops = processes.any(signals.received is not None)
                if any(due) or stops or run.looks_at_each_step:
                    loss, counts = check_losses(run)
                else:
                    counts = True  # left on the GPU, so that no step waits for it
                if counts:
                    run.ema.update(run.step)
                else:
                    report.say(f"step {run.step} is left out: its loss or its gradient is not finite")
                if run.guard.asks_to_roll_back:
                    # Saved at once: a restart must not walk into the same steps again.
                    run, due = roll_back(run, report), due._replace(checkpoint=True)
            if due.log:
                note_bad_samples(run)
                speed = meter.take(config.images_per_step, run.batches.take_seconds())
                report.log(log_row(run, loss, speed, measured))
            if due.grid:
                make_grid(run)
            if due.averages:
                # Before the checkpoint: a run that goes on from there has them all.
                keep_averages(run)
            if due.checkpoint or stops:
                report.sync()
                save(run)
            if due.last or stops:
                break
    announce_end(run, signals.received, is_finished=due.last)
    return 0 if due.last else EXIT_SAVED_AFTER_SIGNAL


def train_step(run: Run, *, measures: bool) -> dict[str, float]:
    """One optimizer step over this rank's micro-batches, after which the run is one step further.

    Returns:
        What there is to log of it, if asked for.
    """
    engine, config, objective = run.engine, run.config, OBJECTIVES[run.config.objective]
    rate = learning_rate(config, run.images_seen)
    zero.set_learning_rate(engine, rate)
    run.monitor.active = measures
    losses = []
    for micro_batch in range(config.accumulation_steps):
        batch = next(run.batches)
        torch.manual_seed(batch.dropout_seed)
        loss = objective.loss(engine, batch.images_BCHW, batch.noise_BCHW, batch.time_u_B, batch.condition)
        losses.append(loss.detach())
        engine.backward(zero.loss_with_telling_gradient(loss) if config.guard.skip_steps else loss)
        if micro_batch < config.accumulation_steps - 1:
            engine.step()
    scale = zero.loss_scale(engine) if measures else 1.0
    taken = zero.take_step(engine, only_finite=config.guard.skip_steps > 0, measures=measures)
    if taken.applied:
        apply_to_rows(engine)
    run.unchecked_losses.append(torch.stack(losses).mean())
    run.unchecked_gradients.append(taken.is_finite)
    run.images_seen, run.step = run.images_seen + config.images_per_step, run.step + 1
    if taken.gradient_norm is None:
        return {}
    measured = {"grad_norm": taken.gradient_norm, "learning_rate": rate, **run.monitor.take()}
    if config.precision == "fp16":
        measured["loss_scale"] = scale
    if config.guard.skip_steps:
        measured["steps_left_out"] = run.guard.left_out
    return measured


def check_losses(run: Run) -> tuple[float, bool]:
    """The loss of the last step, averaged over all ranks, and whether the step counts; looks at those before it too.

    Raises:
        UserError: one that is not finite and may not be left out, naming its step.
    """
    means = torch.stack([torch.stack(run.unchecked_losses), torch.stack(run.unchecked_gradients).float()])
    run.unchecked_losses.clear()
    run.unchecked_gradients.clear()
    if run.processes.world_size > 1:
        dist.all_reduce(means)
        means /= run.processes.world_size
    (losses, shares_finite), counts = means.tolist(), True
    first = run.step - len(losses) + 1
    for step, (loss, share_finite) in enumerate(zip(losses, shares_finite, strict=True), start=first):
        counts = run.guard.admits(loss, share_finite == 1, step, run.config.images_per_step)
    return losses[-1], counts


def log_row(run: Run, loss: float, speed: dict[str, float], measured: dict[str, float]) -> dict[str, float | int]:
    row = {"images_seen": run.images_seen, "step": run.step, "loss": loss, **speed}
    return {**row, "bad_images": len(run.bad_samples), **measured}


def open_report(run: Run) -> QuietReport:
    if not run.processes.is_main:
        return QuietReport()
    return Report(run.config.run, run.images_seen, run.config.total_images)


def announce_finished(start: Start) -> None:
    """Of a run that was trained to its end before."""
    if start.processes.is_main:
        images_seen = start.plan.first_position
        print(f"already trained to {images_seen:,} images; a larger --total-images goes on")
        announce_results(start.config.run, images_seen)


def announce_end(run: Run, signal: str | None, *, is_finished: bool) -> None:
    """Where the results are, or how to go on."""
    if not run.processes.is_main:
        return
    if is_finished:
        announce_results(run.config.run, run.images_seen)
        return
    cause = signal or "a signal to another process"
    print(f"{cause}: saved at {run.images_seen:,} images; to go on, run the same command again:")
    print(f"  {command_to_resume()}", flush=True)


def announce_results(run: Path, images_seen: int) -> None:
    print(f"run folder: {run}")
    print(f"samples to look at: {grid_path(run, images_seen)}", flush=True)


def command_to_resume() -> str:
    """The command that was given, to a launcher if there is one on this host."""
    if GIVEN_COMMAND in os.environ:
        return os.environ[GIVEN_COMMAND]
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        return command_of_launcher() or f"the launcher with ... {shlex.join(without_local_rank(sys.argv[1:]))}"
    program = Path(sys.argv[0])
    if program.name == "__main__.py":
        shown = TRAIN_PROGRAM if program.parent.name == "train" else "python -m scalelong"
    else:
        shown = program.name
    return f"{shown} {shlex.join(without_local_rank(sys.argv[1:]))}"
