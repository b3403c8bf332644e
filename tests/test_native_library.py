"""The C++ library below its Python: rounding, what it refuses, gradients that nobody wants, instruction sets."""

import itertools
from pathlib import Path

import pytest
import torch
from group_norm_cases import Case, in_channels_last
from instruction_sets import FLAGS, outcome_on, run_on

from scalelong.kernels import group_norm_native, native_library
from scalelong.kernels.group_norm_arguments import Options, Tensors, Wanted

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.skipif(native_library.ERROR is not None, reason=str(native_library.ERROR))
both_layouts = pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])


@pytest.mark.parametrize("isa", FLAGS)
def test_bfloat16_rounds_as_torch_does_and_keeps_each_kind_of_nan(isa):
    run_on(
        isa,
        """
import torch
from scalelong.kernels import native_library
native = torch.ops.scalelong_native
high, low = torch.arange(2**16, dtype=torch.int32) << 16, torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF])
numbers = (high[:, None] | low.int()).reshape(-1).view(torch.float32)
# The statistics of NaN are NaN: each kind comes in by the weight of a channel.
nans = numbers[numbers.isnan()]
n = len(nans)
for last in (False, True):
    h = torch.randn(1, n, 4).bfloat16()
    h = h.movedim(1, -1).contiguous().movedim(-1, 1) if last else h
    y, mean, rstd = torch.empty_like(h), torch.empty(1, 1), torch.empty(1, 1)
    native.group_norm_forward(y, mean, rstd, h, None, None, 1.0, nans, nans, None, None, 1, 1e-5, 0, last)
    assert y.isnan().all()
    dh = torch.zeros_like(h)
    native.group_norm_backward(
        dh, *[None] * 6, torch.ones_like(h), h, None, None, 1.0, nans, nans, None, None, mean, rstd, 1, 0, last
    )
    assert dh.isnan().all()
# Identity: h of mean 0 and variance 1 gives its weight back, which is rounded.
normal = numbers[numbers.isfinite() & (numbers.abs() >= 2.0**-126)]
h = torch.tensor([1.0, -1.0]).bfloat16().expand(1, len(normal), 2).contiguous()
y, mean, rstd = torch.empty_like(h), torch.empty(1, len(normal)), torch.empty(1, len(normal))
native.group_norm_forward(
    y, mean, rstd, h, None, None, 1.0, normal, torch.zeros_like(normal), None, None, len(normal), 0.0, 0, False
)
assert torch.equal(y[0, :, 0], normal.bfloat16())
assert torch.equal(y[0, :, 1], -normal.bfloat16())
""",
    )


def test_an_unknown_instruction_set_is_refused_by_name():
    code = "import torch; from scalelong.kernels.gelu_linear import _gelu; _gelu(torch.ones(1), torch.float32, 'gelu')"
    status, err = outcome_on("avx-2", code)
    assert status != 0
    assert "SCALELONG_ISA='avx-2' is none of baseline, avx2, avx512, avx512_bf16" in err


NAMES = ("h", "s", "scale", "weight", "bias", "gain", "shift")


@both_layouts
@pytest.mark.parametrize("act", ["silu", "gelu-tanh", None])
def test_gradients_that_nobody_wants_change_no_other(channels_last, act):
    case = Case(
        num_hidden=7, num_skip=5, groups=3, spatial=(9, 7), scale="(Cs,)", is_adaptive=True, channels_last=channels_last
    )
    inputs = case.inputs()
    h, s, scale, weight, bias, gain, shift = (inputs[name] for name in NAMES)
    y = torch.cat([h, s], 1)
    y = in_channels_last(y) if channels_last else y.contiguous()
    mean, rstd = torch.empty(2, 3), torch.empty(2, 3)
    tensors, options = Tensors(h, s, scale, weight, bias, gain, shift), Options(1.0, 3, 1e-5, act)
    group_norm_native.forward(tensors, options, channels_last, y, mean, rstd)
    dy = torch.randn_like(y)

    def backward(wanted):
        return group_norm_native.backward(dy, tensors, mean, rstd, options, channels_last, Wanted(*wanted))

    full = backward((True,) * 7)
    for wanted in itertools.product([False, True], repeat=7):
        for i, (part, whole) in enumerate(zip(backward(wanted), full, strict=True)):
            if wanted[i]:
                assert part is not None
                assert whole is not None
                assert torch.equal(part, whole), (wanted, NAMES[i])
            else:
                assert part is None


def arguments(**changes):
    """Of group_norm_forward."""
    values = {
        "y": torch.empty(2, 8, 3, 3), "mean": torch.empty(2, 4), "rstd": torch.empty(2, 4),
        "h": torch.ones(2, 5, 3, 3), "s": torch.ones(2, 3, 3, 3), "scale": torch.ones(3), "float_scale": 1.0,
        "weight": torch.ones(8), "bias": torch.ones(8), "gain": torch.ones(2, 8), "shift": torch.ones(2, 8),
        "groups": 4, "eps": 1e-5, "act": 1, "channels_last": False,
    }  # fmt: skip
    return tuple((values | changes).values())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"h": torch.ones(2, 5, 3, 3).double()}, "Double"),
        ({"s": torch.ones(2, 3, 3, 3).bfloat16()}, "s is BFloat16, not Float"),
        ({"s": torch.ones(2, 3, 3, 4)}, "s does not have the shape"),
        ({"y": torch.empty(2, 7, 3, 3)}, "y does not have the shape"),
        ({"y": torch.empty(2, 3, 3, 8).movedim(-1, 1)}, "y is not dense"),
        ({"channels_last": True}, "h is not dense"),
        ({"mean": torch.empty(2, 3)}, "mean has 6 elements, not 8"),
        ({"rstd": torch.empty(2, 4).double()}, "rstd is Double, not Float"),
        ({"scale": torch.ones(4)}, "scale is not of"),
        ({"weight": torch.ones(7)}, "weight has 7 elements, not 8"),
        ({"weight": None}, "weight and bias, or neither"),
        ({"bias": torch.ones(8).half()}, "bias is Half, not Float"),
        ({"gain": torch.ones(8)}, "gain has 8 elements, not 16"),
        ({"shift": torch.ones(8, 2).t()}, "shift is not contiguous"),
        ({"groups": 3}, "8 channels in 3 groups"),
        ({"groups": 0}, "8 channels in 0 groups"),
        ({"act": 4}, "no activation 4"),
    ],
)
def test_group_norm_refuses_what_it_cannot_read(changes, message):
    torch.ops.scalelong_native.group_norm_forward(*arguments())
    with pytest.raises(RuntimeError, match=message):
        torch.ops.scalelong_native.group_norm_forward(*arguments(**changes))


def test_gelu_and_conv3x3_refuse_what_they_cannot_read():
    native, x = torch.ops.scalelong_native, torch.ones(2, 3, 5, 5)
    with pytest.raises(RuntimeError, match="gelu: y has 3 elements, not 4"):
        native.gelu_forward(torch.empty(3), torch.ones(4), False)
    with pytest.raises(RuntimeError, match="gelu: dy is Half, not Float"):
        native.gelu_backward(torch.empty(4), torch.empty(4), torch.ones(4).half(), torch.ones(4), True)
    with pytest.raises(RuntimeError, match="Double"):
        native.gelu_forward(torch.empty(4).double(), torch.ones(4).double(), False)
    with pytest.raises(RuntimeError, match="dout is Double, not Float"):
        native.conv3x3_scratch(torch.ones(2, 4, 5, 5).double(), x)
    with pytest.raises(RuntimeError, match="scratch has 1 elements"):
        native.conv3x3_weight_grad(torch.empty(4, 3, 3, 3), torch.empty(4), torch.empty(1), torch.ones(2, 4, 5, 5), x)
