import pytest
import torch


@pytest.fixture(autouse=True)
def same_start():
    """The seed, and one thread: the tensors of tests are small, and a training run in an earlier test has set more."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
