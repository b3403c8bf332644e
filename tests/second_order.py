"""Derivatives of every kind that PyTorch has, of an operator against its plain reference, on inputs that depend on one
another: ``make_inputs`` computes those of the operator from ``leaves``."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Op = Callable[..., Tensor]
MakeInputs = Callable[..., Sequence[Tensor]]


def gradients_twice(op: Op, make_inputs: MakeInputs, leaves: Sequence[Tensor]) -> list[Tensor]:
    """Of the output's square, and of the square of these gradients."""
    leaves = [x.detach().requires_grad_() for x in leaves]
    first = torch.autograd.grad(op(*make_inputs(*leaves)).square().sum(), leaves, create_graph=True)
    penalty = torch.stack([x.square().mean() for x in first]).sum()
    return [x.detach() for x in (*first, *torch.autograd.grad(penalty, leaves))]


def assert_twice_differentiable(op: Op, ref: Op, make_inputs: MakeInputs, leaves: Sequence[Tensor]) -> None:
    for found, expected in zip(
        gradients_twice(op, make_inputs, leaves), gradients_twice(ref, make_inputs, leaves), strict=True
    ):
        error = (found - expected).abs().max() / expected.abs().max()
        assert error < 1e-4, f"relative error {error:.3g}"


def assert_transforms(op: Op, ref: Op, inputs: Sequence[Tensor]) -> None:
    """torch.func: grad, vmap of grad over the first dimension of the first input, and jvp."""
    places = tuple(range(len(inputs)))
    x, *others = inputs

    def results(f: Op) -> list[Tensor]:
        def loss(*inputs: Tensor) -> Tensor:
            return f(*inputs).square().mean()

        def of_sample(sample: Tensor) -> Tensor:
            return torch.func.grad(lambda sample: loss(sample, *others))(sample)

        grads = torch.func.grad(loss, places)(*inputs)
        samples = torch.stack([x, 2 * x])
        jvp = torch.func.jvp(f, tuple(inputs), tuple(torch.ones_like(x) for x in inputs))
        return [*grads, torch.func.vmap(of_sample)(samples), *jvp]

    for found, expected in zip(results(op), results(ref), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def assert_ordinary(op: Op, inputs: Sequence[Tensor]) -> None:
    """The output is no view, and may be changed in place."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    y = op(*leaves)
    assert not y._is_view()
    expected = torch.autograd.grad(op(*leaves).sum(), leaves)
    y += 1
    assert all(map(torch.equal, torch.autograd.grad(y.sum(), leaves), expected))
