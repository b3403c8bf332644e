"""Fixtures of the files that run in Triton's interpreter; a file has those that it imports."""

import numpy as np
import pytest
import torch
import triton.language as tl
from triton.runtime import interpreter


@pytest.fixture(autouse=True)
def uninitialised_memory_full_of_nan():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True, scope="module")
def rounding_to_bf16_as_on_a_gpu():
    """The interpreter cuts off what does not fit."""
    convert = interpreter._convert_float

    def round_to_nearest(x, input_dtype, output_dtype, rounding_mode):
        if (input_dtype, output_dtype) == (tl.float32, tl.bfloat16):
            return torch.from_numpy(np.ascontiguousarray(x)).bfloat16().view(torch.uint16).numpy().reshape(x.shape)
        return convert(x, input_dtype, output_dtype, rounding_mode)

    interpreter._convert_float = round_to_nearest
    yield
    interpreter._convert_float = convert
