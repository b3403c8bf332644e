"""The experiments whose tables are committed: ``python -m scalelong.bench.lab.experiments NAME [FLAG ...]`` runs one.

Each is a few grids that share a folder, ``bench/results/lab/NAME``; killed at any moment, the same command goes on.
"""

import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

from scalelong.bench.lab.command import main as run_lab
from scalelong.train.errors import UserError, run_command

RESULTS = Path(__file__).resolve().parents[1] / "results" / "lab"
DIGITS = "--model.width 64"
MAGNITUDE = (
    "--seeds 3 --images 51200 --optimizer.weight-decay 0 --optimizer.schedule cosine "
    "--evaluation.features pixels --images-per-evaluation 51200"
)
"""Both kinds of network by one schedule, and samples scored at the end."""


SPEED = (
    "--seeds 5 --optimizer.ema-rampup 0.05 --evaluation.features pixels --evaluation.num-images 256 --sample.steps 12 "
    "--images-per-evaluation 1600"
)
"""Scored eight times, by averages that have forgotten the start."""


SPRINT = (
    "--depths 12 --learning-rates 2^-8.5,2^-7.5 --seeds 3 --images 22400 --model.patch-size 1 --model.dense-blocks 1 "
    f"{DIGITS}"
)
"""Of 64 patches, of which a sparse middle sees 16; of the 16 patches of the recipe it would see no more than 4."""


@dataclass(frozen=True)
class Experiment:
    """One committed table."""

    title: str
    preset: str
    grids: tuple[str, ...]
    """The arguments of ``scalelong lab`` behind the preset, one for each grid."""
    estimate: str
    """How long it takes on two cores, as measured where they were quiet, or by 45 s for 200 steps of depth 24."""


EXPERIMENTS = {
    "initialisation": Experiment(
        "Untrained U-ViTs: norms and gain against depth",
        "digits-uvit",
        (f"--images 0 --starts published,preserving --depths 4,12,24,48,96 {DIGITS}",),
        "10 minutes",
    ),
    "digits-uvit": Experiment(
        "U-ViT on digits, five skip scales around the edge of stability",
        "digits-uvit",
        (
            f"--depths 48 --learning-rates 2^-9.5..2^-7.5:0.5 {DIGITS}",
            f"--depths 24 --learning-rates 2^-9..2^-7:0.5 {DIGITS}",
            f"--depths 12 --learning-rates 2^-8.5..2^-6.5:0.5 {DIGITS}",
        ),
        "60 to 100 minutes: 75 runs of each depth, of 54, 27 and 14 s, two at a time",
    ),
    "digits-uvit-speed": Experiment(
        "U-ViT on digits, images to the unscaled network's best",
        "digits-uvit",
        (f"--depths 48 --skip-scale none,cs:0.5,ls --learning-rates 2^-8.5,2^-8 {SPEED} {DIGITS}",),
        "30 to 60 minutes: 30 runs of 75 s, two at a time",
    ),
    "digits-unet": Experiment(
        "UNet on digits, the factor before the norm and after it",
        "digits-unet",
        (
            "--depths 2 --skip-scale none --positions before-norm --learning-rates 2^-9..2^-6:0.5",
            "--depths 2 --skip-scale cs:0.7,cs:0.5,ls --positions before-norm,after-norm "
            "--learning-rates 2^-9..2^-6:0.5",
        ),
        "60 minutes: 147 runs of 50 s, two at a time",
    ),
    "photos-uvit": Experiment(
        "U-ViT on photographs of 32 x 32",
        "photos32-uvit",
        ("--depths 12 --skip-scale none,inv-sqrt2,cs:0.7,ls --learning-rates 2^-10..2^-8:0.5 --seeds 3",),
        "not timed: 60 runs, two at a time",
    ),
    "photos-uvit-speed": Experiment(
        "U-ViT on photographs, images to the unscaled network's best loss",
        "photos32-uvit",
        ("--depths 12 --skip-scale none,cs:0.7,ls --learning-rates 2^-9.5,2^-9 --seeds 5 --images 25600",),
        "not timed: 30 runs, two at a time",
    ),
    "magnitude-uvit": Experiment(
        "U-ViT on digits, magnitude-preserving layers against norms",
        "digits-uvit",
        (
            f"--depths 12 --skip-scale none,cs:0.7 --magnitude plain --learning-rates 2^-9.5..2^-7.5:0.5 {MAGNITUDE}",
            f"--depths 12 --skip-scale none,geometric:0.7 --magnitude mp --learning-rates 2^-8..2^-5:0.5 {MAGNITUDE}",
        ),
        "70 minutes: 72 runs of 110 s, two at a time",
    ),
    "magnitude-dit": Experiment(
        "DiT on digits, magnitude-preserving layers against norms",
        "digits-dit",
        (
            f"--depths 6 --skip-scale none --magnitude plain --learning-rates 2^-10..2^-7:0.5 {MAGNITUDE}",
            f"--depths 6 --skip-scale none --magnitude mp --learning-rates 2^-8..2^-5:0.5 {MAGNITUDE}",
        ),
        "40 minutes: 42 runs of 110 s, two at a time",
    ),
    "self-condition-block": Experiment(
        "U-ViT on digits, the block whose features condition the later ones, by short runs",
        "digits-uvit",
        (
            "--depths 12 --skip-scale none,cs:0.7 --axis model.self-condition-block=None,3,6,9,11 "
            f"--learning-rates 2^-8.5 --seeds 3 --images 25600 {DIGITS}",
        ),
        "not timed: 30 runs of twice the steps of digits-uvit's depth 12, some 30 s each, two at a time",
    ),
    "digits-sprint": Experiment(
        "U-ViT on digits, operations to the dense unscaled network's best loss with a sparse middle",
        "digits-uvit",
        (
            # All tokens in the last 100 steps: the whole run takes 0.54 of a dense one's operations. Skip 1 is the
            # fusion, which cs would leave as it is.
            f"--skip-scale none,inv-sqrt2,ls --sparse 0.75:16000 {SPRINT}",
            f"--skip-scale none --sparse dense {SPRINT}",
        ),
        "23 minutes: 24 runs of 100 and 160 s, two at a time, by 0.38 s for a dense step and 0.15 s for a sparse one",
    ),
    "clipping": Experiment(
        "U-ViT on digits, clipping of gradients against scaled skips",
        "digits-uvit",
        (
            "--depths 24 --skip-scale none,ls --clipping none,norm:1,z-score:2.5,per-tensor:1.05 "
            f"--learning-rates 2^-8.5..2^-7:0.5 {DIGITS}",
        ),
        "36 minutes: 96 runs of 45 s, two at a time",
    ),
}


def commands_of(name: str) -> list[list[str]]:
    """The arguments of ``scalelong lab``, grid by grid, the report of all of them last."""
    experiment = EXPERIMENTS[name]
    out = ["--out", str(RESULTS / name)]
    grids = [[experiment.preset, *shlex.split(grid), *out] for grid in experiment.grids]
    return grids if len(grids) == 1 else [*grids, [experiment.preset, "--report-only", *out]]


def main() -> None:
    """Runs the experiment that is named; flags behind the name go to each of its grids."""
    name, *flags = sys.argv[1:] or [""]
    if name not in EXPERIMENTS:
        lines = (f"  {key:<18} {e.title} ({e.estimate})" for key, e in EXPERIMENTS.items())
        raise UserError("which experiment? There are\n" + "\n".join(lines))
    for arguments in commands_of(name):
        run_lab([*arguments, *flags])


if __name__ == "__main__":
    run_command(main)
