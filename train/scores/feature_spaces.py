"""The named feature spaces in which sets of images are compared.

efficientnet: EfficientNet-Lite0 of ImageNet. inception: the network of published Frechet distances. pixels: the first
principal components of the training images, which need no network and no package, and suit small images alone.
"""

import hashlib
from abc import ABC, abstractmethod
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from scalelong.train.config import EvaluationConfig
from scalelong.train.hosts.processes import Processes
from scalelong.train.scores import efficientnet, inception

NUM_COMPONENTS = 32
BATCH = 32
"""Images at a time, of 8 to 64 as fast as any on a CPU: one number, so that processes that share give the same bits."""


class FeatureSpace(ABC):
    """Features (N, D), fp32, of images (N, H, W, C) in uint8, grey or RGB."""

    name: str
    num_features: int
    version: str | None
    """Of the weights and of how images are shown to them; None of a space that the real images themselves make."""

    @abstractmethod
    def __call__(self, images_NHWC: np.ndarray) -> np.ndarray:
        """At most a batch of images, on this process."""


class EfficientNetSpace(FeatureSpace):
    """1,280 features. Images of other sizes, small ones above all, are resized to 224 pixels, bicubic, antialiased."""

    name, num_features = "efficientnet", efficientnet.NUM_FEATURES

    def __init__(self):
        self._network = efficientnet.load_efficientnet()
        self.version = f"{_sha256(efficientnet.weights_path())}, bicubic to {efficientnet.IMG_SIZE}"

    @torch.inference_mode()
    def __call__(self, images_NHWC: np.ndarray) -> np.ndarray:
        size = (efficientnet.IMG_SIZE,) * 2
        x_BCHW = _as_rgb(images_NHWC).to(next(self._network.parameters()).device).float()
        x_BCHW = F.interpolate(x_BCHW, size, mode="bicubic", antialias=True, align_corners=False).clamp(0, 255)
        return self._network(x_BCHW.contiguous(memory_format=torch.channels_last)).cpu().numpy()


class InceptionSpace(FeatureSpace):
    """2,048 features by torch-fidelity, which resizes images to 299 pixels as TensorFlow 1 did: published figures of
    Frechet distance are of just that."""

    name, num_features = "inception", inception.NUM_FEATURES

    def __init__(self, file: Path):
        self._network = inception.load_inception(file)
        self.version = f"{_sha256(file)}, torch-fidelity"

    @torch.inference_mode()
    def __call__(self, images_NHWC: np.ndarray) -> np.ndarray:
        device = next(self._network.parameters()).device
        return self._network(_as_rgb(images_NHWC).to(device))[0].flatten(1).cpu().numpy()


class PixelSpace(FeatureSpace):
    """The first 32 principal components of the training images' pixels in [0, 1], of fewer images fewer."""

    name, version = "pixels", None

    def __init__(self, train_NHWC: np.ndarray):
        from sklearn.decomposition import PCA

        pixels = as_vectors(train_NHWC)
        self.num_features = min(NUM_COMPONENTS, *pixels.shape)
        self._components = PCA(self.num_features, svd_solver="full").fit(pixels)

    def __call__(self, images_NHWC: np.ndarray) -> np.ndarray:
        return self._components.transform(as_vectors(images_NHWC)).astype(np.float32)


def check_feature_space(config: EvaluationConfig) -> None:
    """What can be known of a feature space without loading it.

    Raises:
        UserError: its package or its file is missing, with the command or the flag.
    """
    if config.features == "efficientnet":
        efficientnet.weights_path()
    elif config.features == "inception":
        inception.check_inception(config.inception_file)


def make_feature_space(config: EvaluationConfig, train_NHWC: np.ndarray) -> FeatureSpace:
    """The space that a configuration names.

    Args:
        train_NHWC: the training images, of which "pixels" is made.

    Raises:
        UserError: its package or its file is missing or damaged.
    """
    check_feature_space(config)
    if config.features == "efficientnet":
        return EfficientNetSpace()
    if config.features == "inception":
        assert config.inception_file is not None, "checked above"
        return InceptionSpace(config.inception_file)
    return PixelSpace(train_NHWC)


def features_of(space: FeatureSpace, images_NHWC: np.ndarray, processes: Processes) -> np.ndarray:
    """Features (N, D) of any number of images, fp32. The processes, each of which must call it, share the work.

    Raises:
        UserError: what any of the processes met, on all of them.
    """
    firsts = range(0, len(images_NHWC), BATCH)[processes.rank :: processes.world_size]
    mine = processes.agree(lambda: {first: space(images_NHWC[first : first + BATCH]) for first in firsts})
    batches = {first: batch for share in processes.gather(mine) for first, batch in share.items()}
    return np.concatenate([batches[first] for first in sorted(batches)])


def as_vectors(images_NHWC: np.ndarray) -> np.ndarray:
    """Pixels (N, H W C) in [0, 1], fp64."""
    return images_NHWC.reshape(len(images_NHWC), -1) / 255


def _as_rgb(images_NHWC: np.ndarray) -> Tensor:
    """(N, 3, H, W), uint8."""
    return torch.from_numpy(np.ascontiguousarray(images_NHWC)).permute(0, 3, 1, 2).expand(-1, 3, -1, -1)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]
