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
NARROW = "--model.width 64"
METHODS = (
    "--seeds 3 --probe --optimizer.weight-decay 0 --optimizer.schedule cosine --optimizer.ema-rampup 0.05 "
    "--evaluation.features pixels --evaluation.num-images 500 --sample.steps 12 --sample.guidance 0"
)
"""Methods beside each other, by one schedule: samples are scored and blocks probed at the end."""
METHODS_ON_DIGITS = f"--images 19200 --images-per-validation 1920 --images-per-evaluation 19200 {METHODS} {NARROW}"
# All photographs' principal components would take as long as training, and 1,024 images of validation half as long.
FEWER_PHOTOS = "--evaluation.max-real-images 2000 --num-validation-images 256"
METHODS_ON_PHOTOS = (
    f"--images 9600 --images-per-validation 960 --images-per-evaluation 9600 {METHODS} {NARROW} {FEWER_PHOTOS}"
)
SKIP_SCALES = "none,inv-sqrt2,cs:0.7,geometric:0.7,ls,ls-separate,profiled"
LINEARS = "--variant 'sigma-reparam=--model.linear sigma-reparam' --variant 'decoupled=--model.linear decoupled'"
FEATURES = (
    "--variant 'self-conditioning=--model.self-condition-block {middle}' --variant 'contrast=--objective.contrast 0.1'"
)
MUON = "--variant 'muon=--optimizer.kind muon'"
MUP = "--variant 'mup=--parametrization mup --base-width 32'"
"""Rates of hidden weights are half as high as those that are given."""
MAGNITUDE_PRESERVING = "--variant 'magnitude-preserving=--model.magnitude-preserving True'"
MODULATIONS = " ".join(f"--variant '{name}=--model.modulation {name}'" for name in ("scale-rot", "scale", "rot"))
QK_NORM = "--variant 'qk-norm=--model.qk-norm True'"
SPEED = (
    "--seeds 5 --optimizer.ema-rampup 0.05 --evaluation.features pixels --evaluation.num-images 256 --sample.steps 12 "
    "--images-per-evaluation 1600"
)
"""Scored eight times, by averages that have forgotten the start."""
SPRINT = (
    "--depths 12 --learning-rates 2^-8.5,2^-7.5 --seeds 3 --images 22400 --model.patch-size 1 --model.dense-blocks 1 "
    f"{NARROW}"
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
        (f"--images 0 --starts published,preserving --depths 4,12,24,48,96 {NARROW}",),
        "10 minutes",
    ),
    "digits-uvit": Experiment(
        "U-ViT on digits, five skip scales around the edge of stability",
        "digits-uvit",
        (
            f"--depths 48 --learning-rates 2^-9.5..2^-7.5:0.5 {NARROW}",
            f"--depths 24 --learning-rates 2^-9..2^-7:0.5 {NARROW}",
            f"--depths 12 --learning-rates 2^-8.5..2^-6.5:0.5 {NARROW}",
        ),
        "60 to 100 minutes: 75 runs of each depth, of 54, 27 and 14 s, two at a time",
    ),
    "digits-uvit-speed": Experiment(
        "U-ViT on digits, images to the unscaled network's best",
        "digits-uvit",
        (f"--depths 48 --skip-scale none,cs:0.5,ls --learning-rates 2^-8.5,2^-8 {SPEED} {NARROW}",),
        "60 minutes: 30 runs of 110 s and eight scorings each, two at a time",
    ),
    "digits-unet": Experiment(
        "UNet on digits, the factor before the norm and after it",
        "digits-unet",
        (
            "--depths 2 --skip-scale none --positions before-norm --learning-rates 2^-10..2^-5",
            "--depths 2 --skip-scale cs:0.7,ls --positions before-norm,after-norm --learning-rates 2^-10..2^-5",
        ),
        "30 minutes: 90 runs of 35 to 45 s, two at a time",
    ),
    "digits-unet-speed": Experiment(
        "UNet on digits, images to the unscaled network's best",
        "digits-unet",
        (f"--depths 2 --skip-scale none,cs:0.7,ls --learning-rates 2^-9,2^-8 {SPEED}",),
        "21 minutes: 30 runs of 36 s and eight scorings each, two at a time",
    ),
    "photos-uvit": Experiment(
        "U-ViT on photographs of 32 x 32",
        "photos32-uvit",
        (
            "--depths 12 --skip-scale none,inv-sqrt2,cs:0.7,ls --learning-rates 2^-11..2^-6 --seeds 3 --images 6400 "
            f"{NARROW}",
        ),
        "70 minutes: 72 runs of 115 s, 70 of them validation, two at a time",
    ),
    "photos-uvit-speed": Experiment(
        "U-ViT on photographs, images to the unscaled network's best",
        "photos32-uvit",
        (
            # The rate at which photos-uvit has all of them at their best, or within the spread of its seeds of it.
            f"--depths 12 --skip-scale none,inv-sqrt2,cs:0.7,ls --learning-rates 2^-10 --images 9600 {SPEED} {NARROW} "
            f"{FEWER_PHOTOS}",
        ),
        "27 minutes: 20 runs of 75 s, validations and eight scorings each, two at a time",
    ),
    "self-condition-block": Experiment(
        "U-ViT on digits, the block whose features condition the later ones, by short runs",
        "digits-uvit",
        (
            "--depths 12 --skip-scale none,cs:0.7 --axis model.self-condition-block=None,3,6,9,11 "
            f"--learning-rates 2^-8.5 --seeds 3 --images 25600 {NARROW}",
        ),
        "15 minutes: 30 runs of 30 s, two at a time",
    ),
    "methods-digits": Experiment(
        "U-ViT on digits, the skip family and its neighbours beside each other",
        "digits-uvit",
        (
            # How far rates may go with norms and without.
            f"--depths 12 --skip-scale none --learning-rates 2^-9.5..2^-6.5:0.5 {METHODS_ON_DIGITS}",
            f"--depths 12 --skip-scale geometric:0.7 {MAGNITUDE_PRESERVING} --learning-rates 2^-6.5..2^-2.5 "
            f"{METHODS_ON_DIGITS}",
            f"--depths 12 --skip-scale {SKIP_SCALES} --learning-rates 2^-8.5..2^-7.5:0.5 {METHODS_ON_DIGITS}",
            f"--depths 12 --skip-scale none {LINEARS} {FEATURES.format(middle=6)} "
            f"--learning-rates 2^-8.5..2^-7.5:0.5 {METHODS_ON_DIGITS}",
            f"--depths 12 --skip-scale none {MUON} {MUP} --learning-rates 2^-8..2^-7:0.5 {METHODS_ON_DIGITS}",
        ),
        "45 minutes, reckoned from 14 s for 200 steps of depth 12: 144 runs of 300 steps, two at a time",
    ),
    "methods-photos": Experiment(
        "U-ViT on photographs, the skip family and its neighbours beside each other",
        "photos32-uvit",
        (
            # Below the rates of digits, as photos-uvit found; Muon and magnitude-preserving layers bear more.
            f"--depths 8 --skip-scale geometric:0.7 {MAGNITUDE_PRESERVING} --learning-rates 2^-8..2^-2 "
            f"{METHODS_ON_PHOTOS}",
            f"--depths 8 --skip-scale none {MUON} --learning-rates 2^-7.5..2^-5.5 {METHODS_ON_PHOTOS}",
            f"--depths 8 --skip-scale none {MUP} --learning-rates 2^-10,2^-9 {METHODS_ON_PHOTOS}",
            f"--depths 8 --skip-scale {SKIP_SCALES} --learning-rates 2^-10,2^-9 {METHODS_ON_PHOTOS}",
            f"--depths 8 --skip-scale none {LINEARS} {FEATURES.format(middle=4)} --learning-rates 2^-10,2^-9 "
            f"{METHODS_ON_PHOTOS}",
        ),
        "50 minutes: 102 runs of 56 s, two at a time",
    ),
    "methods-dit": Experiment(
        "DiT on digits, modulations, QK-norm and magnitude-preserving layers against norms",
        "digits-dit",
        (
            f"--depths 6 --skip-scale none --learning-rates 2^-9..2^-3 {METHODS_ON_DIGITS}",
            f"--depths 6 --skip-scale none {MODULATIONS} {QK_NORM} --learning-rates 2^-9..2^-4 {METHODS_ON_DIGITS}",
            f"--depths 6 --skip-scale none {MAGNITUDE_PRESERVING} --learning-rates 2^-7.5..2^-1.5 {METHODS_ON_DIGITS}",
        ),
        "20 minutes: 114 runs of 300 steps of depth 6, two at a time",
    ),
    "digits-muon": Experiment(
        "U-ViT on digits, Muon against AdamW: images to AdamW's best loss",
        "digits-uvit",
        (
            f"--depths 12 --skip-scale none --learning-rates 2^-8.5..2^-7.5:0.5 --seeds 5 --images 25600 {NARROW}",
            f"--depths 12 --skip-scale none {MUON} --learning-rates 2^-8.5..2^-7:0.5 --seeds 5 --images 25600 {NARROW}",
        ),
        "15 minutes, reckoned: 35 runs of 400 steps of depth 12, two at a time",
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
        "22 minutes: 24 runs of 95 and 157 s, two at a time",
    ),
    "clipping": Experiment(
        "U-ViT on digits, clipping of gradients against scaled skips",
        "digits-uvit",
        (
            "--depths 24 --skip-scale none --clipping none,norm:1,z-score:2.5 "
            f"--learning-rates 2^-8.5..2^-7:0.5 {NARROW}",
            f"--depths 24 --skip-scale ls --clipping none --learning-rates 2^-8.5..2^-7:0.5 {NARROW}",
        ),
        "18 minutes: 48 runs of 45 s, two at a time",
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
        width = max(map(len, EXPERIMENTS))
        lines = (f"  {key:<{width}}  {e.title} ({e.estimate})" for key, e in EXPERIMENTS.items())
        raise UserError("which experiment? There are\n" + "\n".join(lines))
    for arguments in commands_of(name):
        run_lab([*arguments, *flags])


if __name__ == "__main__":
    run_command(main)
