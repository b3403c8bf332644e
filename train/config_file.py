"""Configurations in a file of one's own, YAML or JSON: ``--config FILE``, whose fields stand in for flags.

A file names a recipe and the fields that differ from it, in sections or with dots, as the flags call them; or it is
whole, as a run's ``config.json`` and what ``--print-config`` prints.
"""

import difflib
import json
from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from scalelong.model.skip_scale import SkipScale
from scalelong.train.config import TrainConfig
from scalelong.train.config_json import config_from_dict, config_to_dict, flag_values
from scalelong.train.errors import UserError
from scalelong.train.recipes import RECIPES

SHORT_FORMS = {
    "--kappa": "--skip-scale.kappa",
    "--skip-position": "--model.skip-position",
    "--parametrization": "--model.parametrization",
    "--base-width": "--model.base-width",
    "--objective": "--objective.noise",
    "--skip-scale": "--skip-scale.kind",
}
"""Flags that are short for others."""


def read_config_file(path: Path) -> dict[str, Any]:
    """What a file says, as it is written.

    Raises:
        UserError: no such file, one that is neither YAML nor JSON, or one of no fields; in one line.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is no text"
        raise UserError(f"--config {path}: cannot be read: {why}") from error
    try:
        values = json.loads(text) if path.suffix == ".json" else _yaml().safe_load(text)
    except (ValueError, RecursionError, _yaml().YAMLError) as error:
        raise UserError(f"--config {path}: neither YAML nor JSON: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
        raise UserError(f"--config {path}: expected fields and their values, found {str(values)[:60]!r}")
    return values


def _yaml() -> Any:
    try:
        import yaml
    except ImportError as error:
        raise UserError('YAML needs PyYAML: pip install "scalelong[train]"') from error
    return yaml


def printed(config: TrainConfig) -> str:
    """The whole configuration as YAML, which ``--config`` reads."""
    return _yaml().safe_dump(config_to_dict(config), sort_keys=False)


def whole_config(values: Mapping[str, Any], path: Path) -> TrainConfig | None:
    """The configuration that a whole file holds; None of a file that says what differs from a recipe.

    Raises:
        UserError: a field that this version does not know, with the one that may be meant.
    """
    model = values.get("model")
    if not isinstance(model, dict) or "architecture" not in model:
        return None
    try:
        return config_from_dict(dict(values))
    except UserError as error:
        cause = str(error).partition("scalelong: ")[2] or str(error)
        unknown = cause.partition("unexpected keyword argument ")[2].strip("'\" ")
        known = {name.rpartition(".")[2] for name in _known_names(None)}
        hint = perhaps(unknown.replace("_", "-"), known) if unknown else ""
        raise UserError(f"--config {path}: {cause}{hint.replace('-', '_')}") from None


def flags_of(values: Mapping[str, Any], base: TrainConfig, path: Path) -> list[str]:
    """The flags that say what the fields of a file say, each ``--name=value``, or ``--name`` before several values.

    Args:
        base: the recipe that they are laid over.

    Raises:
        UserError: a field that there is not, with the one that may be meant.
    """
    known, flags = _known_names(base), []
    for name, value in _leaves(values):
        if name not in known:
            sections = sorted(other for other in known if other.startswith(f"{name}."))
            hint = f"; it is a section, of {sections[0]} and others" if sections else perhaps(name, known)
            raise UserError(f"--config {path} has the unknown field {name.replace('-', '_')!r}{hint}")
        if isinstance(value, list):
            flags += [f"--{name}", *(str(part) for part in value)]
        else:
            flags.append(f"--{name}={value}")
    return flags


def perhaps(name: str, known: set[str]) -> str:
    """ "; perhaps you meant ..." where a known name is like it."""
    close = difflib.get_close_matches(name, sorted(known), n=1)
    if not close:  # in another section
        last = name.rpartition(".")[2]
        close = [other for other in sorted(known) if other.rpartition(".")[2] == last][:1]
    return f"; perhaps you meant {close[0].replace('-', '_')}" if close else ""


def _leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        dotted = f"{prefix}{name}".replace("_", "-")
        if isinstance(value, Mapping):
            yield from _leaves({str(inner): of_it for inner, of_it in value.items()}, f"{dotted}.")
        else:
            yield dotted, value


def _known_names(base: TrainConfig | None) -> set[str]:
    """Names of fields without dashes before them; of any configuration if None."""
    bases = RECIPES.values() if base is None else [base]
    known = {flag[2:] for config in bases for flag, _ in flag_values(config)} - {"model"}
    of_policies = (field.name for kind in SkipScale.known.values() for field in fields(kind.policy))
    known |= {f"skip-scale.{name}".replace("_", "-") for name in of_policies}
    return known | {short[2:] for short in SHORT_FORMS} | {"skip-scale.kind"}


def without_given(flags: list[str], given: set[str]) -> list[str]:
    """The flags of a file without those that the command line gives, in a short form or the long one."""
    named = {SHORT_FORMS.get(name, name) for name in given}
    kept, keeps = [], True
    for flag in flags:
        if flag.startswith("--"):
            name = flag.partition("=")[0]
            keeps = SHORT_FORMS.get(name, name) not in named
        if keeps:
            kept.append(flag)
    return kept
