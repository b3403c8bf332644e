"""Gradients of gradients: those of an operator's plain reference, which PyTorch differentiates again."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Tensors = Sequence[Tensor | None]


def differentiable_gradients(
    f: Callable[..., Tensor], tensors: Tensors, needed: Sequence[bool], dy: Tensor
) -> tuple[Tensor | None, ...]:
    """What backward returns under create_graph=True: the gradients of ``f(*tensors)``, where ``needed``.

    Taken at aliases of the tensors: saved tensors are still attached to what they were computed from, and where one
    input was computed from another, that path would be counted here and once more by the engine.
    """
    aliases = [None if x is None else x.view_as(x) for x in tensors]
    with torch.enable_grad():
        return _gradients(f, aliases, needed, dy)


def second_derivatives(
    f: Callable[..., Tensor],
    tensors: Tensors,
    needed: Sequence[bool],
    dy: Tensor,
    ddgrads: Tensors,
    wanted: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """The backward of an operator that returns the ``needed`` gradients of ``f``: those of dy and of the tensors.

    Args:
        ddgrads: the gradient of each of its outputs, or None.
        wanted: of dy and the tensors, those whose gradients are to be computed.
    """
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        inputs: list[Tensor | None] = [
            None if x is None else x.view_as(x) if create_graph and x.requires_grad else x.detach().requires_grad_()
            for x in (dy, *tensors)
        ]
        assert inputs[0] is not None
        grads = _gradients(f, inputs[1:], needed, inputs[0])
        pairs = [(x, dd) for x, dd in zip(grads, ddgrads, strict=True) if x is not None and dd is not None]
        leaves = [x for x, want in zip(inputs, wanted, strict=True) if x is not None and want]
        found = iter(
            torch.autograd.grad(
                [x for x, _ in pairs], leaves, [dd for _, dd in pairs], create_graph=create_graph, allow_unused=True
            )
        )
    return tuple(next(found) if x is not None and want else None for x, want in zip(inputs, wanted, strict=True))


def _gradients(f: Callable[..., Tensor], tensors: Tensors, needed: Sequence[bool], dy: Tensor) -> tuple:
    leaves = [x for x, need in zip(tensors, needed, strict=True) if x is not None and need]
    found = iter(torch.autograd.grad(f(*tensors), leaves, dy, create_graph=True))
    return tuple(next(found) if x is not None and need else None for x, need in zip(tensors, needed, strict=True))
