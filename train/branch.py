"""``--branch-from RUN[@IMAGES]``: a new run that goes on from a checkpoint of another, with what may differ.

It takes over weights, averages, the optimizer's state and the position in the data, and saves them in its own folder
before its first step; the other run is only read.
"""

import re
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from scalelong.train.checkpoint import find_problem, list_checkpoints, newest_checkpoint
from scalelong.train.config import TrainConfig
from scalelong.train.config_json import config_differences
from scalelong.train.errors import UserError, warn
from scalelong.train.run_folder import read_config

STAYS = ("--model", "--skip-scale", "--objective")
"""Beginnings of the flags that say what the network computes: with other values its weights would mean something else.

All others may differ, but for the kind of optimizer: the learning rate, batch, precision, seed, data, guard."""


class Origin(NamedTuple):
    """What ``--branch-from`` names."""

    run: Path
    images_seen: int | None
    """Of the checkpoint; None for the newest."""

    def __str__(self) -> str:
        return str(self.run) if self.images_seen is None else f"{self.run}@{self.images_seen}"


def parse_origin(text: str) -> Origin:
    """RUN or RUN@IMAGES; what stands behind the last @ is part of the folder's name unless it is a number."""
    match = re.fullmatch(r"(.+)@(\d+)", text, re.DOTALL)
    return Origin(Path(match[1]), int(match[2])) if match else Origin(Path(text), None)


def find_origin(config: TrainConfig) -> Path:
    """The checkpoint that ``config.branch_from`` names, which is read to see that it is whole.

    Raises:
        UserError: there is none, or what differs may not.
    """
    assert config.branch_from is not None
    origin = parse_origin(config.branch_from)
    if origin.run.resolve() == config.run.resolve():
        raise UserError(f"--branch-from {config.branch_from} is the run folder itself; take another --run")
    check_differences(read_config(origin.run), config)
    return checkpoint_of(origin, flag="--branch-from")


def checkpoint_of(origin: Origin, *, flag: str) -> Path:
    """The checkpoint that a flag names, which is read to see that it is whole.

    Raises:
        UserError: there is none.
    """
    if origin.images_seen is None:
        newest = newest_checkpoint(origin.run, warn)
        if newest is None:
            raise UserError(f"{flag} {origin.run}: it has no whole checkpoint")
        return newest
    there_are = {int(checkpoint.name): checkpoint for checkpoint in reversed(list_checkpoints(origin.run))}
    if origin.images_seen not in there_are:
        names = ", ".join(map(str, there_are)) or "none"
        raise UserError(f"{flag} {origin}: no such checkpoint; {origin.run} has {names}")
    checkpoint = there_are[origin.images_seen]
    problem = find_problem(checkpoint)
    if problem is not None:
        raise UserError(f"{flag} {origin}: {problem}")
    return checkpoint


def check_differences(origin: TrainConfig, branch: TrainConfig) -> None:
    """What the weights mean stays.

    Raises:
        UserError: what does not.
    """
    differences = [d for d in config_differences(origin, branch) if d.startswith(STAYS)]
    if bool(origin.label_drop) != bool(branch.label_drop):
        differences.append(f"--label-drop {origin.label_drop} -> {branch.label_drop}, with a null label and without")
    if differences:
        raise UserError(f"a branch computes what {origin.run} does, which {', '.join(differences)} changes")
    before, after = origin.optimizer.kind, branch.optimizer.kind
    if before != after:
        raise UserError(
            f"{origin.run} has the optimizer's state of {before}, which --optimizer.kind {after} cannot go on with: "
            f"take --init-from {origin.run} for its weights alone"
        )
    added = [f"{std:g}" for std in branch.optimizer.ema_stds if std not in origin.optimizer.ema_stds]
    if added:
        raise UserError(f"{origin.run} has no averages of --optimizer.ema-stds {' '.join(added)} to go on with")


def with_origin(config: TrainConfig, checkpoint: Path) -> TrainConfig:
    """The configuration that records where a branch came from: the folder as it is found from everywhere."""
    run = checkpoint.parent.parent.resolve()
    return replace(config, branch_from=str(Origin(run, int(checkpoint.name))))


def keep_origin(there: TrainConfig, config: TrainConfig) -> TrainConfig:
    """The configuration of a start that goes on with a run: where that came from is on record, and need not be said.

    Raises:
        UserError: another origin is given.
    """
    if config.branch_from is not None:
        given = parse_origin(config.branch_from)
        known = None if there.branch_from is None else parse_origin(there.branch_from)
        same_run = known is not None and given.run.resolve() == known.run
        if known is None or not same_run or given.images_seen not in (None, known.images_seen):
            came = "was started from nothing" if known is None else f"is a branch of {known}"
            raise UserError(f"{config.run} {came}, not of {config.branch_from}: take another --run")
    return replace(config, branch_from=there.branch_from)
