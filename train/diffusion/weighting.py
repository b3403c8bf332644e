"""How squared errors count by their noise level: as weights λ(sigma) of errors of the image D against x_0.

Min-SNR: Hang et al., arXiv:2303.09556. Sigmoid: Hoogeboom et al. (SiD2), arXiv:2410.19324. EDM's: Karras et al.,
arXiv:2206.00364. Learned: Karras et al. (EDM2), arXiv:2312.02696. SNR = 1 / sigma².

Shapes: B batch, F features.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from scalelong.train.objective_config import ObjectiveConfig


def min_snr(sigma: Tensor, config: ObjectiveConfig) -> Tensor:
    """min(SNR, γ): of errors of the noise min(1, γ / SNR) (arXiv:2303.09556)."""
    return (sigma**-2).clamp(max=config.min_snr_gamma)


def sigmoid(sigma: Tensor, config: ObjectiveConfig) -> Tensor:
    """SNR · sigmoid(bias - ln SNR): of errors of the noise sigmoid(bias - ln SNR) (arXiv:2410.19324)."""
    return sigma**-2 * torch.sigmoid(config.sigmoid_bias + 2 * sigma.log())


def edm(sigma: Tensor, config: ObjectiveConfig) -> Tensor:
    """1 / c_out² = 1 / sigma² + 1 / sigma_data² (arXiv:2206.00364, table 1)."""
    return sigma**-2 + config.sigma_data**-2


Weighting = Callable[[Tensor, ObjectiveConfig], Tensor]
WEIGHTINGS: dict[str, Weighting] = {"min-snr": min_snr, "sigmoid": sigmoid, "edm": edm}
"""By the name that --objective.weighting takes. Under the others errors of the network's own output count alike."""


class LogVariance(nn.Module):
    """u(sigma), the logarithm of the mean squared error that the network is left with at a noise level, as it learns.

    A linear function of Fourier features of c_noise = ln(sigma) / 4 (arXiv:2312.02696).
    It begins at 0, where it changes nothing. Its parameters are no layer's, so that they are fp32 in every precision.
    """

    waves: Tensor
    num_features = 128

    def __init__(self):
        super().__init__()
        # The same features in every run and on every rank, so that they need not be saved.
        generator = torch.Generator().manual_seed(0)
        frequencies_F = 2 * math.pi * torch.randn(self.num_features, generator=generator)
        phases_F = 2 * math.pi * torch.rand(self.num_features, generator=generator)
        self.register_buffer("waves", torch.stack([frequencies_F, phases_F]), persistent=False)
        self.weight = nn.Parameter(torch.zeros(self.num_features))
        self.bias = nn.Parameter(torch.zeros(1))

    def forward(self, log_sigma_B: Tensor) -> Tensor:
        frequencies_F, phases_F = self.waves
        features_BF = torch.cos(log_sigma_B[:, None] / 4 * frequencies_F + phases_F) * math.sqrt(2 / self.num_features)
        return features_BF @ self.weight + self.bias


def with_uncertainty(squares_BCHW: Tensor, u_B: Tensor) -> Tensor:
    """The mean of squares / e^u + u, which is least where e^u is the mean of the squares (arXiv:2312.02696, eq. 21)."""
    u_B111 = u_B[:, None, None, None]
    return (squares_BCHW / u_B111.exp() + u_B111).mean()
