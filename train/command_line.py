"""Command lines by tyro, with errors of one line."""

import contextlib
import difflib
import io
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import tyro

from scalelong.train.config import TrainConfig
from scalelong.train.errors import UserError
from scalelong.train.recipes import RECIPES
from scalelong.train.usage import TRAIN_PROGRAM, usage

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class RunArguments:
    """What every command on a run takes."""

    run: Annotated[Path, tyro.conf.Positional]
    """Run folder."""
    checkpoint: int | None = None
    """Which one, by its images_seen; the newest if not given."""
    weights: Literal["ema", "model"] = "ema"
    """The averaged weights, or those of the last step."""


def parse(kind: type[T], argv: list[str] | None, *, prog: str, default: T | None = None) -> T:
    """A dataclass from the command line; ``--help`` prints its fields and exits.

    Raises:
        UserError: an unknown field or a value that does not fit, in one line.
    """
    argv = sys.argv[1:] if argv is None else argv
    keywords: dict[str, Any] = {} if default is None else {"default": default}
    # A field that may hold one of several dataclasses keeps the one that the default has.
    keywords["config"] = (tyro.conf.FlagConversionOff, tyro.conf.AvoidSubcommands)
    report = io.StringIO()
    asks_for_help = any(argument in ("-h", "--help") for argument in argv)
    try:
        with contextlib.redirect_stderr(report), contextlib.nullcontext() if asks_for_help else _wide_terminal():
            return tyro.cli(kind, args=argv, prog=prog, **keywords)
    except SystemExit as stopped:
        if stopped.code in (0, None):
            raise
        raise UserError(f"{_first_paragraph(report.getvalue())} (see {prog} --help)") from None
    except ValueError as error:
        # A value of the right type that the dataclass itself refuses.
        raise UserError(str(error)) from error


@contextlib.contextmanager
def _wide_terminal() -> Iterator[None]:
    """tyro breaks its messages at the terminal's width, in the middle of long values; ours are one line."""
    before = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = "10000"
    try:
        yield
    finally:
        if before is None:
            del os.environ["COLUMNS"]
        else:
            os.environ["COLUMNS"] = before


def _first_paragraph(boxed: str) -> str:
    """tyro draws its errors as a box: the first paragraph says what, a "Perhaps you meant" which flag was meant."""
    lines = [line.strip("│ ") for line in boxed.splitlines() if line.startswith("│")]
    # Without UTF-8 the box has no sides, and its title stands above the first rule.
    lines = lines or [line.strip() for line in boxed.splitlines()[2:]]
    paragraphs = [[]]
    for line in lines:
        if line and not line.strip("─-"):
            paragraphs.append([])
        else:
            paragraphs[-1].append(line)
    # A value that the dataclass refuses is named by the dataclass already.
    message = re.sub(r"^Error parsing [A-Z]\w*: ", "", " ".join(paragraphs[0]).rstrip("."))
    for paragraph in paragraphs[1:]:
        if paragraph and paragraph[0].startswith("Perhaps you meant"):
            flags = [line.split()[0] for line in paragraph if line.startswith("--")]
            message += f"; perhaps you meant {' or '.join(dict.fromkeys(flags[:3]))}"
    return message or boxed.strip()


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
    """``--run-folder`` is ``--run``, which torchrun takes for one of its own wherever it stands."""
    return [re.sub(r"^--run[-_]folder(?==|$)", "--run", flag) for flag in flags]


def parse_train_arguments(argv: list[str]) -> TrainConfig:
    """A preset, then flags that override its fields. The launcher's ``--local_rank`` is accepted and not needed.

    Raises:
        UserError: an unknown preset (the presets are listed) or field, or a value that does not fit.
    """
    argv = without_local_rank(argv)
    if argv and argv[0] in ("-h", "--help"):
        print(usage())
        sys.exit(0)
    name, flags = choose_recipe(argv, program=TRAIN_PROGRAM)
    return parse(TrainConfig, with_short_names(flags), prog=f"{TRAIN_PROGRAM} {name}", default=RECIPES[name])


def choose_recipe(argv: list[str], *, program: str) -> tuple[str, list[str]]:
    """The preset's name, which comes first, and the flags behind it.

    Raises:
        UserError: none, or an unknown one; the presets are listed.
    """
    presets = ", ".join(RECIPES)
    if not argv or argv[0].startswith("-"):
        raise UserError(f"which preset? {program} PRESET [--field value ...]; presets: {presets}")
    name, *flags = argv
    if name not in RECIPES:
        close = difflib.get_close_matches(name, RECIPES, n=1)
        hint = f"; perhaps you meant {close[0]}" if close else ""
        raise UserError(f"unknown preset {name!r}{hint}; presets: {presets}")
    return name, flags
