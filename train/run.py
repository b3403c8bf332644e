"""A run in progress: how it is built from nothing or a checkpoint, saved, and rolled back."""

import gc
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from scalelong.model.architectures import make_backbone
from scalelong.model.skip_adapters import freeze_all_but_adapters
from scalelong.model.skip_scale import described
from scalelong.train.checkpoint import (
    TrainState,
    find_problem,
    list_checkpoints,
    read_state,
    read_tensors,
    remove_averages,
    save_averages,
    save_checkpoint,
)
from scalelong.train.checks import Start
from scalelong.train.clipping import ZScoreClipping
from scalelong.train.compiling import compile_network
from scalelong.train.config import TrainConfig
from scalelong.train.data.batches import Batch, choose_reader, num_reader_threads, read_batches
from scalelong.train.data.read_ahead import ReadAhead
from scalelong.train.data.source import LatentSource
from scalelong.train.data.stand_ins import BadSamples, SoundImages, append_bad_samples, read_bad_samples
from scalelong.train.guard import Guard
from scalelong.train.hosts.cores import cores_per_process
from scalelong.train.hosts.host_memory import keep_freed_memory
from scalelong.train.hosts.processes import Processes
from scalelong.train.monitor import Monitor
from scalelong.train.objective import make_objective
from scalelong.train.report import Report
from scalelong.train.resources import Resources, resources_of
from scalelong.train.run_folder import log_path
from scalelong.train.self_distillation import SelfDistillation, make_contrast_heads
from scalelong.train.spikes import SpikeWatch, last_rows
from scalelong.train.zero import engine as zero
from scalelong.train.zero import shards
from scalelong.train.zero.averages import Ema


@dataclass
class Run:
    """A run in progress."""

    start: Start
    engine: Any
    ema: Ema
    monitor: Monitor
    spikes: SpikeWatch
    batches: ReadAhead[Batch]
    bad_samples: BadSamples
    guard: Guard
    clipping: ZScoreClipping | None
    resources: Resources
    distillation: SelfDistillation | None
    images_seen: int
    step: int
    averaged_steps: int
    """Steps that the averages have taken in: those that were not left out, on the way that leads to these weights."""
    unchecked_losses: list[Tensor] = field(default_factory=list)
    """Of this rank's last steps, which nobody has looked at yet."""
    unchecked_gradients: list[Tensor] = field(default_factory=list)
    """Whether they were finite in the same steps."""

    @property
    def config(self) -> TrainConfig:
        return self.start.config

    @property
    def processes(self) -> Processes:
        return self.start.processes

    @property
    def source(self) -> SoundImages | LatentSource:
        return self.start.source

    def network_of(self, batch: Batch) -> Callable[..., Tensor]:
        """The network as an objective calls it, told what a batch says beside images, times and conditions."""
        network = self.engine if self.distillation is None else self.distillation.student(batch)
        return network if batch.middle is None else partial(network, middle=batch.middle)

    @torch.no_grad()
    def watch_uncompiled(self, batch: Batch) -> None:
        """Takes down what blocks and skips do with a batch, in a forward pass of its own: graphs call no hooks."""
        self.monitor.active = True
        torch.manual_seed(batch.dropout_seed)
        network = self.network_of(batch)
        images, noise = batch.images_BCHW, batch.noise_BCHW
        make_objective(self.config.objective).loss(network, images, noise, batch.time_u_B, batch.condition)
        self.monitor.active = False

    def free(self) -> None:
        """Gives up weights, optimizer, averages and readers, so that others of their size find room."""
        zero.destroy(self.engine)
        self.engine = self.ema = self.monitor = self.batches = self.distillation = None  # type: ignore[assignment]
        self.unchecked_losses.clear()
        self.unchecked_gradients.clear()
        gc.collect()  # DeepSpeed's engine and its hooks hold each other

    @property
    def looks_at_each_step(self) -> bool:
        """Whether each step is looked at as soon as it is taken. Elsewhere they stay on the GPU for a while."""
        return self.guard.watches or self.processes.device.type == "cpu"


def start_run(start: Start) -> Run:
    """Builds the model and the engine, and puts back what the checkpoint holds."""
    config, processes, checkpoint = start.config, start.processes, start.checkpoint
    if processes.device.type == "cpu":
        keep_freed_memory()
    torch.manual_seed(config.seed)
    model = make_backbone(config.model, skip_scale=config.skip_scale, recompute=config.recompute)
    if checkpoint is not None:
        model.load_state_dict(read_tensors(checkpoint, "model"))
    elif start.initial is not None:
        start.initial.put_into(model, config)
    if config.skip_scale.trains_alone:
        freeze_all_but_adapters(model)
    learned = learned_by_loss(config)
    if checkpoint is not None:
        for name, module in learned.items():
            module.load_state_dict(read_tensors(checkpoint, name))
    monitor, before = Monitor(model), rows_before(start)
    seconds = (before[-1].get("wall_seconds") or 0.0) if before else 0.0
    resources = resources_of(model, processes.device, config.precision, processes.world_size, seconds)
    compile_network(model, config)
    engine = zero.make_engine(model, config, processes, start.plan.micro_batch, learned)
    o = config.optimizer
    ema = Ema(engine, o.ema_decay, o.ema_stds, rampup=o.ema_rampup)
    state = None if checkpoint is None else restore(checkpoint, engine, ema)
    known = processes.from_main(read_bad_samples(config.run) if processes.is_main else None)
    threads = num_reader_threads(config, cores_per_process())
    batches = read_batches(config, start.source, start.plan, num_threads=threads, device=processes.device)
    return Run(
        start=start,
        engine=engine,
        ema=ema,
        monitor=monitor,
        spikes=SpikeWatch(monitor.blocks, before),
        batches=ReadAhead(batches),
        bad_samples=BadSamples(len(start.source), config.data.max_bad_share, known),
        guard=Guard(config.guard, config.run),
        clipping=restore_clipping(config, state),
        resources=resources,
        distillation=SelfDistillation(config, engine, ema, processes) if config.objective.contrast else None,
        images_seen=start.plan.first_position,
        step=0 if state is None else state.step,
        averaged_steps=0 if state is None else state.num_averaged,
    )


def learned_by_loss(config: TrainConfig) -> dict[str, nn.Module]:
    """What the loss learns beside the network, by its names, as it begins."""
    made = (make_objective(config.objective).make_log_variance(), make_contrast_heads(config))
    return {name: module for name, module in zip(shards.LEARNED_BY_LOSS, made, strict=True) if module is not None}


def restore(checkpoint: Path, engine: Any, ema: Ema) -> TrainState:
    """Puts back what a checkpoint holds besides the model's weights; returns what else it says of the run."""
    state = read_state(checkpoint)
    for name in ema.averages:
        ema.restore(name, read_tensors(checkpoint, name))
    zero.restore_optimizer(engine, read_tensors(checkpoint, "optimizer"), state.optimizer_steps)
    zero.restore_scaler(engine, state.grad_scaler)
    return state


def restore_clipping(config: TrainConfig, state: TrainState | None) -> ZScoreClipping | None:
    """The clipping that is configured, with what a checkpoint remembers for it; a branch may begin with another one."""
    threshold = config.optimizer.clip_z_score
    clipping = ZScoreClipping(threshold) if threshold else None
    remembered = None if state is None else state.clipping
    if clipping is not None and remembered is not None and remembered.keys() == clipping.state().keys():
        clipping.restore(remembered)
    return clipping


def rows_before(start: Start) -> list[dict[str, float | None]]:
    """The last rows of the log that this start goes on from, on every rank."""
    if start.checkpoint is None:
        return []
    path, images_seen = log_path(start.config.run), start.plan.first_position
    return start.processes.from_main(last_rows(path, images_seen) if start.processes.is_main else None)


def describe(run: Run) -> str:
    c, p = run.config, run.processes
    parameters = sum(getattr(x, "ds_numel", x.numel()) for _, x in shards.network_parameters(run.engine))
    how = f"resuming at {run.images_seen:,} images" if run.images_seen else "starting"
    if run.start.is_branch:
        how = f"starting from {c.branch_from}"
    elif run.start.initial is not None:
        how = "starting from weights"
    compiled = "" if c.compile == "none" else f"compiled ({c.compile}), "
    return (
        f"{how}: {parameters:,} parameters, skips {described(c.skip_scale)}, {c.precision}, ZeRO {c.zero_stage}, "
        f"{compiled}{p.world_size} x {p.device.type}, images by {choose_reader(c.data.reader)} from {c.data.path}"
    )


def roll_back(run: Run, report: Report) -> Run:
    """The run with the weights of its last checkpoint before the loss became too high, at the same place in its data.

    The run given is of no use any more: what it holds is freed before the same is built again. Averages that were kept
    since that checkpoint are removed, and those kept from now on count the steps from it: a power function over the
    steps that lead to the weights, as before.

    Raises:
        DivergedError: there is no such checkpoint, or it has been done too often.
    """
    start, guard, step, images_seen = run.start, run.guard, run.step, run.images_seen
    calm_until = guard.roll_back()
    found = run.processes.on_main(lambda: checkpoint_up_to(run.config, calm_until))
    if found is None:
        raise guard.diverged("and no checkpoint is as old as that")
    report.say(
        f"the loss is above {run.config.guard.roll_back_factor:g} times its median since {calm_until:,} images: "
        f"back to the weights of {found}; the images since then are left out"
    )
    run.processes.on_main(lambda: remove_averages(run.config.run, after=int(found.name)))
    run.free()
    plan = replace(start.plan, first_position=images_seen)
    fresh = start_run(replace(start, checkpoint=found, plan=plan))
    return replace(fresh, guard=guard, step=step, spikes=run.spikes, resources=run.resources)


def checkpoint_up_to(config: TrainConfig, images_seen: int) -> Path | None:
    """The newest whole checkpoint that is as old as that, which is read to see that it is."""
    for checkpoint in list_checkpoints(config.run):
        if int(checkpoint.name) <= images_seen and find_problem(checkpoint) is None:
            return checkpoint
    return None


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
        averaged_steps=run.averaged_steps,
        optimizer_steps=zero.optimizer_step_count(run.engine),
        data_fingerprint=run.start.data_fingerprint,
        grad_scaler=zero.scaler_state(run.engine),
        clipping=None if run.clipping is None else run.clipping.state(),
    )
    save_checkpoint(run.config.run, state, run.engine, run.ema, run.processes, keep=run.config.keep_checkpoints)


def keep_averages(run: Run) -> None:
    """Keeps the power-function averages as they stand, for the command ``ema-posthoc``."""
    save_averages(run.config.run, run.images_seen, run.averaged_steps, run.engine, run.ema, run.processes)
