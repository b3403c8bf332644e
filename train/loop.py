"""The training loop: ``train`` is one visible function; what it calls stands below it."""

import json
import shlex
import socket
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from scalelong.model.architectures import make_backbone
from scalelong.train import engine as ds
from scalelong.train.bad_samples import BadSamples, append_bad_samples, read_bad_samples
from scalelong.train.checkpoint import (
    TrainState,
    find_problem,
    list_checkpoints,
    newest_checkpoint,
    read_state,
    read_tensors,
    save_averages,
    save_checkpoint,
)
from scalelong.train.command_line import without_local_rank
from scalelong.train.config import TrainConfig, config_differences, config_to_dict
from scalelong.train.data import Source, open_source
from scalelong.train.data_latents import LatentFolder
from scalelong.train.data_loader import Batch, choose_reader, prepare_source, read_batches
from scalelong.train.data_order import BatchPlan
from scalelong.train.data_sound import SoundImages, spread_indices
from scalelong.train.diffusion import PROCESSES, noise_prediction_loss
from scalelong.train.ema import FIXED_DECAY, Ema
from scalelong.train.errors import UserError
from scalelong.train.guard import Guard
from scalelong.train.heartbeat import Heartbeat
from scalelong.train.host_memory import keep_freed_memory
from scalelong.train.latents import to_pictures
from scalelong.train.monitor import SkipMonitor
from scalelong.train.preflight import check_versions, installed_versions
from scalelong.train.processes import Processes, cores_per_process, join_processes
from scalelong.train.read_ahead import ReadAhead
from scalelong.train.report import QuietReport, Report, warn
from scalelong.train.run_folder import read_config
from scalelong.train.sample import default_labels, default_texts, generate, grid_columns, save_grid
from scalelong.train.signals import EXIT_SAVED_AFTER_SIGNAL, StopSignals

CONFIG_STAGING = ".config.json.writing"


@dataclass
class Run:
    """A run in progress."""

    config: TrainConfig
    processes: Processes
    data_fingerprint: str
    engine: Any
    ema: Ema
    monitor: SkipMonitor
    source: Source
    batches: ReadAhead[Batch]
    bad_samples: BadSamples
    guard: Guard
    images_seen: int
    step: int


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

            ds.set_learning_rate(run.engine, learning_rate(config, run.images_seen))
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
        engine.backward(ds.loss_with_telling_gradient(loss) if config.guard.skip_steps else loss)
        if micro_batch < config.accumulation_steps - 1:
            engine.step()
    # ZeRO knows the gradient's norm after its step; without it, the gradients are gone by then.
    scale = ds.loss_scale(engine) if measures else 1.0
    norm = ds.gradient_norm(engine) if measures and config.zero_stage == 0 else None
    is_finite = ds.take_step(engine, only_finite=config.guard.skip_steps > 0)
    if measures:
        norm = ds.gradient_norm(engine) if norm is None else norm
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


def roll_back(run: Run, source: Source, plan: BatchPlan, report: QuietReport) -> Run:
    """The run with the weights of its last checkpoint before the loss became too high, at the same place in its data.

    Raises:
        UserError: there is no such checkpoint, or it has been done too often.
    """
    calm_until = run.guard.roll_back()
    checkpoint = run.processes.agree(lambda: checkpoint_up_to(run.config, calm_until))
    report.say(
        f"the loss is above {run.config.guard.roll_back_factor:g} times its median since {calm_until:,} images: "
        f"back to the weights of {checkpoint}; the images since then are left out"
    )
    run.engine.destroy()
    fresh = start_run(run.config, run.processes, checkpoint, source, replace(plan, first_position=run.images_seen))
    return replace(fresh, guard=run.guard, step=run.step)


def checkpoint_up_to(config: TrainConfig, images_seen: int) -> Path:
    for checkpoint in list_checkpoints(config.run):
        if int(checkpoint.name) <= images_seen and find_problem(checkpoint) is None:
            return checkpoint
    raise UserError(f"the loss has diverged since {images_seen:,} images, and no checkpoint is as old as that")


def learning_rate(config: TrainConfig, images_seen: int) -> float:
    """Linear from 0 over the warm-up, then constant."""
    warmup = config.optimizer.warmup_images
    return config.optimizer.learning_rate * (min(images_seen / warmup, 1.0) if warmup else 1.0)


def passes(previous: int, now: int, every: int) -> bool:
    """Whether a multiple of ``every`` lies in (previous, now]; never for 0."""
    return every > 0 and now // every > previous // every


def check_before_training(
    config: TrainConfig, processes: Processes, checkpoint: Path | None
) -> tuple[Source, BatchPlan]:
    """Everything else that can be wrong with the input, before anything is written.

    Args:
        checkpoint: what rank 0 resumes from.

    Returns:
        The images as batches are read from them, and which of them this rank takes.

    Raises:
        UserError: what is wrong.
    """
    choose_reader(config.data.reader)
    if checkpoint is not None and not checkpoint.is_dir():
        raise UserError(f"{socket.gethostname()} does not see {checkpoint}: all hosts must share the run folder")
    state = read_state(checkpoint) if checkpoint is not None else None
    try:
        plan = BatchPlan(
            first_position=state.images_seen if state is not None else 0,
            images_per_step=config.images_per_step,
            accumulation_steps=config.accumulation_steps,
            rank=processes.rank,
            world_size=processes.world_size,
        )
    except ValueError as error:
        raise UserError(str(error)) from error
    ds.check_engine_config(config, plan.micro_batch)
    source = open_source(config.data.path, config.num_data_classes)
    if state is not None and state.data_fingerprint != source.fingerprint():
        raise UserError(
            f"the images in {config.data.path} are not those that {config.run} was trained on (files were added, "
            f"removed or changed); take another --run"
        )
    return prepare_source(config, source), plan


def check_images(config: TrainConfig, source: Source, processes: Processes) -> None:
    """Each rank checks its share of ``data.check_images``.

    Raises:
        UserError: more of them are bad than ``data.max_bad_share`` allows, on any rank.
    """
    if not isinstance(source, SoundImages):
        return
    total = min(config.data.check_images, len(source))
    mine = spread_indices(len(source), total, rank=processes.rank, world_size=processes.world_size)
    found = processes.agree(lambda: source.check(mine, num_reader_threads(config)))
    bad = BadSamples(total, config.data.max_bad_share)
    bad.add(image for share in processes.gather(found) for image in share)
    bad.check_share()


def note_bad_samples(run: Run) -> None:
    """Lists the bad images that any rank has found, each once.

    Raises:
        UserError: there are more than ``data.max_bad_share`` allows, on all ranks alike.
    """
    found = run.source.take_found() if isinstance(run.source, SoundImages) else []
    new = run.bad_samples.add(image for share in run.processes.gather(found) for image in share)
    if run.processes.is_main:
        append_bad_samples(run.config.run, new)
    run.bad_samples.check_share()


def find_checkpoint(config: TrainConfig) -> Path | None:
    """The checkpoint to resume from; None for a new run. It is read whole to see that it is undamaged.

    Raises:
        UserError: the folder holds another run, or something else, or no checkpoint that is whole.
    """
    if not config.run.exists():
        return None
    if not (config.run / "config.json").is_file():
        # Whoever was killed while starting has left the one, and no more.
        if not config.run.is_dir() or any(path.name != CONFIG_STAGING for path in config.run.iterdir()):
            raise UserError(f"{config.run} exists and is no run folder; take another --run")
        return None
    differences = config_differences(read_config(config.run), config)
    if differences:
        raise UserError(
            f"{config.run} was made with another configuration: {', '.join(differences)}; take another --run"
        )
    checkpoint = newest_checkpoint(config.run, warn)
    if checkpoint is None and list_checkpoints(config.run):
        raise UserError(f"{config.run} has no checkpoint that is whole; remove its checkpoints to start again")
    return checkpoint


def start_run(
    config: TrainConfig, processes: Processes, checkpoint: Path | None, source: Source, plan: BatchPlan
) -> Run:
    """Builds the model and the engine, and puts back what the checkpoint holds."""
    if processes.device.type == "cpu":
        keep_freed_memory()
    processes.agree(lambda: write_config(config) if processes.is_main else None)
    torch.manual_seed(config.seed)
    model = make_backbone(config.model, skip_scale=config.make_skip_scale(), checkpointing=config.checkpointing)
    if checkpoint is not None:
        model.load_state_dict(read_tensors(checkpoint, "model"))
    monitor = SkipMonitor(model)
    engine = ds.make_engine(model, config, processes, plan.micro_batch)
    ema = Ema(engine, config.optimizer.ema_decay, config.optimizer.ema_stds)
    step = 0
    if checkpoint is not None:
        state = read_state(checkpoint)
        step = state.step
        for name in ema.averages:
            ema.restore(name, read_tensors(checkpoint, name))
        ds.restore_optimizer(engine, read_tensors(checkpoint, "optimizer"), state.optimizer_steps)
        ds.restore_scaler(engine, state.grad_scaler)
    known = processes.from_main(read_bad_samples(config.run) if processes.is_main else None)
    threads = num_reader_threads(config)
    batches = read_batches(config, source, plan, num_threads=threads, device=processes.device)
    return Run(
        config=config,
        processes=processes,
        data_fingerprint=source.fingerprint(),
        engine=engine,
        ema=ema,
        monitor=monitor,
        source=source,
        batches=ReadAhead(batches),
        bad_samples=BadSamples(len(source), config.data.max_bad_share, known),
        guard=Guard(config.guard),
        images_seen=plan.first_position,
        step=step,
    )


def num_reader_threads(config: TrainConfig) -> int:
    return config.data.num_threads or min(4, cores_per_process())


def write_config(config: TrainConfig) -> None:
    try:
        config.run.mkdir(parents=True, exist_ok=True)
        staging = config.run / CONFIG_STAGING
        staging.write_text(json.dumps(config_to_dict(config), indent=2) + "\n")
        staging.rename(config.run / "config.json")
    except OSError as error:
        raise UserError(f"cannot write to the run folder {config.run}: {error.strerror}") from error


def open_report(run: Run) -> QuietReport:
    if not run.processes.is_main:
        return QuietReport()
    return Report(run.config.run, run.images_seen, run.config.total_images)


def describe(run: Run) -> str:
    c, p = run.config, run.processes
    skips = f"{c.skip_scale} (kappa {c.kappa})" if c.skip_scale == "cs" else c.skip_scale
    parameters = sum(getattr(x, "ds_numel", x.numel()) for x in run.engine.module.parameters())
    start = f"resuming at {run.images_seen:,} images" if run.images_seen else "starting"
    return (
        f"{start}: {parameters:,} parameters, skips {skips}, {c.precision}, ZeRO {c.zero_stage}, "
        f"{p.world_size} x {p.device.type}, images by {choose_reader(c.data.reader)} from {c.data.path}"
    )


def save(run: Run) -> None:
    state = TrainState(
        images_seen=run.images_seen,
        step=run.step,
        optimizer_steps=ds.optimizer_step_count(run.engine),
        data_fingerprint=run.data_fingerprint,
        grad_scaler=ds.scaler_state(run.engine),
    )
    save_checkpoint(run.config.run, state, run.engine, run.ema, run.processes, keep=run.config.keep_checkpoints)


def make_grid(run: Run) -> None:
    """Draws samples with the averaged weights; the same noise, labels and captions each time, to compare grids by."""
    weights = dict(ds.whole_tensors(run.engine, run.ema.averages[FIXED_DECAY]))
    run.processes.agree(lambda: _draw_grid(run, weights) if run.processes.is_main else None)


def _draw_grid(run: Run, weights: dict[str, Tensor]) -> None:
    config, sample = run.config, run.config.sample
    model = make_backbone(config.model, skip_scale=config.make_skip_scale())
    model.load_state_dict(weights)
    null_label, labels = config.null_label, default_labels(sample.num_images, config.num_data_classes)
    if config.model.context_tokens:
        assert isinstance(run.source, LatentFolder), "prepare_source refuses anything else for text"
        null_label, labels = run.source.empty_context, default_texts(sample.num_images, run.source)
    images = generate(
        model.to(run.processes.device).eval(),
        PROCESSES[config.objective],
        labels,
        num_images=sample.num_images,
        null_label=null_label,
        sampler=sample.sampler,
        steps=sample.steps,
        guidance=sample.guidance,
        seed=config.seed,
        to_pictures=to_pictures(config),
    )
    path = grid_path(config, run.images_seen)
    try:
        save_grid(images, path, columns=grid_columns(sample.num_images, config.num_data_classes))
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error


def grid_path(config: TrainConfig, images_seen: int) -> Path:
    return config.run / "samples" / f"{images_seen}.png"


def announce_results(config: TrainConfig, images_seen: int) -> None:
    print(f"run folder: {config.run}")
    print(f"samples to look at: {grid_path(config, images_seen)}", flush=True)


def command_to_resume() -> str:
    program = "python -m scalelong.train" if Path(sys.argv[0]).name == "__main__.py" else Path(sys.argv[0]).name
    return f"{program} {shlex.join(without_local_rank(sys.argv[1:]))}"
