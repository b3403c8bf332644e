"""The console script ``scalelong``: train, sample, evaluate, export, prepare."""

import importlib
import sys

from scalelong.train.command_line import run_command
from scalelong.train.errors import UserError

COMMANDS = {
    "train": ("scalelong.train.__main__", "train a preset, or go on with a run"),
    "sample": ("scalelong.train.sample", "draw samples from a run as one picture"),
    "evaluate": ("scalelong.train.evaluate", "score a run's samples against real images"),
    "export": ("scalelong.train.export", "write a run's model as safetensors and JSON"),
    "prepare": ("scalelong.train.prepare", "make shards of images or of latents, with their indices"),
}


def main() -> None:
    run_command(_main)


def _main() -> None:
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        print("usage: scalelong COMMAND ...\n\ncommands:")
        for name, (_, description) in COMMANDS.items():
            print(f"  {name:<9} {description}")
        print("\nscalelong COMMAND --help says more.")
        return
    name, *arguments = sys.argv[1:]
    if name not in COMMANDS:
        raise UserError(f"unknown command {name!r}; there are {', '.join(COMMANDS)}")
    importlib.import_module(COMMANDS[name][0]).main(arguments)
