"""A run in progress: how it is built from nothing or a checkpoint, saved, and rolled back."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from scalelong.model.architectures import make_backbone
from scalelong.train.checkpoint import (
    TrainState,
    find_problem,
    list_checkpoints,
    read_state,
    read_tensors,
    save_checkpoint,
)
from scalelong.train.config import TrainConfig
from scalelong.train.data.batches import Batch, choose_reader, num_reader_threads, read_batches
from scalelong.train.data.order import BatchPlan
from scalelong.train.data.read_ahead import ReadAhead
from scalelong.train.data.source import Source
from scalelong.train.data.stand_ins import BadSamples, SoundImages, append_bad_samples, read_bad_samples
from scalelong.train.errors import UserError
from scalelong.train.guard import Guard
from scalelong.train.hosts.host_memory import keep_freed_memory
from scalelong.train.hosts.processes import Processes, cores_per_process
from scalelong.train.monitor import SkipMonitor
from scalelong.train.report import QuietReport
from scalelong.train.run_folder import write_config
from scalelong.train.zero import engine as zero
from scalelong.train.zero.averages import Ema


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
    engine = zero.make_engine(model, config, processes, plan.micro_batch)
    ema = Ema(engine, config.optimizer.ema_decay, config.optimizer.ema_stds)
    step = 0
    if checkpoint is not None:
        state = read_state(checkpoint)
        step = state.step
        for name in ema.averages:
            ema.restore(name, read_tensors(checkpoint, name))
        zero.restore_optimizer(engine, read_tensors(checkpoint, "optimizer"), state.optimizer_steps)
        zero.restore_scaler(engine, state.grad_scaler)
    known = processes.from_main(read_bad_samples(config.run) if processes.is_main else None)
    threads = num_reader_threads(config, cores_per_process())
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


def describe(run: Run) -> str:
    c, p = run.config, run.processes
    skips = f"{c.skip_scale} (kappa {c.kappa})" if c.skip_scale == "cs" else c.skip_scale
    parameters = sum(getattr(x, "ds_numel", x.numel()) for x in run.engine.module.parameters())
    start = f"resuming at {run.images_seen:,} images" if run.images_seen else "starting"
    return (
        f"{start}: {parameters:,} parameters, skips {skips}, {c.precision}, ZeRO {c.zero_stage}, "
        f"{p.world_size} x {p.device.type}, images by {choose_reader(c.data.reader)} from {c.data.path}"
    )


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


def save(run: Run) -> None:
    state = TrainState(
        images_seen=run.images_seen,
        step=run.step,
        optimizer_steps=zero.optimizer_step_count(run.engine),
        data_fingerprint=run.data_fingerprint,
        grad_scaler=zero.scaler_state(run.engine),
    )
    save_checkpoint(run.config.run, state, run.engine, run.ema, run.processes, keep=run.config.keep_checkpoints)
