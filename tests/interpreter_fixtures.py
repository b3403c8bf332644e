"""Fixtures of the files that run in Triton's interpreter; a file has those that it imports."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

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


@contextmanager
def faster_interpreter() -> Iterator[None]:
    """The interpreter without what takes it more time than the arithmetic.

    It patches triton.language anew for each launch and each call of a device function: here that stays as the first
    that needs it has patched it. It computes every sum of integers a second time, in 64 bits, to see whether it
    overflows: tensors are too small for that here. And for each array it makes a table of all dtypes.
    """
    modules: Any = interpreter
    patch, dtype_of, builder = modules._patch_lang, modules._get_np_dtype, modules.interpreter_builder
    options, seen, dtypes = builder.options, set(), {}

    def patch_once(fn: Callable) -> Any:
        if fn.__module__ not in seen:
            seen.add(fn.__module__)
            patch(fn)
        return modules._LangPatchScope()  # nothing to put back

    def known_dtype(dtype: Any) -> np.dtype:
        scalar = dtype.scalar
        if scalar.name not in dtypes:
            dtypes[scalar.name] = dtype_of(scalar)
        return dtypes[scalar.name]

    modules._patch_lang, modules._get_np_dtype = patch_once, known_dtype
    builder.options = replace(options, sanitize_overflow=False)
    yield
    modules._patch_lang, modules._get_np_dtype, builder.options = patch, dtype_of, options


@pytest.fixture(autouse=True, scope="module")
def interpreted_faster():
    with faster_interpreter():
        yield
