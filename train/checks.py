"""Before the first step: all that can be wrong is found before anything is written."""

import socket
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil

from scalelong.model.skip_scale import ProfiledScale
from scalelong.train.branch import find_origin, keep_origin, with_origin
from scalelong.train.checkpoint import list_checkpoints, newest_checkpoint, read_state
from scalelong.train.compiling import check_compile
from scalelong.train.config import TrainConfig
from scalelong.train.config_json import config_differences, flag_values
from scalelong.train.data.batches import (
    choose_reader,
    num_reader_threads,
    open_validation_source,
    prepare_source,
)
from scalelong.train.data.order import BatchPlan
from scalelong.train.data.source import LatentSource, open_data
from scalelong.train.data.stand_ins import BadSamples, SoundImages, spread_indices
from scalelong.train.errors import UserError, check_installed, warn
from scalelong.train.hosts.cores import cores_per_process
from scalelong.train.hosts.preflight import check_versions, installed_versions
from scalelong.train.hosts.processes import Processes
from scalelong.train.initial_weights import InitialWeights, find_weights, keep_weights, read_weights
from scalelong.train.objective_config import check_sampler
from scalelong.train.run_folder import checkpoints_folder, config_path, holds_something_else, read_config
from scalelong.train.schedule import check_rates, with_horizon
from scalelong.train.scores.feature_spaces import check_feature_space
from scalelong.train.scores.real_images import check_real_images
from scalelong.train.zero.engine_config import check_engine_config

OF_ONE_HOST = {
    *("--data.path", "--data.vae", "--data.reader", "--data.num-threads"),
    *("--deepspeed-config", "--evaluation.inception-file"),
}
"""Flags whose values may differ from host to host: where things lie, and how they are read."""


@dataclass(frozen=True)
class Start:
    """Where a run starts, or goes on, once nothing is wrong with it."""

    config: TrainConfig
    processes: Processes
    checkpoint: Path | None
    """What it resumes from, a checkpoint of another run if it is a branch; None for a new run."""
    source: SoundImages | LatentSource
    """What batches are read from."""
    data_fingerprint: str
    plan: BatchPlan
    """Which part of the data this rank takes, from which position on."""
    validation_source: SoundImages | LatentSource
    """What the validation loss is of."""
    validates_on_held_out: bool
    """Whether that is a test split, which is not trained on."""
    initial: InitialWeights | None = None
    """The weights that a new run starts from; None: from nothing, or it resumes."""

    @property
    def is_branch(self) -> bool:
        """Whether it goes on from a checkpoint of another run."""
        return self.checkpoint is not None and self.checkpoint.parent != checkpoints_folder(self.config.run)

    @property
    def is_finished(self) -> bool:
        """Whether nothing is left to be trained."""
        return self.plan.first_position >= self.config.total_images


def check_before_training(config: TrainConfig, processes: Processes) -> Start:
    """All that can be wrong: versions, the run folder, the input and, of a run that is not finished, the images.

    Raises:
        UserError: what is wrong, on every rank.
    """
    config = processes.agree(lambda: with_horizon(config))
    mine = installed_versions() | values_of(config)
    check_versions(processes.gather((f"rank {processes.rank} on {socket.gethostname()}", mine)))
    checkpoint, on_record = processes.on_main(lambda: find_start(config))
    config = replace(config, **on_record)
    start = processes.agree(lambda: check_input(config, processes, checkpoint))
    check_same_data(config, processes.gather((socket.gethostname(), start.data_fingerprint)))
    check_same_weights(config, processes.gather((socket.gethostname(), start.config.init_sha256)))
    if not start.is_finished:
        check_images(start)
    return start


def values_of(config: TrainConfig) -> dict[str, str]:
    """The flags of the configuration and their values, but for those that may differ from host to host."""
    return {flag: str(value) for flag, value in flag_values(config) if flag not in OF_ONE_HOST}


def check_same_data(config: TrainConfig, fingerprints: list[tuple[str, str]]) -> None:
    """Every rank sees the same images.

    Args:
        fingerprints: of each rank, with its host.

    Raises:
        UserError: a rank that sees others.
    """
    first_host, expected = fingerprints[0]
    for rank, (host, fingerprint) in enumerate(fingerprints):
        if fingerprint != expected:
            raise UserError(f"rank {rank} on {host} has other images in {config.data.path} than rank 0 on {first_host}")


def check_same_weights(config: TrainConfig, found: list[tuple[str, str | None]]) -> None:
    """Every rank starts from the same weights.

    Args:
        found: of each rank its host and the SHA-256 of what it has read.

    Raises:
        UserError: a rank that has read others.
    """
    first_host, expected = found[0]
    for rank, (host, sha256) in enumerate(found):
        if sha256 != expected:
            raise UserError(
                f"rank {rank} on {host} has other weights in {config.init_from} than rank 0 on {first_host}"
            )


def find_start(config: TrainConfig) -> tuple[Path | None, dict[str, Any]]:
    """The checkpoint to go on from, None for a new run; and what the run records of its origin and of its skips.

    Raises:
        UserError: the folder holds another run, or something else, or no checkpoint that is whole; or there is nothing
            to branch or to start from.
    """
    there = run_that_is_there(config)
    checkpoint = None
    if there is not None:
        config = keep_weights(there, keep_origin(there, keep_profiled(there, config)))
        checkpoint = find_checkpoint(config)
        if checkpoint is not None:
            check_rates(there, config, int(checkpoint.name))
    # Of a run that is there, too: it was killed before it had saved what it started from.
    if checkpoint is None and config.branch_from is not None:
        checkpoint = find_origin(config)
        config = with_origin(config, checkpoint)
    elif checkpoint is None and config.init_from is not None:
        config = replace(config, init_from=find_weights(config))
    names = ("branch_from", "init_from", "init_sha256", "skip_scale")
    return checkpoint, {name: getattr(config, name) for name in names}


def run_that_is_there(config: TrainConfig) -> TrainConfig | None:
    """The configuration that the run folder was made with; None if there is no run.

    Raises:
        UserError: the folder holds something else, or a run that computes something else.
    """
    if not config.run.exists():
        return None
    if not config_path(config.run).is_file():
        if not config.run.is_dir() or holds_something_else(config.run):
            raise UserError(f"{config.run} exists and is no run folder; take another --run")
        return None
    there = read_config(config.run)
    differences = config_differences(there, keep_profiled(there, config))
    if differences:
        raise UserError(
            f"{config.run} was made with another configuration: {', '.join(differences)}; take another --run, "
            f"with --branch-from {config.run} to go on from there"
        )
    return there


def keep_profiled(there: TrainConfig, config: TrainConfig) -> TrainConfig:
    """The configuration of a start that goes on with a run: factors that it has measured need not be said."""
    before, now = there.skip_scale, config.skip_scale
    if isinstance(before, ProfiledScale) and isinstance(now, ProfiledScale) and not now.factors:
        return replace(config, skip_scale=replace(now, factors=before.factors))
    return config


def find_checkpoint(config: TrainConfig) -> Path | None:
    """The newest checkpoint of the run itself, None if there is none. It is read whole to see that it is undamaged.

    Raises:
        UserError: it has no checkpoint that is whole.
    """
    checkpoint = newest_checkpoint(config.run, warn)
    if checkpoint is None and list_checkpoints(config.run):
        raise UserError(f"{config.run} has no checkpoint that is whole; remove its checkpoints to start again")
    return checkpoint


def check_input(config: TrainConfig, processes: Processes, checkpoint: Path | None) -> Start:
    """Everything else that can be wrong with the input, on this rank.

    Args:
        checkpoint: what rank 0 resumes from.

    Raises:
        UserError: what is wrong.
    """
    choose_reader(config.data.reader)
    if checkpoint is not None and not checkpoint.is_dir():
        raise UserError(f"{socket.gethostname()} does not see {checkpoint}: all hosts must share the run folder")
    state = read_state(checkpoint) if checkpoint is not None else None
    try:
        check_sampler(config.sample.sampler, config.objective)
        plan = BatchPlan(
            first_position=state.images_seen if state is not None else 0,
            images_per_step=config.images_per_step,
            accumulation_steps=config.accumulation_steps,
            rank=processes.rank,
            world_size=processes.world_size,
        )
    except ValueError as error:
        raise UserError(str(error)) from error
    check_memory(config, plan)
    check_engine_config(config, plan.micro_batch)
    check_compile(config, processes.device)
    check_installed("tensorboard")  # as the report needs it: before the run folder is made
    if config.log.wandb:
        check_installed("wandb", asked_by="--log.wandb")
    source = open_data(config)
    fingerprint = source.fingerprint()
    prepared = prepare_source(config, source)
    validation = open_validation_source(config, prepared)
    if config.images_per_evaluation:
        check_evaluation(config)
    if checkpoint is None and config.init_from is None and config.skip_scale.trains_alone:
        raise UserError(
            f"--skip-scale {config.skip_scale.kind} fine-tunes a network that is trained, and moves nothing else: take "
            f"--init-from"
        )
    initial = read_weights(config) if checkpoint is None and config.init_from is not None else None
    if initial is not None:
        config = replace(config, init_sha256=initial.sha256)
    start = Start(config, processes, checkpoint, prepared, fingerprint, plan, *validation, initial=initial)
    if state is not None and state.data_fingerprint != fingerprint and not start.is_branch:
        raise UserError(
            f"the images in {config.data.path} are not those that {config.run} was trained on (files were added, "
            f"removed or changed); take another --run, with --branch-from {config.run} to go on from there, or the "
            f"--data.path that holds them"
        )
    if start.is_branch and start.is_finished:
        raise UserError(
            f"--branch-from {config.branch_from} starts at {plan.first_position:,} images, and nothing is left to be "
            f"trained; take a larger --total-images"
        )
    return start


def check_evaluation(config: TrainConfig) -> None:
    """Samples can be scored while the run trains.

    Raises:
        UserError: the data holds no images, or too few, or the feature space is not installed.
    """
    check_real_images(config)
    check_feature_space(config.evaluation)


def check_memory(config: TrainConfig, plan: BatchPlan) -> None:
    """A micro-batch and its noise fit this host's memory, long before what the network makes of them.

    Raises:
        UserError: they cannot.
    """
    model = config.model
    num_bytes = 2 * 4 * plan.micro_batch * model.in_channels * model.img_size**2
    there_are = psutil.virtual_memory().total
    if num_bytes > there_are:
        raise UserError(
            f"--images-per-step {config.images_per_step}: {plan.micro_batch:,} images at a time and their noise are "
            f"{num_bytes / 1e9:,.0f} GB, {socket.gethostname()} has {there_are / 1e9:,.0f} GB; lower it, or raise "
            f"--accumulation-steps"
        )


def check_images(start: Start) -> None:
    """Each rank checks its share of ``data.check_images``.

    Raises:
        UserError: more of them are bad than ``data.max_bad_share`` allows, on any rank.
    """
    config, source, processes = start.config, start.source, start.processes
    if source.holds == "latents":
        return
    total = min(config.data.check_images, len(source))
    mine = spread_indices(len(source), total, rank=processes.rank, world_size=processes.world_size)
    found = processes.agree(lambda: source.check(mine, num_reader_threads(config, cores_per_process())))
    bad = BadSamples(total, config.data.max_bad_share)
    bad.add(image for share in processes.gather(found) for image in share)
    bad.check_share()
