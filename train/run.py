"""A run in progress: how it is built from nothing or a checkpoint, saved, and rolled back."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scalelong.model.architectures import make_backbone
from scalelong.model.skip_scale import described
from scalelong.train.checkpoint import (
    TrainState,
    find_problem,
    list_checkpoints,
    read_state,
    read_tensors,
    save_averages,
    save_checkpoint,
)
from scalelong.train.checks import Start
from scalelong.train.config import TrainConfig
from scalelong.train.data.batches import Batch, choose_reader, num_reader_threads, read_batches
from scalelong.train.data.read_ahead import ReadAhead
from scalelong.train.data.source import LatentSource
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

    start: Start
    engine: Any
    ema: Ema
    monitor: SkipMonitor
    batches: ReadAhead[Batch]
    bad_samples: BadSamples
    guard: Guard
    images_seen: int
    step: int
    unchecked_losses: list[Tensor] = field(default_factory=list)
    """Of this rank's last steps, which nobody has looked at yet."""

    @property
    def config(self) -> TrainConfig:
        return self.start.config

    @property
    def processes(self) -> Processes:
        return self.start.processes

    @property
    def source(self) -> SoundImages | LatentSource:
        return self.start.source

    @property
    def looks_at_each_step(self) -> bool:
        """Whether each loss is looked at as soon as its step is taken. Elsewhere they stay on the GPU for a while."""
        return self.guard.watches or self.processes.device.type == "cpu"


def start_run(start: Start) -> Run:
    """Builds the model and the engine, and puts back what the checkpoint holds."""
    config, processes, checkpoint = start.config, start.processes, start.checkpoint
    if processes.device.type == "cpu":
        keep_freed_memory()
    processes.agree(lambda: write_config(config) if processes.is_main else None)
    torch.manual_seed(config.seed)
    model = make_backbone(config.model, skip_scale=config.skip_scale, checkpointing=config.checkpointing)
    if checkpoint is not None:
        model.load_state_dict(read_tensors(checkpoint, "model"))
    monitor = SkipMonitor(model)
    engine = zero.make_engine(model, config, processes, start.plan.micro_batch)
    ema = Ema(engine, config.optimizer.ema_decay, config.optimizer.ema_stds)
    step = 0 if checkpoint is None else restore(checkpoint, engine, ema)
    known = processes.from_main(read_bad_samples(config.run) if processes.is_main else None)
    threads = num_reader_threads(config, cores_per_process())
    batches = read_batches(config, start.source, start.plan, num_threads=threads, device=processes.device)
    return Run(
        start=start,
        engine=engine,
        ema=ema,
        monitor=monitor,
        batches=ReadAhead(batches),
        bad_samples=BadSamples(len(start.source), config.data.max_bad_share, known),
        guard=Guard(config.guard),
        images_seen=start.plan.first_position,
        step=step,
    )


def restore(checkpoint: Path, engine: Any, ema: Ema) -> int:
    """Puts back what a checkpoint holds besides the model's weights; returns the step that it was written after."""
    state = read_state(checkpoint)
    for name in ema.averages:
        ema.restore(name, read_tensors(checkpoint, name))
    zero.restore_optimizer(engine, read_tensors(checkpoint, "optimizer"), state.optimizer_steps)
    zero.restore_scaler(engine, state.grad_scaler)
    return state.step


def describe(run: Run) -> str:
    c, p = run.config, run.processes
    parameters = sum(getattr(x, "ds_numel", x.numel()) for x in run.engine.module.parameters())
    start = f"resuming at {run.images_seen:,} images" if run.images_seen else "starting"
    return (
        f"{start}: {parameters:,} parameters, skips {described(c.skip_scale)}, {c.precision}, ZeRO {c.zero_stage}, "
        f"{p.world_size} x {p.device.type}, images by {choose_reader(c.data.reader)} from {c.data.path}"
    )


def roll_back(run: Run, report: QuietReport) -> Run:
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
    plan = replace(run.start.plan, first_position=run.images_seen)
    fresh = start_run(replace(run.start, checkpoint=checkpoint, plan=plan))
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
    found = run.source.take_found() if run.source.holds == "images" else []
    new = run.bad_samples.add(image for share in run.processes.gather(found) for image in share)
    if run.processes.is_main:
        append_bad_samples(run.config.run, new)
    run.bad_samples.check_share()


def save(run: Run) -> None:
    state = TrainState(
        images_seen=run.images_seen,
        step=run.step,
        optimizer_steps=zero.optimizer_step_count(run.engine),
        data_fingerprint=run.start.data_fingerprint,
        grad_scaler=zero.scaler_state(run.engine),
    )
    save_checkpoint(run.config.run, state, run.engine, run.ema, run.processes, keep=run.config.keep_checkpoints)


def keep_averages(run: Run) -> None:
    """Keeps the power-function averages as they stand, for the command ``ema-posthoc``."""
    save_averages(run.config.run, run.images_seen, run.step, run.engine, run.ema, run.processes)
