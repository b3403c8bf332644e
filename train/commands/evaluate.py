"""``scalelong evaluate RUN``: are the samples what they were asked to be, and like the real images?

Two measures that need no downloaded network, meant for small images:
- label accuracy: a support-vector classifier, trained on real images, names the samples; its accuracy on held-out real
  images stands beside it, the most that the samples can be expected to reach.
- Frechet distance (Heusel et al., arXiv:1706.08500, eq. 6) in a fixed feature space, the first principal components of
  the training images' pixels, between samples and held-out images; beside it that between two halves of real images.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from scalelong.train.command_line import parse
from scalelong.train.config import TrainConfig
from scalelong.train.data.images import resize_and_crop
from scalelong.train.data.order import Stream, generator
from scalelong.train.data.source import has_test_split, open_source
from scalelong.train.data.stand_ins import SoundImages
from scalelong.train.errors import UserError
from scalelong.train.objective import OBJECTIVES
from scalelong.train.sampling.generate import generate, labels_in_turn
from scalelong.train.sampling.load import SamplingArguments, load_sampling

NUM_FEATURES = 32
HELD_OUT_SHARE = 0.2
# A covariance needs two images, and one distance is between two halves of those held out.
LEAST_HELD_OUT = 4
LEAST_IMAGES = round(LEAST_HELD_OUT / HELD_OUT_SHARE)


@dataclass(frozen=True, kw_only=True)
class EvaluateArguments(SamplingArguments):
    """Score a run's samples, with guidance and without, against real images."""

    num_images: int = 1000
    """Samples, spread evenly over the classes."""
    max_real_images: int = 10_000
    """At most so many real images are read."""
    out: Path | None = None
    """Where to write the scores as JSON; RUN/evaluation.json if not given."""


@dataclass(frozen=True)
class RealImages:
    """Real images as pixel vectors in [0, 1], and their labels."""

    train: np.ndarray
    train_labels: np.ndarray
    held_out: np.ndarray
    held_out_labels: np.ndarray
    held_out_from_training: bool
    """The data has no images of its own for testing: the held-out ones were trained on by the diffusion model."""


def read_real_images(config: TrainConfig, at_most: int) -> RealImages:
    """The run's training images, and held-out ones: those of the data's test split, or every fifth of another source.

    Raises:
        UserError: fewer images than the distances need.
    """
    train, train_labels = _read_pixels(config, "train", at_most)
    if has_test_split(config.data.path):
        held_out, labels = _read_pixels(config, "test", at_most)
        if len(held_out) < LEAST_HELD_OUT:
            raise UserError(
                f"{config.data.path} has {len(held_out)} images for testing, too few: the distances need at least "
                f"{LEAST_HELD_OUT}"
            )
        return RealImages(train, train_labels, held_out, labels, held_out_from_training=False)
    shuffled = generator(0, Stream.ORDER, 0).permutation(len(train))
    cut = int(len(train) * HELD_OUT_SHARE)
    if cut < LEAST_HELD_OUT:
        raise UserError(
            f"{config.data.path} has {len(train)} images, too few: the distances need at least {LEAST_IMAGES} "
            f"(a fifth is held out)"
        )
    out, kept = shuffled[:cut], shuffled[cut:]
    return RealImages(train[kept], train_labels[kept], train[out], train_labels[out], held_out_from_training=True)


def _read_pixels(config: TrainConfig, split: str, at_most: int) -> tuple[np.ndarray, np.ndarray]:
    """(N, pixels) in [0, 1] and (N,) labels of images spread evenly over the data."""
    size = config.model.img_size
    source = open_source(config.data.path, config.num_data_classes, split=split, img_size=size)
    if source.holds == "latents":
        raise UserError(f"{config.data.path} holds latents; both scores are of images alone, not of latents or text")
    indices = np.linspace(0, len(source) - 1, min(at_most, len(source))).astype(int)
    images = SoundImages(source, config.model.in_channels)
    pixels = [np.asarray(resize_and_crop(images.image(i), size)).ravel() for i in indices]
    return np.stack(pixels) / 255, np.array([images.label(i) for i in indices])


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """|μ_a - μ_b|² + tr(Σ_a + Σ_b - 2 (Σ_a Σ_b)^½) of two sets of features (N, D) (arXiv:1706.08500, eq. 6)."""
    mean_term = np.square(a.mean(0) - b.mean(0)).sum()
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    # The eigenvalues of Σ_a Σ_b are real and not negative but for rounding; the root's trace is the sum of theirs.
    eigenvalues = np.linalg.eigvals(cov_a @ cov_b).real.clip(min=0)
    return float(mean_term + np.trace(cov_a) + np.trace(cov_b) - 2 * np.sqrt(eigenvalues).sum())


class Judge:
    """A classifier and a feature space, both from real images alone."""

    def __init__(self, real: RealImages):
        from sklearn.decomposition import PCA
        from sklearn.svm import SVC

        self._features = PCA(min(NUM_FEATURES, *real.train.shape), svd_solver="full").fit(real.train)
        self._classifier = SVC(C=10.0).fit(real.train, real.train_labels) if len(set(real.train_labels)) > 1 else None

    def accuracy(self, images: np.ndarray, labels: np.ndarray) -> float | None:
        """The share of images (N, pixels) that are named as their label; None where there is one class alone."""
        return None if self._classifier is None else float((self._classifier.predict(images) == labels).mean())

    def distance(self, a: np.ndarray, b: np.ndarray) -> float:
        return frechet_distance(self._features.transform(a), self._features.transform(b))


def evaluate(arguments: EvaluateArguments) -> dict:
    """The scores of a run.

    Raises:
        UserError: no such run, checkpoint or data.
    """
    sampling = load_sampling(arguments)
    config, settings = sampling.config, sampling.settings
    real = read_real_images(config, arguments.max_real_images)
    judge = Judge(real)
    classes, numbers = range(config.num_data_classes), range(arguments.num_images)
    labels = np.arange(arguments.num_images) % len(classes) if classes else None
    shown = f"{settings['sampler']}, {settings['steps']} steps, {arguments.weights} weights, seed {arguments.seed}"
    scores = {
        "settings": f"{arguments.num_images} samples, {shown}",
        "held_out_from_training": real.held_out_from_training,
        "real_accuracy": judge.accuracy(real.held_out, real.held_out_labels),
        "real_distance": _distance_of_halves(judge, real.held_out),
        "samples": [],
    }
    for strength in sorted({0.0, settings["guidance"]}, reverse=True):
        objective, how = OBJECTIVES[config.objective], {**settings, "guidance": strength}
        images = np.stack(list(generate(sampling.model, objective, labels_in_turn(classes), numbers, **how)))
        pixels = images.reshape(len(images), -1) / 255
        accuracy = judge.accuracy(pixels, labels) if labels is not None else None
        distance = judge.distance(pixels, real.held_out)
        scores["samples"].append({"guidance": strength, "accuracy": accuracy, "distance": distance})
    return scores


def _distance_of_halves(judge: Judge, images: np.ndarray) -> float:
    shuffled = images[generator(0, Stream.ORDER, 1).permutation(len(images))]
    half = len(images) // 2
    return judge.distance(shuffled[:half], shuffled[half:])


def main(argv: list[str] | None = None) -> None:
    """The command ``scalelong evaluate``."""
    arguments = parse(EvaluateArguments, argv, prog="scalelong evaluate")
    if arguments.num_images < 2 or arguments.max_real_images < LEAST_IMAGES:
        raise UserError(f"--num-images must be at least 2 and --max-real-images at least {LEAST_IMAGES}")
    scores = evaluate(arguments)
    print(scores["settings"])
    print(f"{'':<28}{'label accuracy':>15}{'Frechet distance':>18}")
    for score in scores["samples"]:
        name = f"samples, guidance {score['guidance']:g}" if score["guidance"] else "samples, no guidance"
        print(_row(name, score["accuracy"], score["distance"]))
    print(_row("real images, held out", scores["real_accuracy"], scores["real_distance"]))
    print("The last distance is between two halves of the held-out images.")
    if scores["held_out_from_training"]:
        print("The held-out images were among those that the model was trained on.")
    out = arguments.out or arguments.run / "evaluation.json"
    try:
        out.write_text(json.dumps(scores, indent=2) + "\n")
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror}") from error
    print(f"-> {out}")


def _row(name: str, accuracy: float | None, distance: float) -> str:
    shown = "-" if accuracy is None else f"{accuracy:.1%}"
    return f"{name:<28}{shown:>15}{distance:>18.3f}"
