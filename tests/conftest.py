import signal

import pytest
import torch
import torch.nn.functional as F

LINEAR = F.linear

# Whoever runs the tests in the background, or under nohup, has these ignored, and so would all that the tests start.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def same_start():
    """The seed, and one thread: the tensors of tests are small, and a training run in an earlier test has set more."""
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def same_linear(monkeypatch):
    """DeepSpeed's ZeRO 3 puts a product of its own in the place of torch's, which outlives a run in an earlier test."""
    monkeypatch.setattr(F, "linear", LINEAR)
