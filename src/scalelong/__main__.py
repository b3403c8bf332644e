"""The command ``scalelong``: the table of commands. ``python -m scalelong`` is the same where nothing is installed."""

import importlib
import os
import sys

from scalelong import __version__
from scalelong.train.errors import UserError, run_command
from scalelong.train.hosts.cores import bound_spinning

COMMANDS = {
    "train": ("scalelong.train.__main__", "train a recipe, or go on with a run"),
    "launch": ("scalelong.train.hosts.launch", "train on several processes or hosts"),
    "sample": ("scalelong.train.commands.sample", "draw samples from a run or an export"),
    "evaluate": ("scalelong.train.commands.evaluate", "score samples of a run or an export against real images"),
    "probe": ("scalelong.train.commands.probe", "linear probes of every block, at several noise levels"),
    "ema-posthoc": ("scalelong.train.commands.ema_posthoc", "averaged weights of a width chosen after the run"),
    "plan": ("scalelong.train.commands.plan", "memory, traffic and ZeRO stage of a recipe on given GPUs"),
    "export": ("scalelong.train.commands.export", "write a run's model so that others load it in one line"),
    "lab": ("scalelong.bench.lab.command", "grids of runs: stability, sensitivity and speed of each skip scale"),
    "coord-check": ("scalelong.bench.mup.coord_check", "whether a parametrisation keeps its sizes as the width grows"),
    "lr-transfer": ("scalelong.bench.mup.lr_transfer", "grids over width and learning rate: whether a rate serves all"),
    "prepare": ("scalelong.train.commands.prepare", "make shards of images or of latents, with their indices"),
}
"""Each command's module, whose ``main`` takes the arguments, and what it does. A module is imported when it is asked
for: ``--help`` loads none."""


def main() -> None:
    """Runs the command that the first argument names; an error that a user can act on is one line and exit code 2."""
    run_command(_main)


def _main() -> None:
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        print("usage: scalelong COMMAND ...\n\ncommands:")
        for name, (_, description) in COMMANDS.items():
            print(f"  {name:<12} {description}")
        print("\nscalelong COMMAND --help says more; scalelong --version, which this is.")
        return
    if sys.argv[1] == "--version":
        print(f"scalelong {__version__}")
        return
    name, *arguments = sys.argv[1:]
    if name not in COMMANDS:
        raise UserError(f"unknown command {name!r}; there are {', '.join(COMMANDS)}")
    bound_spinning(os.environ)  # before a command loads torch
    importlib.import_module(COMMANDS[name][0]).main(arguments)


if __name__ == "__main__":
    main()
