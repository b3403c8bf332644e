import pytest
import torch
from parity import assert_within_budget

from scalelong.kernels.unit_rows import unit_rows, unit_rows_ref


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(6, 8), (5, 3, 3, 3), (1, 1), (3, 1025)], ids=str)
def test_as_exact_as_the_reference(shape, dtype):
    weight = torch.randn(shape).to(dtype)
    floors = {"dw": 1e-6 if 1 in weight.shape else 0.0}  # a row of one entry has a gradient of zero
    for laid_out in (weight, weight.mT):
        assert_within_budget(
            lambda w: unit_rows(w, 0.7), lambda w: unit_rows_ref(w, 0.7), {"w": laid_out}, floors=floors
        )


def test_gradients_and_their_gradients_in_fp64():
    weight = torch.randn(4, 3, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(unit_rows, weight)
    assert torch.autograd.gradgradcheck(unit_rows, weight)


def test_gradients_are_orthogonal_to_rows():
    weight = torch.randn(32, 300, requires_grad=True)
    (unit_rows(weight) @ torch.randn(300)).square().sum().backward()
    assert weight.grad is not None
    cosines = torch.cosine_similarity(weight.detach(), weight.grad, dim=1)
    assert cosines.abs().max() < 1e-6


def test_a_weight_without_rows_is_refused():
    with pytest.raises(ValueError, match=r"unit_rows: a weight has rows, \(O, ...\), got \(5,\)"):
        unit_rows(torch.ones(5))
