"""What readers do beside the training on a GPU, by the calls that they make: no GPU is needed."""

from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from scalelong.train.data import side_stream
from scalelong.train.data.side_stream import beside_training, hand_over

CUDA = torch.device("cuda", 0)


@pytest.fixture
def calls(monkeypatch) -> list[str]:
    """What a GPU would be told, in order."""
    told: list[str] = []

    class Stream:
        def __init__(self, device: torch.device):
            told.append(f"stream on {device}")

        def synchronize(self) -> None:
            told.append("synchronize")

    @contextmanager
    def current(stream: Stream):
        assert isinstance(stream, Stream)
        told.append("enter")
        yield
        told.append("leave")

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", current)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"the training on {device}")
    monkeypatch.setattr(side_stream, "_side_stream", side_stream._side_stream.__wrapped__)
    return told


def test_what_is_done_beside_the_training_is_done_when_it_ends(calls):
    with beside_training(CUDA):
        calls.append("copy")
    assert calls == ["stream on cuda:0", "enter", "copy", "leave", "synchronize"]


def test_on_a_cpu_nothing_is_told(calls):
    with beside_training(torch.device("cpu")):
        pass
    hand_over(torch.ones(2), None)
    assert calls == []


def test_memory_that_is_handed_over_waits_for_the_stream_that_trains(calls):
    tensor: Any = SimpleNamespace(is_cuda=True, device=CUDA, record_stream=calls.append)
    hand_over(cast(Tensor, tensor), None)
    assert calls == ["the training on cuda:0"]
