"""Other parametrisations of a linear layer, put in the place of any nn.Linear: ``wrap_linear``.

sigma-reparam (Zhai et al., arXiv:2303.06296): W = gamma / sigma(V) V, sigma(V) the largest singular value of the weight
V and gamma a learned number, which alone says how much the layer can amplify. sigma(V) = ‖Vᵀ u‖, whose derivative by V
is the exact one where u is the left singular vector. The layer keeps u, which follows V by one power step after each
step of the optimizer: what forward computes depends on parameters and u alone, however often it is computed.

decoupled (scale-distribution decoupling, Wang et al., arXiv:2502.15499): y = alpha * V x / RMS(V x), alpha a learned
number for each output: the layer's outputs have the size of alpha, whatever that of V or of x.

Shapes: O outputs, I inputs.
"""

from collections.abc import Iterable
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scalelong.model.backbone_config import LinearName
from scalelong.model.linear_layers import GeluLinear, SkipLinear

SINGULAR_VECTOR = "singular_vector"
"""The buffer u: part of a state dict, but neither a parameter nor of an average of those."""
FIRST_VECTORS, FIRST_POWER_STEPS = 8, 20
"""From nothing; from then on one step of one vector follows each change of the weight."""


class SigmaLinear(nn.Linear):
    """nn.Linear of the weight ``gamma / sigma(weight) * weight``.

    It begins as the layer that it is made of, and multiplies no input by more than ``gamma``.
    """

    gamma: nn.Parameter
    singular_vector: Tensor

    def begin(self) -> None:
        """Gives ``gamma`` the value at which the layer is a plain one."""
        self.find_singular_vector()
        with torch.no_grad():
            self.gamma.copy_(self.sigma())

    @torch.no_grad()
    def find_singular_vector(self) -> None:
        """For the weight as it is, by power steps of a few vectors at a time, which every process begins with alike."""
        weight = self.weight.to(torch.promote_types(self.weight.dtype, torch.float32))
        if weight.is_meta:
            self.singular_vector = weight.new_empty(self.out_features)
            return
        generator = torch.Generator().manual_seed(0)
        start = torch.randn(self.out_features, min(FIRST_VECTORS, self.out_features), generator=generator, device="cpu")
        basis = start.to(weight)
        for _ in range(FIRST_POWER_STEPS):
            basis = torch.linalg.qr(weight @ (weight.T @ basis)).Q
        # The vector of the space between them that the weight stretches most.
        most = torch.linalg.svd(weight.T @ basis, full_matrices=False).Vh[0]
        self.singular_vector = F.normalize(basis @ most, dim=0)

    @torch.no_grad()
    def power_step(self, weight: Tensor) -> None:
        """One step of the power iteration: u <- V Vᵀ u / ‖V Vᵀ u‖.

        Args:
            weight: the whole of it, where the layer has a part.
        """
        weight = weight.to(self.singular_vector.dtype)
        self.singular_vector.copy_(F.normalize(weight @ (weight.T @ self.singular_vector), dim=0))

    def sigma(self) -> Tensor:
        """(1,), at least in fp32: the largest singular value, or a little less until the power iteration is there."""
        kind = self.weight.device.type
        with nullcontext() if kind == "meta" else torch.autocast(kind, enabled=False):
            dtype = torch.promote_types(self.weight.dtype, torch.float32)
            return torch.linalg.vector_norm(self.weight.to(dtype).T @ self.singular_vector.to(dtype)).reshape(1)

    def product_weight(self) -> Tensor:
        return self.weight * (self.gamma / self.sigma()).to(self.weight.dtype)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.product_weight(), self.bias)

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, local_metadata: Any, strict: bool, missing: Any, *more
    ):
        """Without the vector, as averages of weights come, it is found anew."""
        is_there = prefix + SINGULAR_VECTOR in state_dict
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, *more)
        if not is_there:
            missing[:] = [name for name in missing if name != prefix + SINGULAR_VECTOR]
            self.find_singular_vector()


class SigmaSkipLinear(SigmaLinear, SkipLinear):
    """The same of ``common * cat([x, scale * s], -1)``."""

    forward = SkipLinear.forward  # type: ignore[assignment]


class SigmaGeluLinear(SigmaLinear, GeluLinear):
    """The same of the activated input, if asked to."""

    forward = GeluLinear.forward  # type: ignore[assignment]


class DecoupledLinear(nn.Linear):
    """``alpha * RMSNorm(weight x) + bias``."""

    alpha: nn.Parameter

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.weight)
        y = F.rms_norm(y, (self.out_features,)) * self.alpha.to(y.dtype)
        return y if self.bias is None else y + self.bias


SIGMA: dict[type[nn.Linear], type[SigmaLinear]] = {
    nn.Linear: SigmaLinear,
    SkipLinear: SigmaSkipLinear,
    GeluLinear: SigmaGeluLinear,
}
"""What stands in the place of each linear layer, with all that it fuses."""


def wrap_linear(layer: nn.Linear, kind: LinearName) -> nn.Linear:
    """Gives a linear layer another parametrisation, in place, beside which its weight and bias keep their names.

    Args:
        kind: "sigma-reparam", where the layer goes on as it is; "decoupled", where its outputs have RMS 1 from then on,
            by a layer that fuses neither a skip nor an activation; or "plain", which changes nothing.

    Returns:
        ``layer`` itself.

    Raises:
        ValueError: a layer that is wrapped already, one whose class is not known, or another kind.
    """
    if kind == "plain":
        return layer
    if isinstance(layer, SigmaLinear | DecoupledLinear):
        raise ValueError(f"{layer} is wrapped already: a linear layer has one parametrisation")
    if type(layer) not in SIGMA:
        raise ValueError(f"only {', '.join(c.__name__ for c in SIGMA)} can be wrapped, got a {type(layer).__name__}")
    weight = layer.weight
    if kind == "sigma-reparam":
        layer.__class__ = SIGMA[type(layer)]
        layer.register_parameter("gamma", nn.Parameter(weight.new_ones(1)))
        layer.register_buffer(SINGULAR_VECTOR, weight.new_zeros(layer.out_features))
        layer.begin()  # type: ignore[operator]
    elif kind == "decoupled":
        layer.__class__ = DecoupledLinear
        layer.register_parameter("alpha", nn.Parameter(weight.new_ones(layer.out_features)))
    else:
        raise ValueError(f"a linear layer is plain, sigma-reparam or decoupled, not {kind!r}")
    return layer


def wrap_linears(layers: Iterable[nn.Module], kind: LinearName) -> None:
    """``wrap_linear`` of those that are linear layers."""
    for layer in layers:
        if isinstance(layer, nn.Linear):
            wrap_linear(layer, kind)


def sigma_layers(network: nn.Module) -> list[tuple[str, SigmaLinear]]:
    """The layers whose singular vectors follow their weights, by their names."""
    return [(name, layer) for name, layer in network.named_modules() if isinstance(layer, SigmaLinear)]
