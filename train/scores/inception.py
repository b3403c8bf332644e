"""Inception v3 as published Frechet distances use it: torch-fidelity's network, weights from a local file."""

import pickle
from pathlib import Path
from typing import Any

import torch

from scalelong.train.errors import UserError

NUM_FEATURES = 2048


def check_inception(file: Path | None) -> None:
    """
    Raises:
        UserError: the package or the file is missing, with the command or the flag.
    """
    _extractor_class()
    if file is None:
        raise UserError(
            "the features inception need torch-fidelity's file of weights: --inception-file "
            "weights-inception-2015-12-05-6726825d.pth"
        )
    if not file.is_file():
        raise UserError(f"--inception-file {file}: no such file")


def load_inception(file: Path) -> torch.nn.Module:
    """uint8 (B, 3, H, W) of any size to a tuple of the pooled features (B, 2048), on a GPU if there is one.

    Raises:
        UserError: the package is missing, or the file holds no weights of this network.
    """
    extractor = _extractor_class()
    try:
        # torch-fidelity would run what code a file holds: read here first, a file that holds any is refused.
        torch.load(file, map_location="cpu", weights_only=True)
        network = extractor("inception-v3-compat", ["2048"], feature_extractor_weights_path=str(file))
    except (OSError, RuntimeError, EOFError, AttributeError, TypeError, pickle.UnpicklingError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"--inception-file {file} holds no weights of torch-fidelity's Inception: {reason}") from error
    return network.to("cuda" if torch.cuda.is_available() else "cpu")


def _extractor_class() -> Any:
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ImportError as error:
        raise UserError(f"the features inception need torch-fidelity ({error}): pip install torch-fidelity") from error
    return FeatureExtractorInceptionV3
