"""Numerics of the Triton kernels of skip_linear under Triton's interpreter; test_skip_linear_triton.py runs it."""

import random
from itertools import product

import pytest
import torch
from interpreter_fixtures import (  # noqa: F401 (fixtures)
    interpreted_faster,
    rounding_to_bf16_as_on_a_gpu,
    uninitialised_memory_full_of_nan,
)
from parity import assert_within_budget
from samples import each_value_once
from torch import Tensor

from scalelong.kernels import skip_linear_triton
from scalelong.kernels.skip_linear import skip_linear, skip_linear_ref
from scalelong.kernels.skip_linear_tilings import Tile

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
# Tokens, widths of x, s and y: of one tile and less, of whole tiles, and of tiles that are not full.
SHAPES = ((1, 1, 1, 1), (5, 3, 20, 7), (64, 16, 32, 32), (35, 33, 24, 38))
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


@pytest.fixture(autouse=True)
def _small_tiles_and_partial_sums(monkeypatch):
    monkeypatch.setattr(skip_linear_triton, "choose_tile", lambda *_: Tile(32, 16, 16, 4, 2))
    monkeypatch.setattr(skip_linear_triton, "choose_num_splits", lambda *_: 2)


class SkipLinear(torch.autograd.Function):
    """The launchers in autograd, on (M, D) matrices."""

    @staticmethod
    def forward(ctx, x, s, weight, bias, row_scale):
        ctx.save_for_backward(x, s, weight, row_scale)
        y = x.new_empty(len(x), len(weight))
        skip_linear_triton.forward(x, s, row_scale, *halves(weight, x), bias, y)
        return y

    @staticmethod
    def backward(ctx, dy):
        x, s, weight, row_scale = ctx.saved_tensors
        dx, ds, dweight = torch.empty_like(x), torch.empty_like(s), torch.empty_like(weight)
        drow = None if row_scale is None else torch.empty(len(x))
        skip_linear_triton.backward_inputs(dy, *halves(weight, x), s, row_scale, dx, ds, drow)
        skip_linear_triton.backward_weight(dy, x, s, row_scale, dweight)
        return dx, ds, dweight, dy.sum(0), drow if drow is None else drow.to(row_scale)


def halves(weight: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    return weight[:, : x.shape[1]], weight[:, x.shape[1] :]


def ours(x, s, weight, bias=None, row_scale=None):
    return SkipLinear.apply(x, s, weight, bias, row_scale)


def ref(x, s, weight, bias=None, row_scale=None):
    scaled = s if row_scale is None else (s * row_scale[:, None]).to(s.dtype)
    return torch.nn.functional.linear(torch.cat([x, scaled], dim=1), weight, bias)


def make_inputs(shape, dtype, *, has_scale=True, scale_dtype=None, margin=0) -> dict[str, Tensor]:
    """Rows lie ``margin`` elements of NaN apart."""
    M, D1, D2, OUT = shape
    inputs = {
        "x": torch.randn(M, D1),
        "s": torch.randn(M, D2),
        "weight": torch.randn(OUT, D1 + D2) / (D1 + D2) ** 0.5,
        "bias": torch.randn(OUT),
    }
    inputs = {name: spaced(x.to(dtype), margin) if x.dim() == 2 else x.to(dtype) for name, x in inputs.items()}
    if has_scale:
        inputs["row_scale"] = (0.5 + torch.rand(M)).to(scale_dtype or dtype)
    return inputs


def spaced(x: Tensor, margin: int) -> Tensor:
    rows, cols = x.shape
    memory = torch.full((rows, cols + margin), torch.nan, dtype=x.dtype)
    return memory[:, margin // 2 : margin // 2 + cols].copy_(x)


@each_dtype
@each_shape
@pytest.mark.parametrize("has_scale", [False, True])
def test_is_within_budget(shape, dtype, has_scale):
    assert_within_budget(ours, ref, make_inputs(shape, dtype, has_scale=has_scale))


@pytest.mark.exhaustive
@pytest.mark.parametrize("has_scale", [False, True])
@each_dtype
@pytest.mark.parametrize("shape", list(product((1, 31, 65), (16, 33), (8, 40), (15, 48))), ids=str)
def test_every_combination_is_within_budget(shape, dtype, has_scale):
    assert_within_budget(ours, ref, make_inputs(shape, dtype, has_scale=has_scale, margin=3))


@pytest.mark.parametrize("seed", [*range(10), *(pytest.param(n, marks=pytest.mark.exhaustive) for n in range(10, 25))])
def test_any_shape_is_within_budget(seed):
    draw = random.Random(seed)
    shape, dtype = tuple(draw.randint(1, 40) for _ in range(4)), draw.choice(DTYPES)
    inputs = make_inputs(shape, dtype, has_scale=draw.random() < 0.5, margin=draw.randint(0, 9))
    assert_within_budget(ours, ref, inputs)


@each_value_once(
    "scale, wide, dtype",
    (None, 0.7, "scalar", "token", "channel"),
    ("xs", "s", "x"),
    (torch.bfloat16, torch.float16),
)
def test_fp32_operands_under_autocast_are_within_budget(scale, wide, dtype):
    B, T, D1, D2, OUT = 2, 19, 33, 24, 38
    inputs = {"x": torch.randn(B, T, D1), "s": torch.randn(B, T, D2)}
    inputs = {name: x if name in wide else x.to(dtype) for name, x in inputs.items()}
    inputs |= {"weight": torch.randn(OUT, D1 + D2) / (D1 + D2) ** 0.5, "bias": torch.randn(OUT)}
    scales = {"scalar": torch.rand(()), "token": torch.rand(B, T, 1), "channel": torch.rand(D2)}
    if scale in scales:
        inputs["scale"] = scales[scale]

    def under_autocast(op):
        def run(x, s, weight, bias, factor=scale):
            with torch.autocast("cpu", dtype):
                return op(x, s, factor, weight, bias)

        return run

    # Rounded to 16 bits and summed in fp32 or not at all: what the reference rounds in between stands for more.
    assert_within_budget(under_autocast(skip_linear), under_autocast(skip_linear_ref), inputs)


def test_a_float_scale_is_applied_to_the_accumulator():
    x, s, weight, bias = make_inputs((33, 40, 24, 17), torch.bfloat16, has_scale=False).values()
    y = x.new_empty(33, 17)
    skip_linear_triton.forward(x, s, None, *halves(weight, x), bias, y, 0.7)
    truth = ref(x.double(), 0.7 * s.double(), weight.double(), bias.double())
    assert torch.equal(y, truth.float().bfloat16())


def test_the_tiles_of_the_tables_are_within_budget(monkeypatch):
    monkeypatch.undo()
    torch.use_deterministic_algorithms(True)
    for dtype in DTYPES:
        assert_within_budget(ours, ref, make_inputs((130, 72, 65, 70), dtype))


def test_a_scale_in_fp32_beside_tensors_in_bf16_is_read_as_it_is():
    inputs = make_inputs((20, 33, 24, 7), torch.bfloat16, scale_dtype=torch.float32)
    assert_within_budget(ours, ref, inputs)


def test_the_sum_is_rounded_once():
    inputs = make_inputs((33, 40, 24, 17), torch.bfloat16, scale_dtype=torch.float32)
    truth = ref(*(x.double() for x in inputs.values()))
    assert torch.equal(ours(*inputs.values()), truth.float().bfloat16())


@each_dtype
def test_a_bias_of_any_type_and_none(dtype):
    x, s, weight, bias, row_scale = make_inputs((20, 33, 24, 7), dtype).values()
    assert torch.equal(ours(x, s, weight, bias.float(), row_scale), ours(x, s, weight, bias, row_scale))
    zero = torch.zeros_like(bias)
    assert torch.equal(ours(x, s, weight, None, row_scale), ours(x, s, weight, zero, row_scale))


def test_weights_that_are_no_slices_of_one_matrix():
    x, s, weight, bias, row_scale = make_inputs((20, 33, 24, 7), torch.bfloat16).values()
    slices = halves(weight, x)

    def results(weight_x, weight_s):
        y, dx, ds, drow = x.new_empty(20, 7), torch.empty_like(x), torch.empty_like(s), torch.empty(20)
        skip_linear_triton.forward(x, s, row_scale, weight_x, weight_s, bias, y)
        skip_linear_triton.backward_inputs(y, weight_x, weight_s, s, row_scale, dx, ds, drow)
        return y, dx, ds, drow

    assert all(map(torch.equal, results(*slices), results(*(half.contiguous() for half in slices))))


@pytest.mark.parametrize("wanted", [{"dx"}, {"ds"}, {"drow"}, {"dx", "drow"}], ids=str)
def test_gradients_that_nobody_needs_change_no_bit_of_the_others(wanted):
    x, s, weight, _, row_scale = make_inputs((40, 33, 24, 7), torch.bfloat16).values()
    dy = torch.randn(40, 7).bfloat16()

    def gradients(names):
        room = {"dx": torch.empty_like(x), "ds": torch.empty_like(s), "drow": torch.empty(40)}
        given = (room[name] if name in names else None for name in room)
        skip_linear_triton.backward_inputs(dy, *halves(weight, x), s, row_scale, *given)  # type: ignore[arg-type]
        return [room[name] for name in sorted(wanted)]

    assert all(map(torch.equal, gradients(wanted), gradients({"dx", "ds", "drow"})))


@pytest.mark.parametrize("num_splits", [1, 2, 5])
def test_partial_sums_of_the_weight_cover_every_token(num_splits, monkeypatch):
    monkeypatch.setattr(skip_linear_triton, "choose_num_splits", lambda *_: num_splits)
    for M in (1, 4, 35):
        assert_within_budget(ours, ref, make_inputs((M, 17, 20, 18), torch.bfloat16))


@each_dtype
def test_repetition_gives_the_same_bits(dtype):
    inputs = make_inputs((35, 33, 24, 20), dtype)

    def output_and_grads():
        leaves = [x.detach().requires_grad_() for x in inputs.values()]
        y = ours(*leaves)
        return [y.detach(), *torch.autograd.grad(y, leaves, torch.ones_like(y))]

    first = output_and_grads()
    assert all(x.isfinite().all() for x in first)
    assert all(map(torch.equal, first, output_and_grads()))


def test_a_batch_without_tokens():
    leaves = [x.requires_grad_() for x in make_inputs((0, 33, 24, 7), torch.float32).values()]
    y = ours(*leaves)
    assert y.shape == (0, 7)
    for leaf, gradient in zip(leaves, torch.autograd.grad(y, leaves, torch.ones_like(y)), strict=True):
        assert torch.equal(gradient, torch.zeros_like(leaf))
