"""Fixtures of the files that run in Triton's interpreter; a file has those that it imports."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
def language_patched_once() -> Iterator[None]:
    """The interpreter patches triton.language anew for each launch and each call of a device function, and takes more
    time for that than for the arithmetic: here it stays as the first that needs it has patched it."""
    modules: Any = interpreter
    patch, seen = modules._patch_lang, set()

    def patch_once(fn: Callable) -> Any:
        if fn.__module__ not in seen:
            seen.add(fn.__module__)
            patch(fn)
        return modules._LangPatchScope()  # nothing to put back

    modules._patch_lang = patch_once
    yield
    modules._patch_lang = patch


@pytest.fixture(autouse=True, scope="module")
def one_patch_of_the_language():
    with language_patched_once():
        yield
