"""Skip-scale policies: what multiplies a long skip before it is concatenated (ScaleLong, arXiv:2310.13545).

Skips are counted as in the paper: i = 1 is the outermost skip (from the first block to the last),
i = N the innermost. A policy yields the factor for the operators' ``scale``, never a multiplied skip.

Shapes: B batch, T tokens, D width.
"""

from dataclasses import asdict, dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn

SkipScaleName = Literal["none", "inv-sqrt2", "cs", "ls", "ls-separate"]
SKIP_SCALE_NAMES: tuple[str, ...] = get_args(SkipScaleName)


@dataclass(frozen=True)
class SkipScale:
    """What every policy answers. Policies are plain values; what they learn lives in the gates they make."""

    def make_gates(self, num_skips: int, num_tokens: int) -> nn.Module | None:
        """The learned part, or None. Made after the model's own initialisation, which must not touch it."""
        return None

    def scale(self, i: int, num_skips: int, skip_BTD: Tensor, gates: nn.Module | None) -> Tensor | float | None:
        """The factor of skip i of num_skips; None stands for 1."""
        return None


@dataclass(frozen=True)
class Unscaled(SkipScale):
    """kappa_i = 1: the plain long skip."""


@dataclass(frozen=True)
class InverseSqrt2(SkipScale):
    """kappa_i = 1/√2 for every skip, the practice before ScaleLong (Imagen)."""

    def scale(self, i: int, num_skips: int, skip_BTD: Tensor, gates: nn.Module | None) -> float:
        return 2**-0.5


@dataclass(frozen=True)
class ConstantScale(SkipScale):
    """CS: kappa_i = kappa^(i-1). The outermost skip keeps its size, deeper ones shrink; the paper suggests 0.5 to 0.95.

    Raises:
        ValueError: kappa outside (0, 1].
    """

    kappa: float = 0.5

    def __post_init__(self):
        if not 0 < self.kappa <= 1:
            raise ValueError(f"kappa must lie in (0, 1], got {self.kappa}")

    def scale(self, i: int, num_skips: int, skip_BTD: Tensor, gates: nn.Module | None) -> float:
        return self.kappa ** (i - 1)


@dataclass(frozen=True)
class LearnedScale(SkipScale):
    """LS: one gate in (0, 1) for each token, from the skip itself; one gate network for all skips, or one for each.

    Raises:
        ValueError: a reduction below 1.
    """

    reduction: int = 16
    shared: bool = True

    def __post_init__(self):
        if self.reduction < 1:
            raise ValueError(f"the reduction of the gates must be at least 1, got {self.reduction}")

    def make_gates(self, num_skips: int, num_tokens: int) -> nn.Module:
        if self.shared:
            return TokenGate(num_tokens, self.reduction)
        # In execution order, as in the published checkpoints: the first belongs to the innermost skip, i = N.
        return nn.ModuleList(TokenGate(num_tokens, self.reduction) for _ in range(num_skips))

    def scale(self, i: int, num_skips: int, skip_BTD: Tensor, gates: nn.Module | None) -> Tensor:
        gate = gates[num_skips - i] if isinstance(gates, nn.ModuleList) else gates
        assert gate is not None, "LearnedScale needs the gates it made"
        return gate(skip_BTD)


class TokenGate(nn.Module):
    """g = σ(W₂ relu(W₁ mean_D(s))): pools each token over its features and excites across tokens.

    The weights keep nn.Linear's default initialisation, so that gates start near σ(0 ± 0.25), about one half.
    The state dict has the published names.
    """

    def __init__(self, num_tokens: int, reduction: int):
        super().__init__()
        hidden = max(1, num_tokens // reduction)
        self.layer1 = nn.Linear(num_tokens, hidden)
        self.layer2 = nn.Linear(hidden, num_tokens)

    def forward(self, skip_BTD: Tensor) -> Tensor:
        gate_BT = torch.sigmoid(self.layer2(torch.relu(self.layer1(skip_BTD.mean(dim=-1)))))
        return gate_BT.unsqueeze(-1)


def make_skip_scale(name: str, kappa: float = 0.5) -> SkipScale:
    """The policy of a command-line name; kappa is used by "cs" alone.

    Raises:
        ValueError: an unknown name, or for "cs" a kappa outside (0, 1].
    """
    policies = {
        "none": Unscaled,
        "inv-sqrt2": InverseSqrt2,
        "cs": lambda: ConstantScale(kappa),
        "ls": lambda: LearnedScale(shared=True),
        "ls-separate": lambda: LearnedScale(shared=False),
    }
    if name not in policies:
        raise ValueError(f"unknown skip scale {name!r}; there are {', '.join(SKIP_SCALE_NAMES)}")
    return policies[name]()


def skip_scale_to_dict(policy: SkipScale) -> dict:
    """A JSON-able description that ``skip_scale_from_dict`` reads."""
    return {"policy": type(policy).__name__, **asdict(policy)}


def skip_scale_from_dict(description: dict) -> SkipScale:
    """The policy that ``skip_scale_to_dict`` described.

    Raises:
        ValueError: a policy that this version does not know.
    """
    policies = {policy.__name__: policy for policy in (Unscaled, InverseSqrt2, ConstantScale, LearnedScale)}
    name = description.get("policy")
    if name not in policies:
        raise ValueError(f"unknown skip-scale policy {name!r}; there are {', '.join(policies)}")
    return policies[name](**{key: value for key, value in description.items() if key != "policy"})
