"""The shape of a DiT; imports no torch."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Self, get_args

from scalelong.model.backbone_config import BackboneConfig, BlockMemory, LinearName, check_linear, with_base_width

if TYPE_CHECKING:
    from scalelong.model.dit import DiT

SkipForm = Literal["none", "layer-norm", "plain"]
SKIP_FORMS: tuple[str, ...] = get_args(SkipForm)
Modulation = Literal["adaln", "scale-rot", "rot", "scale"]
MODULATIONS: tuple[str, ...] = get_args(Modulation)


@dataclass(frozen=True, kw_only=True)
class DiTConfig(BackboneConfig, architecture="DiT"):
    """The shape of a DiT.

    Raises:
        ValueError: sizes that do not fit together, naming them.
    """

    patch_size: int
    """Side of a patch, in pixels."""
    width: int = 384
    """Features of a token."""
    depth: int = 12
    """Blocks."""
    num_heads: int = 6
    """Attention heads."""
    mlp_ratio: float = 4.0
    """Hidden width of the MLP over the width."""
    qk_norm: bool = False
    """RMSNorm of the queries and keys of each head (no published network has it)."""
    skip: SkipForm = "none"
    """Long skips from the first half of the blocks to the second: none, as published; concatenated, normalised and
    projected, as Skip-DiT's; or concatenated and projected, as U-ViT's. With a sparse middle none is one: past it."""
    modulation: Modulation = "adaln"
    """What time and class do to the features that a norm puts out: scale and shift them, as published; scale them and
    rotate pairs of them (arXiv:2505.19122); rotate them; or scale them. Each branch has its gate in all four."""
    magnitude_preserving: bool = False
    """Layers that keep the magnitude of what passes, in the place of norms and biases (MaP-DiT)."""
    linear: LinearName = "plain"
    """How the linear layers of blocks are parametrised: as published; by their largest singular value (sigma-reparam);
    or with outputs of a learned size (decoupled)."""

    def __post_init__(self):
        super().__post_init__()
        self.check_at_least(1, "patch_size", "width", "depth", "num_heads", "mlp_width")
        if self.img_size % self.patch_size:
            raise ValueError(f"img_size {self.img_size} is no multiple of patch_size {self.patch_size}")
        if self.width % self.num_heads:
            raise ValueError(f"width {self.width} is no multiple of num_heads {self.num_heads}")
        if self.modulation not in MODULATIONS:
            raise ValueError(f"modulation must be one of {', '.join(MODULATIONS)}, got {self.modulation!r}")
        if self.width % 2 and self.modulation in ("scale-rot", "rot"):
            raise ValueError(f"modulation {self.modulation} rotates pairs: width must be even, got {self.width}")
        if self.width % 4:
            raise ValueError(
                f"width must be a multiple of 4 for sines and cosines of rows and columns, got {self.width}"
            )
        if self.context_tokens:
            raise ValueError("a DiT takes class labels, no text: context_tokens must be 0")
        if self.skip not in SKIP_FORMS:
            raise ValueError(f"skip must be one of {', '.join(SKIP_FORMS)}, got {self.skip!r}")
        if self.skip != "none" and self.depth < 2:
            raise ValueError(f"long skips need a depth of at least 2, got {self.depth}")
        if self.magnitude_preserving:
            self._check_without_norms()
        check_linear(self.linear, magnitude_preserving=self.magnitude_preserving)
        if self.parametrization == "mup":
            self.base_config()
        self.check_conditions()
        self.check_sparse_middle()

    def _check_without_norms(self) -> None:
        if self.qk_norm:
            raise ValueError(
                "qk_norm and magnitude_preserving exclude each other: attention by cosines has its queries and keys "
                "normalised already"
            )
        if self.skip == "layer-norm":
            raise ValueError(
                "skip layer-norm and magnitude_preserving exclude each other: there are no norms; take skip plain"
            )

    @classmethod
    def network(cls) -> type["DiT"]:
        from scalelong.model.dit import DiT

        return DiT

    def base_config(self) -> Self:
        return with_base_width(self)

    @property
    def preserves_magnitude(self) -> bool:
        return self.magnitude_preserving

    @property
    def block_widths(self) -> tuple[int, ...]:
        return (self.width,) * self.depth

    @property
    def skip_sources(self) -> dict[int, int]:
        """The number of the block whose output a block takes in, by the number of that one, in execution order."""
        if self.skip != "none":
            return {n: self.depth - 1 - n for n in range(self.depth - self.depth // 2, self.depth)}
        # What the middle puts out is fused with what entered it.
        return {middle.stop: middle.start - 1} if (middle := self.middle_blocks) else {}

    @property
    def num_skips(self) -> int:
        return len(self.skip_sources)

    @property
    def has_skips(self) -> bool:
        return self.num_skips > 0

    @property
    def mlp_width(self) -> int:
        return round(self.width * self.mlp_ratio)

    @property
    def num_patches(self) -> int:
        return (self.img_size // self.patch_size) ** 2

    @property
    def num_tokens(self) -> int:
        return self.num_patches

    @property
    def block_memory(self) -> BlockMemory:
        """The input, both norms, queries, keys and values (3), what attention puts out, its projection, the stream
        between the halves of a block, the MLP's hidden layer and its output."""
        hidden = self.mlp_width / self.width
        if self.magnitude_preserving:
            # Modulated twice and gated twice, queries and keys normalised, and what attention puts out.
            return BlockMemory(total=13 + hidden, products=(1.0, 3.0, hidden))
        return BlockMemory(total=10 + hidden, products=(1.0, 3.0, hidden))
