"""Skip-scale policies: what multiplies a long skip before it is concatenated (ScaleLong, arXiv:2310.13545).

Skips are counted as in the paper: i = 1 is the outermost skip (from the first block to the last),
i = N the innermost. A policy yields the factor for the operators' ``scale``, never a multiplied skip.

A UNet's decoder blocks begin with a GroupNorm, which takes one factor for the whole skip out again wherever a group
lies inside the skip (docs/unet.md). ``position="after-norm"`` scales what the norm yields instead.

Shapes: B batch, T tokens, D width, C channels of the skip, * spatial dimensions.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

SkipScaleName = Literal["none", "inv-sqrt2", "cs", "ls", "ls-separate"]
SKIP_SCALE_NAMES: tuple[str, ...] = get_args(SkipScaleName)
SkipPosition = Literal["before-norm", "after-norm"]
SKIP_POSITIONS: tuple[str, ...] = get_args(SkipPosition)


@dataclass(frozen=True)
class SkipScale:
    """What every policy answers. Policies are plain values; what they learn lives in the gates they make.

    One of your own is a frozen dataclass with other answers. It is saved by its name and its fields, and found again
    by that name wherever its class has been defined before the network is loaded.

    Raises:
        ValueError: an unknown position.
    """

    known: ClassVar[dict[str, type["SkipScale"]]] = {}
    """Every policy by the name that it is saved with."""

    position: SkipPosition = field(default="before-norm", kw_only=True)
    """Of a UNet: whether the first norm of a decoder block sees the scaled skip or is scaled itself."""

    def __init_subclass__(cls, **more: Any):
        super().__init_subclass__(**more)
        before = SkipScale.known.get(cls.__name__)
        # Defined again in one place, as in a notebook, it replaces itself; one of another place cannot be saved.
        if before is None or before.__module__ == cls.__module__:
            SkipScale.known[cls.__name__] = cls

    def __post_init__(self):
        if self.position not in SKIP_POSITIONS:
            raise ValueError(f"the position of a skip scale is {' or '.join(SKIP_POSITIONS)}, got {self.position!r}")

    def make_gates(self, num_skips: int, num_tokens: int) -> nn.Module | None:
        """The learned part for skips of tokens, or None. Made after the model's own initialisation."""
        return None

    def make_channel_gates(self, channels: Sequence[int]) -> nn.Module | None:
        """The learned part for skips of so many channels, in execution order (i = N first), or None."""
        return None

    def scale(self, i: int, num_skips: int, skip: Tensor, gates: nn.Module | None) -> Tensor | float | None:
        """The factor of skip i of num_skips, for ``skip`` (B, T, D) or (B, C, *); None stands for 1."""
        return None


@dataclass(frozen=True)
class Unscaled(SkipScale):
    """kappa_i = 1: the plain long skip."""


@dataclass(frozen=True)
class InverseSqrt2(SkipScale):
    """kappa_i = 1/√2 for every skip, the practice before ScaleLong (Imagen)."""

    def scale(self, i: int, num_skips: int, skip: Tensor, gates: nn.Module | None) -> float:
        return 2**-0.5


@dataclass(frozen=True)
class ConstantScale(SkipScale):
    """CS: kappa_i = kappa^(i-1). The outermost skip keeps its size, deeper ones shrink; the paper suggests 0.5 to 0.95.

    Raises:
        ValueError: kappa outside (0, 1].
    """

    kappa: float = 0.5

    def __post_init__(self):
        super().__post_init__()
        if not 0 < self.kappa <= 1:
            raise ValueError(f"kappa must lie in (0, 1], got {self.kappa}")

    def scale(self, i: int, num_skips: int, skip: Tensor, gates: nn.Module | None) -> float:
        return self.kappa ** (i - 1)


@dataclass(frozen=True)
class LearnedScale(SkipScale):
    """LS: gates in (0, 1) from the skip itself, one for each token of a transformer, one for each channel of a UNet.

    One gate network serves all skips (in a UNet, all of equal channel count), or each skip has one of its own.

    Raises:
        ValueError: a reduction below 1.
    """

    reduction: int = 16
    shared: bool = True

    def __post_init__(self):
        super().__post_init__()
        if self.reduction < 1:
            raise ValueError(f"the reduction of the gates must be at least 1, got {self.reduction}")

    def make_gates(self, num_skips: int, num_tokens: int) -> nn.Module:
        if self.shared:
            return TokenGate(num_tokens, self.reduction)
        # In execution order, as in the published checkpoints: the first belongs to the innermost skip, i = N.
        return nn.ModuleList(TokenGate(num_tokens, self.reduction) for _ in range(num_skips))

    def make_channel_gates(self, channels: Sequence[int]) -> nn.Module:
        if self.shared:
            return SharedChannelGates(channels, self.reduction)
        return nn.ModuleList(ChannelGate(num_channels, self.reduction) for num_channels in channels)

    def scale(self, i: int, num_skips: int, skip: Tensor, gates: nn.Module | None) -> Tensor:
        gate = gates[num_skips - i] if isinstance(gates, nn.ModuleList) else gates
        assert gate is not None, "LearnedScale needs the gates it made"
        return gate(skip)


class Gate(nn.Module):
    """g = σ(W₂ relu(W₁ pooled)): one factor in (0, 1) for each of ``size`` pooled numbers, which it mixes.

    The weights keep nn.Linear's default initialisation, so that gates start near σ(0 ± 0.25), about one half.
    The state dict has the published names.
    """

    def __init__(self, size: int, reduction: int):
        super().__init__()
        hidden = max(1, size // reduction)
        self.layer1 = nn.Linear(size, hidden)
        self.layer2 = nn.Linear(hidden, size)

    def of_pooled(self, pooled: Tensor) -> Tensor:
        return torch.sigmoid(self.layer2(torch.relu(self.layer1(pooled))))


class TokenGate(Gate):
    """Pools each token over its features and excites across tokens: (B, T, D) to (B, T, 1)."""

    def forward(self, skip_BTD: Tensor) -> Tensor:
        return self.of_pooled(skip_BTD.mean(dim=-1)).unsqueeze(-1)


class ChannelGate(Gate):
    """Pools each channel over space and excites across channels: (B, C, *) to (B, C)."""

    def forward(self, skip: Tensor) -> Tensor:
        return self.of_pooled(skip.flatten(2).mean(dim=-1))


class SharedChannelGates(nn.ModuleDict):
    """One ``ChannelGate`` for each number of channels that occurs; how unequal skips share is not published."""

    def __init__(self, channels: Sequence[int], reduction: int):
        super().__init__({str(num_channels): ChannelGate(num_channels, reduction) for num_channels in channels})

    def forward(self, skip: Tensor) -> Tensor:
        return self[str(skip.shape[1])](skip)


def make_skip_scale(name: str, kappa: float = 0.5, position: SkipPosition = "before-norm") -> SkipScale:
    """The policy of a command-line name; kappa is used by "cs" alone.

    Raises:
        ValueError: an unknown name or position, or for "cs" a kappa outside (0, 1].
    """
    policies = {
        "none": lambda: Unscaled(position=position),
        "inv-sqrt2": lambda: InverseSqrt2(position=position),
        "cs": lambda: ConstantScale(kappa, position=position),
        "ls": lambda: LearnedScale(shared=True, position=position),
        "ls-separate": lambda: LearnedScale(shared=False, position=position),
    }
    if name not in policies:
        raise ValueError(f"unknown skip scale {name!r}; there are {', '.join(SKIP_SCALE_NAMES)}")
    return policies[name]()


def skip_scale_to_dict(policy: SkipScale) -> dict[str, Any]:
    """A description for JSON that ``skip_scale_from_dict`` reads.

    Raises:
        ValueError: a policy of one's own that would not be the same when it is read again.
    """
    description = {"policy": type(policy).__name__, **asdict(policy)}
    try:
        again = skip_scale_from_dict(json.loads(json.dumps(description)))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{policy} cannot be saved: {error}") from error
    if type(again) is not type(policy):
        raise ValueError(f"{policy} cannot be saved: another policy has its name, in {type(again).__module__}")
    forgotten = vars(policy).keys() - {field.name for field in fields(policy)}
    if again != policy or forgotten:
        lost = f"{', '.join(sorted(forgotten))} is no field of it" if forgotten else f"read again it is {again}"
        raise ValueError(
            f"{policy} cannot be saved, {lost}: a policy is a frozen dataclass of numbers, texts and tuples of those"
        )
    return description


def skip_scale_from_dict(description: dict[str, Any]) -> SkipScale:
    """The policy that ``skip_scale_to_dict`` described.

    Raises:
        ValueError: a policy that is not known, or fields that it does not have.
    """
    if not isinstance(description, dict):
        raise ValueError(f"the description of a skip scale is a dictionary, got {description!r}")
    values: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value for key, value in description.items()
    }
    name = values.pop("policy", None)
    if not isinstance(name, str) or name not in SkipScale.known:
        raise ValueError(
            f"unknown skip-scale policy {name!r}; there are {', '.join(SkipScale.known)}. "
            "One of your own must be defined before it is read"
        )
    try:
        return SkipScale.known[name](**values)
    except TypeError as error:
        raise ValueError(f"{name} of this version cannot be made of {values}: {error}") from error
