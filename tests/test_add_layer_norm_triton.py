"""Runs interpreted_add_layer_norm.py, and compiles the kernels ahead of time: what limits them shows in their machine
code, without a GPU.
"""

import math
import os
from unittest.mock import patch

import pytest
import torch
from add_layer_norm_cases import ADAPTIVE
from interpreting import run_interpreted
from samples import each_value_once
from torch import Tensor

from scalelong.bench.ahead_of_time import Launch, recorded_launches, spill_bytes
from scalelong.bench.machine_code import machine_code
from scalelong.bench.warp_path import WarpPath
from scalelong.kernels import add_layer_norm_triton
from scalelong.kernels.add_layer_norm_tensors import Gradients, Inputs, Outputs
from scalelong.kernels.add_layer_norm_triton import choose_tiling
from scalelong.kernels.launches import Kept

compiled_only = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing")

# An H100 issues 29.7e12 instructions of a lane a second: at 60 % of that and 3.0 TB/s, memory leaves 12 for each
# element in bf16 and pass.
FORWARD_PER_PASS, BACKWARD_PER_PASS = 6, 8
# Loads under way that hide the latency of memory: 3.0 TB/s times 0.6 us, for one multiprocessor.
BYTES_UNDER_WAY = 14 * 1024
NETWORKS = ((128, 257, 512), (128, 258, 768), (64, 258, 1024), (32, 258, 1152))  # batch, tokens and width of U-ViTs


@pytest.mark.slow
def test_the_kernels_are_right_in_the_interpreter():
    run_interpreted("interpreted_add_layer_norm.py", "-m", "not exhaustive")


@pytest.mark.exhaustive
def test_every_shape_and_type_is_right_in_the_interpreter():
    run_interpreted("interpreted_add_layer_norm.py", "-m", "exhaustive")


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("itemsize", [2, 4])
def test_tilings_cover_every_row_and_feature(direction, itemsize):
    for B, T, D in (*NETWORKS, (1, 1, 1), (1, 7, 77), (3, 1000, 8191), (2, 5, 8192), (1, 100_000, 96)):
        tiling = choose_tiling(direction, itemsize, B, T, D, 132)
        assert tiling.piece * tiling.num_pieces >= D > tiling.piece * (tiling.num_pieces - 1)
        assert tiling.rows_per_program * tiling.num_chunks >= T > tiling.rows_per_program * (tiling.num_chunks - 1)
        assert tiling.rows_per_program % tiling.rows == 0
        assert D > 8192 or tiling.num_pieces * tiling.piece * tiling.rows <= 40 * 32 * tiling.num_warps


def launches_of(
    shape: tuple[int, ...], dtypes: tuple[torch.dtype, torch.dtype], told: tuple[str, ...] = ()
) -> list[Launch]:
    """Forward, backward and what puts its sums together, for ``dtypes`` of the stream and of branch and y.

    ``told``: gain, shift, gate and angle, as parts of one projection; without any, a norm with weight and bias.
    """
    (B, T, D), (stream, half) = shape, dtypes

    def empty(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(size, dtype=dtype, device="meta")

    def rows(dtype: torch.dtype) -> Tensor:
        return empty(B, T, D, dtype=dtype)

    affine = (None, None) if told else (empty(D), empty(D))
    parts = zip(ADAPTIVE, empty(B, 4 * D, dtype=half).chunk(4, 1), strict=True)
    adaptive = {name: part[:, : D // 2] if name == "angle" else part for name, part in parts}
    adaptive = [adaptive[name] if name in told else None for name in ADAPTIVE]
    inputs, statistics = Inputs(rows(stream), rows(half), *affine, *adaptive), (empty(B * T), empty(B * T))
    of_parameters = (None if p is None else empty(*p.shape) for p in inputs[2:])
    dbranch = rows(half) if told or half != stream else None
    kept = inputs if told else inputs._replace(branch=None)
    with recorded_launches() as launches, patch.object(add_layer_norm_triton, "_plans", Kept()):
        add_layer_norm_triton.forward(inputs, 1e-5, Outputs(rows(stream), rows(half), *statistics))
        gradients = Gradients(rows(stream), dbranch, *of_parameters)
        add_layer_norm_triton.backward(rows(stream), rows(half), kept, *statistics, gradients)
    return launches


BF16, FP32 = torch.bfloat16, torch.float32
KINDS = (
    *(((BF16, BF16), ()), ((FP32, BF16), ()), ((BF16, BF16), ADAPTIVE[:3])),
    ((BF16, BF16), ("gain", "gate", "angle")),
)


@pytest.mark.slow
@compiled_only
@each_value_once("shape, kind", NETWORKS, KINDS)
def test_memory_decides_and_not_instructions(shape, kind):
    """Passes over rows of two bytes: forward four; backward four, and with a gate six."""
    dtypes, told = kind
    forward, backward, *small = launches_of(shape, dtypes, told)
    # Gain, shift and gate are loaded once a program, which walks through few rows where samples are small.
    budgets = (28, 6 * BACKWARD_PER_PASS) if told else (4 * FORWARD_PER_PASS, 4 * BACKWARD_PER_PASS)
    for launch, budget in zip((forward, backward), budgets, strict=True):
        code = machine_code(launch.compile(90), 90)
        constants = dict(zip(launch.kernel.arg_names, launch.arguments, strict=True))
        name = f"{launch.name} {shape}"
        assert code.stack_bytes == 0, name
        issued = WarpPath(code).instructions_of_a_launch(launch.parameters(90), launch.num_programs)
        assert 32 * issued / math.prod(shape) <= budget, name
        assert code.widths("load")[16] >= 2 * constants["NUM_PIECES"], name
        row_bytes = 2 * 2 * shape[-1]  # two inputs, two bytes
        assert code.num_programs_on_an_sm * constants["ROWS"] * row_bytes >= BYTES_UNDER_WAY, name
    assert len(small) == 1


@pytest.mark.slow
@compiled_only
@pytest.mark.parametrize("arch", [80, 90])
def test_odd_and_wide_rows_compile_and_spill_next_to_nothing(arch):
    for shape in ((3, 5, 77), (2, 9, 8192)):
        for dtypes in ((FP32, FP32), (FP32, torch.float16)):
            for launch in launches_of(shape, dtypes, ADAPTIVE[:3] if shape[2] == 77 else ()):
                assert spill_bytes(launch.compile(arch)) <= 32, launch.name


@compiled_only
def test_numbers_are_arguments_and_recompile_nothing():
    first, second = (launches_of((B, T, 512), (BF16, BF16))[:2] for B, T in ((128, 257), (4, 1000)))
    for a, b in zip(first, second, strict=True):
        assert a.compile(90).hash == b.compile(90).hash
