"""Dataclasses from command lines by tyro, with errors of one line."""

import contextlib
import io
import os
import re
import sys
from collections.abc import Iterator
from typing import Any, TypeVar

import tyro

from scalelong.train.errors import UserError

T = TypeVar("T")


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
    message = re.sub(r"^Error parsing [A-Za-z][\w.]*: ", "", " ".join(paragraphs[0]).rstrip("."))
    for paragraph in paragraphs[1:]:
        if paragraph and paragraph[0].startswith("Perhaps you meant"):
            flags = [line.split()[0] for line in paragraph if line.startswith("--")]
            message += f"; perhaps you meant {' or '.join(dict.fromkeys(flags[:3]))}"
    return message or boxed.strip()
