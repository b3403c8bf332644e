"""Numerics of the Triton kernels of skip_group_norm under Triton's interpreter; test_group_norm_triton.py runs it."""

import itertools

import pytest
import torch
from parity import assert_within_budget

from scalelong.kernels import group_norm_triton
from scalelong.kernels.backend import get_backend
from scalelong.kernels.group_norm import group_norm, group_norm_ref, skip_group_norm, skip_group_norm_ref
from scalelong.kernels.group_norm_tilings import Tiling, next_power_of_two

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FORMS = ("resident", "looped", "split")
LAYOUTS = (False, True)
# 35 positions, tiles of 16 or 32: the last one is not full. Groups of 9 channels, one of them of both inputs.
SHAPE = (3, 20, 16, 4, 5, 7)


@pytest.fixture(autouse=True)
def _uninitialised_memory_is_nan():
    torch.use_deterministic_algorithms(True)
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


def inputs_of(shape, dtype, channels_last, *, scale=None, adaptive=False, affine=True, mean=0.0):
    N, Ch, Cs, _, *spatial = shape
    C = Ch + Cs

    def image(channels):
        x = (mean + torch.randn(N, channels, *spatial)).to(dtype)
        return x.movedim(1, -1).contiguous().movedim(-1, 1) if channels_last else x

    inputs = {"h": image(Ch), "s": image(Cs)}
    if scale is not None:
        inputs["scale"] = 0.5 + torch.rand(scale, dtype=torch.float32).to(dtype)
    if affine:
        inputs |= {"weight": torch.randn(C).to(dtype), "bias": torch.randn(C).to(dtype)}
    if adaptive:
        inputs |= {"gain": torch.randn(N, C).to(dtype), "shift": torch.randn(N, C).to(dtype)}
    return inputs


def check(shape, inputs, act="silu", float_scale=None):
    def on(f):
        def call(*tensors):
            named = dict(zip(inputs, tensors, strict=True))
            h, s, scale = named.pop("h"), named.pop("s"), named.pop("scale", float_scale)
            weight, bias = named.pop("weight", None), named.pop("bias", None)
            return f(h, s, scale, shape[3], weight, bias, act=act, **named)

        return call

    assert get_backend(inputs["h"]) == "triton"
    assert_within_budget(on(skip_group_norm), on(skip_group_norm_ref), inputs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels_last", LAYOUTS)
@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_within_budget(form, channels_last, dtype, force):
    force(form)
    check(SHAPE, inputs_of(SHAPE, dtype, channels_last, scale=(3, 16), adaptive=True))


@pytest.mark.parametrize("channels_last", LAYOUTS)
@pytest.mark.parametrize("form", FORMS)
def test_a_mean_far_from_zero_costs_no_precision(form, channels_last, force):
    force(form)
    check(SHAPE, inputs_of(SHAPE, torch.float32, channels_last, mean=100.0))


@pytest.mark.parametrize("scale", [(), (16,), (3, 16), (3, 1)], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_scales_of_every_shape(form, scale, force):
    force(form)
    check(SHAPE, inputs_of(SHAPE, torch.float32, form == "looped", scale=scale))


@pytest.mark.parametrize("act", ["gelu", None])
@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_activations_and_absent_parameters(form, affine, act, force):
    force(form)
    check(SHAPE, inputs_of(SHAPE, torch.float32, form == "split", affine=affine), act=act, float_scale=0.7)


@pytest.mark.parametrize(
    "shape",
    [
        (2, 7, 3, 1, 9),  # one spatial dimension, one group
        (2, 6, 6, 12, 4),  # groups of one channel
        (2, 20, 12, 4, 1, 1),  # one position
        (2, 8, 8, 4),  # no spatial dimension
        (1, 24, 8, 2, 4, 4, 4),  # vectors, three spatial dimensions
        (2, 3, 1, 2, 2, 3, 5),
    ],
    ids=str,
)
@pytest.mark.parametrize("channels_last", LAYOUTS)
def test_shapes_at_the_edge(shape, channels_last):
    if channels_last and len(shape) == 4:
        pytest.skip("without spatial dimensions there is one layout")
    check(shape, inputs_of(shape, torch.float32, channels_last, scale=(), adaptive=True))


@pytest.mark.parametrize("form", FORMS)
def test_group_norm_alone(form, force):
    force(form)
    inputs = {"x": torch.randn(2, 12, 5, 7), "weight": torch.randn(12), "bias": torch.randn(12)}
    assert_within_budget(lambda x, *p: group_norm(x, 4, *p), lambda x, *p: group_norm_ref(x, 4, *p), inputs)


@pytest.mark.parametrize("channels_last", LAYOUTS)
@pytest.mark.parametrize("form", FORMS)
def test_views_of_any_alignment_and_repetition_give_the_same_bits(form, channels_last, force):
    force(form)
    shape = (2, 24, 8, 2, 4, 8)
    inputs = inputs_of(shape, torch.bfloat16, channels_last, scale=(8,))

    def gradients(offset):
        leaves = []
        for x in inputs.values():
            dense = x.movedim(1, -1) if channels_last and x.dim() > 2 else x
            shifted = torch.empty(dense.numel() + offset, dtype=x.dtype)[offset:].view(dense.shape).copy_(dense)
            leaves.append((shifted.movedim(-1, 1) if channels_last and x.dim() > 2 else shifted).requires_grad_())
        h, s, scale, *parameters = leaves
        y = skip_group_norm(h, s, scale, shape[3], *parameters)
        return [y, *torch.autograd.grad(y, leaves, torch.ones_like(y))]

    aligned, again, shifted = gradients(0), gradients(0), gradients(1)
    for first, second, third in zip(aligned, again, shifted, strict=True):
        assert torch.equal(first, second)
        assert torch.equal(first, third)


def test_strided_small_tensors_are_read_in_place():
    inputs = inputs_of(SHAPE, torch.float32, False, scale=(3, 16))
    h, s, scale, weight, bias = inputs.values()
    embedding = torch.randn(3, 72)
    gain, shift = embedding.chunk(2, dim=1)
    strided = skip_group_norm(h, s, scale.t().contiguous().t(), 4, weight, bias, gain=gain, shift=shift)
    dense = skip_group_norm(h, s, scale, 4, weight, bias, gain=gain.clone(), shift=shift.clone())
    assert torch.equal(strided, dense)


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("form", "channels_last", "dtype", "scale", "act"),
    list(itertools.product(FORMS, LAYOUTS, DTYPES, [None, (), (16,), (3, 16), (3, 1)], ["silu", "gelu", None])),
    ids=str,
)
def test_everything_together(form, channels_last, dtype, scale, act, force):
    force(form)
    check(SHAPE, inputs_of(SHAPE, dtype, channels_last, scale=scale, adaptive=act != "gelu"), act=act)
