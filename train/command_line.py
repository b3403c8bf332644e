"""What commands on recipes and runs are given: flags, files of configurations, and short forms of both."""

import difflib
import re
import sys
from collections.abc import Collection
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, NoReturn, TypeVar

import tyro

from scalelong.model.backbone_config import BackboneConfig, Parametrization
from scalelong.model.skip_scale import SkipScale, check_kind, has_field, make_skip_scale
from scalelong.model.unet_config import SkipPosition
from scalelong.train.config import TrainConfig
from scalelong.train.config_file import flags_of, printed, read_config_file, whole_config, without_given
from scalelong.train.config_json import flag_values
from scalelong.train.errors import UserError, is_main_process, warn
from scalelong.train.objective_config import NOISE_NAMES, check_sampler
from scalelong.train.parsing import parse
from scalelong.train.recipes import RECIPES
from scalelong.train.run_folder import config_path, read_config
from scalelong.train.usage import HELP_FLAGS, TRAIN_PROGRAM, short_help, usage

R = TypeVar("R", bound="RecipeArguments")


@dataclass(frozen=True, kw_only=True)
class RunArguments:
    """What every command on a run takes."""

    run: Annotated[Path, tyro.conf.Positional]
    """Run folder."""
    checkpoint: int | None = None
    """Which one, by its images_seen; the newest if not given."""
    weights: Literal["ema", "model"] = "ema"
    """The averaged weights, or those of the last step."""


@dataclass(frozen=True, kw_only=True)
class RecipeArguments:
    """A run of a recipe: the flags of training, and short forms of some."""

    skip_scale: Annotated[str, tyro.conf.arg(metavar="{" + ",".join(SkipScale.known) + "}")] = ""
    """What multiplies the long skips: nothing, 1/sqrt2, kappa^(i-1) (cs; geometric keeps the magnitude too), a shared
    learned gate, one gate a skip, given factors, or such as are measured. The same as skip-scale.kind."""
    objective: Annotated[str, tyro.conf.arg(metavar="{" + ",".join(NOISE_NAMES) + "}")] = ""
    """How noise grows with time: the VP-SDE, or the schedule of DDPM, ADM or Stable Diffusion. The same as
    objective.noise."""
    kappa: float | None = None
    """Short for skip-scale.kappa, of "cs" and "geometric"."""
    skip_position: SkipPosition | None = None
    """Short for model.skip-position, of a UNet."""
    parametrization: Parametrization | None = None
    """Short for model.parametrization, of a U-ViT or a DiT."""
    base_width: int | None = None
    """Short for model.base-width, of mup."""
    base_run: Path | None = None
    """A run of mup whose learning rate and base width this one takes: the narrow one that the rate was found by."""
    train: Annotated[TrainConfig, tyro.conf.arg(name="")]
    """The run."""


def without_local_rank(argv: list[str]) -> list[str]:
    """The arguments without the ``--local_rank`` and ``--launch-id`` that launchers put among them."""
    kept, skip_next = [], False
    for argument in argv:
        if skip_next:
            skip_next = False
        elif argument in ("--local_rank", "--local-rank"):
            skip_next = True
        elif not argument.startswith(("--local_rank=", "--local-rank=", "--launch-id=")):
            kept.append(argument)
    return kept


def with_short_names(flags: list[str]) -> list[str]:
    """``--run-folder`` is ``--run``, which torchrun takes for one of its own wherever it stands; and what was
    ``--checkpointing`` before is ``--recompute``."""
    flags = [re.sub(r"^--run[-_]folder(?==|$)", "--run", flag) for flag in flags]
    return [re.sub(r"^--checkpointing(?==|$)", "--recompute", flag) for flag in flags]


class TrainArguments(NamedTuple):
    """What a command that trains says."""

    config: TrainConfig
    base: TrainConfig
    """The recipe, or the run, whose fields the others override."""
    given: set[str]
    """Flags that the command line or a file gives."""
    prints: bool
    """Whether the configuration is to be printed, and nothing trained."""


def parse_train_arguments(argv: list[str]) -> TrainConfig:
    """The configuration that a command that trains says; with ``--print-config`` it is printed, and the command ends.

    Raises:
        UserError: as ``read_train_arguments`` does.
    """
    arguments = read_train_arguments(argv)
    if arguments.prints:
        print_config(arguments.config)
    return arguments.config


def print_config(config: TrainConfig) -> NoReturn:
    """Prints the configuration, once for all processes, and ends the command."""
    if is_main_process():
        print(printed(config), end="")
    sys.exit(0)


def read_train_arguments(argv: list[str]) -> TrainArguments:
    """A recipe or a run, then flags that override its fields, those of a ``--config FILE`` before the others.

    The launcher's ``--local_rank`` is accepted and not needed.

    Raises:
        UserError: an unknown recipe (the recipes are listed) or field, or a value that does not fit.
    """
    argv = without_local_rank(argv)
    if argv and argv[0] in HELP_FLAGS:
        print(usage())
        sys.exit(0)
    argv, file = _take_config_file(argv)
    prints = "--print-config" in argv
    name, base, flags, values = _choose_base([flag for flag in argv if flag != "--print-config"], file)
    if {"-h", "--help"} & set(flags) and "--help-all" not in flags:
        print(short_help(name, dict(flag_values(base))))
        sys.exit(0)
    flags = with_short_names(["--help" if flag == "--help-all" else flag for flag in flags])
    if file is not None and values:
        flags = [*without_given(flags_of(values, base, file), _names_of(flags)), *flags]
    default = RecipeArguments(train=base)
    config = parse_recipe(RecipeArguments, flags, prog=f"{TRAIN_PROGRAM} {name}", default=default).train
    return TrainArguments(config, base, _names_of(flags), prints)


def _take_config_file(argv: list[str]) -> tuple[list[str], Path | None]:
    """The arguments without ``--config FILE``, and the file."""
    kept, file, rest = [], None, iter(argv)
    for argument in rest:
        name, equals, value = argument.partition("=")
        if name != "--config":
            kept.append(argument)
            continue
        value = value if equals else next(rest, "")
        if not value or file is not None:
            raise UserError("--config takes one file, YAML or JSON")
        file = Path(value)
    return kept, file


def _choose_base(argv: list[str], file: Path | None) -> tuple[str, TrainConfig, list[str], dict[str, Any]]:
    """What it is called, the configuration that is overridden, the flags behind it, and the fields of the file."""
    values = {} if file is None else read_config_file(file)
    named = values.pop("recipe", None)
    if argv and not argv[0].startswith("-") and argv[0] not in RECIPES and config_path(Path(argv[0])).is_file():
        run, *flags = argv
        return run, replace(read_config(Path(run)), run=Path(run)), flags, values
    if file is not None and (not argv or argv[0].startswith("-")):
        whole = whole_config(values, file)
        if whole is not None:
            return f"--config {file}", whole, argv, {}
        if named is None:
            raise UserError(f"--config {file} names no recipe: give one in it (recipe: NAME) or before the flags")
        argv = [str(named), *argv]
    name, flags = choose_recipe(argv, program=TRAIN_PROGRAM)
    if file is not None and whole_config(values, file) is not None:
        raise UserError(f"--config {file} is a whole configuration: leave out the recipe {name}")
    if named not in (None, name):
        raise UserError(f"--config {file} is of the recipe {named}, not {name}: give one")
    return name, RECIPES[name], flags, values


def parse_recipe(kind: type[R], flags: list[str], *, prog: str, default: R) -> R:
    """As ``parse``, of arguments that hold a recipe; what short forms say is in ``train``.

    Raises:
        UserError: as ``parse`` does; or a short form and a long one that disagree.
    """
    policy, objective = default.train.skip_scale, default.train.objective
    # Names that say what other flags there are, or that are no flags of tyro's beside those of their section.
    flags, chosen = _take_name(flags, "--skip-scale", "--skip-scale.kind", known=SkipScale.known)
    flags, noise = _take_name(flags, "--objective", "--objective.noise", known=NOISE_NAMES)
    if chosen is not None and chosen != policy.kind:
        policy = make_skip_scale(chosen)
    if noise is not None:
        objective = replace(objective, noise=noise)
    train = replace(default.train, skip_scale=policy, objective=objective)
    default = replace(default, skip_scale=policy.kind, objective=objective.noise, train=train)
    parsed = parse(kind, flags, prog=prog, default=default)
    try:
        if chosen is not None:
            check_kind(chosen, parsed.train.skip_scale)
        if noise is not None and parsed.train.objective.has_own_noise:
            prediction = parsed.train.objective.prediction
            raise ValueError(f"--objective {noise}: the prediction {prediction} has noise of its own; leave it out")
        check_sampler(parsed.train.sample.sampler, parsed.train.objective)
        train = _with_short_forms(parsed, given=_names_of(flags))
        # Not by the configuration itself, which holds a recipe's network before the flags give it skips.
        train.model.check_skip_scale(train.skip_scale)
        return replace(parsed, train=train)
    except ValueError as error:
        raise UserError(str(error)) from error


def _take_name(flags: list[str], *forms: str, known: Collection[str]) -> tuple[list[str], str | None]:
    """The flags without those of these forms, which take one of the known names; and that name, if it is given.

    Raises:
        UserError: another name, or two forms that disagree.
    """
    kept, found, values = [], {}, iter(flags)
    for flag in values:
        name, equals, value = flag.partition("=")
        name = name.replace("_", "-")
        if name not in forms:
            kept.append(flag)
            continue
        value = value if equals else next(values, None)
        if value not in known:
            got = "expected a name after it" if value is None else f"invalid choice {value!r}"
            raise UserError(f"{name}: {got}; there are {', '.join(known)}")
        found[name] = value
    if len(set(found.values())) > 1:
        raise UserError(" and ".join(f"{name} {value}" for name, value in found.items()) + " disagree: give one")
    return kept, next(iter(found.values()), None)


def _names_of(flags: list[str]) -> set[str]:
    return {flag.partition("=")[0].replace("_", "-") for flag in flags if flag.startswith("--")}


def _with_short_forms(parsed: RecipeArguments, *, given: set[str]) -> TrainConfig:
    config = parsed.train
    policy, model = config.skip_scale, config.model
    if parsed.kappa is not None:
        if has_field(policy.kind, "kappa"):
            policy = _with(policy, "kappa", parsed.kappa, "--kappa", "--skip-scale.kappa", given)
        else:
            warn(f"--kappa is ignored: the skip scale {policy.kind!r} has none")
    if parsed.skip_position is not None:
        if any(field.name == "skip_position" for field in fields(model)):
            long = "--model.skip-position"
            model = _with(model, "skip_position", parsed.skip_position, "--skip-position", long, given)
        elif parsed.skip_position != "before-norm":
            raise ValueError(f"no norm follows the skips of a {model.architecture}: no skip scale can stand after one")
    if parsed.base_run is not None:
        return _with_base_run(replace(config, skip_scale=policy, model=model), parsed, given)
    if parsed.parametrization is not None or parsed.base_width is not None:
        model = _with_parametrization(model, parsed, given)
    return replace(config, skip_scale=policy, model=model)


def _with_parametrization(model: BackboneConfig, parsed: RecipeArguments, given: set[str]) -> BackboneConfig:
    """Both at once: neither fits without the other."""
    changes: dict[str, Any] = {}
    for name in ("parametrization", "base_width"):
        value, flag = getattr(parsed, name), name.replace("_", "-")
        if value is not None:
            if f"--model.{flag}" in given and getattr(model, name) != value:
                raise ValueError(f"--{flag} {value} and --model.{flag} {getattr(model, name)} disagree: give one")
            changes[name] = value
    return replace(model, **changes)


def _with_base_run(config: TrainConfig, parsed: RecipeArguments, given: set[str]) -> TrainConfig:
    """The learning rate of a run, unless one is given, and its base width; warns of what muP does not carry over.

    Raises:
        UserError: no run.
        ValueError: a run of another architecture or without muP, or flags that say something else.
    """
    run, model = parsed.base_run, config.model
    assert run is not None
    base = read_config(run)
    if type(base.model) is not type(model):
        raise ValueError(f"--base-run {run} is of a {base.model.architecture}, this is a {model.architecture}")
    if base.model.parametrization != "mup":
        raise ValueError(f"--base-run {run} has no parametrization mup: its learning rate is that of its width alone")
    chosen = model.parametrization if "--model.parametrization" in given else parsed.parametrization
    if chosen not in (None, "mup"):
        raise ValueError(f"--base-run {run} is of mup, --parametrization {chosen} is not: give one")
    base_width = parsed.base_width or model.base_width
    if base_width not in (0, base.model.base_width):
        raise ValueError(f"--base-run {run} has the base width {base.model.base_width}, not {base_width}")
    config = replace(config, model=replace(model, parametrization="mup", base_width=base.model.base_width))
    if differences := _not_carried_over(base, config):
        warn(f"muP carries a learning rate over the width alone, and {run} differs in {', '.join(differences)}")
    if "--optimizer.learning-rate" in given:
        return config
    return replace(config, optimizer=replace(config.optimizer, learning_rate=base.optimizer.learning_rate))


def _not_carried_over(base: TrainConfig, config: TrainConfig) -> list[str]:
    """What of the network's shape, of the batch and of the skips' scale is another than in a base run."""

    def shape(of: TrainConfig) -> dict[str, Any]:
        values = {field.name.replace("_", "-"): getattr(of.model, field.name) for field in fields(of.model)}
        head_width = values.pop("width") // values.pop("num-heads")
        return {**values, "width of a head": head_width, "images-per-step": of.images_per_step}

    before, now = shape(base), shape(config)
    found = [f"{name} ({before[name]}, here {now[name]})" for name in before if before[name] != now[name]]
    kappa, num_skips = getattr(base.skip_scale, "kappa", 1.0), getattr(config.model, "num_skips", 0)
    if config.skip_scale == base.skip_scale and kappa != 1.0 and before["depth"] != now["depth"] and num_skips > 1:
        same = kappa ** ((base.model.num_skips - 1) / (num_skips - 1))  # type: ignore[attr-defined]
        found.append(f"the innermost skip (kappa {same:.3g} gives it the same factor)")
    return found


def _with(part: Any, field: str, value: Any, short: str, long: str, given: set[str]) -> Any:
    """
    Raises:
        ValueError: the long form was given too, and says something else.
    """
    if long in given and getattr(part, field) != value:
        raise ValueError(f"{short} {value} and {long} {getattr(part, field)} disagree: give one")
    return replace(part, **{field: value})


def choose_recipe(argv: list[str], *, program: str) -> tuple[str, list[str]]:
    """The recipe's name, which comes first, and the flags behind it.

    Raises:
        UserError: none, or an unknown one; the recipes are listed.
    """
    recipes = ", ".join(RECIPES)
    if not argv or argv[0].startswith("-"):
        raise UserError(f"which recipe? {program} RECIPE [--field value ...]; recipes: {recipes}")
    name, *flags = argv
    if name not in RECIPES:
        close = difflib.get_close_matches(name, RECIPES, n=1)
        hint = f"; perhaps you meant {close[0]}" if close else ""
        raise UserError(f"unknown recipe {name!r}{hint}; recipes: {recipes}")
    return name, flags
