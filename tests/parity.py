"""Parity by error budget: against an fp64 truth, an op may be only so much more wrong than its plain reference."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor


def assert_within_budget(
    op: Callable[..., Tensor],
    ref: Callable[..., Tensor],
    inputs: Mapping[str, Tensor],
    *,
    output_budget: float = 2.0,
    grad_budget: float = 3.0,
    floors: Mapping[str, float] | None = None,
) -> None:
    """``op`` and ``ref`` take the values of ``inputs`` in order; ``ref`` on fp64 copies of them is the truth.

    ``floors`` names gradients ("dscale") that are what remains where large numbers cancel, and the error that rounding
    those numbers allows; it comes on top of the budget.
    """
    truths = _output_and_grads(ref, {name: x.double() for name, x in inputs.items()})
    plain, ours = _output_and_grads(ref, inputs), _output_and_grads(op, inputs)
    for name, truth in truths.items():
        assert ours[name].dtype == plain[name].dtype, name
        assert ours[name].shape == truth.shape, name
        if truth.numel() == 0:
            continue
        # A few fp32 roundings of the largest entry, for where the reference happens to be exact.
        epsilon = 4 * torch.finfo(torch.float32).eps * truth.abs().max()
        allowed = (output_budget if name == "output" else grad_budget) * _error(plain[name], truth) + epsilon
        allowed += (floors or {}).get(name, 0.0)
        error = _error(ours[name], truth)
        assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}"


def _output_and_grads(f: Callable[..., Tensor], inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    # detach() alone keeps the strides, also where they overlap nothing but are no dense layout.
    leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    output = f(*leaves.values())
    grads = torch.autograd.grad(output, list(leaves.values()), sent_back(output))
    return {"output": output.detach(), **{f"d{name}": grad for name, grad in zip(leaves, grads, strict=True)}}


def sent_back(output: Tensor) -> Tensor:
    """The gradient of an output; drawn in bf16, so that every dtype gets the same numbers."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(output.shape, generator=generator, dtype=torch.bfloat16).to(output)


def _error(x: Tensor, truth: Tensor) -> Tensor:
    return (x.double() - truth).abs().max()
