"""The training loop: ``train`` is one visible function; what it calls stands below it."""

import os
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist

from scalelong.train.checkpoint import read_state
from scalelong.train.checks import Start, check_before_training
from scalelong.train.command_line import TRAIN_PROGRAM, without_local_rank
from scalelong.train.config import TrainConfig
from scalelong.train.errors import EXIT_SAVED_AFTER_SIGNAL, DivergedError, UserError
from scalelong.train.evaluation import Evaluation
from scalelong.train.hosts.heartbeat import Heartbeat, end_process
from scalelong.train.hosts.meeting import says_if_it_takes_long
from scalelong.train.hosts.processes import join_processes, others_at_work, same_bits_each_time, subnormals_flushed
from scalelong.train.hosts.signals import StopSignals
from scalelong.train.hosts.workers import GIVEN_COMMAND, command_of_launcher
from scalelong.train.objective import make_objective
from scalelong.train.outcome import OutcomeFile
from scalelong.train.pace import Estimate, Meter
from scalelong.train.profiled_skips import with_profiled_skips
from scalelong.train.profiling import tracing
from scalelong.train.report import Report, open_report, truncate_log
from scalelong.train.run import Run, describe, keep_averages, note_bad_samples, roll_back, save, start_run
from scalelong.train.run_folder import grid_path, log_path, profile_path, spikes_path, write_config
from scalelong.train.run_grid import make_grid
from scalelong.train.run_lock import RunLock
from scalelong.train.schedule import learning_rate, what_is_due
from scalelong.train.spikes import append_spike, last_rows, of_divergence, outlying_positions
from scalelong.train.validation import Validation
from scalelong.train.zero import engine as zero
from scalelong.train.zero.gradients import gradient_norms, gradients_against_weights, scale_gradients
from scalelong.train.zero.learned_loss import loss_weighting
from scalelong.train.zero.rows import apply_to_rows, follow_weights

FIGURES_TO_SAY = ("loss", "validation_loss", "validation_loss_ema", "kernel_distance", "label_accuracy")
"""Of the last row of the log, at the end of a run."""


@subnormals_flushed()
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
        start = with_profiled_skips(start)
        is_new = start.checkpoint is None or start.is_branch
        processes.agree(lambda: lock.take(is_new=is_new) if processes.is_main else None)
        with same_bits_each_time(start.config.deterministic):
            return train_on(start)


def train_on(start: Start) -> int:
    """Trains from a start, which nothing is wrong with, to the end or a signal; returns the exit code."""
    processes = start.processes
    processes.agree(lambda: write_config(start.config) if processes.is_main else None)
    with processes.agree(lambda: open_outcome(start)) as outcome:
        run = start_run(start)
        note_bad_samples(run)
        if start.is_branch:
            save(run)  # from here on it needs the other run no more
        heartbeat = Heartbeat(processes, on_loss=lambda host, seconds: end_process(host, seconds, outcome.fail))
        with StopSignals() as signals:
            with heartbeat, processes.agree(lambda: report_of(run)) as report:
                report.say(describe(run))
                validation = Validation(start)
                if said := validation.describe():
                    report.say(said)
                for line in start.initial.lines if start.initial is not None else ():
                    report.say(line)
                if busy := others_at_work(processes):
                    report.say(busy)
                steps_traced = start.config.profile if processes.is_main else None
                with tracing(profile_path(start.config.run), steps_traced, processes.device) as trace:
                    is_finished = take_steps(run, report, signals, outcome, validation, trace)
            if is_finished:
                outcome.finish()
            else:
                outcome.stop(signals.received)
            announce_end(start, outcome.images_seen, signals.received, is_finished=is_finished)
    return 0 if is_finished else EXIT_SAVED_AFTER_SIGNAL


def take_steps(
    run: Run,
    report: Report,
    signals: StopSignals,
    outcome: OutcomeFile,
    validation: Validation,
    trace: Callable[[], None],
) -> bool:
    """The loop. Returns whether it came to the end; if not, a signal stopped it."""
    config, meter, evaluation, first = run.config, Meter(), Evaluation(), run.images_seen
    estimate = Estimate(first, config.total_images, config.images_per_step)
    while True:
        due = what_is_due(config, run.images_seen)
        with meter, says_if_long(run, is_first=run.images_seen == first):
            measured = train_step(run, measures=due.log)
            outcome.reached(run.images_seen, run.step)
            stops = run.processes.any(signals.received is not None)
            if any(due) or stops or run.looks_at_each_step:
                with reporting_divergence(run, report, measured):
                    loss, counts = check_losses(run)
            else:
                counts = True  # left on the GPU, so that no step waits for it
            if counts:
                run.averaged_steps += 1
                run.ema.update(run.averaged_steps)
            else:
                report.say(f"step {run.step} is left out: its loss or its gradient is not finite")
            if run.guard.asks_to_roll_back:
                # Saved at once: a restart must not walk into the same steps again.
                with reporting_divergence(run, report, measured):
                    run, due = roll_back(run, report), due._replace(checkpoint=True)
        if due.log:
            note_bad_samples(run)
            speed = meter.take(config.images_per_step, run.batches.take_seconds())
            drops = config.drops_tokens_at(run.images_seen - config.images_per_step)
            speed |= run.resources.figures(speed["images_per_second"], drops_tokens=drops)
            figures = validation.losses(run) if due.validation else {}
            if due.evaluation:
                figures |= evaluation.scores(run)
            row = log_row(run, loss, speed, measured | figures)
            report.log(row)
            what = run.spikes.look(row)
            if run.processes.any(what is not None):
                report_spike(run, report, "spike", what or "features jump on another process", row, run.step)
        if due.grid:
            make_grid(run)
            report.show(grid_path(config.run, run.images_seen), run.images_seen)
        if due.averages:
            # Before the checkpoint: a run that goes on from there has them all.
            keep_averages(run)
        if due.checkpoint or stops:
            report.sync()
            save(run)
        if (due.log or run.looks_at_each_step) and (said := estimate.line(run.images_seen, run.resources.memory_gb)):
            report.say(said)
        trace()
        if due.last or stops:
            return due.last


def train_step(run: Run, *, measures: bool) -> dict[str, float]:
    """One optimizer step over this rank's micro-batches, after which the run is one step further.

    Returns:
        What there is to log of it, if asked for.
    """
    engine, config, objective = run.engine, run.config, make_objective(run.config.objective)
    rate = learning_rate(config, run.images_seen)
    zero.set_learning_rate(engine, rate)
    watches_step = measures and config.compile == "none"
    run.monitor.active = watches_step
    losses, learned, distillation = [], loss_weighting(engine), run.distillation
    if distillation is not None:
        distillation.begin_step()
    for micro_batch in range(config.accumulation_steps):
        batch = next(run.batches)
        if measures and not watches_step:
            run.watch_uncompiled(batch)
        torch.manual_seed(batch.dropout_seed)
        minimised, loss = objective.training_loss(
            run.network_of(batch), batch.images_BCHW, batch.noise_BCHW, batch.time_u_B, batch.condition, learned
        )
        if distillation is not None:
            minimised = minimised + distillation.loss(batch)
        losses.append(loss.detach())
        engine.backward(zero.loss_with_telling_gradient(minimised) if config.guard.skip_steps else minimised)
        if micro_batch < config.accumulation_steps - 1:
            engine.step()
    scale = zero.loss_scale(engine) if measures or run.clipping else 1.0
    norms_P = gradient_norms(engine) if measures or run.clipping else None
    if measures and norms_P is not None:
        run.monitor.record_gradients(norms_P / scale, *gradients_against_weights(engine, scale=scale))
    norm_before_clipping = None
    if run.clipping is not None and norms_P is not None:
        norm_before_clipping = float(torch.linalg.vector_norm(norms_P / scale))
        scale_gradients(engine, run.clipping.factor(norm_before_clipping))
    taken = zero.take_step(engine, only_finite=config.guard.skip_steps > 0, measures=measures, norms_P=norms_P)
    if taken.applied:
        apply_to_rows(engine)
        follow_weights(engine)
    run.unchecked_losses.append(torch.stack(losses).mean())
    run.unchecked_gradients.append(taken.is_finite)
    run.images_seen, run.step = run.images_seen + config.images_per_step, run.step + 1
    contrast = {} if distillation is None else distillation.take(measures=taken.gradient_norm is not None)
    if taken.gradient_norm is None:
        return {}
    measured = {"grad_norm": taken.gradient_norm, "learning_rate": rate, **contrast, **run.monitor.take()}
    if norm_before_clipping is not None:
        measured["grad_norm"] = norm_before_clipping
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
        seen = run.images_seen - (run.step - step) * run.config.images_per_step
        counts = run.guard.admits(loss, share_finite == 1, step, range(seen - run.config.images_per_step, seen))
    return losses[-1], counts


@contextmanager
def reporting_divergence(run: Run, report: Report, measured: dict[str, float]) -> Iterator[None]:
    """While entered, a loss or gradient that ends the run is reported before it does; all ranks meet it alike."""
    try:
        yield
    except DivergedError as error:
        # Only what was measured in the very step; on a GPU it may be some steps back.
        row = of_divergence(error, measured if error.step == run.step else {})
        report_spike(run, report, "divergence", error.what, row, error.step)
        raise


def report_spike(
    run: Run, report: Report, kind: Literal["spike", "divergence"], what: str, row: dict[str, float], step: int
) -> None:
    """Says what happened in a step of this start, and writes it into the run folder. All ranks must call it."""
    seen = run.images_seen - (run.step - step) * run.config.images_per_step
    plan, found = run.start.plan, []
    if step == run.step:
        steps = (seen - plan.first_position) // plan.images_per_step
        positions = plan.positions(steps * plan.accumulation_steps - 1)
        found = [(ratio, positions[place]) for ratio, place in run.monitor.take_outliers()]
    outliers = outlying_positions(pair for share in run.processes.gather(found) for pair in share)
    if run.processes.is_main:
        images = range(seen - run.config.images_per_step, seen)
        spike = run.spikes.describe(kind, what, row, images=images, outliers=outliers)
        append_spike(spikes_path(run.config.run), spike)
        report.say(spike.line())


def log_row(run: Run, loss: float, speed: dict[str, float], measured: dict[str, float]) -> dict[str, float | int]:
    row = {"images_seen": run.images_seen, "step": run.step, "loss": loss, **speed}
    return {**row, "bad_images": len(run.bad_samples), **measured}


def open_outcome(start: Start) -> OutcomeFile:
    state = None if start.checkpoint is None else read_state(start.checkpoint)
    step = 0 if state is None else state.step
    return OutcomeFile(start.config.run, start.plan.first_position, step, writes=start.processes.is_main)


def report_of(run: Run) -> Report:
    if not run.processes.is_main:
        return Report()
    config = run.config
    try:
        truncate_log(spikes_path(config.run), run.images_seen)
    except OSError as error:
        raise UserError(f"cannot write {spikes_path(config.run)}: {error.strerror}") from error
    # Every step is whole: the last one may end past the images that were asked for.
    steps = -(-(config.total_images - run.images_seen) // config.images_per_step)
    end = run.images_seen + steps * config.images_per_step
    return open_report(config.run, run.images_seen, end, wandb=config.log.wandb)


def says_if_long(run: Run, *, is_first: bool) -> AbstractContextManager[None]:
    """The first step shows how long all of them will take, which is said if that is long; others are in the log."""
    if not is_first or not run.processes.is_main:
        return nullcontext()
    return says_if_it_takes_long(f"still in the first step, of {run.config.images_per_step:,} images")


def announce_finished(start: Start) -> None:
    """Of a run that was trained to its end before."""
    if start.processes.is_main:
        images_seen = start.plan.first_position
        print(f"already trained to {images_seen:,} images; a larger --total-images goes on")
        announce_results(start.config, images_seen)


def announce_end(start: Start, images_seen: int, signal: str | None, *, is_finished: bool) -> None:
    """Where the results are, or how to go on."""
    if not start.processes.is_main:
        return
    if is_finished:
        announce_results(start.config, images_seen)
        return
    cause = signal or "a signal to another process"
    print(f"{cause}: saved at {images_seen:,} images; to go on, run the same command again:")
    print(f"  {command_to_resume()}", flush=True)


def announce_results(config: TrainConfig, images_seen: int) -> None:
    """The picture to look at, the last figures of the log, and what to do with the run next."""
    run = config.run
    print(f"run folder: {run}")
    print(f"samples to look at: {grid_path(run, images_seen)}")
    rows = last_rows(log_path(run), images_seen)
    figures = [(name, rows[-1].get(name)) for name in FIGURES_TO_SAY if rows]
    said = [f"{name.replace('_', ' ')} {value:.4g}" for name, value in figures if value is not None]
    if said:
        print(f"scores: {', '.join(said)}")
    if profile_path(run).is_file():
        print(f"trace of the profiler, for https://ui.perfetto.dev: {profile_path(run)}")
    here = shlex.quote(str(run))
    print(f"next:\n  scalelong sample {here} --out grid.png")
    if config.model.in_channels in (1, 3):  # latents are not scored
        print(f"  scalelong evaluate {here}")
    print(f"  scalelong export {here} --out {here}-model", flush=True)


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
