"""``python -m scalelong.train RECIPE [--field value ...]``: trains, or goes on with, a run."""

import os
import sys
import time

from scalelong.train.errors import EXIT_SAVED_AFTER_SIGNAL, dropped_if_nobody_reads, run_command, speak_as
from scalelong.train.usage import HELP_FLAGS, usage

SECONDS_BEHIND_THE_DEAD = 3.0


def main(argv: list[str] | None = None) -> None:
    """The command ``scalelong train``."""
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0] in HELP_FLAGS:  # at once, before the imports that take seconds
        print(usage())
        return

    from scalelong.train.hosts.cores import bound_spinning

    bound_spinning(os.environ)  # before torch is loaded

    from scalelong.train.command_line import print_config, read_train_arguments
    from scalelong.train.hosts.environment import find_place

    speak_as(find_place(os.environ).rank)
    arguments = read_train_arguments(argv)  # asked for help, it ends here

    from scalelong.train.data.classes import with_classes_of_data

    config = with_classes_of_data(arguments)
    if arguments.prints:
        print_config(config)

    from scalelong.train.hosts.processes import leave_processes, to_user_error
    from scalelong.train.hosts.signals import ignore_stop_signals
    from scalelong.train.loop import train

    try:
        with dropped_if_nobody_reads():
            exit_code = train(config)
    except RuntimeError as error:
        told = to_user_error(error)
        if told is None:
            raise
        # The launcher is to meet the one that died before it meets this one.
        time.sleep(SECONDS_BEHIND_THE_DEAD)
        raise told from None
    if exit_code == EXIT_SAVED_AFTER_SIGNAL:
        ignore_stop_signals()
    leave_processes()
    sys.exit(exit_code)


if __name__ == "__main__":
    run_command(main)
