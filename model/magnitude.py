"""Layers and functions that keep the magnitude of what passes: inputs of unit RMS give outputs of unit RMS.

EDM2 (Karras et al., arXiv:2312.02696), for transformers MaP-DiT (arXiv:2505.19122). All identities hold in expectation,
of entries with zero mean that are not correlated. Weights have rows of unit RMS, which the trainer restores after every
step (``forced_normalisation``); no layer has a bias: a constant input stands for all of them.

Shapes: B batch, T tokens, D width, F features, O outputs, * any dimensions; M(x) is the RMS of x.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scalelong.kernels.gelu_linear import APPROXIMATE, gelu_linear
from scalelong.kernels.unit_rows import unit_rows
from scalelong.model.layer_calls import is_called_by_class
from scalelong.model.linear_layers import SkipLinear

SILU_RMS = 0.596
"""M(silu(x)) of standard normal x (arXiv:2312.02696, eq. 81)."""
GELU_RMS = 0.6525
"""M(gelu(x)) of standard normal x, of the exact one and of its approximation by tanh."""
EPS = 1e-4
RESIDUAL_BALANCE = 0.3
"""t of ``mp_sum`` where a branch joins the stream, in both papers."""


def unit_rms(x: Tensor, dim: int = -1) -> Tensor:
    """x / (eps + M(x)) over one dimension, in the dtype of x ("pixel norm", arXiv:2312.02696, eq. 30)."""
    rms = torch.linalg.vector_norm(x, dim=dim, keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32))
    return x * (1 / (EPS + rms * x.shape[dim] ** -0.5)).to(x.dtype)


def unit_tokens(x: Tensor) -> Tensor:
    """x / M(x) over the last dimension, in one pass each way; no token may be zero."""
    return unit_rows(x.flatten(0, -2), math.sqrt(x.shape[-1])).view(x.shape)


def with_unit_rows(weight: Tensor) -> Tensor:
    """Every row, over all dimensions but the first, with RMS 1: forced normalisation (arXiv:2312.02696, eq. 66)."""
    return unit_rms(weight.flatten(1)).view_as(weight)


def mp_silu(x: Tensor) -> Tensor:
    """silu(x) / 0.596 (arXiv:2312.02696, eq. 81)."""
    return F.silu(x) / SILU_RMS


def mp_gelu(x: Tensor, *, act: str = "gelu") -> Tensor:
    """gelu(x) / 0.6525, act being "gelu", the exact one, or "gelu-tanh"."""
    return F.gelu(x, approximate=APPROXIMATE[act]) / GELU_RMS


def mp_sum(a: Tensor, b: Tensor, t: float = 0.5) -> Tensor:
    """((1 - t) a + t b) / √((1 - t)² + t²) (arXiv:2312.02696, eq. 88)."""
    of_a, of_b = sum_factors(t)
    return torch.add(of_a * a, b, alpha=of_b)


def sum_factors(t: float) -> tuple[float, float]:
    """What ``mp_sum`` multiplies both parts by."""
    norm = math.hypot(1 - t, t)
    return (1 - t) / norm, t / norm


def cat_factors(num_a: int, num_b: int, t: float = 0.5) -> tuple[float, float]:
    """What ``mp_cat`` multiplies both halves by, of so many channels."""
    common = math.sqrt((num_a + num_b) / ((1 - t) ** 2 + t**2))
    return common * (1 - t) / math.sqrt(num_a), common * t / math.sqrt(num_b)


def mp_cat(a: Tensor, b: Tensor, t: float = 0.5, dim: int = 1) -> Tensor:
    """Both halves, of Na and Nb channels, each with a share of the sum that follows: (1 - t)² and t² of its energy.

    C = √((Na + Nb) / ((1 - t)² + t²)); [C (1 - t) / √Na a, C t / √Nb b] (arXiv:2312.02696, eq. 103).
    """
    of_a, of_b = cat_factors(a.shape[dim], b.shape[dim], t)
    return torch.cat([of_a * a, of_b * b], dim)


class UnitRows(nn.Module):
    """A layer whose weight has rows of unit RMS, which it divides by √fan-in to multiply its inputs with.

    It normalises them itself too (arXiv:2312.02696, eq. 47): gradients are orthogonal to their rows, and averages of
    such weights, whose rows are shorter, compute the same as if they were not.
    """

    weight: nn.Parameter

    def reset_parameters(self) -> None:
        normal_rows(self.weight)

    def product_weight(self) -> Tensor:
        """w / ‖w‖ of each row, as RMS 1 over √fan-in comes to."""
        return unit_rows(self.weight)


class MPLinear(UnitRows, nn.Linear):
    """M(y) = 1 where M(x) = 1: nn.Linear without a bias, whose rows have norm 1."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__(in_features, out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.product_weight())


class MPConv2d(UnitRows, nn.Conv2d):
    """The same as a convolution of odd size that keeps the sides."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int):
        super().__init__(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.product_weight(), None)


class MPSkipLinear(UnitRows, SkipLinear):
    """The same of ``common * cat([x, scale * s], -1)``, whose magnitude is the skip-scale policy's affair."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__(in_features, out_features, bias=False)


class MPGeluLinear(UnitRows, nn.Linear):
    """The same of ``mp_gelu(x)``, if asked to; backward then keeps x alone. The factor is folded into the weight."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__(in_features, out_features, bias=False)

    def forward(self, x: Tensor, *, act: str | None = None) -> Tensor:  # type: ignore[override]
        if act is None:
            return F.linear(x, self.product_weight())
        return gelu_linear(x, unit_rows(self.weight, 1 / GELU_RMS), None, act=act)


def project_mp_gelu(layer: nn.Module, x: Tensor, *, act: str = "gelu") -> Tensor:
    """``layer(mp_gelu(x))``."""
    return layer(x, act=act) if is_called_by_class(layer, MPGeluLinear) else layer(mp_gelu(x, act=act))


class MPEmbedding(UnitRows, nn.Embedding):
    """nn.Embedding whose rows have unit RMS."""

    def forward(self, y: Tensor) -> Tensor:
        return unit_tokens(super().forward(y))


class MPFourier(nn.Module):
    """√2 cos(2π (f x + φ)), f of N(0, bandwidth²) and φ of U[0, 1) being the same for ever (arXiv:2312.02696, eq. 75).

    Args:
        num_features: F.
    """

    frequencies: Tensor
    phases: Tensor

    def __init__(self, num_features: int, bandwidth: float = 1.0):
        super().__init__()
        self.num_features, self.bandwidth = num_features, bandwidth
        frequencies, phases = self._drawn()
        self.register_buffer("frequencies", frequencies)
        self.register_buffer("phases", phases)

    def forward(self, x_B: Tensor) -> Tensor:
        """(B, F), of numbers some few units apart."""
        dtype = torch.promote_types(self.frequencies.dtype, torch.float32)
        angles_BF = x_B.to(dtype)[:, None] * self.frequencies + self.phases
        return math.sqrt(2) * torch.cos(2 * math.pi * angles_BF)

    def reset_buffers(self) -> None:
        for buffer, drawn in zip((self.frequencies, self.phases), self._drawn(), strict=True):
            buffer.copy_(drawn)

    def _drawn(self) -> tuple[Tensor, Tensor]:
        generator = torch.Generator("cpu").manual_seed(0)
        with torch.device("cpu"):
            frequencies = self.bandwidth * torch.randn(self.num_features, generator=generator)
            return frequencies, torch.rand(self.num_features, generator=generator)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *arguments: Any) -> None:
        """They are drawn anew, the same, where a state dict, as a run's checkpoint, has parameters alone."""
        like = next((x for x in state_dict.values() if x.is_floating_point()), self.phases)
        for name, drawn in zip(("frequencies", "phases"), self._drawn(), strict=True):
            state_dict.setdefault(f"{prefix}{name}", drawn.to(like.device, like.dtype))
        super()._load_from_state_dict(state_dict, prefix, *arguments)


class Gain(nn.Module):
    """A learned number for each of ``num_parts`` parts of the last dimension, which begins as zero.

    It begins modulations as the identity, and predictions as zero, where weights cannot be zero.
    """

    def __init__(self, num_parts: int = 1):
        super().__init__()
        self.gain = nn.Parameter(torch.zeros(num_parts))

    def forward(self, x: Tensor, sizes: Sequence[int] | None = None) -> Tensor:
        """``gain * x`` in the dtype of x, where the parts are of these sizes; without them there is one."""
        gain = self.gain.to(x.dtype)
        if sizes is None:
            return gain * x
        return x * torch.cat([gain[n : n + 1].expand(size) for n, size in enumerate(sizes)])


def normal_rows(weight: Tensor) -> None:
    """Fills a weight with rows of random direction and unit RMS."""
    with torch.no_grad():
        nn.init.normal_(weight)
        weight.copy_(with_unit_rows(weight))


def forced_normalisation(network: nn.Module) -> Mapping[str, Callable[[Tensor], Tensor]]:
    """By the names of the weights, what the trainer puts in their place after each step; empty without such layers.

    Adam moves a row at right angles to itself, so that without it rows grow, and the steps beside them shrink.
    """
    layers = ((name, layer) for name, layer in network.named_modules() if isinstance(layer, UnitRows))
    return {f"{name}.weight": with_unit_rows for name, _ in layers}
