#!/usr/bin/env python3
"""In the place of Slurm's srun: starts the tasks of a step on this machine, with the variables that srun documents.

The step is killed when a task ends badly (--kill-on-bad-exit); SIGUSR1 to this program goes to every task, as Slurm
sends it before the time is up. The exit code is the largest of the tasks'.
"""

import os
import signal
import subprocess
import sys
import time

options, command = [], sys.argv[1:]
while command and command[0].startswith("--"):
    options.append(command.pop(0))
num_tasks = int(os.environ["SLURM_NTASKS"])
step = {
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": str(num_tasks),
    "SLURM_STEP_NODELIST": os.environ["SLURM_JOB_NODELIST"],
    "SLURM_CPUS_PER_TASK": next(o.split("=")[1] for o in options if o.startswith("--cpus-per-task=")),
}
tasks = [
    subprocess.Popen(command, env={**os.environ, **step, "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)})
    for rank in range(num_tasks)
]
signal.signal(signal.SIGUSR1, lambda number, frame: [task.send_signal(number) for task in tasks])
while any(task.poll() is None for task in tasks):
    if "--kill-on-bad-exit=1" in options and any(task.poll() not in (None, 0, 75) for task in tasks):
        for task in tasks:
            task.kill()
    time.sleep(0.05)
sys.exit(max(task.returncode if task.returncode >= 0 else 128 - task.returncode for task in tasks))
