"""Fills the compilers' caches before anything is timed, in processes of their own, so that timing them finds all there.

    python -m scalelong.bench.warm_cache triton             every kernel of bench_group_norm.py, ahead of time
    python -m scalelong.bench.warm_cache inductor FOLDER    what torch.compile makes of eight norms and three networks

The second notes in FOLDER what is done, a file each: is_warm of compare.py asks for them where SCALELONG_WARM names it.
"""

import argparse
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

import torch

from scalelong.bench import bench_dit_step, bench_group_norm, bench_unet_step, bench_uvit_step
from scalelong.bench.ahead_of_time import compiling_processes, launches_of
from scalelong.bench.compare import DEVICE, make_case
from scalelong.bench.shapes import GROUPS, SkipConcat
from scalelong.bench.timing import IS_DRY_RUN
from scalelong.bench.training_step import Trainer, noisy_batch

NUM_JOBS = 1 if IS_DRY_RUN else 6
NUM_IN_DRY_RUN = 2


def warm_triton() -> int:
    """How many launches were compiled; the same one twice is found in the cache."""
    arch = 10 * torch.cuda.get_device_capability()[0] if DEVICE.type == "cuda" else 90
    concats = list(dict.fromkeys(planned.concat for planned in bench_group_norm.plan()))
    cases = list(product(concats, bench_group_norm.LAYOUTS, ("forward", "backward"), (arch,)))
    with compiling_processes() as pool:
        return sum(pool.imap_unordered(compile_launches, cases[:NUM_IN_DRY_RUN] if IS_DRY_RUN else cases))


def compile_launches(case: tuple[SkipConcat, str, str, int]) -> int:
    concat, layout, direction, arch = case
    shape = (concat.gpu_batch, concat.num_hidden, concat.num_skip, GROUPS, concat.size, concat.size)
    dtype = torch.bfloat16  # as make_inputs has it, of parameters too
    launches = launches_of(
        direction, shape, channels_last=layout == "channels_last", dtype=dtype, parameter_dtype=dtype
    )
    for launch in launches:
        launch.compile(arch)
    return len(launches)


def warm_inductor(folder: Path) -> None:
    """Each case in a process of its own; networks, which take longest, first."""
    networks = [str(next(case for case in module.benchmarks() if case.compiles)) for module in MODULES]
    norms = [str(planned) for planned in bench_group_norm.plan() if planned.kind == "compiled"]
    names = [*networks, *(norms[:1] if IS_DRY_RUN else norms)]
    # The cases share the cores, and what they compile must be found by a process that waits for none of them.
    environment = {**os.environ, "TORCHINDUCTOR_COMPILE_THREADS": "4"}
    environment.pop("SCALELONG_WARM", None)
    command = [sys.executable, "-m", "scalelong.bench.warm_cache", "inductor", str(folder), "--case"]
    with ThreadPoolExecutor(NUM_JOBS) as pool:
        statuses = pool.map(lambda name: subprocess.run([*command, name], env=environment).returncode, names)
        print(*(f"{name}: {'done' if status == 0 else 'failed'}" for name, status in zip(names, statuses, strict=True)))


MODULES = (bench_uvit_step, bench_unet_step, bench_dit_step)


def warm_case(name: str, folder: Path) -> None:
    for planned in bench_group_norm.plan():
        if str(planned) == name:
            inputs = bench_group_norm.make_inputs(planned.concat, planned.dtype, planned.layout)
            ref, ours = bench_group_norm.ref, bench_group_norm.ours
            make_case("skip_group_norm", name, ref=ref, ours=ours, inputs=inputs, compilers=planned.compilers)
            (folder / name).touch()
            return
    module = next(module for module in MODULES if name in map(str, module.benchmarks()))
    case = next(case for case in module.benchmarks() if str(case) == name)
    model, batch, dtype = module.model_of(case)
    trainer = Trainer(model, noisy_batch(model.config, batch), dtype)
    # The plain one first: its kernels, found in Triton's cache, serve those who time it.
    for provider, network in sorted(module.networks(model, case).items(), key=lambda item: "compile" in item[0]):
        trainer.find_gradients(network)
        if "compile" in provider:
            (folder / f"{name}-{provider}").touch()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="cache", required=True)
    commands.add_parser("triton")
    inductor = commands.add_parser("inductor")
    inductor.add_argument("folder", type=Path)
    inductor.add_argument("--case", help="one of them, in this process")
    arguments = parser.parse_args()
    if arguments.cache == "triton":
        print(f"{warm_triton()} launches compiled")
    elif arguments.case is not None:
        warm_case(arguments.case, arguments.folder)
    else:
        arguments.folder.mkdir(parents=True, exist_ok=True)
        warm_inductor(arguments.folder)


if __name__ == "__main__":
    main()
