"""Forward processes: how an image is corrupted at time t, and how the network is told the time.

VPSDE: Song et al., arXiv:2011.13456 (as U-ViT trains its pixel models). Discrete schedules: of DDPM (arXiv:2006.11239),
of ADM (Nichol and Dhariwal, arXiv:2102.09672) and of latent diffusion (arXiv:2112.10752). Rectified flow: Liu et al.,
arXiv:2209.03003. Without a decay of the signal: Karras et al., arXiv:2206.00364, whose sigma, the noise in
x = x_0 + sigma ε, is what samplers count by.

Shapes: B batch.
"""

import math
from abc import ABC, abstractmethod
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from scalelong.train.objective_config import NUM_TIMES

RHO = 7.0
"""How steps of sigma grow with sigma: arXiv:2206.00364, eq. 5."""


class Process(ABC):
    """x_t = signal x_0 + noise level · ε at time t."""

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
    def training_times(self, sigma_B: Tensor) -> Tensor:
        """The training times nearest to those of sigmas."""

    @abstractmethod
    def signal_of_sigma(self, sigma: float) -> float:
        """The signal at that time."""

    @abstractmethod
    def network_time(self, t: Tensor) -> Tensor:
        """Time t as the network is fed it: networks embed numbers from 0 to about 1000."""

    @property
    @abstractmethod
    def largest_sigma(self) -> float:
        """The sigma that samplers start from."""

    def sigmas(self, count: int) -> list[float]:
        """So many sigmas for a sampler in sigma, falling from the largest, that leave one more step to 0.

        At equal distances of sigma / (1 + sigma), the time of rectified flow, whatever the process.
        """
        largest = self.largest_sigma / (1 + self.largest_sigma)
        shares = [largest * (1 - n / count) for n in range(count)]
        return [share / (1 - share) for share in shares]

    def largest_noise(self) -> float:
        """What samplers multiply standard normal noise by to start from x at the largest sigma."""
        return self.largest_sigma


class VariancePreserving(Process):
    """Of signal √ᾱ_t and noise level √(1 - ᾱ_t)."""

    @abstractmethod
    def alpha_bar(self, t: Tensor) -> Tensor:
        """ᾱ at time t, in the dtype of t."""

    @abstractmethod
    def grid_time(self, n: Tensor) -> Tensor:
        """The time of point n of the grid 1 .. 1000 on which the samplers of diffusers work."""

    def levels(self, t: Tensor) -> tuple[Tensor, Tensor]:
        alpha_bar = self.alpha_bar(t)
        return alpha_bar.sqrt(), (1 - alpha_bar).sqrt()

    def signal_of_sigma(self, sigma: float) -> float:
        return 1 / math.sqrt(1 + sigma**2)

    def largest_noise(self) -> float:
        # x_t itself starts as standard normal noise, though a trace of the image should be left in it.
        return 1 / self.signal_of_sigma(self.largest_sigma)


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

    def training_times(self, sigma_B: Tensor) -> Tensor:
        integral_B = torch.log1p(sigma_B**2)
        root_B = torch.sqrt(self.beta_min**2 + 2 * (self.beta_max - self.beta_min) * integral_B)
        return (2 * integral_B / (self.beta_min + root_B)).clamp(max=1.0)

    def network_time(self, t: Tensor) -> Tensor:
        return 999 * t

    def grid_time(self, n: Tensor) -> Tensor:
        return n / NUM_TIMES

    @property
    def largest_sigma(self) -> float:
        """Of t = 1."""
        return math.sqrt(math.expm1((self.beta_min + self.beta_max) / 2))


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

    def training_times(self, sigma_B: Tensor) -> Tensor:
        """The nearest in ln sigma."""
        log_sigmas = torch.from_numpy(self._log_sigmas).to(sigma_B)
        return torch.bucketize(sigma_B.log(), (log_sigmas[1:] + log_sigmas[:-1]) / 2).to(sigma_B.dtype) + 1

    @cached_property
    def _log_sigmas(self) -> np.ndarray:
        alpha_bar = self._make_table().numpy()
        return 0.5 * (np.log1p(-alpha_bar) - np.log(alpha_bar))

    def network_time(self, t: Tensor) -> Tensor:
        return t - 1 + self.first_network_time

    def grid_time(self, n: Tensor) -> Tensor:
        return n

    @property
    def largest_sigma(self) -> float:
        return math.exp(self._log_sigmas[-1])


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


class Flow(Process):
    """x_t = (1 - t) x_0 + t ε, t in [0, 1]: sigma = t / (1 - t) (arXiv:2209.03003)."""

    last_time = 0.999
    """Where sampling starts: at t = 1 sigma is infinite."""

    def draw_time(self, u_B: Tensor) -> Tensor:
        return u_B

    def levels(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return 1 - t, t

    def time_of_sigma(self, sigma: float) -> float:
        return sigma / (1 + sigma)

    def training_times(self, sigma_B: Tensor) -> Tensor:
        return sigma_B / (1 + sigma_B)

    def signal_of_sigma(self, sigma: float) -> float:
        return 1 / (1 + sigma)

    def network_time(self, t: Tensor) -> Tensor:
        return 999 * t

    @property
    def largest_sigma(self) -> float:
        return self.last_time / (1 - self.last_time)


class Karras(Process):
    """x = x_0 + sigma ε, whose time is sigma itself, 0.002 to 80 (arXiv:2206.00364, table 1)."""

    smallest, largest = 0.002, 80.0

    def draw_time(self, u_B: Tensor) -> Tensor:
        """ln sigma is uniform."""
        return self.smallest * (self.largest / self.smallest) ** u_B

    def levels(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ones_like(t), t

    def time_of_sigma(self, sigma: float) -> float:
        return sigma

    def training_times(self, sigma_B: Tensor) -> Tensor:
        return sigma_B

    def signal_of_sigma(self, sigma: float) -> float:
        return 1.0

    def network_time(self, t: Tensor) -> Tensor:
        """1000 c_noise = 1000 · ln(sigma) / 4."""
        return 250 * t.log()

    @property
    def largest_sigma(self) -> float:
        return self.largest

    def sigmas(self, count: int) -> list[float]:
        """EDM's, down to the smallest (arXiv:2206.00364, eq. 5)."""
        smallest, largest = self.smallest ** (1 / RHO), self.largest ** (1 / RHO)
        shares = [n / max(count - 1, 1) for n in range(count)]
        return [(largest + share * (smallest - largest)) ** RHO for share in shares]


PROCESSES: dict[str, VariancePreserving] = {
    "vp-sde": VPSDE(),
    "linear": Linear(),
    "cosine": Cosine(),
    "scaled-linear": ScaledLinear(),
}
"""By the name that --objective.noise takes."""
OWN_PROCESSES: dict[str, Process] = {"flow": Flow(), "edm": Karras()}
"""Of the predictions that come with noise of their own."""
