"""The scores of a set of samples: label accuracy, kernel distance, precision and recall, Frechet distance.

Kernel distance, precision and recall are to the training images, which there are most of; the Frechet distance is to
the held-out ones, beside that between their halves, and is left out where there are too few of either.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file

from scalelong.model.checkpoint_file import write_tensors
from scalelong.train.data.cache import cache_folder
from scalelong.train.data.order import Stream, generator
from scalelong.train.errors import warn
from scalelong.train.hosts.processes import Processes
from scalelong.train.scores.distances import frechet_distance, kernel_distance, least_for_frechet, precision_and_recall
from scalelong.train.scores.feature_spaces import FeatureSpace, as_vectors, features_of
from scalelong.train.scores.real_images import RealImages
from scalelong.train.write_whole import staged

NUM_NOISE = 200
"""Images of uniform noise: as far away as samples come that show nothing."""


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Of a set of images; what cannot be estimated is None."""

    num_images: int
    accuracy: float | None
    """The share that a classifier, trained on the training images, names as their labels; of one class alone None."""
    kernel_distance: float
    kernel_distance_error: float
    precision: float
    recall: float
    distance: float | None
    """Frechet distance to the held-out images; None where there are too few of them, or of these."""


class Classifier:
    """A support-vector machine over pixels, trained on the training images; None of one class alone."""

    def __init__(self, real: RealImages):
        from sklearn.svm import SVC

        several = len(set(real.train_labels)) > 1
        self._machine = SVC(C=10.0).fit(as_vectors(real.train), real.train_labels) if several else None

    def accuracy(self, images_NHWC: np.ndarray, labels: np.ndarray) -> float | None:
        """The share of images that are named as their labels (N,); None where there is one class alone."""
        if self._machine is None:
            return None
        return float((self._machine.predict(as_vectors(images_NHWC)) == labels).mean())


class Judge:
    """A classifier and a feature space, and where real images and noise lie in it.

    Processes that share the work must all make one, and call it, together; the scores are rank 0's.

    Raises:
        UserError: what any of the processes met, on all of them.
    """

    def __init__(self, real: RealImages, space: FeatureSpace, processes: Processes):
        self.real, self.space, self._processes = real, space, processes
        self._classifier = Classifier(real) if processes.is_main else None
        self._features = real_features(real, space, processes)

    def __call__(self, images_NHWC: np.ndarray, labels: np.ndarray | None) -> Scores | None:
        """The scores on rank 0, None on the others.

        Args:
            images_NHWC: uint8, the same on all processes.
            labels: what each was to show (N,); None without labels.
        """
        features = features_of(self.space, images_NHWC, self._processes)
        if self._classifier is None:
            return None
        accuracy = None if labels is None else self._classifier.accuracy(images_NHWC, labels)
        return self._score(features, accuracy)

    def of_held_out(self) -> Scores | None:
        """What real images come to that the reference has not: the most that can be expected of samples."""
        if self._classifier is None:
            return None
        accuracy = self._classifier.accuracy(self.real.held_out, self.real.held_out_labels)
        return self._score(self._features["held_out"], accuracy, distance=self.distance_of_halves())

    def of_noise(self) -> Scores | None:
        return None if self._classifier is None else self._score(self._features["noise"], accuracy=None)

    def distance_of_halves(self) -> float | None:
        """Frechet distance between two halves of the held-out images: smaller ones cannot be told apart."""
        held_out = self._features["held_out"]
        if len(held_out) < least_for_frechet(self.space.num_features):
            return None
        shuffled = held_out[generator(0, Stream.ORDER, 1).permutation(len(held_out))]
        half = len(held_out) // 2
        return frechet_distance(shuffled[:half], shuffled[half:])

    def why_no_distance(self, num_images: int) -> str | None:
        """Why so many images are given no Frechet distance, for people; None if they are."""
        least, there_are = least_for_frechet(self.space.num_features), min(num_images, len(self.real.held_out))
        if there_are >= least:
            return None
        return f"no Frechet distance: {there_are:,} images are fewer than the {least:,} that it needs in this space"

    def _score(self, features: np.ndarray, accuracy: float | None, **distance: float | None) -> Scores:
        estimate = kernel_distance(features, self._features["train"])
        precision, recall = precision_and_recall(features, self._features["train"])
        if not distance:
            refused = self.why_no_distance(len(features)) is not None
            distance = {"distance": None if refused else frechet_distance(features, self._features["held_out"])}
        return Scores(
            num_images=len(features),
            accuracy=accuracy,
            kernel_distance=estimate.value,
            kernel_distance_error=estimate.error,
            precision=precision,
            recall=recall,
            **distance,
        )


def real_features(real: RealImages, space: FeatureSpace, processes: Processes) -> dict[str, np.ndarray]:
    """Features of "train", "held_out" and "noise", kept in the cache folder by pixels, space and version.

    Those of a space that the images themselves make take no time, and are not kept. Every process must call it; what
    is kept is read by rank 0 alone, and the others get nothing.
    """
    noise = np.random.default_rng(0).integers(0, 256, (NUM_NOISE, *real.train.shape[1:]), dtype=np.uint8)
    images = {"train": real.train, "held_out": real.held_out, "noise": noise}
    path = None if space.version is None else _cached_path(real, space)
    kept = _read_features(path, space, images) if processes.is_main else None
    if processes.from_main(kept is not None):
        return kept or {}
    features = {name: features_of(space, those, processes) for name, those in images.items()}
    if path is not None and processes.is_main:
        _keep_features(path, features)
    return features


def _cached_path(real: RealImages, space: FeatureSpace) -> Path:
    what: dict[str, Any] = {"images": real.fingerprint(), "noise": NUM_NOISE, "version": space.version}
    key = hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:24]
    return cache_folder() / "features" / f"{space.name}-{key}.safetensors"


def _read_features(
    path: Path | None, space: FeatureSpace, images: dict[str, np.ndarray]
) -> dict[str, np.ndarray] | None:
    """None if they are not there, or not what they should be: they are made again."""
    if path is None or not path.is_file():
        return None
    try:
        features = load_file(path)
    except (OSError, SafetensorError):
        return None
    expected = {name: (len(those), space.num_features) for name, those in images.items()}
    return features if {name: x.shape for name, x in features.items()} == expected else None


def _keep_features(path: Path, features: dict[str, np.ndarray]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with staged(path) as staging:
            write_tensors({name: torch.from_numpy(x) for name, x in features.items()}, staging)
    except (OSError, SafetensorError) as error:
        warn(f"the features of the real images cannot be kept in {path.parent}: {error}; set SCALELONG_CACHE")
