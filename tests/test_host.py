"""What a call costs the host, with launches that go nowhere."""

import os
import re
from typing import Any
from unittest.mock import patch

import pytest
import torch
import triton
from torch import Tensor

from scalelong.bench import host

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter launches nothing")

TARGETS_US = {"resident": 60, "split": 90}


@pytest.mark.parametrize("scale", host.SCALES)
@pytest.mark.parametrize(("form", "num_launches"), [("resident", 1 + 2), ("split", 3 + 4)])
def test_a_call_goes_round_triton_once_it_is_planned(form, num_launches, scale):
    launches = []
    with host.stubbed_launches(lambda *arguments: launches.append(arguments)):
        case = host.make_cases()[f"{form}-{scale}"]
        call = host.forward_and_backward(case.call, case.inputs)
        call()
        launches.clear()
        with patch.object(triton.JITFunction, "run", side_effect=AssertionError("through Triton")):
            grads = call()
    assert len(launches) == num_launches
    assert [grad.shape for grad in grads] == [x.shape for x in case.inputs]
    assert [grad.dtype for grad in grads] == [x.dtype for x in case.inputs]


@pytest.mark.parametrize("change", ["dtype", "stride", "address", "eps", "wanted", "address of saved"])
def test_another_kind_of_call_has_another_plan(change):
    with host.stubbed_launches():
        case = host.make_cases()["resident-float"]
        h, s, weight, bias = (x.detach() for x in case.inputs)
        plans = host.group_norm_triton._plans._kept

        def run(h: Tensor = h, s: Tensor = s, eps=1e-5, needs_s=True, pack: Any = lambda x: x):
            h, s = h.detach().requires_grad_(), s.detach().requires_grad_(needs_s)
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
                y = host.skip_group_norm(h, s, 0.7, 32, weight, bias, eps=eps)
            torch.autograd.backward(y, torch.empty_like(y))
            return h.grad, s.grad

        run()
        run()
        assert len(plans) == 2
        shifted = torch.zeros(h.numel() + 1, dtype=h.dtype)[1:].view(h.shape)
        changes = {
            "dtype": {"h": h.half(), "s": s.half()},
            "stride": {"h": h.to(memory_format=torch.channels_last), "s": s.to(memory_format=torch.channels_last)},
            "address": {"h": shifted},
            "eps": {"eps": 1e-6},
            "wanted": {"needs_s": False},
            "address of saved": {"pack": lambda x: shifted if x.shape == h.shape else x},
        }
        dh, ds = run(**changes[change])
    assert dh is not None
    assert (ds is None) == (change == "wanted")
    # Backward's plan alone where forward ran as before.
    assert len(plans) == (3 if change in ("wanted", "address of saved") else 4)


def test_bad_arguments_are_found_after_good_ones():
    with host.stubbed_launches():
        h, s, weight, bias = host.make_cases()["resident-float"].inputs
        host.skip_group_norm(h, s, 0.7, 32, weight, bias)
        with pytest.raises(ValueError, match="do not divide into 33 groups"):
            host.skip_group_norm(h, s, 0.7, 33, weight, bias)
        with pytest.raises(ValueError, match=r"weight has shape \(63,\)"):
            host.skip_group_norm(h, s, 0.7, 32, weight[1:], bias)


def test_the_bench_ends_with_what_lies_beyond_a_bare_function(capsys):
    host.main(only=("resident-float", "split-float"), directions=("both",))
    last = capsys.readouterr().out.splitlines()[-1]
    found = re.fullmatch(
        r"forward \+ backward beyond a bare autograd\.Function: resident (\d+) us, split (\d+) us", last
    )
    assert found, last
    # A machine under test is busy.
    for us, target in zip(found.groups(), TARGETS_US.values(), strict=True):
        assert 0 < int(us) < 5 * target
