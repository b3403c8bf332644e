"""Conditions beside time and label: what the network itself has found in the image, and how the image was augmented.

Internal self-conditioning (DDAE++, arXiv:2505.10999) gives the blocks behind block B what that block has found:

    c' = c + s(t) P(LN(z)),   z the mean of the features of block B over all positions,   s(t) = 1 + w · e(t) + b

P, w and b begin as zero, and so the network begins as the one without. The paper's body could not be read. It has the
pooled feature, the way along with the condition of time, and a scale that depends on time; that z is normalised, that
s is one number an image, what begins as zero, and that the gradient goes through z are inferred.

Shapes: B batch, D width of the condition, F features of a block, A numbers of an augmentation label.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from scalelong.model.magnitude import Gain, MPLinear, unit_rms
from scalelong.model.parameter_kinds import ParameterKind

EPS = 1e-6
# fmt: off
PARAMETERS = (
    # names                             begin as
    ParameterKind("self_condition.*",   nn.init.zeros_, keeps_init=True),
    ParameterKind("augment_embed.*",    nn.init.zeros_, keeps_init=True),
)
# fmt: on
"""Zeros under muP too: nothing is added at first. Magnitude-preserving layers have gains of zero for that."""


class SelfConditioning(nn.Module):
    """Adds to a condition what a block has found."""

    def __init__(self, num_features: int, width: int):
        super().__init__()
        self.proj = nn.Linear(num_features, width)
        self.time_scale = nn.Linear(width, 1)

    def forward(self, c_BD: Tensor, z_BF: Tensor, time_BD: Tensor) -> Tensor:
        """``c + s(t) P(LN(z))`` in the dtype of c.

        Args:
            c_BD: the condition.
            z_BF: the pooled features of a block.
            time_BD: the embedding of time alone.
        """
        return c_BD + self.found(z_BF, time_BD).to(c_BD.dtype)

    def found(self, z_BF: Tensor, time_BD: Tensor) -> Tensor:
        """``s(t) P(LN(z))``, (B, D)."""
        return (1 + self.time_scale(time_BD)) * self.proj(F.layer_norm(z_BF, z_BF.shape[1:], eps=EPS))


class MPSelfConditioning(nn.Module):
    """The same of magnitude-preserving layers: conditions of unit RMS stay so.

    c' = (c + g P(z / M(z))) / √(1 + g²) with g(t) = gain (1 + time gain (w · e(t))), both gains beginning as zero.
    """

    def __init__(self, num_features: int, width: int):
        super().__init__()
        self.proj = MPLinear(num_features, width)
        self.gain = Gain()
        self.time_scale = MPLinear(width, 1)
        self.time_gain = Gain()

    def forward(self, c_BD: Tensor, z_BF: Tensor, time_BD: Tensor) -> Tensor:
        factor_B1 = self._factor(time_BD).to(c_BD.dtype)
        found_BD = self.proj(unit_rms(z_BF)).to(c_BD.dtype)
        return (c_BD + factor_B1 * found_BD) * (1 + factor_B1.square()).rsqrt()

    def found(self, z_BF: Tensor, time_BD: Tensor) -> Tensor:
        return self._factor(time_BD) * self.proj(unit_rms(z_BF))

    def _factor(self, time_BD: Tensor) -> Tensor:
        return self.gain(1 + self.time_gain(self.time_scale(time_BD)))


class MPAugmentEmbedding(nn.Module):
    """A projection of augmentation labels with a gain that begins as zero."""

    def __init__(self, num_labels: int, width: int):
        super().__init__()
        self.linear = MPLinear(num_labels, width)
        self.gain = Gain()

    def forward(self, augment_BA: Tensor) -> Tensor:
        return self.gain(self.linear(augment_BA))


def make_self_condition(num_features: int, width: int, *, preserves_magnitude: bool) -> nn.Module:
    """What adds to a condition of ``width`` what a block of ``num_features`` has found."""
    return (MPSelfConditioning if preserves_magnitude else SelfConditioning)(num_features, width)


def make_augment_embed(num_labels: int, width: int, *, preserves_magnitude: bool) -> nn.Module:
    """What an augmentation label adds to a condition: nothing where the label is zero, as of plain images."""
    return MPAugmentEmbedding(num_labels, width) if preserves_magnitude else nn.Linear(num_labels, width, bias=False)
