"""A sparse middle: in training, the blocks between both ends see a part of the patches (SPRINT, arXiv:2510.21986).

The first blocks see every token. Those of the middle see the extra tokens and some patches of each image, drawn anew
for each step; behind it a learned mask token stands in the places of the others, and the long skip of the last block
before the middle is fused with that: ``h' = W [restored ; kappa s]``, the projection of a concatenation as of any other
long skip, scaled by the same policies. A network that is not told to drop anything is the dense one.

Shapes: B images, T tokens (E extras + patches), K kept patches, S = E + K tokens that the middle sees, D width.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from scalelong.model.magnitude import normal_rows, unit_rms
from scalelong.model.parameter_kinds import ParameterKind
from scalelong.model.skip_scale import LongSkip, SkipScale, SkipShape

MASK_TOKEN = "sparse_middle.mask_token"
# fmt: off
PARAMETERS = (
    # names                     begin as
    ParameterKind(MASK_TOKEN,   0.02),
)
MP_PARAMETERS = (
    ParameterKind(MASK_TOKEN,   normal_rows),
)
# fmt: on
"""As published; of magnitude-preserving networks of unit RMS."""


class MiddleTokens(NamedTuple):
    """What the middle sees of a batch."""

    kept_BK: Tensor | None = None
    """Numbers of patches, from 0 on, none twice in an image; None: all. With K = 0 the middle is not computed."""
    left_out_B: Tensor | None = None
    """Bool: images that go on as if the middle were not there, with mask tokens alone; None: none of them."""

    def to(self, device: torch.device) -> "MiddleTokens":
        """The same on a device."""
        return MiddleTokens(*(None if x is None else x.to(device) for x in self))

    @staticmethod
    def none(num_images: int, device: torch.device) -> "MiddleTokens":
        """The middle sees nothing, and is not computed."""
        return MiddleTokens(torch.empty(num_images, 0, dtype=torch.long, device=device))


class SparseMiddle(nn.Module):
    """The learned token in the places of those that the middle has not seen."""

    def __init__(self, width: int, *, num_extras: int, blocks: range, preserves_magnitude: bool):
        super().__init__()
        self.num_extras, self.blocks, self.preserves_magnitude = num_extras, blocks, preserves_magnitude
        self.mask_token = nn.Parameter(torch.zeros(1, width))

    def forward(self, x_BSD: Tensor, rows_M: Tensor | None, left_out_B: Tensor | None, num_tokens: int) -> Tensor:
        """(B, T, D): what the middle has put out at its places, elsewhere the mask token.

        Args:
            rows_M: the places of those tokens among all of the batch; None: they are all.
            left_out_B: as in ``MiddleTokens``.
        """
        mask_1D = (unit_rms(self.mask_token) if self.preserves_magnitude else self.mask_token).to(x_BSD.dtype)
        x_BTD = x_BSD
        if rows_M is not None:
            rows = mask_1D.expand(len(x_BSD) * num_tokens, -1).index_copy(0, rows_M, x_BSD.flatten(0, 1))
            x_BTD = rows.unflatten(0, (len(x_BSD), num_tokens))
        return x_BTD if left_out_B is None else torch.where(left_out_B[:, None, None], mask_1D, x_BTD)


class SparsePass:
    """One pass of a batch (B, T, D) through a network whose middle sees what ``tokens`` says."""

    def __init__(self, middle: SparseMiddle, tokens: MiddleTokens, x_BTD: Tensor):
        self.middle, self.left_out_B = middle, tokens.left_out_B
        self.num_images, self.num_tokens = x_BTD.shape[:2]
        self.rows_M, self.is_computed = None, True
        if tokens.kept_BK is not None:
            self.rows_M, self.is_computed = self._rows(tokens.kept_BK), tokens.kept_BK.shape[1] > 0

    def _rows(self, kept_BK: Tensor) -> Tensor:
        """(B S): the extra tokens and these patches among all tokens of the batch; none of no patches."""
        B, E = len(kept_BK), self.middle.num_extras
        if kept_BK.shape[1] == 0:
            return kept_BK.flatten()
        extras_BE = torch.arange(E, device=kept_BK.device).expand(B, E)
        first_B1 = self.num_tokens * torch.arange(B, device=kept_BK.device)[:, None]
        return (torch.cat([extras_BE, kept_BK + E], dim=1) + first_B1).flatten()

    def before(self, number: int, x: Tensor) -> Tensor:
        """The stream as the block of that number is to see it."""
        if number == self.middle.blocks.start:
            return self._seen(x)
        if number == self.middle.blocks.stop:
            return self.middle(x, self.rows_M, self.left_out_B, self.num_tokens)
        return x

    def leaves_out(self, number: int) -> bool:
        """Whether the block of that number is not computed."""
        return not self.is_computed and number in self.middle.blocks

    def long_skip(
        self, i: int, policy: SkipScale, skips: Sequence[SkipShape], features: Tensor, gates: nn.Module | None
    ) -> LongSkip:
        """Skip i of a policy, from inside the middle, where it begins and ends: of the tokens that are seen.

        Gates, which may look at tokens by their places, are shown zeros in those of the others.
        """
        is_inside = features.shape[1] != self.num_tokens
        if gates is None or not is_inside:
            return policy.long_skip(i, skips, features, gates)
        assert self.rows_M is not None
        empty = features.new_zeros(self.num_images * self.num_tokens, features.shape[2])
        all_BTD = empty.index_copy(0, self.rows_M, features.flatten(0, 1)).unflatten(0, (self.num_images, -1))
        skip = policy.long_skip(i, skips, all_BTD, gates)
        return skip._replace(features=self._seen(skip.features), scale=self._seen_of(skip.scale))

    def _seen_of(self, scale: Any) -> Any:
        """A factor for each token, of those that are seen; any other factor as it is."""
        is_of_tokens = isinstance(scale, Tensor) and scale.shape[:2] == (self.num_images, self.num_tokens)
        return self._seen(scale) if is_of_tokens else scale

    def _seen(self, x_BT: Tensor) -> Tensor:
        """(B, S, *) of (B, T, *)."""
        if self.rows_M is None:
            return x_BT
        return x_BT.flatten(0, 1).index_select(0, self.rows_M).unflatten(0, (self.num_images, -1))


def sparse_pass(network: nn.Module, tokens: MiddleTokens | None, x_BTD: Tensor) -> SparsePass | None:
    """The pass of a batch through a network of which the middle sees what ``tokens`` says; None: all of it.

    Raises:
        ValueError: a network without a sparse middle, or tokens of another number of images.
    """
    if tokens is None:
        return None
    name, middle = type(network).__name__, getattr(network, "sparse_middle", None)
    if middle is None:
        raise ValueError(f"{name}: this model has no sparse middle (sparse_ratio)")
    for given in tokens:
        if given is not None and len(given) != len(x_BTD):
            raise ValueError(f"{name}: tokens of the middle are of {len(given)} images, not of {len(x_BTD)}")
    return SparsePass(middle, tokens, x_BTD)
