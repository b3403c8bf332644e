"""Contrast between features of two views: the heads, the loss, and what it is judged by.

After MoCo v3 (Chen et al., arXiv:2104.02057), whose heads have batch norms. Here they have layer norms: what one image
comes to does not depend on the others in its batch, on how many processes share it, or on running averages that would
have to be saved and made the same on all of them.

Shapes: B queries, of this process; N keys, of all; F features of a block, O outputs.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ContrastHeads(nn.Module):
    """A projector, and a predictor behind it for queries alone."""

    def __init__(self, num_features: int, hidden: int, num_outputs: int):
        super().__init__()
        self.projector = _mlp(num_features, hidden, num_outputs)
        self.predictor = _mlp(num_outputs, hidden, num_outputs)

    def queries(self, pooled_BF: Tensor) -> Tensor:
        """(B, O) of norm 1, of the network that is trained."""
        return F.normalize(self.predictor(self._projected(pooled_BF)), dim=1)

    @torch.no_grad()
    def keys(self, pooled_BF: Tensor) -> Tensor:
        """(B, O) of norm 1, of the teacher's features, by the same projector, without a gradient."""
        return F.normalize(self._projected(pooled_BF), dim=1)

    def _projected(self, pooled_BF: Tensor) -> Tensor:
        return self.projector(F.layer_norm(pooled_BF.float(), pooled_BF.shape[1:]))


def _mlp(num_inputs: int, hidden: int, num_outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(num_inputs, hidden, bias=False), nn.LayerNorm(hidden), nn.GELU(), nn.Linear(hidden, num_outputs)
    )


def contrast_loss(queries_BO: Tensor, keys_NO: Tensor, first: int, temperature: float) -> Tensor:
    """2 τ CE(q · k / τ), a scalar: each query is to be more like its own key than like any other (arXiv:2104.02057).

    Args:
        first: the number of the key of the first query; the others follow.
        temperature: τ.
    """
    own_B = torch.arange(first, first + len(queries_BO), device=queries_BO.device)
    return 2 * temperature * F.cross_entropy(queries_BO @ keys_NO.T / temperature, own_B)


def alignment(queries_BO: Tensor, keys_BO: Tensor) -> Tensor:
    """The mean of |q - k|² over both views of an image; 0 at best (Wang and Isola, arXiv:2005.10242)."""
    return (queries_BO - keys_BO).square().sum(dim=1).mean()


def uniformity(keys_NO: Tensor) -> Tensor:
    """ln of the mean of exp(-2 |k - k'|²) over pairs of images; the lower, the wider spread (arXiv:2005.10242)."""
    squares_NN = torch.cdist(keys_NO, keys_NO, compute_mode="donot_use_mm_for_euclid_dist").square()
    pairs = ~torch.eye(len(keys_NO), dtype=torch.bool, device=keys_NO.device)
    return (-2 * squares_NN[pairs]).exp().mean().log()
