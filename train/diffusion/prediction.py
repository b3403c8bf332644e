"""What networks predict of x_t = α x_0 + s ε, and the image that a prediction stands for.

ε: DDPM (arXiv:2006.11239). v: Salimans and Ho (arXiv:2202.00512). Velocity: rectified flow (arXiv:2209.03003).
EDM's preconditioning: Karras et al. (arXiv:2206.00364, table 1).

Each is affine in x_t and the output, so that classifier-free guidance of outputs is that of images. ``signal`` α and
``noise_level`` s are tensors that broadcast over images, or numbers.

Shapes: B batch, C channels, H height, W width.
"""

import math
from abc import ABC, abstractmethod

from torch import Tensor

Level = Tensor | float


class Prediction(ABC):
    """The network's output F, and D = x_0 as it stands for."""

    @abstractmethod
    def target(self, x0_BCHW: Tensor, noise_BCHW: Tensor, signal: Tensor, noise_level: Tensor) -> Tensor:
        """What the network is to predict, (B, C, H, W)."""

    @abstractmethod
    def denoised(self, output_BCHW: Tensor, x_BCHW: Tensor, signal: float, noise_level: float) -> Tensor:
        """The x_0 that the output for x_t stands for."""

    @abstractmethod
    def image_error(self, sigma: Tensor) -> Tensor:
        """|dD / dF|, EDM's c_out: how far an error of the output moves the image, at sigma = s / α."""

    def shown(self, x_BCHW: Tensor, signal: Level, noise_level: Level) -> Tensor:
        """c_in x_t, which the network is shown: x_t where its variance is near 1 at all times."""
        return x_BCHW


class Noise(Prediction):
    """F = ε."""

    def target(self, x0_BCHW: Tensor, noise_BCHW: Tensor, signal: Tensor, noise_level: Tensor) -> Tensor:
        return noise_BCHW

    def denoised(self, output_BCHW: Tensor, x_BCHW: Tensor, signal: float, noise_level: float) -> Tensor:
        return (x_BCHW - noise_level * output_BCHW) / signal

    def image_error(self, sigma: Tensor) -> Tensor:
        return sigma


class V(Prediction):
    """F = v = α ε - s x_0, under a process that preserves the variance: D = α x_t - s v."""

    def target(self, x0_BCHW: Tensor, noise_BCHW: Tensor, signal: Tensor, noise_level: Tensor) -> Tensor:
        return signal * noise_BCHW - noise_level * x0_BCHW

    def denoised(self, output_BCHW: Tensor, x_BCHW: Tensor, signal: float, noise_level: float) -> Tensor:
        return signal * x_BCHW - noise_level * output_BCHW

    def image_error(self, sigma: Tensor) -> Tensor:
        return sigma / (1 + sigma**2).sqrt()


class Image(Prediction):
    """F = x_0."""

    def target(self, x0_BCHW: Tensor, noise_BCHW: Tensor, signal: Tensor, noise_level: Tensor) -> Tensor:
        return x0_BCHW

    def denoised(self, output_BCHW: Tensor, x_BCHW: Tensor, signal: float, noise_level: float) -> Tensor:
        return output_BCHW

    def image_error(self, sigma: Tensor) -> Tensor:
        return sigma.new_ones(())


class Velocity(Prediction):
    """F = dx_t/dt = ε - x_0 of a straight path, α = 1 - s: D = x_t - s F."""

    def target(self, x0_BCHW: Tensor, noise_BCHW: Tensor, signal: Tensor, noise_level: Tensor) -> Tensor:
        return noise_BCHW - x0_BCHW

    def denoised(self, output_BCHW: Tensor, x_BCHW: Tensor, signal: float, noise_level: float) -> Tensor:
        return x_BCHW - noise_level * output_BCHW

    def image_error(self, sigma: Tensor) -> Tensor:
        return sigma / (1 + sigma)


class Preconditioned(Prediction):
    """D = c_skip x + c_out F(c_in x), with c_in and the target of variance 1 (arXiv:2206.00364, eq. 7 and table 1).

    Args:
        sigma_data: the standard deviation of pixels.
    """

    def __init__(self, sigma_data: float):
        self.sigma_data = sigma_data

    def shown(self, x_BCHW: Tensor, signal: Level, noise_level: Level) -> Tensor:
        return x_BCHW / (noise_level**2 + self.sigma_data**2) ** 0.5

    def target(self, x0_BCHW: Tensor, noise_BCHW: Tensor, signal: Tensor, noise_level: Tensor) -> Tensor:
        # (x_0 - c_skip x) / c_out, multiplied out so that at small sigma it is no difference of like numbers.
        norm = self.sigma_data * (noise_level**2 + self.sigma_data**2).sqrt()
        return (noise_level * x0_BCHW - self.sigma_data**2 * noise_BCHW) / norm

    def denoised(self, output_BCHW: Tensor, x_BCHW: Tensor, signal: float, noise_level: float) -> Tensor:
        total = noise_level**2 + self.sigma_data**2
        c_skip, c_out = self.sigma_data**2 / total, noise_level * self.sigma_data / math.sqrt(total)
        return c_skip * x_BCHW + c_out * output_BCHW

    def image_error(self, sigma: Tensor) -> Tensor:
        return sigma * self.sigma_data / (sigma**2 + self.sigma_data**2).sqrt()


def make_prediction(name: str, sigma_data: float) -> Prediction:
    """The prediction of a name that --objective.prediction takes."""
    plain = {"eps": Noise, "v": V, "x0": Image, "flow": Velocity}
    return plain[name]() if name in plain else Preconditioned(sigma_data)
