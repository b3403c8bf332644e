"""Skip-scale policies: what multiplies a long skip before it is concatenated (ScaleLong, arXiv:2310.13545).

Skips are counted as in the paper: i = 1 is the outermost skip (from the first block to the last), i = N the innermost.
A backbone describes its skips (``SkipShape``); a policy makes its gates from that and is asked, for skip i, for the
factors that the operators take, never for a multiplied skip. No policy knows an architecture, and no network a policy.

Imports no torch: policies are plain values, and what they learn lives in the gates they make.

Shapes: B batch, T tokens, D width, C channels of the skip, * spatial dimensions.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

from scalelong.model.renamed import POLICY_NAMES

if TYPE_CHECKING:
    from torch import Tensor, nn


class SkipShape(NamedTuple):
    """A long skip as its backbone describes it."""

    kind: Literal["tokens", "channels"]
    """(B, T, D), or (B, C, *)."""
    width: int
    """D or C of the skip."""
    stream_width: int
    """The same of the hidden stream that it is concatenated with."""
    num_tokens: int = 0
    """T of tokens."""


class LongSkip(NamedTuple):
    """A long skip as a block takes it: the block sees ``common * cat([hidden stream, scale * features])``."""

    features: "Tensor"
    """(B, T, D) or (B, C, *)."""
    scale: "Tensor | float | None"
    """The factor of the skip; None stands for 1."""
    i: int
    """1 is the outermost."""
    common: "Tensor | float | None" = None
    """The factor of the whole concatenation, a number or a tensor of one element; None stands for 1."""


@dataclass(frozen=True)
class SkipScale:
    """What every policy answers.

    One of your own is a frozen dataclass with other answers. It is saved by its kind, which is the name of its class
    unless it gives another (``class Ramp(SkipScale, kind="ramp")``), and its fields; and found again by that name
    wherever its class has been defined before the network is loaded.
    """

    trains_alone: ClassVar[bool] = False
    """Whether training moves what the policy has made and leaves the network as it is."""
    known: ClassVar[dict[str, "Kind"]] = {}
    """The one registry: every policy by the name that it has on the command line and is saved with."""

    def __init_subclass__(cls, kind: str | None = None, **more: Any):
        super().__init_subclass__(**more)
        cls.register(kind or POLICY_NAMES.get(cls.__name__, cls.__name__))

    @classmethod
    def register(cls, kind: str, **fixed: Any) -> None:
        """Gives this policy, with these values of its fields, a name."""
        before = SkipScale.known.get(kind)
        # Defined again in one place, as in a notebook, it replaces itself; one of another place cannot be saved.
        if before is None or before.policy.__module__ == cls.__module__:
            SkipScale.known[kind] = Kind(cls, fixed)

    @property
    def kind(self) -> str:
        """Its name in the registry.

        Raises:
            ValueError: it has none, because another policy has it.
        """
        for name, kind in reversed(SkipScale.known.items()):
            if kind.policy is type(self) and all(getattr(self, field) == value for field, value in kind.fixed.items()):
                return name
        taken = SkipScale.known.get(POLICY_NAMES.get(type(self).__name__, type(self).__name__))
        where = f", in {taken.policy.__module__}" if taken else ""
        raise ValueError(f"{self} cannot be saved: another policy has its name{where}")

    def make_gates(self, skips: Sequence[SkipShape]) -> "nn.Module | None":
        """The learned part for these skips, in execution order (i = N first), or None.

        It becomes a child of the network, and is made after the network's own initialisation.
        """
        return None

    def scale(self, i: int, num_skips: int, skip: "Tensor", gates: "nn.Module | None") -> "Tensor | float | None":
        """The factor of skip i of num_skips, for ``skip`` (B, T, D) or (B, C, *); None stands for 1."""
        return None

    def common_scale(
        self, i: int, num_skips: int, shape: SkipShape, scale: "Tensor | float | None"
    ) -> "Tensor | float | None":
        """Where a policy renormalises: the factor of the whole concatenation of skip i, whose own factor is ``scale``.

        A number or a tensor of one element; None stands for 1.
        """
        return None

    def check_num_skips(self, num_skips: int) -> None:
        """
        Raises:
            ValueError: the policy is for another number of skips.
        """

    def long_skip(self, i: int, skips: Sequence[SkipShape], features: "Tensor", gates: "nn.Module | None") -> LongSkip:
        """Skip i of those that a backbone describes, with its factors."""
        scale = self.scale(i, len(skips), features, gates)
        return LongSkip(features, scale, i, self.common_scale(i, len(skips), skips[len(skips) - i], scale))


class Kind(NamedTuple):
    """What a name in the registry stands for."""

    policy: type[SkipScale]
    fixed: dict[str, Any]
    """Values of fields that the name implies."""


@dataclass(frozen=True)
class Unscaled(SkipScale, kind="none"):
    """kappa_i = 1: the plain long skip."""


@dataclass(frozen=True)
class InverseSqrt2(SkipScale, kind="inv-sqrt2"):
    """kappa_i = 1/√2 for every skip, the practice before ScaleLong (Imagen)."""

    def scale(self, i: int, num_skips: int, skip: "Tensor", gates: "nn.Module | None") -> float:
        return 2**-0.5


@dataclass(frozen=True)
class ConstantScale(SkipScale, kind="cs"):
    """CS: kappa_i = kappa^(i-1). The outermost skip keeps its size, deeper ones shrink; the paper suggests 0.5 to 0.95.

    Raises:
        ValueError: kappa outside (0, 1].
    """

    kappa: float = 0.5
    """The base of the factors kappa^(i-1), in (0, 1]."""

    def __post_init__(self):
        if not 0 < self.kappa <= 1:
            raise ValueError(f"kappa must lie in (0, 1], got {self.kappa}")

    def scale(self, i: int, num_skips: int, skip: "Tensor", gates: "nn.Module | None") -> float:
        return self.kappa ** (i - 1)


@dataclass(frozen=True)
class Geometric(ConstantScale, kind="geometric"):
    """kappa_i = kappa^(i-1) as CS, renormalised unless told otherwise: EDM2's mp_cat (arXiv:2312.02696, equation 103).

    With widths N_a of the hidden stream and N_b of the skip, and t / (1 - t) = kappa_i √(N_b / N_a), the renormalised
    ``common * cat([h, kappa_i * s])`` is ``mp_cat(h, s, t)``: it has the mean square 1 where both halves have. Without
    ``renorm`` it is CS.

    Raises:
        ValueError: kappa outside (0, 1].
    """

    renorm: bool = True
    """Whether the whole concatenation is multiplied by √((N_a + N_b) / (N_a + kappa_i² N_b)), which keeps its mean
    square."""

    def common_scale(
        self, i: int, num_skips: int, shape: SkipShape, scale: "Tensor | float | None"
    ) -> "Tensor | float | None":
        assert isinstance(scale, float)
        return magnitude_preserving(shape, scale) if self.renorm else None


def magnitude_preserving(shape: SkipShape, scale: float) -> float:
    """The factor of ``cat([h, scale * s])`` at which two halves of mean square 1 keep it."""
    h, s = shape.stream_width, shape.width
    return math.sqrt((h + s) / (h + scale**2 * s))


@dataclass(frozen=True)
class LearnedScale(SkipScale, kind="ls"):
    """LS: gates in (0, 1) from the skip itself, one for each token of a transformer, one for each channel of a UNet.

    One gate network serves all skips (in a UNet, all of equal channel count), or each skip has one of its own.

    Raises:
        ValueError: a reduction below 1.
    """

    reduction: int = 16
    """Pooled numbers over hidden units of a gate network."""
    shared: bool = True
    """One gate network for all skips, not one for each."""

    def __post_init__(self):
        if self.reduction < 1:
            raise ValueError(f"the reduction of the gates must be at least 1, got {self.reduction}")

    def make_gates(self, skips: Sequence[SkipShape]) -> "nn.Module":
        from scalelong.model.skip_gates import make_gates

        # This file, seen from here, has another name than through the package.
        return make_gates(skips, self.reduction, shared=self.shared)  # pyright: ignore[reportArgumentType]

    def scale(self, i: int, num_skips: int, skip: "Tensor", gates: Any) -> "Tensor":
        assert gates is not None, "LearnedScale needs the gates it made"
        gate = gates if self.shared else gates[num_skips - i]
        return gate(skip)


LearnedScale.register("ls-separate", shared=False)
SKIP_SCALE_NAMES: tuple[str, ...] = tuple(SkipScale.known)
"""The policies that come with the package and fit any network with skips, as they are."""


@dataclass(frozen=True)
class GivenScale(SkipScale, kind="given"):
    """kappa_i as they are given, one for each skip of the network.

    Raises:
        ValueError: a factor that is not finite or is negative; of a network, another number of skips.
    """

    factors: tuple[float, ...] = ()
    """kappa_1, of the outermost skip, to kappa_N."""

    def __post_init__(self):
        object.__setattr__(self, "factors", tuple(self.factors))
        for i, factor in enumerate(self.factors, start=1):
            if not 0 <= factor < math.inf:
                raise ValueError(f"factors of skips must be finite and not negative, got {factor} for skip {i}")

    def check_num_skips(self, num_skips: int) -> None:
        if len(self.factors) != num_skips:
            there_are = f"{len(self.factors)} factors" if self.factors else "no factors (skip-scale.factors)"
            raise ValueError(f"skip scale {self.kind!r} has {there_are}, the network has {num_skips} long skips")

    def make_gates(self, skips: Sequence[SkipShape]) -> None:
        self.check_num_skips(len(skips))

    def scale(self, i: int, num_skips: int, skip: "Tensor", gates: "nn.Module | None") -> float | None:
        return self.factors[i - 1] if self.factors else None


@dataclass(frozen=True)
class ProfiledScale(GivenScale, kind="profiled"):
    """Given factors that a run measures when it starts (``scalelong.model.skip_profile``); until then skips stay.

    Each skip makes up the same share of the concatenation that it enters: Admin's profiling of branch variances
    (Liu et al., arXiv:2004.08249), for long skips.

    Raises:
        ValueError: a share outside (0, 1), or what ``GivenScale`` raises.
    """

    share: float = 0.5
    """Of the energy of the concatenation, in (0, 1): kappa² N_b M[s]² / (N_a M[h]² + kappa² N_b M[s]²)."""

    def __post_init__(self):
        super().__post_init__()
        if not 0 < self.share < 1:
            raise ValueError(f"the share of a skip must lie in (0, 1), got {self.share}")

    def check_num_skips(self, num_skips: int) -> None:
        if self.factors:
            super().check_num_skips(num_skips)


@dataclass(frozen=True)
class AdaptedSkips(ConstantScale, kind="adapter"):
    """kappa^(i-1) times ``s + W2 gelu(W1 s)``, which is s at the start: SCEdit (arXiv:2312.11392), to fine-tune with.

    Training moves the adapters alone (``scalelong.model.skip_adapters``). At kappa 1 it begins as the network without.

    Raises:
        ValueError: kappa outside (0, 1], or a rank below 1.
    """

    trains_alone: ClassVar[bool] = True
    kappa: float = 1.0
    """The base of the factors kappa^(i-1), in (0, 1]: that of the network that is fine-tuned."""
    rank: int = 16
    """Hidden features of an adapter."""

    def __post_init__(self):
        super().__post_init__()
        if self.rank < 1:
            raise ValueError(f"the rank of an adapter must be at least 1, got {self.rank}")

    def make_gates(self, skips: Sequence[SkipShape]) -> "nn.Module":
        from scalelong.model.skip_adapters import make_adapters

        return make_adapters(skips, self.rank)  # pyright: ignore[reportArgumentType]

    def long_skip(self, i: int, skips: Sequence[SkipShape], features: "Tensor", gates: Any) -> LongSkip:
        return super().long_skip(i, skips, gates[len(skips) - i](features), gates)


def make_skip_scale(kind: str, kappa: float | None = None, **values: Any) -> SkipScale:
    """The policy of a command-line name, with these values of its fields.

    Args:
        kappa: of a policy that has one ("cs", "geometric"), ignored by others.

    Raises:
        ValueError: an unknown name, a field that the policy does not have, or a value that it refuses.
    """
    if kind not in SkipScale.known:
        raise ValueError(f"unknown skip scale {kind!r}; there are {', '.join(SkipScale.known)}")
    if kappa is not None and has_field(kind, "kappa"):
        values["kappa"] = kappa
    return _make(kind, values)


def has_field(kind: str, name: str) -> bool:
    """Whether the policy of that name has a field of that name."""
    return any(field.name == name for field in fields(SkipScale.known[kind].policy))


def _make(kind: str, values: dict[str, Any]) -> SkipScale:
    policy, fixed = SkipScale.known[kind]
    try:
        made = policy(**{**fixed, **values})
    except TypeError as error:
        raise ValueError(f"{kind} of this version cannot be made of {values}: {error}") from error
    check_kind(kind, made)
    return made


def described(policy: SkipScale) -> str:
    """Its name, and the values of the fields that its name leaves open: "cs (kappa 0.5)"."""
    implied = {field for kind in SkipScale.known.values() if kind.policy is type(policy) for field in kind.fixed}
    values = [f"{field} {value}" for field, value in asdict(policy).items() if field not in implied]
    return f"{policy.kind} ({', '.join(values)})" if values else policy.kind


def check_kind(kind: str, policy: SkipScale) -> None:
    """
    Raises:
        ValueError: a field that contradicts the name, as a shared gate contradicts "ls-separate".
    """
    for field, value in SkipScale.known[kind].fixed.items():
        if getattr(policy, field) != value:
            raise ValueError(f"skip scale {kind!r} has {field} {value}, not {getattr(policy, field)}")


def skip_scale_to_dict(policy: SkipScale) -> dict[str, Any]:
    """A description for JSON that ``skip_scale_from_dict`` reads.

    Raises:
        ValueError: a policy of one's own that would not be the same when it is read again.
    """
    description = {"kind": policy.kind, **asdict(policy)}
    try:
        again = skip_scale_from_dict(json.loads(json.dumps(description)))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{policy} cannot be saved: {error}") from error
    forgotten = vars(policy).keys() - {field.name for field in fields(policy)}
    if again != policy or forgotten:
        lost = f"{', '.join(sorted(forgotten))} is no field of it" if forgotten else f"read again it is {again}"
        raise ValueError(
            f"{policy} cannot be saved, {lost}: a policy is a frozen dataclass of numbers, texts and tuples of those"
        )
    return description


def skip_scale_from_dict(description: dict[str, Any]) -> SkipScale:
    """The policy that ``skip_scale_to_dict`` described, of an earlier version too.

    Raises:
        ValueError: a policy that is not known, or fields that it does not have.
    """
    if not isinstance(description, dict):
        raise ValueError(f"the description of a skip scale is a dictionary, got {description!r}")
    values: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value for key, value in description.items()
    }
    kind = values.pop("kind", None) or values.pop("policy", None)
    kind = POLICY_NAMES.get(kind, kind) if isinstance(kind, str) else kind
    if not isinstance(kind, str) or kind not in SkipScale.known:
        raise ValueError(
            f"unknown skip-scale policy {kind!r}; there are {', '.join(SkipScale.known)}. "
            "One of your own must be defined before it is read"
        )
    if values.get("position") == "before-norm":  # of a U-ViT, where it never meant anything
        del values["position"]
    return _make(kind, values)
