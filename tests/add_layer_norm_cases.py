"""Calls of add_layer_norm and of its reference, for the tests on a CPU, in the interpreter and on a GPU."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from parity import assert_within_budget
from torch import Tensor

from scalelong.kernels.add_layer_norm import add_layer_norm, add_layer_norm_ref

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ADAPTIVE = ("gain", "shift", "gate", "angle")
"""What belongs to samples."""


@dataclass
class Case:
    shape: tuple[int, ...] = (2, 9, 24)
    dtype: torch.dtype = torch.float32
    branch_dtype: torch.dtype | None = None  # that of x
    autocast: torch.dtype | None = None
    has_branch: bool = True
    has_weight: bool = True
    has_bias: bool = True
    adaptive: tuple[str, ...] = ()
    mean: float = 0.0
    device: str = "cpu"

    def inputs(self) -> dict[str, Tensor]:
        inputs = {"x": self.mean + torch.randn(self.shape)}
        if self.has_branch:
            inputs["branch"] = torch.randn(self.shape).to(self.branch_dtype or self.dtype)
        if self.has_weight:
            inputs["weight"] = torch.randn(self.shape[-1])
        if self.has_bias:
            inputs["bias"] = torch.randn(self.shape[-1])
        B, D = self.shape[0], self.shape[-1]
        inputs |= {name: torch.randn(B, D // 2 if name == "angle" else D) for name in self.adaptive}
        return {name: p.to(self.device, p.dtype if name == "branch" else self.dtype) for name, p in inputs.items()}

    def call(self, inputs: Mapping[str, Tensor], *, ref: bool = False) -> tuple[Tensor, Tensor]:
        arguments = {**dict.fromkeys(("branch", "weight", "bias")), **inputs}
        is_truth = inputs["x"].dtype == torch.float64
        with torch.autocast(self.device, self.autocast, enabled=self.autocast is not None and not is_truth):
            return (add_layer_norm_ref if ref else add_layer_norm)(**arguments)  # type: ignore[arg-type]

    def as_one(self, names: Sequence[str], ref: bool, *values: Tensor) -> Tensor:
        """Both outputs, so that both have a gradient; in fp64, of the stream as it is kept in ``dtype``.

        Its rounding is everybody's and in 16 bits the largest error of all: it would hide the others, or cancel them.
        """
        inputs = dict(zip(names, values, strict=True))
        stream, y = self.call(inputs, ref=ref)
        if stream.dtype == torch.float64:
            kept = stream + (stream.to(self.dtype).double() - stream).detach()
            others = {name: p for name, p in inputs.items() if name not in ("branch", "gate")}
            stream, y = self.call({**others, "x": kept}, ref=ref)
        return torch.stack([stream.to(torch.promote_types(stream.dtype, y.dtype)), y])

    def assert_parity(self, inputs: Mapping[str, Tensor] | None = None) -> None:
        inputs = self.inputs() if inputs is None else inputs
        op, ref = (partial(self.as_one, list(inputs), is_ref) for is_ref in (False, True))
        assert_within_budget(op, ref, inputs, grad_budget=2.0)


def joined(leaves: Sequence[Tensor], has_branch: bool) -> dict[str, Tensor | None]:
    """Arguments of add_layer_norm that all depend on the same two leaves, x (B, T, D) and a matrix (D, D)."""
    x, matrix = leaves
    mixed = x @ matrix
    adaptive = mixed.mean(1)
    inputs = {"x": mixed.tanh(), "branch": (x * mixed).sin() if has_branch else None}
    inputs |= {"weight": matrix[0] * x.mean(), "bias": matrix.sum(0), "gain": adaptive.sin(), "shift": adaptive.cos()}
    inputs["angle"] = adaptive[:, 1::2]
    return inputs | ({"gate": adaptive} if has_branch else {})
