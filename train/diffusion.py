"""The training objective: noise prediction under two forward processes.

VPSDE: Song et al., arXiv:2011.13456 (as U-ViT trains its pixel models); ScaledLinear: the discrete schedule of latent
diffusion (arXiv:2112.10752). Loss: Ho et al., arXiv:2006.11239, eq. 14.

Shapes: B batch, C channels, H height, W width.
"""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

NUM_TIMES = 1000


class Process(Protocol):
    """q(x_t | x_0) = N(√ᾱ_t x_0, (1 - ᾱ_t) I), and how the network is told the time."""

    def draw_time(self, u_B: Tensor) -> Tensor:
        """A training time from a uniform number in [0, 1)."""
        ...

    def alpha_bar(self, t: Tensor) -> Tensor:
        """ᾱ at time t, in the dtype of t."""
        ...

    def network_time(self, t: Tensor) -> Tensor:
        """Time t as the network is fed it."""
        ...

    def grid_time(self, n: Tensor) -> Tensor:
        """The time of point n of the grid 1 .. 1000 on which the samplers of diffusers work (n may be fractional)."""
        ...


class VPSDE:
    """Continuous time t in [0, 1], β(t) = 0.1 + 19.9 t (arXiv:2011.13456, eq. 32-33)."""

    beta_min, beta_max = 0.1, 20.0

    def draw_time(self, u_B: Tensor) -> Tensor:
        return u_B

    def alpha_bar(self, t: Tensor) -> Tensor:
        """ᾱ(t) = exp(-∫₀ᵗ β) = exp(-(0.1 t + 9.95 t²))."""
        return torch.exp(-(self.beta_min * t + 0.5 * (self.beta_max - self.beta_min) * t**2))

    def network_time(self, t: Tensor) -> Tensor:
        return 999 * t

    def grid_time(self, n: Tensor) -> Tensor:
        return n / NUM_TIMES


class ScaledLinear:
    """Discrete time n in 1 .. 1000, β = linspace(√0.00085, √0.012, 1000)² (Stable Diffusion's)."""

    beta_start, beta_end = 0.00085, 0.012

    def draw_time(self, u_B: Tensor) -> Tensor:
        return (u_B * NUM_TIMES).floor() + 1

    def alpha_bar(self, t: Tensor) -> Tensor:
        """ᾱ_n = Π_{m ≤ n} (1 - β_m)."""
        root = torch.linspace(self.beta_start**0.5, self.beta_end**0.5, NUM_TIMES, dtype=torch.float64)
        table = torch.cumprod(1 - root**2, dim=0).to(t.device, t.dtype)
        return table[t.long() - 1]

    def network_time(self, t: Tensor) -> Tensor:
        return t

    def grid_time(self, n: Tensor) -> Tensor:
        return n


PROCESSES: dict[str, Process] = {"vp-sde": VPSDE(), "scaled-linear": ScaledLinear()}


def add_noise(x0_BCHW: Tensor, noise_BCHW: Tensor, alpha_bar_B: Tensor) -> Tensor:
    """x_t = √ᾱ_t x_0 + √(1 - ᾱ_t) ε (arXiv:2006.11239, eq. 4)."""
    alpha_bar_B111 = alpha_bar_B[:, None, None, None]
    return alpha_bar_B111.sqrt() * x0_BCHW + (1 - alpha_bar_B111).sqrt() * noise_BCHW


def noise_prediction_loss(
    model: Callable[..., Tensor],
    process: Process,
    x0_BCHW: Tensor,
    noise_BCHW: Tensor,
    time_u_B: Tensor,
    labels_B: Tensor | None,
) -> Tensor:
    """L_simple = mean (ε - ε_θ(x_t, t))² over pixels and batch (arXiv:2006.11239, eq. 14), a scalar in fp32."""
    t_B = process.draw_time(time_u_B)
    x_BCHW = add_noise(x0_BCHW, noise_BCHW, process.alpha_bar(t_B))
    predicted_BCHW = model(x_BCHW, process.network_time(t_B), labels_B)
    return (predicted_BCHW.float() - noise_BCHW).square().mean()
