"""The training loop: ``train`` is one visible function; what it calls stands below it."""

import shlex
import socket
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from scalelong.train.checkpoint import save_averages
from scalelong.train.checks import check_before_training, check_images, find_checkpoint
from scalelong.train.command_line import TRAIN_PROGRAM, without_local_rank
from scalelong.train.config import TrainConfig
from scalelong.train.errors import EXIT_SAVED_AFTER_SIGNAL
from scalelong.train.hosts.heartbeat import Heartbeat
from scalelong.train.hosts.preflight import check_versions, installed_versions
from scalelong.train.hosts.processes import join_processes
from scalelong.train.hosts.signals import StopSignals
from scalelong.train.objective import PROCESSES, noise_prediction_loss
from scalelong.train.report import QuietReport, Report
from scalelong.train.run import Run, describe, note_bad_samples, roll_back, save, start_run
from scalelong.train.sampling.grid import grid_path, make_grid
from scalelong.train.schedule import learning_rate, passes
from scalelong.train.zero import engine as zero


def train(config: TrainConfig) -> int:
    """Trains to ``config.total_images``, resuming from the run's newest whole checkpoint; returns the exit code.

    Raises:
        UserError: bad input, before anything is written; or a run that cannot go on, its last checkpoint intact.
    """
    processes = join_processes()
    check_versions(processes.gather((socket.gethostname(), installed_versions())))
    checkpoint = processes.on_main(lambda: find_checkpoint(config))
    source, plan = processes.agree(lambda: check_before_training(config, processes, checkpoint))
    if plan.first_position >= config.total_images:
        if processes.is_main:
            print(f"already trained to {plan.first_position:,} images; a larger --total-images goes on")
            announce_results(config, plan.first_position)
        return 0
    check_images(config, source, processes)
    run = start_run(config, processes, checkpoint, source, plan)
    note_bad_samples(run)
    unchecked_losses, seconds, images_timed = [], 0.0, 0
    with StopSignals() as signals, Heartbeat(processes), processes.agree(lambda: open_report(run)) as report:
        report.say(describe(run))
        while True:
            step_began = time.perf_counter()
            previous, now = run.images_seen, run.images_seen + config.images_per_step
            last = now >= config.total_images
            logs = last or config.images_per_log == 0 or passes(previous, now, config.images_per_log)
            saves = last or passes(previous, now, config.images_per_checkpoint)

            zero.set_learning_rate(run.engine, learning_rate(config, run.images_seen))
            loss, is_finite, measured = train_step(run, measures=logs)
            unchecked_losses.append(loss)
            run.images_seen, run.step = now, run.step + 1
            stops = processes.any(signals.received is not None)
            counts = True
            if logs or saves or stops or run.guard.watches or processes.device.type == "cpu":
                # Elsewhere the loss is left on the GPU, so that no step waits for it.
                losses, counts = check_losses(run, unchecked_losses, is_finite)
                unchecked_losses.clear()
            if counts:
                run.ema.update(run.step)
            else:
                report.say(f"step {run.step} is left out: its loss or its gradient is not finite")
            if run.guard.asks_to_roll_back:
                # Saved at once: a restart must not walk into the same steps again.
                run, saves = roll_back(run, source, plan, report), True
            seconds, images_timed = seconds + time.perf_counter() - step_began, images_timed + config.images_per_step

            if logs:
                note_bad_samples(run)
                report.log(
                    {
                        "images_seen": run.images_seen,
                        "step": run.step,
                        "loss": losses[-1],
                        "images_per_second": images_timed / seconds,
                        "data_wait": run.batches.take_seconds() / seconds,
                        "bad_images": len(run.bad_samples),
                        **measured,
                    }
                )
                seconds, images_timed = 0.0, 0
            if last or passes(previous, now, config.images_per_grid):
                make_grid(run)
            if run.ema.exponents and (last or passes(previous, now, config.images_per_average)):
                # Before the checkpoint: a run that goes on from there has them all.
                save_averages(config.run, run.images_seen, run.step, run.engine, run.ema, processes)
            if saves or stops:
                save(run)
            if last or stops:
                break
    if processes.is_main:
        if last:
            announce_results(config, run.images_seen)
        else:
            cause = signals.received or "a signal to another process"
            print(f"{cause}: saved at {run.images_seen:,} images; to go on, run the same command again:")
            # What a launcher was told is not known here.
            print(f"  {'deepspeed ...' if processes.world_size > 1 else command_to_resume()}", flush=True)
    return 0 if last else EXIT_SAVED_AFTER_SIGNAL


def train_step(run: Run, *, measures: bool) -> tuple[Tensor, bool, dict[str, float]]:
    """One optimizer step over this rank's micro-batches.

    Returns:
        Their mean loss; whether the gradient was finite, so that the step was taken; what there is to log if asked for.
    """
    engine, config = run.engine, run.config
    run.monitor.active = measures
    losses, measured = [], {}
    for micro_batch in range(config.accumulation_steps):
        batch = next(run.batches)
        torch.manual_seed(batch.dropout_seed)
        loss = noise_prediction_loss(
            engine, PROCESSES[config.objective], batch.images_BCHW, batch.noise_BCHW, batch.time_u_B, batch.labels_B
        )
        losses.append(loss.detach())
        engine.backward(zero.loss_with_telling_gradient(loss) if config.guard.skip_steps else loss)
        if micro_batch < config.accumulation_steps - 1:
            engine.step()
    # ZeRO knows the gradient's norm after its step; without it, the gradients are gone by then.
    scale = zero.loss_scale(engine) if measures else 1.0
    norm = zero.gradient_norm(engine) if measures and config.zero_stage == 0 else None
    is_finite = zero.take_step(engine, only_finite=config.guard.skip_steps > 0)
    if measures:
        norm = zero.gradient_norm(engine) if norm is None else norm
        rate = learning_rate(config, run.images_seen)
        measured = {"grad_norm": norm / scale, "learning_rate": rate, **run.monitor.take()}
        if config.precision == "fp16":
            measured["loss_scale"] = scale
        if config.guard.skip_steps:
            measured["steps_left_out"] = run.guard.left_out
    return torch.stack(losses).mean(), is_finite, measured


def check_losses(run: Run, losses: list[Tensor], is_finite: bool) -> tuple[list[float], bool]:
    """The losses of the steps up to this one, averaged over all ranks, and whether this one counts.

    Raises:
        UserError: one that is not finite and may not be left out, naming its step.
    """
    mean = torch.stack(losses)
    if run.processes.world_size > 1:
        dist.all_reduce(mean)
        mean /= run.processes.world_size
    values, counts = mean.tolist(), True
    for step, value in enumerate(values, start=run.step - len(values) + 1):
        counts = run.guard.admits(value, is_finite or step < run.step, step, run.config.images_per_step)
    return values, counts


def open_report(run: Run) -> QuietReport:
    if not run.processes.is_main:
        return QuietReport()
    return Report(run.config.run, run.images_seen, run.config.total_images)


def announce_results(config: TrainConfig, images_seen: int) -> None:
    print(f"run folder: {config.run}")
    print(f"samples to look at: {grid_path(config, images_seen)}", flush=True)


def command_to_resume() -> str:
    program = Path(sys.argv[0])
    if program.name == "__main__.py":
        shown = TRAIN_PROGRAM if program.parent.name == "train" else "python -m scalelong"
    else:
        shown = program.name
    return f"{shown} {shlex.join(without_local_rank(sys.argv[1:]))}"
