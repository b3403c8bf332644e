"""``scalelong evaluate RUN``, or an export: are the samples what they were asked to be, and like the real images?

- Kernel distance to the training images, in a named feature space, with its standard error: the headline. That of
  held-out images and of noise stands beside it.
- Precision and recall to the training images: how many samples look real, and how much of the real is reached.
- Frechet distance to the held-out images, and between halves of these, where there are enough for it.
- Label accuracy: a classifier, trained on real images, names the samples; beside it its accuracy on held-out images.

Under torchrun, the deepspeed launcher or srun the processes draw and compare the samples together.
"""

import json
import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from scalelong.train.command_line import without_local_rank
from scalelong.train.commands.load import SamplingArguments, load_sampling
from scalelong.train.commands.sweep import parse_axes, run_sweep
from scalelong.train.config import LEAST_REAL_IMAGES, LEAST_SAMPLES, EvaluationConfig, FeaturesName
from scalelong.train.errors import UserError, speak_as
from scalelong.train.evaluation import make_judge, score_samples
from scalelong.train.hosts.environment import find_place
from scalelong.train.hosts.processes import Processes, working_together
from scalelong.train.parsing import parse
from scalelong.train.scores import table
from scalelong.train.scores.feature_spaces import check_feature_space
from scalelong.train.scores.judge import Scores
from scalelong.train.write_whole import write_whole


@dataclass(frozen=True, kw_only=True)
class EvaluateArguments(SamplingArguments):
    """Score samples of a run or an export, with guidance and without, against real images; or a sweep over settings."""

    features: FeaturesName = "efficientnet"
    """In which space: EfficientNet-Lite0's features, Inception's, or principal components of pixels."""
    inception_file: Path | None = None
    """Weights of torch-fidelity's Inception, a file on this machine."""
    num_images: int = 1000
    """Samples, spread evenly over the classes."""
    max_real_images: int = 10_000
    """At most so many real images are read, of those trained on and of those held out."""
    sweep: tuple[str, ...] = ()
    """Score every combination, as ema=0.05,0.1 guidance=0,0.5,1: post-hoc widths of the averaged weights, guidance,
    steps, checkpoint (by images_seen). Writes a table as CSV and Markdown, and a plot."""
    out: Path | None = None
    """Where to write the scores as JSON; RUN/evaluation.json if not given. Of a sweep, RUN/sweep.csv with .md and .png
    beside it."""

    @property
    def evaluation(self) -> EvaluationConfig:
        return EvaluationConfig(
            features=self.features,
            inception_file=self.inception_file,
            num_images=self.num_images,
            max_real_images=self.max_real_images,
        )


def evaluate(arguments: EvaluateArguments, processes: Processes) -> dict[str, Any]:
    """The scores of a run on rank 0; nothing on other ranks, which must all call it.

    Raises:
        UserError: no such run, checkpoint, data or feature space, or too few images.
    """
    processes.agree(lambda: check_feature_space(arguments.evaluation))
    sampling = processes.agree(lambda: load_sampling(arguments))
    settings, count = sampling.settings, arguments.num_images
    judge = make_judge(sampling.config, arguments.evaluation, processes)
    strengths = sorted({0.0, settings["guidance"]}, reverse=True)
    samples = []
    for strength in strengths:
        how = {**settings, "guidance": strength}
        samples.append(score_samples(judge, sampling.model, sampling.config, how, count, processes))
    held_out, noise = judge.of_held_out(), judge.of_noise()
    if held_out is None or noise is None:
        return {}
    shown = f"{settings['sampler']}, {settings['steps']} steps, {arguments.weights} weights, seed {arguments.seed}"
    return {
        "settings": f"{count} samples, {shown}",
        "images_seen": sampling.images_seen,
        "weights": arguments.weights,
        "features": judge.space.name,
        "features_version": judge.space.version,
        "num_train_images": len(judge.real.train),
        "held_out_from_training": judge.real.held_out_from_training,
        "real_accuracy": held_out.accuracy,
        "real_distance": held_out.distance,
        "samples": [{"guidance": s, **asdict(scores)} for s, scores in zip(strengths, samples, strict=True)],
        "held_out": asdict(held_out),
        "noise": asdict(noise),
        "why_no_distance": judge.why_no_distance(count),
    }


def main(argv: list[str] | None = None) -> None:
    """The command ``scalelong evaluate``."""
    speak_as(find_place(os.environ).rank)
    argv = without_local_rank(sys.argv[1:] if argv is None else argv)
    arguments = parse(EvaluateArguments, argv, prog="scalelong evaluate")
    if arguments.num_images < LEAST_SAMPLES or arguments.max_real_images < LEAST_REAL_IMAGES:
        raise UserError(
            f"--num-images must be at least {LEAST_SAMPLES} and --max-real-images at least {LEAST_REAL_IMAGES}: a "
            f"distance needs so many"
        )
    axes = parse_axes(arguments.sweep)
    with working_together() as processes:
        if axes:
            run_sweep(arguments, arguments.evaluation, axes, arguments.out or arguments.run / "sweep.csv", processes)
        else:
            write_scores(arguments, evaluate(arguments, processes), processes)


def write_scores(arguments: EvaluateArguments, scores: dict[str, Any], processes: Processes) -> None:
    """Prints the scores and writes them as JSON, on rank 0."""
    if not processes.is_main:
        return
    print_scores(scores)
    out = arguments.out or arguments.run / "evaluation.json"
    try:
        write_whole(out, (json.dumps(scores, indent=2) + "\n").encode())
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror}") from error
    print(f"-> {out}")


def print_scores(scores: dict[str, Any]) -> None:
    """The scores as a table, and what has to be known to read it."""
    named = []
    for sample in scores["samples"]:
        strength, rest = sample["guidance"], {name: value for name, value in sample.items() if name != "guidance"}
        named.append((f"samples, guidance {strength:g}" if strength else "samples, no guidance", Scores(**rest)))
    named += [("real images, held out", Scores(**scores["held_out"])), ("noise", Scores(**scores["noise"]))]
    print(scores["settings"])
    print(table.table([{"": name, **table.cells(those)} for name, those in named]))
    about = table.notes(
        scores["features"],
        scores["num_train_images"],
        held_out_from_training=scores["held_out_from_training"],
        why_no_distance=scores["why_no_distance"],
    )
    print("\n".join(about))
