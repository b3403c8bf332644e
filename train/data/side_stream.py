"""A stream of a GPU beside the one that trains, for what readers put there."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor


@contextmanager
def beside_training(device: torch.device) -> Iterator[None]:
    """What is done within on a GPU waits for no kernel of the training, and is done where this ends; on a CPU nothing.

    So memory that was copied from may be written to anew afterwards. What is made within goes to the training by
    ``hand_over``.
    """
    if device.type != "cuda":
        yield
        return
    stream = _side_stream(device)
    with torch.cuda.stream(stream):
        yield
    stream.synchronize()


def hand_over(*tensors: Tensor | None) -> None:
    """Leaves tensors made beside the training to it: their memory is taken again only behind what it does with them."""
    for tensor in tensors:
        if tensor is not None and tensor.is_cuda:
            tensor.record_stream(torch.cuda.current_stream(tensor.device))


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
