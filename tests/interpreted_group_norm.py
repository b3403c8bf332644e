"""Numerics of the Triton kernels of skip_group_norm under Triton's interpreter; test_group_norm_triton.py runs it."""

from dataclasses import replace
from itertools import combinations, product
from math import ceil, gcd

import pytest
import torch
from group_norm_cases import SCALES, Case, in_channels_last
from interpreter_fixtures import interpreted_faster, rounding_to_bf16_as_on_a_gpu  # noqa: F401 (fixtures)

from scalelong.kernels import group_norm_triton
from scalelong.kernels.backend import use_backend
from scalelong.kernels.group_norm import group_norm, group_norm_ref, skip_group_norm
from scalelong.kernels.group_norm_arguments import Options, Tensors, Wanted
from scalelong.kernels.group_norm_flat import Pieces
from scalelong.kernels.group_norm_tilings import FlatTiling, SplitTiling, WholeTiling, next_power_of_two
from scalelong.kernels.group_norm_walks import Tile
from scalelong.kernels.launches import Kept, Launch

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FORMS = (("flat", False), ("whole", True), ("split", False), ("split", True))
of_each_form = pytest.mark.parametrize(
    ("form", "channels_last"), [pytest.param(*x, id=f"{x[0]}-{'NHWC' if x[1] else 'NCHW'}") for x in FORMS]
)


def of_a_form_each(names: str, values: list) -> pytest.MarkDecorator:
    """Each value in one form at least, and in each form a value; all of them in all of them where it is exhaustive."""

    def marks(i: int, j: int) -> list:
        return [] if i % len(FORMS) == j % len(values) else [pytest.mark.exhaustive]

    pairs = product(enumerate(values), enumerate(FORMS))
    cases = [pytest.param(*form, *value, marks=marks(i, j)) for (i, value), (j, form) in pairs]
    return pytest.mark.parametrize(f"form, channels_last, {names}", cases)


# 35 positions: pieces, tiles and chunks of them are not full at the end. Groups of 9 channels, one of both inputs.
STRADDLING = Case(batch=2, num_hidden=20, num_skip=16, spatial=(5, 7), groups=4)
# For the form that takes whole groups of h or of s: three blocks of two groups.
WHOLE_GROUPS = Case(batch=2, num_hidden=36, num_skip=18, spatial=(5, 7), groups=6)
# The same with less work for the interpreter.
SMALL = Case(num_hidden=7, num_skip=5, spatial=(3, 5), groups=2)
SMALL_WHOLE_GROUPS = Case(num_hidden=12, num_skip=6, spatial=(3, 5), groups=3)
# Rows of whole vectors; nothing is masked.
EVEN = Case(num_hidden=24, num_skip=8, spatial=(8, 8), groups=2)


@pytest.fixture(autouse=True)
def _triton_with_uninitialised_memory_full_of_nan(monkeypatch):
    monkeypatch.setattr(group_norm_triton, "_plans", Kept())
    torch.use_deterministic_algorithms(True)
    with use_backend("triton"):
        yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def force(monkeypatch):
    """Makes the launchers take one form, with pieces, tiles and chunks so small that there are several of each."""

    def force(form: str, positions: int = 8, tiles_of_chunk: int = 3, rows_of_piece: int = 128) -> None:
        def choose(direction, channels_last, itemsize, vec, N, Ch, Cs, G, P, num_multiprocessors):
            if form == "flat":
                return small_flat(vec, (Ch + Cs) // G, P, rows_of_piece)
            if form == "whole":
                return small_whole(vec, N, Ch, Cs, G, P, 2 * positions)
            return small_split(channels_last, vec, N, Ch, Cs, P, max(positions, vec), tiles_of_chunk)

        monkeypatch.setattr(group_norm_triton, "choose_tiling", choose)

    return force


def small_flat(vec, D, P, rows_of_piece):
    rows = D * P // vec
    rows_of_piece = min(rows_of_piece, next_power_of_two(rows))
    segment = gcd(P // vec, 8, rows_of_piece)
    masked = rows % rows_of_piece != 0
    return FlatTiling(Pieces(ceil(rows / rows_of_piece), rows_of_piece, vec, masked, segment), 1, None)


def small_whole(vec, N, Ch, Cs, G, P, positions):
    D = (Ch + Cs) // G
    groups = 2 if Ch % (2 * D) == 0 and Cs % (2 * D) == 0 else 1
    block = groups * D
    assert Ch % block == 0
    assert Cs % block == 0
    channels = next_power_of_two(block)
    masked = channels != block or P % positions != 0
    return WholeTiling(
        tile=Tile(channels, positions, True, vec, masked),
        num_tiles=ceil(P / positions),
        num_warps=1,
        max_registers=None,
        block=block,
        groups=groups,
        num_programs=N * (Ch + Cs) // block,
    )


def small_split(channels_last, vec, N, Ch, Cs, P, positions, tiles_of_chunk):
    channels = 16  # of 20 + 16: the second block of h is not full
    walk = positions * tiles_of_chunk
    num_chunks = ceil(P / walk)
    masked = Ch % channels != 0 or Cs % channels != 0 or P % positions != 0
    return SplitTiling(
        tile=Tile(channels, positions, channels_last, vec, masked),
        num_warps=1,
        walk=walk,
        num_chunks=num_chunks,
        num_programs=N * (ceil(Ch / channels) + ceil(Cs / channels)) * num_chunks,
    )


SMALL_TILES = {"positions": 4, "tiles_of_chunk": 2, "rows_of_piece": 64}


def case_of(form, channels_last, **changes):
    return replace(WHOLE_GROUPS if form == "whole" else STRADDLING, channels_last=channels_last, **changes)


def small_case_of(form, channels_last, **changes):
    return replace(SMALL_WHOLE_GROUPS if form == "whole" else SMALL, channels_last=channels_last, **changes)


@of_a_form_each("dtype", [(dtype,) for dtype in DTYPES])
def test_every_form_is_within_budget(form, channels_last, dtype, force):
    force(form)
    case_of(form, channels_last, dtype=dtype, scale="(N,Cs)", is_adaptive=True).assert_parity()


@of_a_form_each("dtype", [(dtype,) for dtype in DTYPES[:2]])
def test_nothing_is_masked_where_tiles_and_pieces_are_full(form, channels_last, dtype, force):
    force(form)
    groups = 4 if form == "whole" else 2  # of 16 channels the second one straddles
    replace(EVEN, channels_last=channels_last, dtype=dtype, groups=groups).assert_parity()


@pytest.mark.parametrize("mean", [100.0, pytest.param(-100.0, marks=pytest.mark.exhaustive)])
@of_each_form
def test_a_mean_far_from_zero_costs_no_precision(form, channels_last, mean, force):
    force(form)
    case_of(form, channels_last, scale="none", mean=mean).assert_parity()


@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.exhaustive)], ids=str)
@of_each_form
def test_nor_does_it_in_16_bits(form, channels_last, dtype, force):
    force(form, **SMALL_TILES)
    small_case_of(form, channels_last, scale="float", mean=100.0, dtype=dtype).assert_parity()


@of_a_form_each("place", [((0, 0),), ((3, 37),), ((63, 63),)])
def test_one_outlier_among_equals_costs_no_accuracy(form, channels_last, place, force):
    # The interpreter adds up the rows of a tile one by one, a GPU by halves: few rows.
    force(form, positions=64 if form == "whole" else 512, rows_of_piece=512)
    x = torch.zeros(1, 2, 64, 64)
    x[0, 0, *place] = 1e5
    x = in_channels_last(x) if channels_last else x
    truth = group_norm_ref(x.double(), 1, None, None, act=None)
    assert torch.allclose(group_norm(x, 1, None, None, act=None).double(), truth, rtol=1e-5, atol=1e-7)


@of_a_form_each("scale", [("()",), ("(Cs,)",), ("(N,Cs)",), ("(N,1)",)])
def test_scales_of_every_shape(form, channels_last, scale, force):
    force(form, **SMALL_TILES)
    small_case_of(form, channels_last, scale=scale).assert_parity()


@of_a_form_each("is_affine, act", list(product([False, True], ["gelu", "gelu-tanh", None])))
def test_activations_and_absent_parameters(form, channels_last, is_affine, act, force):
    force(form, **SMALL_TILES)
    small_case_of(form, channels_last, scale="float", is_affine=is_affine, act=act).assert_parity()


@of_a_form_each("is_affine", [(False,), (True,)])
def test_gain_and_shift_with_and_without_weight_and_bias(form, channels_last, is_affine, force):
    force(form, **SMALL_TILES)
    small_case_of(form, channels_last, scale="none", is_affine=is_affine, is_adaptive=True).assert_parity()


SHAPES_AT_THE_EDGE = [
    (7, 3, 1, (9,)),
    (6, 6, 12, (4,)),  # groups of one channel
    (20, 12, 4, (1, 1)),
    (8, 8, 4, ()),
    (24, 8, 2, (4, 4, 4)),  # whole vectors
    (3, 1, 2, (3, 5)),
    (12, 0, 4, (5, 7)),  # group_norm
]


@pytest.mark.parametrize(("num_hidden", "num_skip", "groups", "spatial"), SHAPES_AT_THE_EDGE, ids=str)
@pytest.mark.parametrize("channels_last", [False, True])
def test_shapes_at_the_edge(num_hidden, num_skip, groups, spatial, channels_last):
    if channels_last and not spatial:
        pytest.skip("without spatial dimensions there is one layout")
    edge_case(num_hidden, num_skip, groups, spatial, channels_last).assert_parity()


@pytest.mark.parametrize(
    ("num_hidden", "num_skip", "groups", "spatial"),
    [
        (80, 60, 2, (7, 10)),  # a combine program takes a chunk at a time
        (80, 60, 1, (9,)),  # and part of a group's channels at a time
        (10, 5, 5, (4, 6)),  # several groups in a block that is not full
        *(pytest.param(*x, marks=pytest.mark.exhaustive) for x in SHAPES_AT_THE_EDGE if x[3]),
    ],
    ids=str,
)
@pytest.mark.parametrize("channels_last", [pytest.param(False, marks=pytest.mark.exhaustive), True])
def test_shapes_at_the_edge_when_split(num_hidden, num_skip, groups, spatial, channels_last, force):
    force("split", positions=32, tiles_of_chunk=1)
    edge_case(num_hidden, num_skip, groups, spatial, channels_last).assert_parity()


def edge_case(num_hidden, num_skip, groups, spatial, channels_last):
    return Case(
        num_hidden=num_hidden,
        num_skip=num_skip,
        spatial=spatial,
        groups=groups,
        channels_last=channels_last,
        scale="()" if spatial else "none",
        is_adaptive=True,
    )


@pytest.mark.parametrize("tiles_of_chunk", [1, pytest.param(2, marks=pytest.mark.exhaustive)])
def test_many_chunks_are_combined_and_summed_in_several_rounds(tiles_of_chunk, force):
    """Chan's formula over more chunks than a program holds, and the gradients of parameters over more parts."""
    force("split", positions=1, tiles_of_chunk=tiles_of_chunk)
    spatial = (5 * tiles_of_chunk, 7)
    Case(batch=1, num_hidden=3, num_skip=2, spatial=spatial, groups=1, scale="(N,Cs)", is_adaptive=True).assert_parity()


@of_each_form
def test_group_norm_alone(form, channels_last, force):
    force(form)
    Case(num_hidden=12, num_skip=0, spatial=(5, 7), channels_last=channels_last).assert_parity()


@of_a_form_each("scale", [("none",), ("(N,Cs)",)])
def test_a_skip_or_a_stream_without_channels(form, channels_last, scale, force):
    force(form)
    case = Case(num_hidden=12, num_skip=12, spatial=(5, 7), channels_last=channels_last, scale=scale)
    inputs = case.inputs()
    # Without channels h counts as contiguous, which the form of whole groups does not take.
    for empty in ("s",) if form == "whole" else ("h", "s"):
        kept = {**inputs, "weight": inputs["weight"][:12], "bias": inputs["bias"][:12], empty: inputs[empty][:, :0]}
        if empty == "s" and scale != "none":
            kept["scale"] = inputs["scale"][:, :0]
        case.assert_parity(kept)


@of_each_form
def test_repetition_gives_the_same_bits_and_alignment_too(form, channels_last, force):
    """But in the flat form, whose pieces are made of vectors: there it adds in another order."""
    force(form)
    shape = {"num_hidden": 16, "num_skip": 8, "spatial": (4, 4), "groups": 3}
    case = Case(**shape, dtype=torch.bfloat16, scale="(Cs,)", channels_last=channels_last)
    inputs = case.inputs()

    def gradients(offset):
        leaves = {name: at_offset(x, offset).requires_grad_() for name, x in inputs.items()}
        y = case.call(leaves)
        return [y, *torch.autograd.grad(y, list(leaves.values()), torch.ones_like(y))]

    aligned, again, shifted = gradients(0), gradients(0), gradients(1)
    for first, second, third in zip(aligned, again, shifted, strict=True):
        assert torch.equal(first, second)
        assert torch.equal(first, third) or form == "flat"
    case.assert_parity({name: at_offset(x, 1) for name, x in inputs.items()})


def at_offset(x, offset):
    """A copy with the strides of x, so many elements after an aligned address."""
    storage = torch.empty(x.numel() + offset, dtype=x.dtype)
    return storage.as_strided(x.shape, x.stride(), offset).copy_(x)


def test_strided_small_tensors_are_read_in_place():
    h, s, scale, weight, bias = replace(STRADDLING, scale="(N,Cs)").inputs().values()
    gain, shift = torch.randn(2, 72).chunk(2, dim=1)
    strided = skip_group_norm(h, s, scale.t().contiguous().t(), 4, weight, bias, gain=gain, shift=shift)
    dense = skip_group_norm(h, s, scale, 4, weight, bias, gain=gain.clone(), shift=shift.clone())
    assert torch.equal(strided, dense)


def wanted_subsets(largest):
    """Few gradients, and all but few."""
    fields = Wanted._fields
    few = [set(x) for size in range(largest + 1) for x in combinations(fields, size)]
    return [Wanted(*(name in x for name in fields)) for chosen in few for x in (chosen, set(fields) - chosen)]


@pytest.mark.parametrize(
    ("largest", "dtype"),
    [(1, torch.float32), *(pytest.param(2, dtype, marks=pytest.mark.exhaustive) for dtype in DTYPES)],
    ids=str,
)
@of_each_form
def test_only_the_gradients_that_are_wanted_are_computed(form, channels_last, largest, dtype, force, monkeypatch):
    force(form, **SMALL_TILES)
    launched = []
    through_triton = Launch.through_triton

    def noted(launch, tensors):
        launched.append(launch.kernel.fn.__name__)
        return through_triton(launch, tensors)

    monkeypatch.setattr(Launch, "through_triton", noted)
    case = small_case_of(form, channels_last, batch=1, scale="(N,Cs)", is_adaptive=True, dtype=dtype)
    inputs = case.inputs()
    tensors, options = Tensors(**inputs), Options(1.0, case.groups, 1e-5, "silu")
    y = case.call(inputs)
    mean, rstd = torch.empty(2, 1, case.groups).unbind()
    group_norm_triton.forward(tensors, options, channels_last, torch.empty_like(y), mean, rstd)

    def gradients(wanted):
        launched.clear()
        return group_norm_triton.backward(
            torch.ones_like(y), tensors, mean, rstd, options, channels_last, wanted
        ), launched.copy()

    # The gradient of s is rounded once less where that of its scale is not computed on the way.
    everything = {has_scale: gradients(Wanted(scale=has_scale))[0] for has_scale in (False, True)}
    for wanted in wanted_subsets(largest):
        grads, names = gradients(wanted)
        for name, want, grad, expected in zip(Wanted._fields, wanted, grads, everything[wanted.scale], strict=True):
            assert (grad is not None) == want, name
            assert grad is None or (expected is not None and torch.equal(grad, expected)), name
        assert ("_parameters_bwd_kernel" in names) == any(wanted[2:])
        if form == "split":
            assert ("_split_bwd_apply_kernel" in names) == any(wanted[:3])


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("form", "dtype", "scale", "act"),
    list(product(FORMS, DTYPES, SCALES, ["silu", "gelu", "gelu-tanh", None])),
    ids=str,
)
def test_everything_together(form, dtype, scale, act, force):
    force(form[0])
    is_adaptive = act != "gelu"
    case_of(*form, dtype=dtype, scale=scale, act=act, is_adaptive=is_adaptive).assert_parity()
