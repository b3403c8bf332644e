"""What a run takes of its machine: memory, arithmetic and time, as rows of the log have it.

``mfu`` is the share of what the device could compute that goes into the network's own products: what backward computes
again (``--recompute``) does not count (PaLM, arXiv:2204.02311, appendix B).
"""

import resource
import time
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from scalelong.train.config import PrecisionName, TrainConfig

FORWARD_AND_BACKWARD = 3
"""Products of a training step over those of a forward pass: backward has two for each."""


class Peak(NamedTuple):
    """Dense products per second of a GPU, in TFLOP/s, as its datasheet has them: sums are kept in fp32."""

    halves: float
    """Of bf16 and fp16."""
    tf32: float
    fp32: float


PEAKS = {
    "B200": Peak(2250, 1125, 75),
    "H200 NVL": Peak(835, 418, 60),
    "H200": Peak(989, 495, 67),
    "GH200": Peak(989, 495, 67),
    "H100 PCIe": Peak(756, 378, 51),
    "H100 NVL": Peak(835, 418, 60),
    "H100": Peak(989, 495, 67),
    "H800": Peak(989, 495, 67),
    "A100": Peak(312, 156, 19.5),
    "A800": Peak(312, 156, 19.5),
    "L40S": Peak(362, 183, 91.6),
    "L4": Peak(121, 60, 30.3),
    "A10": Peak(125, 62.5, 31.2),
    "A40": Peak(150, 75, 37.4),
    "RTX A6000": Peak(155, 77.4, 38.7),
    "RTX 5090": Peak(210, 105, 105),
    "RTX 4090": Peak(165, 82.6, 82.6),
    "RTX 3090": Peak(71, 35.6, 35.6),
}
"""By what the name of the device has in it; of several the longest counts."""


def peak_flops(device_name: str, precision: PrecisionName) -> float | None:
    """FLOP/s that a GPU reaches at most in a precision; None of one that is not in the table, or a part of one.

    Args:
        device_name: as ``torch.cuda.get_device_name`` has it.
    """
    words = set(device_name.replace("-", " ").split())
    known = [name for name in PEAKS if set(name.split()) <= words]
    if not known or words & {"Laptop", "MIG"}:
        return None
    peak = PEAKS[max(known, key=len)]
    if precision != "fp32":
        return 1e12 * peak.halves
    return 1e12 * (peak.fp32 if torch.get_float32_matmul_precision() == "highest" else peak.tf32)


def memory_gb(device: torch.device) -> float:
    """The most memory so far, in GB of 10^9 bytes: of a GPU what tensors took, of a CPU the process's resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9  # counted by the host: no kernel is waited for
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


@dataclass(frozen=True)
class Resources:
    """Counts what the main process's device does.

    Args:
        flops_per_image: of a step, forward and backward; None if the network does not say.
        world_size: how many devices share the images.
        peak: FLOP/s of a device at most; None if that is not known.
        began: ``time.monotonic()`` of the run's first start, without the time between starts.
        sparse_flops_per_image: of a step in which the middle does not see all tokens.
    """

    device: torch.device
    flops_per_image: int | None
    world_size: int
    peak: float | None
    began: float
    sparse_flops_per_image: int | None = None

    def memory_gb(self) -> float:
        """The most so far, of this process and its device."""
        return memory_gb(self.device)

    def figures(self, images_per_second: float, *, drops_tokens: bool = False) -> dict[str, float]:
        """Of a row of the log.

        Args:
            drops_tokens: whether the middle does not see all tokens.
        """
        found = {"wall_seconds": time.monotonic() - self.began, "memory_gb": memory_gb(self.device)}
        flops_per_image = self.sparse_flops_per_image if drops_tokens else self.flops_per_image
        if flops_per_image is not None:
            flops_per_second = flops_per_image * images_per_second / self.world_size
            found["tflops_per_device"] = flops_per_second / 1e12
            if self.peak is not None:
                found["mfu"] = flops_per_second / self.peak
        return found


def resources_of(
    model: Any, device: torch.device, precision: PrecisionName, world_size: int, seconds_before: float
) -> Resources:
    """Those of a network that is trained.

    Args:
        model: a ``Backbone``; one of one's own need not count its operations.
        seconds_before: what the log has of earlier starts.
    """
    sparse_flops = None
    try:
        flops_per_image = FORWARD_AND_BACKWARD * model.flops()
        if getattr(model, "sparse_middle", None) is not None:
            sparse_flops = FORWARD_AND_BACKWARD * model.training_flops()
    except NotImplementedError:
        flops_per_image = None
    peak = peak_flops(torch.cuda.get_device_name(device), precision) if device.type == "cuda" else None
    return Resources(device, flops_per_image, world_size, peak, time.monotonic() - seconds_before, sparse_flops)


def flops_of_training(model: Any, config: TrainConfig, images_seen: int) -> int:
    """Of a run of a network up to there, forward and backward, whole steps.

    Raises:
        NotImplementedError: the network does not say.
    """
    step = config.images_per_step
    sparse = 0 if not config.model.sparse_ratio else images_seen
    if sparse and config.sparse_images:
        sparse = min(images_seen, -(-config.sparse_images // step) * step)  # steps that begin before are sparse whole
    return FORWARD_AND_BACKWARD * (sparse * model.training_flops() + (images_seen - sparse) * model.flops())


def describe_middle(model: Any) -> str:
    """What the sparse middle of a network sees in training, and what that leaves of its arithmetic."""
    config, blocks = model.config, model.config.middle_blocks
    sparse, dense = (FORWARD_AND_BACKWARD * flops for flops in (model.training_flops(), model.flops()))
    return (
        f"blocks {blocks.start} to {blocks.stop - 1} see {config.num_kept} of {config.num_patches} patches: "
        f"{sparse / 1e9:.3g} GFLOP an image in place of {dense / 1e9:.3g}, {dense / sparse:.2f} times fewer"
    )
