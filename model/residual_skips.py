"""SiD2's long skips: one for each level of a UNet, added and not concatenated (Hoogeboom et al., arXiv:2410.19324).

With b what the encoder puts out at a level and a = Down(b), which the levels below make h of, the decoder goes on from

    Up(h - kappa a) + kappa b

At kappa = 1, SiD2's own, the levels below add to b what they have changed; at 0 there is no skip, and kappa leads from
one to the other: levels below that change nothing yield (1 - kappa) Up(a) + kappa b.

Shapes: B batch, C channels, H height, W width; those of h and a are half the height and width of b.
"""

from typing import Any

from torch import Tensor, nn

from scalelong.kernels.arguments import scaled
from scalelong.model.skip_scale import LongSkip


class ResidualJoin(nn.Module):
    """Takes in the long skip of a level on the way up to it.

    Args:
        up: doubles the side, of (B, C, H, W) or, where it is a residual block, of that and the embedding.
    """

    def __init__(self, up: nn.Module):
        super().__init__()
        self.up = up

    def forward(self, h_BCHW: Tensor, emb: Any, skip: LongSkip, below_BCHW: Tensor) -> Tensor:
        """Up(h - kappa a) + kappa b, of the level below.

        Args:
            emb: the embedding of time and label.
            skip: b and kappa.
            below_BCHW: a.
        """
        assert skip.common is None, "a sum has no common factor"
        change_BCHW = h_BCHW - scaled(below_BCHW, skip.scale)
        takes_embedding = getattr(self.up, "takes_embedding", False)
        up_BCHW = self.up(change_BCHW, emb) if takes_embedding else self.up(change_BCHW)
        return up_BCHW + scaled(skip.features, skip.scale)
