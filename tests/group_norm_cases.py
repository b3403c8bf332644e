"""Arguments for skip_group_norm, built from a few words, and its parity with the reference."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from parity import assert_within_budget, sent_back
from torch import Tensor

from scalelong.kernels.group_norm import group_norm, group_norm_ref, skip_group_norm, skip_group_norm_ref

SCALES = ("none", "float", "()", "(Cs,)", "(N,Cs)", "(N,1)")


@dataclass(frozen=True, kw_only=True)
class Case:
    """``num_skip`` 0 is group_norm; ``mean`` is that of h and s, in their standard deviations."""

    batch: int = 2
    num_hidden: int = 8
    num_skip: int = 8
    spatial: tuple[int, ...] = (4, 4)
    groups: int = 4
    dtype: torch.dtype = torch.float32
    channels_last: bool = False
    scale: str = "()"
    act: str | None = "silu"
    is_affine: bool = True
    is_adaptive: bool = False
    mean: float = 0.0
    device: str = "cpu"

    def inputs(self) -> dict[str, Tensor]:
        N, Cs, C = self.batch, self.num_skip, self.num_hidden + self.num_skip
        inputs = {"h": torch.randn(N, self.num_hidden, *self.spatial) + self.mean}
        if Cs:
            inputs["s"] = 2 * torch.randn(N, Cs, *self.spatial) + self.mean
            shape = {"()": (), "(Cs,)": (Cs,), "(N,Cs)": (N, Cs), "(N,1)": (N, 1)}.get(self.scale)
            if shape is not None:
                inputs["scale"] = torch.rand(shape) + 0.2
        if self.is_affine:
            inputs |= {"weight": torch.randn(C), "bias": torch.randn(C)}
        if self.is_adaptive:
            inputs |= {"gain": 0.5 * torch.randn(N, C), "shift": torch.randn(N, C)}
        inputs = {name: x.to(self.device, self.dtype) for name, x in inputs.items()}
        if self.channels_last:
            inputs |= {name: in_channels_last(inputs[name]) for name in ("h", "s") if name in inputs}
        return inputs

    def call(self, inputs: Mapping[str, Tensor], *, ref: bool = False) -> Tensor:
        h, groups, weight, bias = inputs["h"], self.groups, inputs.get("weight"), inputs.get("bias")
        options = {"gain": inputs.get("gain"), "shift": inputs.get("shift"), "act": self.act}
        if not self.num_skip:
            return (group_norm_ref if ref else group_norm)(h, groups, weight, bias, **options)
        scale = inputs.get("scale", {"none": None}.get(self.scale, 0.7))
        op = skip_group_norm_ref if ref else skip_group_norm
        return op(h, inputs["s"], scale, groups, weight, bias, **options)

    def assert_parity(self, inputs: Mapping[str, Tensor] | None = None) -> None:
        inputs = self.inputs() if inputs is None else inputs
        has_scale = "scale" in inputs and inputs["scale"].numel() > 0
        assert_within_budget(
            lambda *values: self.call(dict(zip(inputs, values, strict=True))),
            lambda *values: self.call(dict(zip(inputs, values, strict=True)), ref=True),
            inputs,
            floors={"dscale": self._rounding_of_dscale(inputs)} if has_scale else None,
        )

    def _rounding_of_dscale(self, inputs: Mapping[str, Tensor]) -> float:
        """A group that lies inside the skip cancels its scale: the gradient is the rest of terms of this size."""
        leaves = {name: x.detach().double().requires_grad_() for name, x in inputs.items()}
        y = self.call(leaves, ref=True)
        (ds,) = torch.autograd.grad(y, leaves["s"], sent_back(y))
        terms = (
            (ds * leaves["s"] / leaves["scale"].abs().min()).detach().abs().reshape(*leaves["s"].shape[:2], -1).sum(2)
        )
        whole = {"()": terms.sum(), "(Cs,)": terms.sum(0).max(), "(N,Cs)": terms.max(), "(N,1)": terms.sum(1).max()}
        return float(torch.finfo(torch.float32).eps * whole[self.scale])


def in_channels_last(x: Tensor) -> Tensor:
    return x.movedim(1, -1).contiguous().movedim(-1, 1)
