"""``python -m scalelong.train PRESET [--field value ...]``: trains, or goes on with, a run."""

import difflib
import sys
import time

from scalelong.train.command_line import parse, run_command, without_local_rank
from scalelong.train.config import TrainConfig
from scalelong.train.errors import RankError, UserError
from scalelong.train.presets import DESCRIPTIONS, PRESETS

PROGRAM = "python -m scalelong.train"
SECONDS_BEHIND_THE_DEAD = 3.0


def main(argv: list[str] | None = None) -> None:
    """The command ``scalelong train``."""
    config = parse_train_arguments(sys.argv[1:] if argv is None else argv)

    from scalelong.train.loop import train
    from scalelong.train.processes import has_lost_contact, leave_processes

    try:
        exit_code = train(config)
    except RuntimeError as error:
        if not has_lost_contact(error):
            raise
        # The launcher is to meet the one that died before it meets this one.
        time.sleep(SECONDS_BEHIND_THE_DEAD)
        raise RankError("lost contact with another process of the run: it, or its machine, has died") from None
    leave_processes()
    sys.exit(exit_code)


def parse_train_arguments(argv: list[str]) -> TrainConfig:
    """A preset, then flags that override its fields. The launcher's ``--local_rank`` is accepted and not needed.

    Raises:
        UserError: an unknown preset (the presets are listed) or field, or a value that does not fit.
    """
    argv = without_local_rank(argv)
    if argv and argv[0] in ("-h", "--help"):
        print(usage())
        sys.exit(0)
    name, flags = choose_preset(argv, program=PROGRAM)
    return parse(TrainConfig, flags, prog=f"{PROGRAM} {name}", default=PRESETS[name])


def choose_preset(argv: list[str], *, program: str) -> tuple[str, list[str]]:
    """The preset's name, which comes first, and the flags behind it.

    Raises:
        UserError: none, or an unknown one; the presets are listed.
    """
    presets = ", ".join(PRESETS)
    if not argv or argv[0].startswith("-"):
        raise UserError(f"which preset? {program} PRESET [--field value ...]; presets: {presets}")
    name, *flags = argv
    if name not in PRESETS:
        close = difflib.get_close_matches(name, PRESETS, n=1)
        hint = f"; perhaps you meant {close[0]}" if close else ""
        raise UserError(f"unknown preset {name!r}{hint}; presets: {presets}")
    return name, flags


def usage() -> str:
    width = max(map(len, PRESETS))
    lines = [f"  {name:<{width}}  {DESCRIPTIONS[name]}" for name in PRESETS]
    return "\n".join(
        [
            f"usage: {PROGRAM} PRESET [--field value ...]",
            "",
            "Trains a diffusion model with scaled long skips. The same command resumes.",
            "",
            "presets:",
            *lines,
            "",
            f"{PROGRAM} PRESET --help lists the fields of a preset and their values.",
        ]
    )


if __name__ == "__main__":
    run_command(main)
