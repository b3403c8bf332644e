"""The console script ``scalelong``: train, launch, plan, sample, evaluate, export, ema-posthoc, prepare."""

import importlib
import sys

from scalelong.train.command_line import run_command
from scalelong.train.errors import UserError

COMMANDS = {
    "train": ("scalelong.train.__main__", "train a preset, or go on with a run"),
    "launch": ("scalelong.train.launch", "train on several processes or hosts"),
    "sample": ("scalelong.train.sample", "draw samples from a run as one picture"),
    "evaluate": ("scalelong.train.evaluate", "score a run's samples against real images"),
    "ema-posthoc": ("scalelong.train.ema_posthoc", "averaged weights of a width chosen after the run"),
    "plan": ("scalelong.train.plan", "memory, traffic and ZeRO stage of a preset on given GPUs"),
    "export": ("scalelong.train.export", "write a run's model as safetensors and JSON"),
    "prepare": ("scalelong.train.prepare", "make shards of images or of latents, with their indices"),
}


def main() -> None:
    run_command(_main)


def _main() -> None:
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        print("usage: scalelong COMMAND ...\n\ncommands:")
        for name, (_, description) in COMMANDS.items():
            print(f"  {name:<12} {description}")
        print("\nscalelong COMMAND --help says more.")
        return
    name, *arguments = sys.argv[1:]
    if name not in COMMANDS:
        raise UserError(f"unknown command {name!r}; there are {', '.join(COMMANDS)}")
    importlib.import_module(COMMANDS[name][0]).main(arguments)
