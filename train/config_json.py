"""A configuration as JSON-able values, those of earlier versions too; its flags, and where two of them differ."""

import json
from collections.abc import Iterator
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any

from scalelong.model.architectures import model_from_dict, model_to_dict
from scalelong.model.backbone_config import BackboneConfig
from scalelong.model.renamed import with_new_names
from scalelong.model.skip_scale import SkipScale, has_field
from scalelong.train.config import (
    DataConfig,
    EvaluationConfig,
    GuardConfig,
    LogConfig,
    OptimizerConfig,
    SampleConfig,
    TrainConfig,
)
from scalelong.train.errors import UserError
from scalelong.train.objective_config import ObjectiveConfig


def config_to_dict(config: TrainConfig) -> dict[str, Any]:
    """A JSON-able form of the configuration, in which the skip scale stands with the model, as in exports."""
    values = {**asdict(config), "model": model_to_dict(config.model, config.skip_scale)}
    del values["skip_scale"]
    return json.loads(json.dumps(values, default=str))


def config_from_dict(values: dict[str, Any]) -> TrainConfig:
    """What ``config_to_dict`` wrote, in an earlier version too.

    Raises:
        UserError: a field that this version does not know.
    """
    parts = {
        "objective": ObjectiveConfig,
        "optimizer": OptimizerConfig,
        "data": DataConfig,
        "sample": SampleConfig,
        "guard": GuardConfig,
        "evaluation": EvaluationConfig,
        "log": LogConfig,
    }
    try:
        values = _with_new_names(values)
        values["model"], values["skip_scale"] = model_from_dict(values["model"])
        for name, part in parts.items():
            # Runs older than the guard, the scores during training and trackers have none.
            is_newer = name in ("guard", "evaluation", "log")
            values[name] = part(**(values.get(name, {}) if is_newer else values[name]))
        file = values.get("deepspeed_config")
        return TrainConfig(
            **{**values, "run": Path(values["run"]), "deepspeed_config": None if file is None else Path(file)}
        )
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"the run's config.json does not fit this version of scalelong: {error}") from error


def _with_new_names(values: dict[str, Any]) -> dict[str, Any]:
    """The values of a run of any version under the names of this one."""
    if "config" not in values["model"]:  # the sizes of the network stood beside the name of its architecture
        architecture = values["model"].get("architecture", "UViT")
        sizes = {name: value for name, value in values["model"].items() if name != "architecture"}
        values = {**values, "model": {"architecture": architecture, "config": sizes}}
    values = with_new_names("run", values)
    skip_scale = values["model"].get("skip_scale", {})
    # Every run had a kappa, whatever its policy.
    if skip_scale.get("kind") in SkipScale.known and not has_field(skip_scale["kind"], "kappa"):
        skip_scale.pop("kappa", None)
    return values


def config_differences(old: TrainConfig, new: TrainConfig) -> list[str]:
    """What the two compute differently, as "flag old -> new"; bookkeeping fields may differ freely."""
    return _differences(old, new, "--")


def _differences(old: Any, new: Any, prefix: str) -> list[str]:
    found = []
    for f in fields(old):
        before, after = getattr(old, f.name), getattr(new, f.name)
        flag = prefix + f.name.replace("_", "-")
        if kind_of(before) != kind_of(after):
            found.append(f"{flag} {kind_of(before)} -> {kind_of(after)}")
        elif is_dataclass(before):
            found += _differences(before, after, flag + ".")
        elif before != after and not f.metadata.get("bookkeeping"):
            found.append(f"{flag} {before} -> {after}")
    return found


def kind_of(part: Any) -> str | None:
    """Which of several kinds a part of the configuration is: an architecture, or a policy; None of other parts."""
    if isinstance(part, BackboneConfig):
        return part.architecture
    return part.kind if isinstance(part, SkipScale) else None


def flag_values(part: Any, prefix: str = "--") -> Iterator[tuple[str, Any]]:
    """Every flag of a configuration, and its value."""
    for f in fields(part):
        value, flag = getattr(part, f.name), prefix + f.name.replace("_", "-")
        if (kind := kind_of(value)) is not None:
            yield flag, kind
        if is_dataclass(value):
            yield from flag_values(value, flag + ".")
        else:
            yield flag, value
