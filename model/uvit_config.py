"""The shape of a U-ViT; imports no torch."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Self, get_args

from scalelong.model.backbone_config import BackboneConfig, BlockMemory, LinearName, check_linear, with_base_width

if TYPE_CHECKING:
    from scalelong.model.uvit import UViT


SelfConditionForm = Literal["token", "modulation"]


@dataclass(frozen=True, kw_only=True)
class UViTConfig(BackboneConfig, architecture="UViT"):
    """The shape of a U-ViT.

    Raises:
        ValueError: sizes that do not fit together, naming them.
    """

    patch_size: int
    """Side of a patch, in pixels."""
    width: int = 512
    """Features of a token."""
    depth: int = 12
    """Blocks that a skip joins, half of them on each side; one more block lies between."""
    num_heads: int = 8
    """Attention heads."""
    mlp_ratio: float = 4.0
    """Hidden width of the MLP over the width."""
    final_conv: bool = True
    """A 3x3 convolution after the last projection."""
    qkv_bias: bool = False
    """A bias in the projection to queries, keys and values (no published network has one)."""
    time_mlp: bool = False
    """An MLP over the time embedding (no published network has one)."""
    magnitude_preserving: bool = False
    """Layers that keep the magnitude of what passes, in the place of norms and biases (EDM2, MaP-DiT)."""
    self_condition_form: SelfConditionForm = "token"
    """What the features of self_condition_block do behind it: they are added to the token of the time, or they scale
    what the norms of the blocks put out."""
    linear: LinearName = "plain"
    """How the linear layers of blocks are parametrised: as published; by their largest singular value (sigma-reparam);
    or with outputs of a learned size (decoupled)."""

    def __post_init__(self):
        super().__post_init__()
        self.check_at_least(1, "patch_size", "width", "num_heads", "mlp_width")
        if self.img_size % self.patch_size:
            raise ValueError(f"img_size {self.img_size} is no multiple of patch_size {self.patch_size}")
        if self.width % self.num_heads:
            raise ValueError(f"width {self.width} is no multiple of num_heads {self.num_heads}")
        if self.width % 2:
            raise ValueError(f"width must be even for the sinusoidal time embedding, got {self.width}")
        if self.depth < 2 or self.depth % 2:
            raise ValueError(f"depth must be even and at least 2, got {self.depth}")
        if self.num_classes and self.context_tokens:
            raise ValueError("a U-ViT takes class labels or text, not both")
        if self.self_condition_form not in get_args(SelfConditionForm):
            raise ValueError(f"self_condition_form must be token or modulation, got {self.self_condition_form!r}")
        if self.magnitude_preserving and self.qkv_bias:
            raise ValueError("qkv_bias and magnitude_preserving exclude each other: its layers have no biases")
        check_linear(self.linear, magnitude_preserving=self.magnitude_preserving)
        if self.parametrization == "mup":
            self.base_config()
        self.check_conditions()
        self.check_sparse_middle()

    @classmethod
    def network(cls) -> type["UViT"]:
        from scalelong.model.uvit import UViT

        return UViT

    def base_config(self) -> Self:
        return with_base_width(self)

    @property
    def preserves_magnitude(self) -> bool:
        return self.magnitude_preserving

    @property
    def block_widths(self) -> tuple[int, ...]:
        return (self.width,) * (self.depth + 1)

    @property
    def num_skips(self) -> int:
        return self.depth // 2

    @property
    def mlp_width(self) -> int:
        return round(self.width * self.mlp_ratio)

    @property
    def extras(self) -> tuple[str, ...]:
        """Tokens before the patches: the time, then the class before it or the text after it."""
        texts = tuple(f"text {n}" for n in range(self.context_tokens))
        return (("label",) if self.num_classes else ()) + ("time", *texts)

    @property
    def num_extras(self) -> int:
        return 1 + (1 if self.num_classes else 0) + self.context_tokens

    @property
    def num_patches(self) -> int:
        return (self.img_size // self.patch_size) ** 2

    @property
    def num_tokens(self) -> int:
        return self.num_extras + self.num_patches

    @property
    def block_memory(self) -> BlockMemory:
        """Both norms, queries, keys and values (3), what attention puts out, its projection, the stream between the
        halves of a block, and the MLP's hidden layer."""
        hidden = self.mlp_width / self.width
        if self.magnitude_preserving:
            # No norms, but queries and keys are normalised, and so is what attention puts out.
            return BlockMemory(total=9 + hidden, products=(1.0, 3.0, hidden))
        return BlockMemory(total=8 + hidden, products=(1.0, 3.0, hidden))
