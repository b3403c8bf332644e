"""What the launchers of Triton kernels ask of the device that a tensor lies on."""

from contextlib import AbstractContextManager, nullcontext
from functools import cache

import torch
from torch import Tensor


@cache
def multiprocessors(device: int) -> int:
    """Of ``tensor.get_device()``; those of an H100 for a tensor that is on no GPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device >= 0 else 132


def current_device(x: Tensor) -> AbstractContextManager:
    """Launches inside go to the GPU of ``x``, if it is on one."""
    return torch.cuda.device_of(x) if x.is_cuda else nullcontext()
