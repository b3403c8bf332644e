"""The training objective: noise prediction under a forward process.

VPSDE: Song et al., arXiv:2011.13456 (as U-ViT trains its pixel models). Discrete schedules: of DDPM (arXiv:2006.11239),
of ADM (Nichol and Dhariwal, arXiv:2102.09672) and of latent diffusion (arXiv:2112.10752). Loss: DDPM's, eq. 14.

Shapes: B batch, C channels, H height, W width.
"""

import math
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from scalelong.train.config import NUM_TIMES


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


class Discrete:
    """Discrete time n in 1 .. 1000, ᾱ_n = Π_{m ≤ n} (1 - β_m)."""

    first_network_time = 0
    """What the network is fed for n = 1."""

    def betas(self) -> Tensor:
        """β_1 .. β_1000, fp64."""
        raise NotImplementedError

    def draw_time(self, u_B: Tensor) -> Tensor:
        return (u_B * NUM_TIMES).floor() + 1

    def alpha_bar(self, t: Tensor) -> Tensor:
        table = torch.cumprod(1 - self.betas(), dim=0).to(t.device, t.dtype)
        return table[t.long() - 1]

    def network_time(self, t: Tensor) -> Tensor:
        return t - 1 + self.first_network_time

    def grid_time(self, n: Tensor) -> Tensor:
        return n


class Linear(Discrete):
    """β = linspace(0.0001, 0.02, 1000) (DDPM's)."""

    def betas(self) -> Tensor:
        return torch.linspace(1e-4, 0.02, NUM_TIMES, dtype=torch.float64)


class Cosine(Discrete):
    """β_n = min(1 - f(n) / f(n - 1), 0.999), f(n) = cos²((n / 1000 + 0.008) / 1.008 · π / 2) (ADM's)."""

    def betas(self) -> Tensor:
        n = torch.arange(NUM_TIMES + 1, dtype=torch.float64)
        f = torch.cos((n / NUM_TIMES + 0.008) / 1.008 * math.pi / 2) ** 2
        return (1 - f[1:] / f[:-1]).clamp(max=0.999)


class ScaledLinear(Discrete):
    """β = linspace(√0.00085, √0.012, 1000)² (Stable Diffusion's, fed to U-ViT from 1 on)."""

    first_network_time = 1

    def betas(self) -> Tensor:
        return torch.linspace(0.00085**0.5, 0.012**0.5, NUM_TIMES, dtype=torch.float64) ** 2


PROCESSES: dict[str, Process] = {
    "vp-sde": VPSDE(),
    "linear": Linear(),
    "cosine": Cosine(),
    "scaled-linear": ScaledLinear(),
}


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
    condition: Tensor | None,
) -> Tensor:
    """L_simple = mean (ε - ε_θ(x_t, t))² over pixels and batch (arXiv:2006.11239, eq. 14), a scalar in fp32.

    Args:
        condition: what the network is told of each image: labels (B,), or text features (B, L, D).
    """
    t_B = process.draw_time(time_u_B)
    x_BCHW = add_noise(x0_BCHW, noise_BCHW, process.alpha_bar(t_B))
    predicted_BCHW = model(x_BCHW, process.network_time(t_B), condition)
    return (predicted_BCHW.float() - noise_BCHW).square().mean()
