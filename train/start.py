"""Before the first step: all that can be wrong is found before anything is written, then the run is built."""

import json
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from scalelong.model.architectures import make_backbone
from scalelong.train import engine as ds
from scalelong.train.bad_samples import BadSamples, read_bad_samples
from scalelong.train.checkpoint import list_checkpoints, newest_checkpoint, read_state, read_tensors
from scalelong.train.config import TrainConfig, config_differences, config_to_dict
from scalelong.train.data import Source, open_source
from scalelong.train.data_loader import Batch, choose_reader, prepare_source, read_batches
from scalelong.train.data_order import BatchPlan
from scalelong.train.data_sound import SoundImages, spread_indices
from scalelong.train.ema import Ema
from scalelong.train.errors import UserError
from scalelong.train.guard import Guard
from scalelong.train.host_memory import keep_freed_memory
from scalelong.train.monitor import SkipMonitor
from scalelong.train.processes import Processes, cores_per_process
from scalelong.train.read_ahead import ReadAhead
from scalelong.train.report import warn
from scalelong.train.run_folder import read_config

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


def write_config(config: TrainConfig) -> None:
    try:
        config.run.mkdir(parents=True, exist_ok=True)
        staging = config.run / CONFIG_STAGING
        staging.write_text(json.dumps(config_to_dict(config), indent=2) + "\n")
        staging.rename(config.run / "config.json")
    except OSError as error:
        raise UserError(f"cannot write to the run folder {config.run}: {error.strerror}") from error


def num_reader_threads(config: TrainConfig) -> int:
    return config.data.num_threads or min(4, cores_per_process())


def describe(run: Run) -> str:
    c, p = run.config, run.processes
    skips = f"{c.skip_scale} (kappa {c.kappa})" if c.skip_scale == "cs" else c.skip_scale
    parameters = sum(getattr(x, "ds_numel", x.numel()) for x in run.engine.module.parameters())
    start = f"resuming at {run.images_seen:,} images" if run.images_seen else "starting"
    return (
        f"{start}: {parameters:,} parameters, skips {skips}, {c.precision}, ZeRO {c.zero_stage}, "
        f"{p.world_size} x {p.device.type}, images by {choose_reader(c.data.reader)} from {c.data.path}"
    )
