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


@pytest.fixture
def process_group(tmp_path):
    """Of this process alone."""
    if torch.distributed.is_initialized():  # by a training run in an earlier test
        yield
        return
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()
