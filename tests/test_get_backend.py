"""What get_backend says of a call, against what the call and its backward launch."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest.mock import patch

import pytest
import torch
from operators_seen import OperatorsSeen
from torch import Tensor, nn

from scalelong.kernels import native_library
from scalelong.kernels.add_layer_norm import add_layer_norm
from scalelong.kernels.attention import BACKENDS, attention
from scalelong.kernels.backend import Backends, get_backend, use_backend
from scalelong.kernels.conv3x3 import conv3x3
from scalelong.kernels.gelu_linear import gelu_linear
from scalelong.kernels.group_norm import group_norm, skip_group_norm
from scalelong.kernels.launches import Plan
from scalelong.kernels.skip_conv1x1 import skip_conv1x1
from scalelong.kernels.skip_linear import IN_TRITON, skip_linear
from scalelong.kernels.skip_norm_linear import skip_norm_linear
from scalelong.kernels.unit_rows import unit_rows

needs_native = pytest.mark.skipif(native_library.ERROR is not None, reason=str(native_library.ERROR))
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Operators of PyTorch's own libraries that ours call where they have no kernel for something.
TORCHS = ("mm", "addmm", "bmm", "baddbmm", "convolution", "convolution_backward", "_scaled_dot_product", "_weight_norm")


NATIVES = (
    *("group_norm_forward", "group_norm_backward", "add_layer_norm_forward", "add_layer_norm_backward"),
    *("gelu_forward", "gelu_backward", "conv3x3_weight_grad"),
)


@dataclass(frozen=True)
class Call:
    operator: Callable[..., Any]
    make: Callable[[torch.dtype], Sequence[Any]]


def leaves(*shapes: tuple[int, ...]) -> Callable[[torch.dtype], list[Tensor]]:
    return lambda dtype: [torch.randn(shape).to(dtype).requires_grad_() for shape in shapes]


def images(*shapes: tuple[int, ...], channels_last: bool) -> Callable[[torch.dtype], list[Tensor]]:
    def make(dtype: torch.dtype) -> list[Tensor]:
        memory_format = torch.channels_last if channels_last else torch.contiguous_format
        return [
            torch.randn(shape).to(dtype).contiguous(memory_format=memory_format).requires_grad_() for shape in shapes
        ]

    return make


def with_scale(make: Callable[[torch.dtype], list[Tensor]], scale: Any) -> Callable[[torch.dtype], tuple[Any, ...]]:
    def arguments(dtype: torch.dtype) -> tuple[Any, ...]:
        a, b, *rest = make(dtype)
        return a, b, scale, *rest

    return arguments


def norm(make: Callable[[torch.dtype], list[Tensor]], *between: Any) -> Callable[[torch.dtype], tuple[Any, ...]]:
    return lambda dtype: (*make(dtype), *between, 2, None, None)


TOKENS, CONV = ((2, 5, 8), (2, 5, 4), (6, 12), (6,)), ((2, 8, 4, 4), (2, 4, 4, 4), (6, 12, 1, 1))
PER_CHANNEL = torch.rand(2, 4)
CALLS = {
    "group_norm": Call(group_norm, norm(leaves((2, 8, 4, 4)))),
    "skip_group_norm": Call(skip_group_norm, norm(leaves((2, 8, 4, 4), (2, 4, 4, 4)), 0.5)),
    "add_layer_norm": Call(add_layer_norm, leaves((2, 5, 8), (2, 5, 8), (8,), (8,))),
    "gelu_linear": Call(gelu_linear, leaves((5, 8), (6, 8), (6,))),
    "skip_linear": Call(skip_linear, with_scale(leaves(*TOKENS), 0.5)),
    "skip_linear of tokens": Call(skip_linear, with_scale(leaves(*TOKENS), torch.rand(2, 5))),
    "skip_norm_linear": Call(skip_norm_linear, with_scale(leaves(*TOKENS[:2], (12,), (12,), *TOKENS[2:]), 0.5)),
    "skip_conv1x1": Call(skip_conv1x1, lambda d: (*with_scale(images(*CONV, channels_last=False), 0.5)(d), None)),
    "skip_conv1x1 in channels_last": Call(
        skip_conv1x1, lambda d: (*with_scale(images(*CONV, channels_last=True), 0.5)(d), None)
    ),
    "skip_conv1x1 of channels": Call(
        skip_conv1x1, lambda d: (*with_scale(images(*CONV, channels_last=True), PER_CHANNEL)(d), None)
    ),
    "conv3x3": Call(conv3x3, leaves((2, 8, 4, 4), (6, 8, 3, 3), (6,))),
    "conv3x3, frozen": Call(conv3x3, lambda d: (leaves((2, 8, 4, 4))(d)[0], torch.randn(6, 8, 3, 3).to(d), None)),
    "unit_rows": Call(unit_rows, leaves((6, 8))),
    "attention": Call(attention, lambda d: (*leaves((2, 5, 24))(d), 2)),
    "cross-attention": Call(attention, lambda d: (tuple(leaves((2, 5, 8), (2, 3, 8), (2, 3, 8))(d)), 2)),
}
each_call = pytest.mark.parametrize("call", CALLS.values(), ids=tuple(CALLS))


def run(call: Call, arguments: Sequence[Any]) -> Backends:
    plans: list[Plan] = []
    with patch.object(Plan, "run", lambda plan, tensors: plans.append(plan)):
        with OperatorsSeen() as forward:
            y = call.operator(*arguments)
        y = y if isinstance(y, Tensor) else y[1]
        if not has_function_of_ours(y.grad_fn):
            return Backends("reference", "reference")
        in_forward = launched(forward, plans)
        plans.clear()
        with OperatorsSeen() as backward:
            y.backward(torch.zeros_like(y))
    return Backends(in_forward, launched(backward, plans))


def has_function_of_ours(node: Any) -> bool:
    """Where there is none, autograd differentiates the formula."""
    return node is not None and (
        node.name().startswith("_") or any(has_function_of_ours(n) for n, _ in node.next_functions)
    )


def launched(seen: OperatorsSeen, plans: list[Plan]) -> str:
    names = [name for name, _ in seen.all]
    if plans:
        return "triton"
    if any(name in NATIVES for name in names):
        return "native"
    assert any(name.startswith(TORCHS) for name in names), names
    return "torch"


def as_seen(call: Call, told: Backends) -> Backends:
    """The convolution's formula is PyTorch's, which nothing tells from the convolution itself."""
    return Backends(*("reference" if call.operator is conv3x3 and x == "torch" else x for x in told))


@needs_native
@each_call
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("forced", [None, "native", "reference"])
def test_it_tells_what_runs_on_a_cpu(call, dtype, forced):
    arguments = call.make(dtype)
    if forced is None:
        told = get_backend(call.operator, *arguments)
        assert as_seen(call, told) == as_seen(call, run(call, arguments))
        assert (told.forward == "reference") == (dtype == torch.float64 and call.operator is not attention)
        return
    with use_backend(forced):
        if dtype == torch.float64 and forced == "native" and call.operator is not attention:
            with pytest.raises(RuntimeError, match="takes float32, bfloat16 and float16, not float64"):
                get_backend(call.operator, *arguments)
            return
        told = get_backend(call.operator, *arguments)
        assert as_seen(call, told) == as_seen(call, run(call, arguments))
    if forced == "reference":
        assert told == Backends("reference", "reference")


@each_call
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_it_tells_what_runs_in_triton(call, dtype, monkeypatch):
    monkeypatch.setattr("scalelong.kernels.backend._interprets", True)
    arguments = call.make(dtype)
    assert as_seen(call, get_backend(call.operator, *arguments)) == as_seen(call, run(call, arguments))


@pytest.mark.parametrize("under_autocast", [False, True], ids=["16 bits", "fp32 operands"])
def test_the_products_of_a_gpu_go_where_the_table_says(under_autocast, monkeypatch):
    monkeypatch.setattr("scalelong.kernels.backend._why_no_triton", lambda: None)
    dtype = torch.float32 if under_autocast else torch.bfloat16
    x, s, weight = (torch.empty(shape, dtype=dtype, device="meta") for shape in TOKENS[:3])
    monkeypatch.setattr("scalelong.kernels.skip_linear.backend_of", lambda x: "triton")
    monkeypatch.setattr("scalelong.kernels.skip_linear.autocast_dtype", lambda x: torch.bfloat16)
    told = partial(get_backend, skip_linear, x, s, 0.5, weight, None)
    assert told() == Backends("triton", "triton" if under_autocast else "torch")
    monkeypatch.setitem(IN_TRITON, "fp32 operands" if under_autocast else "16 bits", ("weight",))
    assert told() == Backends("torch", "torch+triton")
    monkeypatch.setattr("scalelong.kernels.skip_linear.autocast_dtype", lambda x: torch.float32)
    assert told() == Backends("torch", "torch")


def test_it_tells_the_package_of_attention():
    qkv = torch.randn(2, 5, 24)
    told = {name: get_backend(attention, qkv, 2, backend=name).forward for name in ("auto", *BACKENDS)}
    assert told == {name: name if name in ("fa2", "fa3", "fa4", "reference") else "torch" for name in told}


def test_transforms_take_the_reference():
    told = []

    def loss(x: Tensor) -> Tensor:
        told.append(get_backend(group_norm, x, 2, None, None))
        return group_norm(x, 2, None, None).sum()

    torch.func.grad(loss)(torch.randn(2, 4, 3))
    assert told == [Backends("reference", "reference")]


def test_what_is_no_operator_is_an_error():
    with pytest.raises(TypeError, match=r"no operator that tells what it runs; .*group_norm.*skip_linear"):
        get_backend(nn.functional.linear, torch.ones(2))
