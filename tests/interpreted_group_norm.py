"""Numerics of the Triton kernels of skip_group_norm under Triton's interpreter; test_group_norm_triton.py runs it."""

from dataclasses import replace
from itertools import product

import pytest
import torch
from group_norm_cases import SCALES, Case

from scalelong.kernels import group_norm_triton
from scalelong.kernels.backend import use_backend
from scalelong.kernels.group_norm import skip_group_norm
from scalelong.kernels.group_norm_tilings import Tiling, next_power_of_two

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FORMS = ("resident", "looped", "split")
LAYOUTS = (False, True)
# 35 positions, tiles of 16 or 32: the last one is not full. Groups of 9 channels, one of them of both inputs.
CASE = Case(batch=3, num_hidden=20, num_skip=16, spatial=(5, 7), groups=4)


@pytest.fixture(autouse=True)
def _triton_with_uninitialised_memory_full_of_nan():
    torch.use_deterministic_algorithms(True)
    with use_backend("triton"):
        yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def force(monkeypatch):
    """Makes the launchers take one form, with small tiles, and with steps of two images where split."""

    def force(form: str) -> None:
        def choose(direction, channels_last, itemsize, N, C, G, P, num_multiprocessors):
            groups = 2 if channels_last and G % 2 == 0 and form != "split" else 1
            channels = 16 if form == "split" else groups * (C // G)
            block_p = next_power_of_two(P) if form == "resident" else 32 if form == "split" else 16
            num_chunks = -(-P // block_p) if form == "split" else 1
            return Tiling(
                form=form,
                block_channels=channels,
                block_c=next_power_of_two(channels),
                block_p=block_p,
                num_groups=next_power_of_two(groups),
                num_warps=4,
                num_programs=num_chunks * -(-C // channels),
                num_chunks=num_chunks,
                images=2,
            )

        monkeypatch.setattr(group_norm_triton, "choose_tiling", choose)

    return force


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels_last", LAYOUTS)
@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_within_budget(form, channels_last, dtype, force):
    force(form)
    replace(CASE, channels_last=channels_last, dtype=dtype, scale="(N,Cs)", is_adaptive=True).assert_parity()


@pytest.mark.parametrize("channels_last", LAYOUTS)
@pytest.mark.parametrize("form", FORMS)
def test_a_mean_far_from_zero_costs_no_precision(form, channels_last, force):
    force(form)
    replace(CASE, channels_last=channels_last, scale="none", mean=100.0).assert_parity()


@pytest.mark.parametrize("scale", ["()", "(Cs,)", "(N,Cs)", "(N,1)"])
@pytest.mark.parametrize("form", FORMS)
def test_scales_of_every_shape(form, scale, force):
    force(form)
    replace(CASE, channels_last=form == "looped", scale=scale).assert_parity()


@pytest.mark.parametrize("act", ["gelu", None])
@pytest.mark.parametrize("is_affine", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_activations_and_absent_parameters(form, is_affine, act, force):
    force(form)
    replace(CASE, channels_last=form == "split", scale="float", is_affine=is_affine, act=act).assert_parity()


@pytest.mark.parametrize(
    ("num_hidden", "num_skip", "groups", "spatial"),
    [
        (7, 3, 1, (9,)),
        (6, 6, 12, (4,)),  # groups of one channel
        (20, 12, 4, (1, 1)),
        (8, 8, 4, ()),
        (24, 8, 2, (4, 4, 4)),  # whole vectors
        (3, 1, 2, (3, 5)),
        (12, 0, 4, (5, 7)),  # group_norm
    ],
    ids=str,
)
@pytest.mark.parametrize("channels_last", LAYOUTS)
def test_shapes_at_the_edge(num_hidden, num_skip, groups, spatial, channels_last):
    if channels_last and not spatial:
        pytest.skip("without spatial dimensions there is one layout")
    Case(
        num_hidden=num_hidden,
        num_skip=num_skip,
        spatial=spatial,
        groups=groups,
        channels_last=channels_last,
        scale="()" if spatial else "none",
        is_adaptive=True,
    ).assert_parity()


@pytest.mark.parametrize("form", FORMS)
def test_group_norm_alone(form, force):
    force(form)
    Case(num_hidden=12, num_skip=0, spatial=(5, 7)).assert_parity()


@pytest.mark.parametrize("channels_last", LAYOUTS)
@pytest.mark.parametrize("form", FORMS)
def test_views_of_any_alignment_and_repetition_give_the_same_bits(form, channels_last, force):
    force(form)
    case = Case(
        num_hidden=24, spatial=(4, 8), groups=2, dtype=torch.bfloat16, scale="(Cs,)", channels_last=channels_last
    )
    inputs = case.inputs()

    def gradients(offset):
        leaves = {name: at_offset(x, offset).requires_grad_() for name, x in inputs.items()}
        y = case.call(leaves)
        return [y, *torch.autograd.grad(y, list(leaves.values()), torch.ones_like(y))]

    aligned, again, shifted = gradients(0), gradients(0), gradients(1)
    for first, second, third in zip(aligned, again, shifted, strict=True):
        assert torch.equal(first, second)
        assert torch.equal(first, third)


def at_offset(x, offset):
    """A copy with the strides of x, so many elements after an aligned address."""
    storage = torch.empty(x.numel() + offset, dtype=x.dtype)
    return storage.as_strided(x.shape, x.stride(), offset).copy_(x)


def test_strided_small_tensors_are_read_in_place():
    h, s, scale, weight, bias = replace(CASE, scale="(N,Cs)").inputs().values()
    gain, shift = torch.randn(3, 72).chunk(2, dim=1)
    strided = skip_group_norm(h, s, scale.t().contiguous().t(), 4, weight, bias, gain=gain, shift=shift)
    dense = skip_group_norm(h, s, scale, 4, weight, bias, gain=gain.clone(), shift=shift.clone())
    assert torch.equal(strided, dense)


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("form", "channels_last", "dtype", "scale", "act"),
    list(product(FORMS, LAYOUTS, DTYPES, SCALES, ["silu", "gelu", None])),
    ids=str,
)
def test_everything_together(form, channels_last, dtype, scale, act, force):
    force(form)
    is_adaptive = act != "gelu"
    case = replace(CASE, channels_last=channels_last, dtype=dtype, scale=scale, act=act, is_adaptive=is_adaptive)
    case.assert_parity()
