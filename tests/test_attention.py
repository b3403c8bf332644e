import math
from functools import partial

import pytest
import torch
from parity import assert_within_budget

from scalelong.kernels.attention import attention, attention_ref


def qkv(B: int, T: int, H: int, E: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(B, T, 3 * H * E, dtype=dtype)


@pytest.mark.parametrize("T", [1, 16, 257])
@pytest.mark.parametrize("E", [64, 72])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("backend", ["auto", "sdpa"])
def test_as_exact_as_the_reference(backend, dtype, E, T):
    op = partial(attention, num_heads=2, backend=backend)
    assert_within_budget(op, partial(attention_ref, num_heads=2), {"qkv": qkv(2, T, 2, E, dtype)})


def test_parity_holds_for_a_permuted_input():
    def transposed(op, qkv):
        return op(qkv.transpose(0, 1), 2)

    inputs = {"qkv": qkv(17, 2, 2, 8)}
    assert_within_budget(partial(transposed, attention), partial(transposed, attention_ref), inputs)


def test_reference_backend_is_the_reference():
    x = qkv(2, 16, 2, 8)
    assert torch.equal(attention(x, 2, backend="reference"), attention_ref(x, 2))


def test_reference_attends_head_by_head_in_the_published_layout():
    B, T, H, E = 2, 5, 3, 4
    x = qkv(B, T, H, E, torch.float64)
    q, k, v = x.split(H * E, dim=-1)
    for b in range(B):
        for h in range(H):
            head = slice(h * E, (h + 1) * E)
            weights = torch.softmax(q[b, :, head] @ k[b, :, head].T / math.sqrt(E), dim=-1)
            torch.testing.assert_close(attention_ref(x, H)[b, :, head], weights @ v[b, :, head])


def test_reference_gradients():
    x = qkv(2, 3, 2, 4, torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(partial(attention_ref, num_heads=2), x, fast_mode=True)


def test_large_logits_stay_finite():
    assert attention(1e3 * qkv(1, 16, 2, 8), 2).isfinite().all()


@pytest.mark.parametrize(
    ("shape", "num_heads", "backend", "message"),
    [
        ((2, 12), 2, "auto", r"\(B, T, 3D\), got \(2, 12\)"),
        ((2, 5, 13), 1, "auto", r"\(B, T, 3D\), got \(2, 5, 13\)"),
        ((2, 5, 12), 3, "auto", "3 heads do not divide the width 4"),
        ((2, 5, 12), 0, "auto", "0 heads do not divide the width 4"),
        ((2, 5, 12), 2, "fast", "unknown backend 'fast'; there are auto, sdpa, reference"),
    ],
)
def test_bad_arguments_are_named(shape, num_heads, backend, message):
    with pytest.raises(ValueError, match=message):
        attention(torch.randn(shape), num_heads, backend=backend)
