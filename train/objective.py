"""The training objective: what the network is shown, what it is to predict, and the image that its output stands for.

Put together from the parts in diffusion/, as ``--objective.*`` says; docs/objectives.md has the equation of each.
Samplers count by sigma, the noise in x = x_0 + sigma ε, as Karras et al. do (arXiv:2206.00364).

Shapes: B batch, C channels, H height, W width.
"""

from collections.abc import Callable
from functools import cache

from torch import Tensor

from scalelong.train.diffusion.prediction import make_prediction
from scalelong.train.diffusion.process import OWN_PROCESSES, PROCESSES, Process
from scalelong.train.diffusion.times import TIMES
from scalelong.train.diffusion.weighting import WEIGHTINGS, LogVariance, with_uncertainty
from scalelong.train.objective_config import ObjectiveConfig

Denoiser = Callable[[Tensor, float], Tensor]
"""D(x, sigma): the mean of x_0, (B, C, H, W), given x = x_0 + sigma ε."""
SIGMAS_OF_WEIGHTS = 1e-4, 1e5
"""Weights are those of the nearest sigma between these: they and what they multiply stay finite."""


class Objective:
    """What a network learns under a process: what it predicts, how errors are weighted, which times it is shown."""

    def __init__(self, config: ObjectiveConfig):
        self.config = config
        processes: dict[str, Process] = OWN_PROCESSES if config.has_own_noise else {**PROCESSES}
        self.process = processes[config.prediction if config.has_own_noise else config.noise]
        self.prediction = make_prediction(config.prediction, config.sigma_data)

    def draw_time(self, u_B: Tensor) -> Tensor:
        """The training time of each image from a uniform number in [0, 1)."""
        return TIMES[self.config.times](u_B, self.process, self.config)

    def corrupt(self, x0_BCHW: Tensor, noise_BCHW: Tensor, signal: Tensor, noise_level: Tensor) -> Tensor:
        """x_t (arXiv:2006.11239, eq. 4)."""
        return signal * x0_BCHW + noise_level * noise_BCHW

    def shown_at(self, x0_BCHW: Tensor, noise_BCHW: Tensor, sigma: float) -> tuple[Tensor, Tensor]:
        """What the network is shown of images at the noise level sigma, and the time (B,) that it is fed."""
        signal = self.process.signal_of_sigma(sigma)
        t_B = x0_BCHW.new_full((len(x0_BCHW),), self.process.time_of_sigma(sigma))
        x_BCHW = signal * (x0_BCHW + sigma * noise_BCHW)
        return self.prediction.shown(x_BCHW, signal, signal * sigma), self.process.network_time(t_B)

    def weight(self, signal: Tensor, noise_level: Tensor) -> Tensor | float:
        """Of squared errors of the network's output; of a learned weighting, what it starts from."""
        if self.config.weighting not in WEIGHTINGS:
            return 1.0
        sigma = (noise_level / signal).clamp(*SIGMAS_OF_WEIGHTS)
        return WEIGHTINGS[self.config.weighting](sigma, self.config) * self.prediction.image_error(sigma) ** 2

    def squared_errors(
        self,
        network: Callable[..., Tensor],
        x0_BCHW: Tensor,
        noise_BCHW: Tensor,
        t_B: Tensor,
        condition: Tensor | None,
    ) -> Tensor:
        """The weighted squares of the network's errors at the times of the images, (B, C, H, W) in fp32."""
        levels_B111 = self.process.levels(t_B[:, None, None, None])
        x_BCHW = self.prediction.shown(self.corrupt(x0_BCHW, noise_BCHW, *levels_B111), *levels_B111)
        output_BCHW = network(x_BCHW, self.process.network_time(t_B), condition)
        error_BCHW = output_BCHW.float() - self.prediction.target(x0_BCHW, noise_BCHW, *levels_B111)
        return self.weight(*levels_B111) * error_BCHW.square()

    def loss(
        self,
        network: Callable[..., Tensor],
        x0_BCHW: Tensor,
        noise_BCHW: Tensor,
        time_u_B: Tensor,
        condition: Tensor | None,
    ) -> Tensor:
        """The weighted mean square of the network's errors over pixels and batch, a scalar in fp32.

        Of a learned weighting it is the loss without what has been learned: comparable from step to step.

        Args:
            network: (x_BCHW, t_B, condition) -> (B, C, H, W).
            noise_BCHW: standard normal.
            time_u_B: uniform in [0, 1).
            condition: what the network is told of each image: labels (B,), or text features (B, L, D).
        """
        return self.squared_errors(network, x0_BCHW, noise_BCHW, self.draw_time(time_u_B), condition).mean()

    def make_log_variance(self) -> LogVariance | None:
        """What a learned weighting learns, which ``training_loss`` takes; None of fixed ones."""
        return LogVariance() if self.config.weighting == "uncertainty" else None

    def training_loss(
        self,
        network: Callable[..., Tensor],
        x0_BCHW: Tensor,
        noise_BCHW: Tensor,
        time_u_B: Tensor,
        condition: Tensor | None,
        log_variance: Callable[[Tensor], Tensor] | None,
    ) -> tuple[Tensor, Tensor]:
        """What training minimises, and ``loss``, scalars in fp32; the same but for a learned weighting.

        Args:
            network, x0_BCHW, noise_BCHW, time_u_B, condition: as ``loss`` takes them.
            log_variance: made by ``make_log_variance``, of ln sigma (B,).
        """
        if log_variance is None:
            loss = self.loss(network, x0_BCHW, noise_BCHW, time_u_B, condition)
            return loss, loss
        t_B = self.draw_time(time_u_B)
        squares_BCHW = self.squared_errors(network, x0_BCHW, noise_BCHW, t_B, condition)
        signal_B, noise_level_B = self.process.levels(t_B)
        u_B = log_variance((noise_level_B / signal_B).clamp(*SIGMAS_OF_WEIGHTS).log())
        return with_uncertainty(squares_BCHW, u_B), squares_BCHW.detach().mean()

    def denoiser(self, network: Callable[[Tensor, Tensor], Tensor]) -> Denoiser:
        """D(x, sigma) of a network (x_BCHW, t_B) -> (B, C, H, W)."""

        def denoise(x_BCHW: Tensor, sigma: float) -> Tensor:
            signal = self.process.signal_of_sigma(sigma)
            t_B = x_BCHW.new_full((len(x_BCHW),), self.process.time_of_sigma(sigma))
            scaled_BCHW = signal * x_BCHW
            shown_BCHW = self.prediction.shown(scaled_BCHW, signal, signal * sigma)
            output_BCHW = network(shown_BCHW, self.process.network_time(t_B))
            return self.prediction.denoised(output_BCHW.to(x_BCHW.dtype), scaled_BCHW, signal, signal * sigma)

        return denoise


@cache
def make_objective(config: ObjectiveConfig) -> Objective:
    """The objective that ``--objective.*`` describes, made once for each description."""
    return Objective(config)
