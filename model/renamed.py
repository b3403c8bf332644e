"""What saved files said before: tables of renamed and removed fields, by the kind of file, and how they are read."""

from collections.abc import Mapping
from typing import Any

RENAMED: dict[str, dict[str, str]] = {
    "run": {
        "checkpointing": "recompute",
        "skip_scale": "model.skip_scale.kind",
        "kappa": "model.skip_scale.kappa",
        "skip_position": "model.config.skip_position",
        "objective": "objective.noise",
    },
    "model": {
        "skip_scale.policy": "skip_scale.kind",
        "skip_scale.position": "config.skip_position",
    },
    "patched network": {
        "skip_scale.policy": "skip_scale.kind",
        "skip_scale.position": "position",
    },
}
"""Where a field is now: of a run's config.json, of the description of a model (in an export or a run), and of the entry
in the configuration of a patched network of diffusers."""
REMOVED: dict[str, dict[str, Any]] = {"run": {"optimizer.clip_per_tensor": 0.0}}
"""Fields that are gone, with the value at which they did nothing: a file with another one is not read."""
POLICY_NAMES = {"Unscaled": "none", "InverseSqrt2": "inv-sqrt2", "ConstantScale": "cs", "LearnedScale": "ls"}
"""Policies were saved by the names of their classes."""


def with_new_names(kind: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """What a file of this kind held, of any version, with every field where it is now, and without those that are gone.

    A name that is now that of a section is taken for the old field only where it holds no section.
    """
    renamed = _copied(values)
    for old, new in RENAMED[kind].items():
        *sections, name = old.split(".")
        holder = _section(renamed, sections, make=False)
        if holder is None or name not in holder or isinstance(holder[name], dict):
            continue
        value = holder.pop(name)
        *sections, name = new.split(".")
        section = _section(renamed, sections, make=True)
        if section is not None:
            section.setdefault(name, value)
    for old, idle in REMOVED.get(kind, {}).items():
        *sections, name = old.split(".")
        holder = _section(renamed, sections, make=False)
        if holder is not None and name in holder and holder[name] == idle:
            del holder[name]
    return renamed


def _copied(values: Any) -> Any:
    return {name: _copied(value) for name, value in values.items()} if isinstance(values, Mapping) else values


def _section(values: dict[str, Any], names: list[str], *, make: bool) -> dict[str, Any] | None:
    """The section of that path; None where there is none, or something else stands there."""
    for name in names:
        values = values.setdefault(name, {}) if make else values.get(name)  # type: ignore[assignment]
        if not isinstance(values, dict):
            return None
    return values
