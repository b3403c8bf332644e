"""``scalelong ema-posthoc RUN --std 0.08 --out DIR``: averaged weights of any width, after the run.

It needs a run with two or more ``--optimizer.ema-stds``, whose averages it combines, and writes what ``export`` does.
"""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro
from torch import Tensor

from scalelong.model.architectures import make_backbone
from scalelong.train.branch import parse_origin
from scalelong.train.checkpoint import find_problem, numbered_folders, read_tensors
from scalelong.train.commands.export import make_pipeline, write_export
from scalelong.train.errors import UserError, warn
from scalelong.train.optimizer_config import LARGEST_STD
from scalelong.train.parsing import parse
from scalelong.train.run_folder import averages_folder, config_path, read_config
from scalelong.train.zero.averages import Profile, compose, exponent_of_std

LARGEST_ERROR = 0.1
"""Of a composed average: the share of its profile's norm by which it may be missed."""


@dataclass(frozen=True, kw_only=True)
class PosthocArguments:
    """Export averaged weights of a width that was chosen after the run, as safetensors for ``from_pretrained``."""

    run: Annotated[Path, tyro.conf.Positional]
    """Run folder, trained with two or more --optimizer.ema-stds."""
    std: float
    """Relative width of the average: 0.05 looks back over about a tenth of the run."""
    out: Path
    """Folder to write; must be new or empty."""
    at: int | None = None
    """Averages up to this images_seen, one of those kept; the newest if not given."""
    largest_error: float = LARGEST_ERROR
    """Refuse where the profile over time is missed by more than this share of its norm."""


@dataclass(frozen=True)
class KeptAverage:
    """One average of one moment, on disk."""

    folder: Path
    name: str
    profile: Profile


def main(argv: list[str] | None = None) -> None:
    """The command ``scalelong ema-posthoc``."""
    arguments = parse(PosthocArguments, argv, prog="scalelong ema-posthoc")
    config = read_config(arguments.run)
    weights, error = posthoc_average(
        arguments.run, arguments.std, at=arguments.at, largest_error=arguments.largest_error
    )
    model = make_backbone(config.model, skip_scale=config.skip_scale)
    model.load_state_dict(weights)
    images_seen = int(kept_averages(arguments.run, arguments.at)[0].folder.name)
    weights_name = f"power-function average of relative width {arguments.std:g}"
    pipeline = make_pipeline(config, model.eval(), images_seen=images_seen, weights=weights_name)
    write_export(pipeline, arguments.out)
    print(f"width {arguments.std:g}, profile met within {100 * error:.2g} % -> {arguments.out}")


def posthoc_average(
    run: Path, std: float, *, at: int | None = None, largest_error: float = LARGEST_ERROR
) -> tuple[dict[str, Tensor], float]:
    """The power-function average of a relative width, combined from the averages that a run kept.

    Returns:
        The tensors by name, fp32, and by how much the combination misses the profile (a share of the profile's norm).

    Raises:
        UserError: no such run or width, too few averages, or none that meet ``largest_error``.
    """
    kept, coefficients, error = plan_average(run, std, at=at, largest_error=largest_error, flag="--std ")
    return combine(kept, coefficients), error


def plan_average(
    run: Path, std: float, *, at: int | None, largest_error: float, flag: str
) -> tuple[list[KeptAverage], list[float], float]:
    """What ``posthoc_average`` combines, with which coefficients, and by how much that misses the profile.

    Args:
        flag: what stands before the width on the command line, for messages.

    Raises:
        UserError: as ``posthoc_average`` does.
    """
    if not 0.001 <= std <= LARGEST_STD:
        raise UserError(f"{flag.strip(' =')} must be in [0.001, {LARGEST_STD:.4f}], got {std:g}")
    kept = kept_averages(run, at)
    wanted = Profile(max(average.profile.step for average in kept), exponent_of_std(std))
    coefficients, error = compose([average.profile for average in kept], wanted)
    if error > largest_error:
        raise UserError(
            f"the {len(kept)} averages in {averages_folder(run)} miss the profile of {flag}{std:g} "
            f"by {100 * error:.2g} %; a run with a smaller --images-per-average comes closer"
        )
    return kept, coefficients.tolist(), error


def kept_averages(run: Path, at: int | None) -> list[KeptAverage]:
    """Those up to ``at`` that are whole; others are reported and passed over.

    Raises:
        UserError: there are none, or those of ``at`` are not among them.
    """
    found = []
    for folder in kept_folders(run, math.inf if at is None else at):
        problem = find_problem(folder, files=("state.json",))
        if problem:
            warn(f"passing over the averages {folder}: {problem}")
            continue
        state = json.loads((folder / "state.json").read_text())
        profiles = {name: Profile(state["step"], exponent) for name, exponent in state["exponents"].items()}
        found += [KeptAverage(folder, name, profile) for name, profile in profiles.items()]
    if not found:
        raise UserError(f"{run} kept no averages: it was trained without --optimizer.ema-stds, or has not come so far")
    if at is not None and found[0].folder.name != str(at):
        raise UserError(f"there are no whole averages {averages_folder(run) / str(at)}")
    return found


def kept_folders(run: Path, up_to: float) -> Iterator[Path]:
    """The newest first; behind those of a branch, those that the other run kept before it, if that is still there."""
    for folder in numbered_folders(averages_folder(run)):
        if int(folder.name) <= up_to:
            yield folder
    branch_from = read_config(run).branch_from
    if branch_from is not None:
        origin = parse_origin(branch_from)
        if config_path(origin.run).is_file():
            yield from kept_folders(origin.run, min(up_to, origin.images_seen or 0))


def combine(kept: Sequence[KeptAverage], coefficients: Sequence[float]) -> dict[str, Tensor]:
    """The weighted sum of averages, summed in fp64; one of them is in memory at a time."""
    total: dict[str, Tensor] = {}
    for average, coefficient in zip(kept, coefficients, strict=True):
        for name, value in read_tensors(average.folder, average.name).items():
            term = coefficient * value.double()
            total[name] = total[name].add_(term) if name in total else term
    return {name: value.to(torch.float32) for name, value in total.items()}
