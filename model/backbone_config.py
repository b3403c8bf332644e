"""What the configurations of all backbones have in common.

Imports no torch, and nor do the configurations: command lines, recipes and checks of options do without it.
"""

from dataclasses import dataclass, fields, replace
from numbers import Integral
from typing import TYPE_CHECKING, ClassVar, Literal, Self, TypeVar, get_args

from scalelong.model.skip_tuning import SkipTuning

if TYPE_CHECKING:
    from scalelong.model.backbone import Backbone
    from scalelong.model.skip_scale import SkipScale

Parametrization = Literal["standard", "mup"]
Recompute = Literal["none", "blocks"] | float
LinearName = Literal["plain", "sigma-reparam", "decoupled"]
Transformer = TypeVar("Transformer", bound="BackboneConfig")


@dataclass(frozen=True)
class BlockMemory:
    """What backward reads of a block, in multiples of the size of its input: what recomputation may drop of it."""

    total: float
    """All of it, the input included, which is always kept."""
    products: tuple[float, ...]
    """Outputs of matrix products, each known by its outputs an input."""
    attention: float = 1.0
    """The output of attention."""


def with_base_width(config: Transformer) -> Transformer:
    """The ``base_config`` of a configuration with a ``width`` and ``num_heads``: fewer heads as wide."""
    width, num_heads, base_width = config.width, config.num_heads, config.base_width  # type: ignore[attr-defined]
    head_width = width // num_heads
    if base_width % head_width:
        raise ValueError(f"base_width {base_width} is no multiple of the width {head_width} of a head")
    changes = {"width": base_width, "num_heads": base_width // head_width}
    return replace(config, parametrization="standard", base_width=0, **changes)


def check_linear(linear: str, *, magnitude_preserving: bool) -> None:
    """
    Raises:
        ValueError: no parametrisation of linear layers, or one for layers that have another already.
    """
    if linear not in get_args(LinearName):
        raise ValueError(f"linear must be one of {', '.join(get_args(LinearName))}, got {linear!r}")
    if linear != "plain" and magnitude_preserving:
        raise ValueError(
            f"linear {linear!r} and magnitude_preserving exclude each other: its layers have a parametrisation already"
        )


@dataclass(frozen=True, kw_only=True)
class BackboneConfig:
    """The shape of a network: what data, trainer and samplers ask of any.

    A network's own configuration derives from it and gives its architecture a name, by which it is saved and found
    again: ``class UViTConfig(BackboneConfig, architecture="UViT")``.

    Raises:
        ValueError: sizes that do not fit together, naming them.
    """

    known: ClassVar[dict[str, type["BackboneConfig"]]] = {}
    """The configurations by the names of their architectures."""
    architecture: ClassVar[str] = ""

    img_size: int
    """Side of the (square) image or latent, in pixels."""
    in_channels: int = 3
    """Channels of the image or latent."""
    out_channels: int = 0
    """Channels of the prediction; 0: as the image. Networks that learn the variance have twice as many."""
    num_classes: int = 0
    """Rows of the label embedding, a null label for guidance included; 0: no labels."""
    context_tokens: int = 0
    """Text tokens; 0: no text."""
    context_dim: int = 768
    """Features of a text token as given."""
    parametrization: Parametrization = "standard"
    """How initialisation, learning rates and outputs go with the width: as published, or by muP."""
    base_width: int = 0
    """Of muP: the width at which the run's learning rate was found."""
    self_condition_block: int | None = None
    """The block whose features condition those behind it, by its number in execution order, 0 the first; None: none."""
    augment_dim: int = 0
    """Numbers that say how an image was augmented, which the network is told beside the time; 0: it is told nothing."""
    sparse_ratio: float | None = None
    """Share of the patches, in [0, 1), that the blocks between both ends do not see in training (SPRINT has 0.75; 0 is
    to train on with all of them); None: there is no such middle."""
    dense_blocks: int = 2
    """Of sparse_ratio: blocks at each end that see all tokens."""
    path_drop: float = 0.0
    """Of sparse_ratio: share of the training images that go past the middle, for path-drop guidance (SPRINT: 0.1)."""

    def __init_subclass__(cls, architecture: str | None = "", **more: object):
        super().__init_subclass__(**more)
        if architecture is None:  # what several configurations share; no network is saved by it
            return
        cls.architecture = architecture or cls.__name__.removesuffix("Config")
        before = BackboneConfig.known.setdefault(cls.architecture, cls)
        if before.__module__ != cls.__module__:
            raise ValueError(f"the architecture {cls.architecture!r} is that of a configuration in {before.__module__}")
        # Defined again in one place, as in a notebook, it replaces itself.
        BackboneConfig.known[cls.architecture] = cls

    def __post_init__(self):
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type is int and (not isinstance(value, Integral) or isinstance(value, bool)):
                what = ", the side of a square image" if field.name == "img_size" else ""
                raise ValueError(f"{field.name} is a whole number{what}, got {value!r}")
        self.check_at_least(1, "img_size", "in_channels", "context_dim")
        self.check_at_least(0, "out_channels", "num_classes", "context_tokens", "base_width", "augment_dim")
        if type(self).block_widths is BackboneConfig.block_widths:
            self.check_conditions()
        if type(self).num_patches is BackboneConfig.num_patches:
            self.check_sparse_middle()
        if self.parametrization not in get_args(Parametrization):
            raise ValueError(f"parametrization must be standard or mup, got {self.parametrization!r}")
        if self.parametrization == "standard" and self.base_width:
            raise ValueError(f"base_width {self.base_width} is of the parametrization mup alone")
        if self.parametrization == "mup" and not self.base_width:
            raise ValueError("the parametrization mup needs a base_width: that at which the learning rate was found")

    def check_conditions(self) -> None:
        """
        Raises:
            ValueError: a block that cannot condition others, or conditions that the network does not take.
        """
        block, last = self.self_condition_block, len(self.block_widths) - 1
        if not self.block_widths and (block is not None or self.augment_dim):
            name = "augment_dim" if block is None else "self_condition_block"
            raise ValueError(f"a {self.architecture} takes no {name}: its block_widths are not known")
        if block is None:
            return
        if not isinstance(block, Integral) or isinstance(block, bool):
            raise ValueError(f"self_condition_block is the number of a block, got {block!r}")
        if not 0 <= block < last:
            raise ValueError(
                f"self_condition_block {block}: this {self.architecture} has the blocks 0 to {last}, of which those "
                f"from 0 to {last - 1} have one behind them"
            )

    def check_sparse_middle(self) -> None:
        """
        Raises:
            ValueError: a network without a sparse middle that is given one, shares out of their range, no block in the
                middle, or patches that are too few; or a middle that cannot be gone past.
        """
        ratio = self.sparse_ratio
        if ratio is None:
            if self.path_drop:
                raise ValueError("path_drop is of a network with a sparse middle: it needs a sparse_ratio")
            return
        if not self.num_patches:
            raise ValueError(f"a {self.architecture} takes no sparse_ratio: its blocks see no patches as tokens")
        for name, share in {"sparse_ratio": ratio, "path_drop": self.path_drop}.items():
            if isinstance(share, bool) or not isinstance(share, int | float) or not 0 <= share < 1:
                raise ValueError(f"{name} must be a share in [0, 1), got {share!r}")
        self.check_at_least(1, "dense_blocks")
        if not self.middle_blocks:
            raise ValueError(
                f"dense_blocks {self.dense_blocks} at each end leave no block between them: this {self.architecture} "
                f"has the blocks 0 to {len(self.block_widths) - 1}"
            )
        if ratio and not 0 < self.num_kept < self.num_patches:
            raise ValueError(f"sparse_ratio {ratio} keeps {self.num_kept} of {self.num_patches} patches")
        if self.path_drop and self.self_condition_block in self.middle_blocks:
            raise ValueError(
                f"path_drop goes past the block {self.self_condition_block}, which conditions those behind it: take a "
                f"self_condition_block outside of {self.middle_blocks.start} to {self.middle_blocks.stop - 1}"
            )

    def check_path_drop(self, path_drop: bool) -> None:
        """
        Raises:
            ValueError: path-drop guidance of a network that was not trained for it.
        """
        if path_drop and not self.path_drop:
            raise ValueError(
                f"path_drop guidance needs a {self.architecture} that was trained with model.path_drop above 0"
            )

    def check_at_least(self, least: int, *names: str) -> None:
        """
        Raises:
            ValueError: a field of these that is smaller, naming it.
        """
        for name in names:
            if getattr(self, name) < least:
                what = "must not be negative" if least == 0 else f"must be at least {least}"
                raise ValueError(f"{name} {what}, got {getattr(self, name)}")

    @classmethod
    def network(cls) -> type["Backbone"]:
        """The class of the network that is described; imports it, and torch."""
        raise NotImplementedError

    def base_config(self) -> Self:
        """Of muP: the same network at its base width, in the standard parametrisation.

        Raises:
            ValueError: no base width, or none that fits.
        """
        raise ValueError(f"a {self.architecture} has no parametrization mup")

    @property
    def preserves_magnitude(self) -> bool:
        """Whether the weights have rows of one norm, which the trainer restores after every step."""
        return False

    @property
    def block_widths(self) -> tuple[int, ...]:
        """Features of what each block puts out, in execution order. A network whose configuration knows them takes
        ``self_condition_block`` and ``augment_dim``."""
        return ()

    @property
    def num_patches(self) -> int:
        """Patches of an image that blocks see as tokens. A network that has some takes ``sparse_ratio``."""
        return 0

    @property
    def num_kept(self) -> int:
        """Patches of an image that the blocks of the middle see in training."""
        return self.num_patches - round((self.sparse_ratio or 0) * self.num_patches)

    @property
    def middle_blocks(self) -> range:
        """Numbers of the blocks between those that see all tokens; none of a network without a sparse middle."""
        if self.sparse_ratio is None:
            return range(0)
        return range(self.dense_blocks, len(self.block_widths) - self.dense_blocks)

    @property
    def channels_out(self) -> int:
        """Channels of the prediction."""
        return self.out_channels or self.in_channels

    @property
    def context_shape(self) -> tuple[int, int] | None:
        """(tokens, features) of the text that the network takes; None for a network without text."""
        return (self.context_tokens, self.context_dim) if self.context_tokens else None

    @property
    def block_memory(self) -> BlockMemory | None:
        """What recomputation may drop of each block; None where it can only drop all but the input."""
        return None

    @property
    def has_skips(self) -> bool:
        """Whether the network has long skips, which a policy may scale."""
        return True

    def check_skip_scale(self, policy: "SkipScale") -> None:
        """
        Raises:
            ValueError: a policy other than "none" for a network without long skips, or one for another number of them.
        """
        if not self.has_skips and policy.kind != "none":
            raise ValueError(
                f"skip scale {policy.kind!r}, but this {self.architecture} has no long skips (model.skip): 'none' fits"
            )
        if (num_skips := getattr(self, "num_skips", None)) is not None:
            policy.check_num_skips(num_skips)

    def check_skip_tuning(self, tuning: tuple[float, float] | None) -> None:
        """
        Raises:
            ValueError: factors that are none, or any for a network without long skips.
        """
        if tuning is None:
            return
        SkipTuning(*tuning)
        if not self.has_skips:
            raise ValueError(f"skip_tuning, but this {self.architecture} has no long skips (model.skip)")

    def check_recompute(self, recompute: Recompute) -> None:
        """
        Raises:
            ValueError: neither "none", "blocks" nor, where blocks say what may be dropped, a share in (0, 1).
        """
        if recompute in ("none", "blocks"):
            return
        if self.block_memory is None:
            raise ValueError(f"recompute of a {self.architecture} is 'none' or 'blocks', got {recompute!r}")
        if isinstance(recompute, str) or not 0 < recompute < 1:
            raise ValueError(f"recompute is 'none', 'blocks' or a share in (0, 1), got {recompute!r}")
