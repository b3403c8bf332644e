"""What every operator takes that PyTorch's own takes: shapes, subclasses of tensors, copies on write, and counters."""

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils.flop_counter import FlopCounterMode

from scalelong.kernels.add_layer_norm import add_layer_norm
from scalelong.kernels.attention import attention
from scalelong.kernels.conv3x3 import conv3x3, conv3x3_ref
from scalelong.kernels.gelu_linear import gelu_linear, gelu_linear_ref
from scalelong.kernels.group_norm import group_norm
from scalelong.kernels.skip_conv1x1 import skip_conv1x1, skip_conv1x1_ref
from scalelong.kernels.skip_linear import skip_linear, skip_linear_ref
from scalelong.kernels.skip_norm_linear import skip_norm_linear
from scalelong.kernels.unit_rows import unit_rows

LEADING = [(), (1,), (6,), (2, 3), (2, 3, 4), (0,), (2, 0, 3)]


@pytest.mark.parametrize("leading", LEADING, ids=str)
@pytest.mark.parametrize("kind", ["none", "float", "scalar", "element", "channel", "token", "token of one"])
def test_skip_linear_takes_the_leading_dimensions_that_linear_takes(leading, kind):
    scales = {
        "none": None, "float": 0.7, "scalar": torch.tensor(0.7), "element": torch.full((1,), 0.7),
        "channel": torch.rand(5), "token": torch.rand(leading), "token of one": torch.rand(*leading, 1),
    }  # fmt: skip
    scale, x, s = scales[kind], torch.randn(*leading, 4), torch.randn(*leading, 5)
    weight, bias = torch.randn(3, 9), torch.randn(3)
    leaves = [x.requires_grad_() for x in (x, s, weight, bias)]
    leaves += [scale.requires_grad_()] if isinstance(scale, Tensor) else []
    scaled = s if scale is None else s * (scale[..., None] if kind == "token" else scale)  # type: ignore[index]
    expected = F.linear(torch.cat([x, scaled], -1), weight, bias)
    found = skip_linear(x, s, scale, weight, bias)
    torch.testing.assert_close(found, expected)
    for ours, plain, leaf in zip(
        torch.autograd.grad(found.square().sum(), leaves),
        torch.autograd.grad(expected.square().sum(), leaves),
        leaves,
        strict=True,
    ):
        assert ours.shape == leaf.shape
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-4)


def test_an_image_without_a_batch_is_named():
    h, s, weight = torch.ones(4, 5, 5), torch.ones(3, 5, 5), torch.ones(2, 7, 1, 1)
    with pytest.raises(ValueError, match=r"h \(4, 5, 5\) has no batch: weight .* takes \(N, C, \*\) with 2 spatial"):
        skip_conv1x1(h, s, None, weight, None)


X, S, WEIGHT = torch.ones(2, 3, 4).cumsum(1), torch.ones(2, 3, 3).cumsum(2), torch.eye(5, 7) + 0.1
H, SKIP = torch.linspace(-1, 1, 200).view(2, 4, 5, 5), torch.linspace(1, 2, 150).view(2, 3, 5, 5)
OF_WEIGHTS = {
    "skip_linear": lambda w: skip_linear(X, S, 0.5, w, None),
    "skip_linear-tokens": lambda w: skip_linear(X, S, torch.full((2, 3), 0.5), w, None),
    "gelu_linear": lambda w: gelu_linear(X, w[:, :4], None),
    "skip_conv1x1": lambda w: skip_conv1x1(H, SKIP, 0.5, w, None),
    "skip_conv1x1-channels_last": lambda w: skip_conv1x1(
        H.contiguous(memory_format=torch.channels_last), SKIP, 0.5, w, None
    ),
    "conv3x3": lambda w: conv3x3(H, w[:, :4, None, None].expand(-1, -1, 3, 3), None),
}


@pytest.mark.parametrize("op", OF_WEIGHTS.values(), ids=tuple(OF_WEIGHTS))
def test_weights_that_are_tensor_subclasses(op):
    """As quantised and sharded ones are: both of the tensors inside are computed with, forward and backward."""
    weight = TwoTensor(WEIGHT, 2 * WEIGHT).requires_grad_()
    y = op(weight)
    (grad,) = torch.autograd.grad(y.square().sum(), weight)
    for part, plain in (("a", WEIGHT), ("b", 2 * WEIGHT)):
        leaf = plain.clone().requires_grad_()
        expected = op(leaf)
        torch.testing.assert_close(getattr(y, part), expected.detach())
        (truth,) = torch.autograd.grad(expected.square().sum(), leaf)
        torch.testing.assert_close(getattr(grad, part), truth, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("num_threads", [1, 2])
def test_inputs_that_are_copied_on_write(num_threads):
    """Inside a parallel region nothing may be copied."""
    torch.set_num_threads(num_threads)

    def lazy(*shape: int) -> Tensor:
        return torch._lazy_clone(torch.randn(*shape))

    weight, image, tokens = (
        torch.randn(8, 512),
        lazy(4, 64, 32, 32).requires_grad_(),
        lazy(64, 65, 128).requires_grad_(),
    )
    x = lazy(1028, 512).requires_grad_()
    gelu = gelu_linear(x, weight, None)
    torch.testing.assert_close(gelu, gelu_linear_ref(x, weight, None), rtol=1e-4, atol=1e-4)
    torch.autograd.grad(gelu, x, lazy(1028, 8))
    torch.autograd.grad(group_norm(image, 8, None, None), image, lazy(4, 64, 32, 32))
    torch.autograd.grad(add_layer_norm(tokens, lazy(64, 65, 128), None, None), tokens, (lazy(64, 65, 128),) * 2)
    kernel, projection = lazy(16, 64, 3, 3).requires_grad_(), lazy(16, 256).requires_grad_()
    torch.autograd.grad(conv3x3(image, kernel, None), kernel, lazy(4, 16, 32, 32))
    torch.autograd.grad(skip_linear(tokens, tokens, 0.5, projection, None), projection, lazy(64, 65, 16))


def flops(op, *inputs: Tensor) -> int:
    leaves = [x.detach().requires_grad_() for x in inputs]
    with FlopCounterMode(display=False) as counter:
        op(*leaves).sum().backward()
    return counter.get_total_flops()


A, B, W = torch.randn(2, 8, 16), torch.randn(2, 8, 16), torch.randn(24, 32)
IMAGE, LONG, KERNEL = torch.randn(2, 16, 8, 8), torch.randn(2, 8, 8, 8), torch.randn(8, 24, 1, 1)


@pytest.mark.parametrize("scale", [None, 0.5, torch.tensor(0.5), torch.rand(2, 8), torch.rand(16)])
def test_all_of_skip_linear_is_counted(scale):
    found, expected = (
        flops(lambda a, b, w, op=op: op(a, b, scale, w, None), A, B, W) for op in (skip_linear, skip_linear_ref)
    )
    assert found == expected > 0


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_all_of_the_convolutions_is_counted(layout):
    image, skip = (x.contiguous(memory_format=layout) for x in (IMAGE, LONG))
    found, expected = (
        flops(lambda h, s, w, op=op: op(h, s, 0.5, w, None), image, skip, KERNEL)
        for op in (skip_conv1x1, skip_conv1x1_ref)
    )
    assert found == expected > 0
    kernel = torch.randn(8, 16, 3, 3)
    found, expected = (flops(lambda x, w, op=op: op(x, w, None), image, kernel) for op in (conv3x3, conv3x3_ref))
    assert found == expected > 0


def test_a_scale_of_one_element_is_learned():
    scale = nn.Parameter(torch.ones(1))
    skip_linear(A, B, scale, W, None).sum().backward()
    assert scale.grad is not None
    torch.testing.assert_close(scale.grad, (B @ W[:, 16:].t()).sum()[None], rtol=1e-3, atol=1e-3)


def _skip_norm_linear(x: Tensor, s: Tensor, *parameters: Tensor) -> Tensor:
    return skip_norm_linear(x, s, 0.7, *parameters)


CALLS: dict[str, Callable[[], Tensor]] = {
    "skip_linear": lambda: skip_linear(*_tensors((2, 5, 8), (2, 5, 8)), 0.7, *_tensors((6, 16), (6,))),  # type: ignore[misc]
    "skip_norm_linear": lambda: _skip_norm_linear(*_tensors((2, 5, 8), (2, 5, 8), (16,), (16,), (6, 16), (6,))),
    "gelu_linear": lambda: gelu_linear(*_tensors((2, 5, 8), (6, 8), (6,))),
    "add_layer_norm": lambda: add_layer_norm(*_tensors((2, 5, 8), (2, 5, 8), (8,), (8,)))[1],
    "group_norm": lambda: group_norm(_tensors((2, 8, 4))[0], 2, *_tensors((8,), (8,))),
    "conv3x3": lambda: conv3x3(*_tensors((2, 8, 4, 4), (6, 8, 3, 3), (6,))),
    "skip_conv1x1": lambda: skip_conv1x1(*_tensors((2, 8, 4, 4), (2, 8, 4, 4)), 0.7, *_tensors((6, 16, 1, 1), (6,))),  # type: ignore[misc]
    "attention": lambda: attention(_tensors((2, 5, 24))[0], 2),
    "unit_rows": lambda: unit_rows(*_tensors((6, 8))),
}


def _tensors(*shapes: tuple[int, ...]) -> Any:
    return [torch.ones(shape, requires_grad=True) for shape in shapes]


@pytest.mark.parametrize("operator", CALLS)
def test_tensors_that_only_stand_for_real_ones(operator):
    """As memory is planned with, before and after calls of the same kind with real ones, in modes of their own."""
    call = CALLS[operator]
    for _ in range(2):
        with FakeTensorMode():
            y = call()
            y.sum().backward()
        assert isinstance(y, FakeTensor)
        real = call()
        real.sum().backward()
        assert not isinstance(real, FakeTensor)
        assert (y.shape, y.dtype, y.stride()) == (real.shape, real.dtype, real.stride())


@pytest.mark.parametrize("operator", CALLS)
def test_tensors_that_are_distributed(operator, process_group, monkeypatch):
    """Not only where FSDP has gathered them; and plain ones are computed as before after that."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate, distribute_tensor

    call, plain, mesh = CALLS[operator], _tensors, init_device_mesh("cpu", (1,))
    expected, leaves = call(), []

    def distributed(*shapes: tuple[int, ...]) -> Any:
        leaves.extend(distribute_tensor(x.detach(), mesh, [Replicate()]).requires_grad_() for x in plain(*shapes))
        return leaves[-len(shapes) :]

    with monkeypatch.context() as patch:
        patch.setattr(sys.modules[__name__], "_tensors", distributed)
        y = call()
        y.sum().backward()
    assert isinstance(y, DTensor)
    torch.testing.assert_close(y.full_tensor(), expected)
    assert all(isinstance(leaf.grad, DTensor) for leaf in leaves)
    assert torch.equal(call(), expected)


def test_stand_ins_that_are_met_outside_their_mode_leave_nothing_behind():
    def calls(x: Tensor, weight: Tensor) -> list[Tensor]:
        return [group_norm(x, 3, weight, weight), *add_layer_norm(x.mT, x.mT, weight, weight)]

    x, weight = torch.ones(3, 24, 5), torch.ones(24)
    mode = FakeTensorMode()
    assert all(isinstance(y, FakeTensor) for y in calls(mode.from_tensor(x), mode.from_tensor(weight)))
    assert not any(isinstance(y, FakeTensor) for y in calls(x, weight))
