"""The machine code of skip_group_norm's kernels at all shapes of shapes.py against its budget, compiled without a GPU.

An H100 issues 29.7e12 lane instructions a second, of which 60 % are realistic. At 3.0 TB/s, bf16 leaves 24 of them for
each element in forward and 35 in backward; fp32 moves twice the bytes and leaves twice as many. Timed on an H200, walks
that the model finds too short are the fastest: more of them hide latency, and instructions are not what binds
(docs/log.md). So backward is allowed 42, and two shapes of few images more.
"""

import os
from collections.abc import Iterator
from itertools import product

import pytest
import torch

from scalelong.bench.against_compile import DIRECTIONS, Key, best_compile, shortfalls
from scalelong.bench.issue_model import Case, ModelledCase, ModelledLaunch, issue_over_floor, modelled
from scalelong.bench.shapes import LARGE_BYTES, SKIP_CONCATS

pytestmark = [
    pytest.mark.slow,
    pytest.mark.alone,  # compiles on all cores
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing"),
]

INSTRUCTIONS = {("forward", 2): 24, ("backward", 2): 42, ("forward", 4): 48, ("backward", 4): 84}
# Below 8 MB a program has few elements, over which it spreads its prologue and its reductions: a launch takes as long.
SMALL_INSTRUCTIONS = {
    "ddpm-cifar10-256+256:4": {"forward": 100, "backward": 160},  # 256 elements in a group
    "adm-imagenet64-768+768:8": {"forward": 36, "backward": 60},
    "adm-imagenet64-768+576:8": {"forward": 36, "backward": 66},
    "sd-1.5-1280+1280:8": {"forward": 36, "backward": 66},
}
# Of four images: walks over one tile, of tables that an H200 has timed.
SHORT_WALKS = {
    f"sdxl-{channels}:32": {("forward", 90): 28, ("forward", 80): 28.2, ("backward", 90): 50, ("backward", 80): 50}
    for channels in ("1280+1280", "1280+640")
}
LEAST_WARPS = 16  # on an SM, so that loads overlap arithmetic
# Of registers that are read once more, far apart, of a thread that holds 64 elements: counted as instructions too.
MOST_SPILL_BYTES = 256
# What they load, and beside these the first walk of backward what it stores, are sums and parameters.
OVER_SUMS = ("_split_fwd_combine_kernel", "_split_bwd_combine_kernel", "_parameters_bwd_kernel")
STORE_SUMS = ("_split_fwd_sums_kernel", "_split_bwd_sums_kernel", *OVER_SUMS)
MOST_LAUNCHES, MOST_LAUNCHES_UP_TO = 5, 160e6
MOST_ISSUE_OVER_FLOOR = {"NCHW": 1.3, "NHWC": 1.5}
MOST_ISSUE_OVER_FLOOR_OF_A_SHAPE = 1.8


def all_modelled(dtype: torch.dtype, arch: int) -> list[ModelledCase]:
    cases = [Case(*place, dtype, arch) for place in product(SKIP_CONCATS, (False, True), DIRECTIONS)]
    return modelled(cases, num_workers=2)


@pytest.fixture(scope="module")
def in_bf16() -> list[ModelledCase]:
    return all_modelled(torch.bfloat16, 90)


def name_of(x: ModelledCase) -> str:
    return f"{x.case.concat} {x.case.layout} {x.case.direction}"


def instructions_allowed(x: ModelledCase) -> float:
    case = x.case
    concat, words = str(case.concat), case.dtype.itemsize / 2
    if concat in SMALL_INSTRUCTIONS:
        return SMALL_INSTRUCTIONS[concat][case.direction] * words
    if concat in SHORT_WALKS:
        return SHORT_WALKS[concat][case.direction, case.arch] * words
    return INSTRUCTIONS[case.direction, case.dtype.itemsize]


def breaches(found: list[ModelledCase]) -> list[str]:
    lines = []
    for x in found:
        if x.instructions_per_element > instructions_allowed(x):
            lines.append(f"{name_of(x)}: {x.instructions_per_element:.1f} instructions, not {instructions_allowed(x)}")
        for launch in {launch.kernel.name: launch for launch in x.launches}.values():
            lines += [f"{name_of(x)}: {launch.kernel.name} {flaw}" for flaw in flaws(launch, x)]
    return lines


def flaws(launch: ModelledLaunch, x: ModelledCase) -> Iterator[str]:
    """Of one of its launches; those that move sums only may have few warps and no vectors."""
    kernel = launch.kernel
    if kernel.stack_bytes > MOST_SPILL_BYTES:
        yield f"spills {kernel.stack_bytes} bytes"
    if kernel.name not in OVER_SUMS:
        # Parameters, which are many beside a group of 256 elements, may come one by one.
        least = 0.5 if x.case.num_bytes >= LARGE_BYTES else 0.25
        if kernel.num_warps_on_an_sm < LEAST_WARPS:
            yield f"has {kernel.num_warps_on_an_sm} warps on an SM"
        if launch.totals.part_in_vectors("load") < least:
            yield "loads few vectors"
        if kernel.name not in STORE_SUMS and launch.totals.part_in_vectors("store") < least:
            yield "stores few vectors"


def test_every_small_shape_has_a_budget_of_its_own():
    small = {str(x) for x in SKIP_CONCATS if 2 * x.num_elements(x.gpu_batch) < LARGE_BYTES}
    assert set(SMALL_INSTRUCTIONS) == small


def test_bf16_keeps_the_budget(in_bf16):
    assert breaches(in_bf16) == []


def test_instructions_do_not_hold_up_memory(in_bf16):
    large = [x for x in in_bf16 if x.case.num_bytes >= LARGE_BYTES]
    for layout, most in MOST_ISSUE_OVER_FLOOR.items():
        assert issue_over_floor(x for x in large if x.case.layout == layout) <= most
    assert [name_of(x) for x in large if x.issue_over_floor > MOST_ISSUE_OVER_FLOOR_OF_A_SHAPE] == []


def test_a_direction_takes_few_launches(in_bf16):
    few = [x for x in in_bf16 if x.case.num_bytes <= MOST_LAUNCHES_UP_TO]
    assert [name_of(x) for x in few if len(x.launches) > MOST_LAUNCHES] == []


def test_faster_than_the_best_that_compile_finds(in_bf16):
    ours = {Key(str(x.case.concat), x.case.layout, x.case.direction): x.us for x in in_bf16}
    assert shortfalls(ours, best_compile()) == []


@pytest.mark.exhaustive
@pytest.mark.parametrize(("dtype", "arch"), [(torch.float32, 90), (torch.bfloat16, 80), (torch.float32, 80)], ids=str)
def test_other_types_and_gpus_keep_the_budget(dtype, arch):
    assert breaches(all_modelled(dtype, arch)) == []
