"""Every operator, with each of its options, under each of PyTorch's transforms, against its plain reference."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from second_order import assert_ordinary, assert_transforms, assert_twice_differentiable, gradients_twice
from torch import Tensor, nn

from scalelong.kernels.add_layer_norm import add_layer_norm, add_layer_norm_ref
from scalelong.kernels.attention import attention, attention_ref
from scalelong.kernels.conv3x3 import conv3x3, conv3x3_ref
from scalelong.kernels.gelu_linear import gelu_linear, gelu_linear_ref
from scalelong.kernels.group_norm import group_norm, group_norm_ref, skip_group_norm, skip_group_norm_ref
from scalelong.kernels.skip_conv1x1 import skip_conv1x1, skip_conv1x1_ref
from scalelong.kernels.skip_linear import skip_linear, skip_linear_ref
from scalelong.kernels.skip_norm_linear import skip_norm_linear, skip_norm_linear_ref
from scalelong.kernels.unit_rows import unit_rows, unit_rows_ref

Op = Callable[..., Any]


@dataclass(frozen=True)
class Case:
    op: Op
    ref: Op
    sizes: tuple[tuple[int, ...], ...]
    """Of the tensors; where one starts with 2, it is the batch."""
    call: Callable[..., Tensor] = lambda op, *tensors: op(*tensors)
    """Of either, with the tensors of these sizes."""

    def inputs(self, batch: int = 2) -> list[Tensor]:
        generator = torch.Generator().manual_seed(0)
        sizes = [(batch, *size[1:]) if size[0] == 2 else size for size in self.sizes]
        return [torch.randn(size, generator=generator) / 2 for size in sizes]

    def of(self, op: Op) -> Callable[..., Tensor]:
        return partial(self.call, op)


IMAGE, SKIP, TOKENS = (2, 4, 5, 6), (2, 8, 5, 6), (2, 7, 8)


def norm(act: str | None) -> Case:
    sizes = ((2, 12, 5, 6), (12,), (12,))
    return Case(group_norm, group_norm_ref, sizes, lambda op, x, weight, bias: op(x, 3, weight, bias, act=act))


def skip_norm(act: str | None) -> Case:
    def call(op: Op, h: Tensor, s: Tensor, scale: Tensor, *affine: Tensor) -> Tensor:
        weight, bias, gain, shift = affine
        return op(h, s, scale, 3, weight, bias, gain=gain, shift=shift, act=act)

    return Case(skip_group_norm, skip_group_norm_ref, (IMAGE, SKIP, (8,), (12,), (12,), (2, 12), (2, 12)), call)


def mlp(act: str) -> Case:
    sizes = (TOKENS, (6, 8), (6,))
    return Case(gelu_linear, gelu_linear_ref, sizes, lambda op, *tensors: op(*tensors, act=act))


def attends(sizes: tuple[tuple[int, ...], ...], scale: float | None, norm: Callable[..., Any] | None) -> Case:
    """The last two tensors are the weights of the norms, of queries and of keys."""

    def call(op: Op, *tensors: Tensor) -> Tensor:
        *projections, for_q, for_k = tensors
        qk_norm = None if norm is None else (partial(norm, for_q), partial(norm, for_k))
        qkv = projections[0] if len(projections) == 1 else tuple(projections)
        return op(qkv, 2, scale=scale, qk_norm=qk_norm) * (1 + for_q.mean() + for_k.mean())

    return Case(attention, attention_ref, (*sizes, (8,), (8,)), call)


def rms_norm(weight: Tensor, x: Tensor) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], 1 + weight)


def add_norm(op: Op, x: Tensor, branch: Tensor, weight: Tensor, bias: Tensor, *of_samples: Tensor) -> Tensor:
    gain, shift, gate, angle = of_samples
    stream, y = op(x, branch, weight, bias, gain=gain, shift=shift, gate=gate, angle=angle)
    return stream + 2 * y


PACKED, CROSSED = ((2, 7, 48),), ((2, 7, 16), (2, 3, 16), (2, 3, 16))
CASES = {
    **{f"group_norm {act}": norm(act) for act in ("silu", "gelu", "gelu-tanh", None)},
    **{f"skip_group_norm {act}": skip_norm(act) for act in ("silu", "gelu-tanh")},
    "skip_linear": Case(skip_linear, skip_linear_ref, (TOKENS, (2, 7, 4), (4,), (6, 12), (6,))),
    "skip_norm_linear": Case(
        skip_norm_linear, skip_norm_linear_ref, (TOKENS, (2, 7, 4), (2, 7), (12,), (12,), (6, 12), (6,))
    ),
    "skip_conv1x1": Case(skip_conv1x1, skip_conv1x1_ref, (IMAGE, SKIP, (8,), (6, 12, 1, 1), (6,))),
    "add_layer_norm": Case(
        add_layer_norm, add_layer_norm_ref, (TOKENS, TOKENS, (8,), (8,), (2, 8), (2, 8), (2, 8), (2, 4)), add_norm
    ),
    "gelu_linear gelu": mlp("gelu"),
    "gelu_linear gelu-tanh": mlp("gelu-tanh"),
    "conv3x3": Case(conv3x3, conv3x3_ref, (IMAGE, (6, 4, 3, 3), (6,))),
    "unit_rows": Case(unit_rows, unit_rows_ref, ((5, 4, 3),), lambda op, weight: op(weight, 0.7).cumsum(0)),
    "attention": attends(PACKED, None, None),
    "attention with scale and norms": attends(PACKED, 0.5, rms_norm),
    "cross-attention": attends(CROSSED, None, None),
    "cross-attention with scale and norms": attends(CROSSED, 0.5, rms_norm),
}
each_case = pytest.mark.parametrize("case", CASES.values(), ids=tuple(CASES))


def of_one_another(first: Tensor, *others: Tensor) -> list[Tensor]:
    """Inputs that all come from the first, as in a network."""
    return [first.tanh(), *(x + (i + 1) * first.mean() for i, x in enumerate(others))]


@each_case
def test_create_graph(case):
    assert_twice_differentiable(case.of(case.op), case.of(case.ref), of_one_another, case.inputs())


@each_case
def test_create_graph_through_what_was_compiled(case):
    torch.compiler.reset()
    compiled = torch.compile(case.of(case.op), backend="eager", fullgraph=True)
    if case.op is not attention:
        return assert_twice_differentiable(compiled, case.of(case.ref), of_one_another, case.inputs())
    with pytest.raises(RuntimeError, match="is not implemented"):  # by PyTorch's kernels, which say so
        gradients_twice(compiled, of_one_another, case.inputs())


@each_case
def test_grad_vmap_and_jvp(case):
    assert_transforms(case.of(case.op), case.of(case.ref), case.inputs())


@each_case
def test_the_output_may_be_changed_in_place(case):
    if case.call is Case.call:  # what a call makes of the output is no output of an operator
        assert_ordinary(case.of(case.op), case.inputs())


class Called(nn.Module):
    def __init__(self, call: Callable[..., Tensor]):
        super().__init__()
        self.call = call

    def forward(self, *tensors: Tensor) -> Tensor:
        return self.call(*tensors)


@each_case
def test_export_with_any_batch(case):
    batch = torch.export.Dim("batch", min=2, max=64)
    sizes = tuple({0: batch} if size[0] == 2 else None for size in case.sizes)
    exported = torch.export.export(Called(case.of(case.op)), tuple(case.inputs(3)), dynamic_shapes=(sizes,))
    for num in (2, 5):
        inputs = case.inputs(num)
        torch.testing.assert_close(exported.module()(*inputs), case.of(case.ref)(*inputs), rtol=1e-4, atol=1e-5)


@each_case
def test_one_graph_and_its_gradients_for_any_batch(case):
    torch.compiler.reset()
    compiled = torch.compile(case.of(case.op), fullgraph=True, dynamic=True, backend="aot_eager")
    for num in (2, 3, 5):
        leaves = [x.requires_grad_() for x in case.inputs(num)]
        with torch._dynamo.config.patch(error_on_recompile=num > 2):
            found = compiled(*leaves)
        expected = case.of(case.ref)(*leaves)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        grads = zip(*(torch.autograd.grad(y.square().sum(), leaves) for y in (found, expected)), strict=True)
        for ours, plain in grads:
            torch.testing.assert_close(ours, plain, rtol=1e-3, atol=1e-4)
