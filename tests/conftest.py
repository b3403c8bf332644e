import pytest
import torch

# The tensors of tests are small: more threads gain nothing, and on a busy machine they wait for one another.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)
