"""Parity by error budget: against an fp64 truth, an op may be only so much more wrong than its plain reference."""

from collections.abc import Callable, Mapping, Sequence

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


def assert_networks_within_budget(
    results: Callable[[str, tuple, torch.dtype], dict[str, Tensor]],
    batches: Sequence[tuple],
    dtype: torch.dtype,
    *,
    gates: str,
    share_of_largest: float = 0.0,
) -> None:
    """Output and gradients of a fused network ("ours") against the same network written plainly ("plain").

    ``results(network, batch, dtype)`` gives them by name. Errors are judged over all batches: in one, a parameter of
    few numbers may be lucky, in 16 bits above all. Parameters whose names start with ``gates`` are judged together:
    their few numbers are what remains where large ones cancel. ``share_of_largest`` of the largest gradient counts as a
    number that rounds off, for gradients that are zero.
    """
    squares: dict[str, list[float]] = {}
    for batch in batches:
        truths = _gates_as_one(results("plain", batch, torch.float64), gates)
        expected, found = (_gates_as_one(results(name, batch, dtype), gates) for name in ("plain", "ours"))
        for name, truth in truths.items():
            parts = (found[name].double() - truth, expected[name].double() - truth, truth)
            before = squares.get(name, [0.0] * 3)
            squares[name] = [x + float(part.square().sum()) for x, part in zip(before, parts, strict=True)]
    norms = {name: [x**0.5 for x in values] for name, values in squares.items()}
    largest = max(size for _, _, size in norms.values())
    for name, (error, plain_error, size) in norms.items():
        floor = 4 * torch.finfo(torch.float32).eps * (size + share_of_largest * largest)
        budget = 2 if name == "output" else 3
        assert error <= budget * plain_error + floor, f"{name}: {error:.3g}, plain {plain_error:.3g}"


def _gates_as_one(results: dict[str, Tensor], gates: str) -> dict[str, Tensor]:
    found = [x.double().flatten() for name, x in results.items() if name.startswith(gates)]
    others = {name: x for name, x in results.items() if not name.startswith(gates)}
    return {**others, gates: torch.cat(found)} if found else others
