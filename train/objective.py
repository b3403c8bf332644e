"""The training objective: what the network is shown, what it is to predict, and the image that its output stands for.

VPSDE: Song et al., arXiv:2011.13456 (as U-ViT trains its pixel models). Discrete schedules: of DDPM (arXiv:2006.11239),
of ADM (Nichol and Dhariwal, arXiv:2102.09672) and of latent diffusion (arXiv:2112.10752). Loss: DDPM's, eq. 14.
Samplers count by sigma, the noise in x = x_0 + sigma ε, as Karras et al. do (arXiv:2206.00364).

Shapes: B batch, C channels, H height, W width.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from scalelong.train.config import NUM_TIMES

Denoiser = Callable[[Tensor, float], Tensor]
"""D(x, sigma): the mean of x_0, (B, C, H, W), given x = x_0 + sigma ε."""


class Process(ABC):
    """How an image is corrupted: x_t = signal x_0 + noise level · ε at time t, and how the network is told the time."""

    @abstractmethod
    def draw_time(self, u_B: Tensor) -> Tensor:
        """A training time from a uniform number in [0, 1)."""

    @abstractmethod
    def levels(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(signal, noise level) at time t, in the shape and dtype of t."""

    @abstractmethod
    def time_of_sigma(self, sigma: float) -> float:
        """The time at which x_t / signal = x_0 + sigma ε, which need not be one of the training times."""

    @abstractmethod
    def signal_of_sigma(self, sigma: float) -> float:
        """The signal at that time."""

    @abstractmethod
    def network_time(self, t: Tensor) -> Tensor:
        """Time t as the network is fed it."""

    @abstractmethod
    def grid_time(self, n: Tensor) -> Tensor:
        """The time of point n of the grid 1 .. 1000 on which the samplers of diffusers work."""


class VariancePreserving(Process):
    """Of signal √ᾱ_t and noise level √(1 - ᾱ_t)."""

    @abstractmethod
    def alpha_bar(self, t: Tensor) -> Tensor:
        """ᾱ at time t, in the dtype of t."""

    def levels(self, t: Tensor) -> tuple[Tensor, Tensor]:
        alpha_bar = self.alpha_bar(t)
        return alpha_bar.sqrt(), (1 - alpha_bar).sqrt()

    def signal_of_sigma(self, sigma: float) -> float:
        return 1 / math.sqrt(1 + sigma**2)


class VPSDE(VariancePreserving):
    """Continuous time t in [0, 1], β(t) = 0.1 + 19.9 t (arXiv:2011.13456, eq. 32-33)."""

    beta_min, beta_max = 0.1, 20.0

    def draw_time(self, u_B: Tensor) -> Tensor:
        return u_B

    def alpha_bar(self, t: Tensor) -> Tensor:
        """ᾱ(t) = exp(-∫₀ᵗ β) = exp(-(0.1 t + 9.95 t²))."""
        return torch.exp(-(self.beta_min * t + 0.5 * (self.beta_max - self.beta_min) * t**2))

    def time_of_sigma(self, sigma: float) -> float:
        """The root of 9.95 t² + 0.1 t = ln(1 + sigma²)."""
        integral = math.log1p(sigma**2)
        # Multiplied out, so that small times are no difference of large numbers.
        root = math.sqrt(self.beta_min**2 + 2 * (self.beta_max - self.beta_min) * integral)
        return 2 * integral / (self.beta_min + root)

    def network_time(self, t: Tensor) -> Tensor:
        return 999 * t

    def grid_time(self, n: Tensor) -> Tensor:
        return n / NUM_TIMES


class Discrete(VariancePreserving):
    """Discrete time n in 1 .. 1000, ᾱ_n = Π_{m ≤ n} (1 - β_m)."""

    first_network_time = 0
    """What the network is fed for n = 1."""

    def __init__(self):
        self._tables: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    @abstractmethod
    def betas(self) -> Tensor:
        """β_1 .. β_1000, fp64."""

    def draw_time(self, u_B: Tensor) -> Tensor:
        return (u_B * NUM_TIMES).floor() + 1

    def alpha_bar(self, t: Tensor) -> Tensor:
        return self._table(t)[t.long() - 1]

    def _table(self, t: Tensor) -> Tensor:
        """ᾱ_1 .. ᾱ_1000 where t is and in its dtype, made once."""
        key = (t.device, t.dtype)
        if type(t) is not Tensor:  # it stands for a real one, whose table is of its own kind
            return self._make_table().to(*key)
        if key not in self._tables:
            self._tables[key] = self._make_table().to(*key)
        return self._tables[key]

    def _make_table(self) -> Tensor:
        return torch.cumprod(1 - self.betas(), dim=0)

    def time_of_sigma(self, sigma: float) -> float:
        """Between two training times in proportion to ln sigma; the first or the last outside of them."""
        return float(np.interp(math.log(sigma), self._log_sigmas, np.arange(1, NUM_TIMES + 1)))

    @cached_property
    def _log_sigmas(self) -> np.ndarray:
        alpha_bar = self._make_table().numpy()
        return 0.5 * (np.log1p(-alpha_bar) - np.log(alpha_bar))

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


PROCESSES: dict[str, VariancePreserving] = {
    "vp-sde": VPSDE(),
    "linear": Linear(),
    "cosine": Cosine(),
    "scaled-linear": ScaledLinear(),
}


class Objective(ABC):
    """What a network learns under a process; a subclass says what it predicts and how errors are weighted.

    ``signal`` and ``noise_level`` are those of x_t: tensors that broadcast over images, or numbers.
    """

    def __init__(self, process: Process):
        self.process = process

    @abstractmethod
    def target(self, x0_BCHW: Tensor, noise_BCHW: Tensor, signal: Tensor, noise_level: Tensor) -> Tensor:
        """What the network is to predict, (B, C, H, W)."""

    @abstractmethod
    def weight(self, signal: Tensor, noise_level: Tensor) -> Tensor | float:
        """Of squared errors in the loss."""

    @abstractmethod
    def denoised(self, output_BCHW: Tensor, x_BCHW: Tensor, signal: float, noise_level: float) -> Tensor:
        """The x_0 that the output for x_t stands for: affine in the output, so that guidance of either is the same."""

    def draw_time(self, u_B: Tensor) -> Tensor:
        """The training time of each image from a uniform number in [0, 1)."""
        return self.process.draw_time(u_B)

    def corrupt(self, x0_BCHW: Tensor, noise_BCHW: Tensor, signal: Tensor, noise_level: Tensor) -> Tensor:
        """x_t (arXiv:2006.11239, eq. 4)."""
        return signal * x0_BCHW + noise_level * noise_BCHW

    def network_input(self, x_BCHW: Tensor, t_B: Tensor) -> tuple[Tensor, Tensor]:
        """c_in x_t and c_noise, what the network is shown and told. Here c_in is 1: the variance of x_t is."""
        return x_BCHW, self.process.network_time(t_B)

    def loss(
        self,
        network: Callable[..., Tensor],
        x0_BCHW: Tensor,
        noise_BCHW: Tensor,
        time_u_B: Tensor,
        condition: Tensor | None,
    ) -> Tensor:
        """The weighted mean square of the network's errors over pixels and batch, a scalar in fp32.

        Args:
            network: (x_BCHW, t_B, condition) -> (B, C, H, W).
            noise_BCHW: standard normal.
            time_u_B: uniform in [0, 1).
            condition: what the network is told of each image: labels (B,), or text features (B, L, D).
        """
        t_B = self.draw_time(time_u_B)
        levels_B111 = self.process.levels(t_B[:, None, None, None])
        x_BCHW = self.corrupt(x0_BCHW, noise_BCHW, *levels_B111)
        output_BCHW = network(*self.network_input(x_BCHW, t_B), condition)
        error_BCHW = output_BCHW.float() - self.target(x0_BCHW, noise_BCHW, *levels_B111)
        return (self.weight(*levels_B111) * error_BCHW.square()).mean()

    def denoiser(self, network: Callable[[Tensor, Tensor], Tensor]) -> Denoiser:
        """D(x, sigma) of a network (x_BCHW, t_B) -> (B, C, H, W)."""

        def denoise(x_BCHW: Tensor, sigma: float) -> Tensor:
            signal = self.process.signal_of_sigma(sigma)
            t_B = x_BCHW.new_full((len(x_BCHW),), self.process.time_of_sigma(sigma))
            scaled_BCHW = signal * x_BCHW
            output_BCHW = network(*self.network_input(scaled_BCHW, t_B))
            return self.denoised(output_BCHW.to(x_BCHW.dtype), scaled_BCHW, signal, signal * sigma)

        return denoise


class NoisePrediction(Objective):
    """The network predicts ε, and all images weigh the same: L_simple of arXiv:2006.11239, eq. 14."""

    def target(self, x0_BCHW: Tensor, noise_BCHW: Tensor, signal: Tensor, noise_level: Tensor) -> Tensor:
        return noise_BCHW

    def weight(self, signal: Tensor, noise_level: Tensor) -> float:
        return 1.0

    def denoised(self, output_BCHW: Tensor, x_BCHW: Tensor, signal: float, noise_level: float) -> Tensor:
        return (x_BCHW - noise_level * output_BCHW) / signal


OBJECTIVES: dict[str, Objective] = {name: NoisePrediction(process) for name, process in PROCESSES.items()}
"""By the name that --objective takes."""
