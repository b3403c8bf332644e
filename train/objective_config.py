"""What a network learns, and the samplers that can ask it: names and numbers, without an import of torch.

docs/objectives.md has the equation of each.
"""

from dataclasses import dataclass
from typing import Literal, get_args

from scalelong.model.backbone_config import BackboneConfig

NUM_TIMES = 1000
"""Points of the grid of times on which discrete schedules are defined and the samplers of diffusers work."""
NUM_AUGMENT_LABELS = 9
"""Numbers that tell EDM's augmentations of an image (data/augment.py)."""
PredictionName = Literal["eps", "v", "x0", "flow", "edm"]
NoiseName = Literal["vp-sde", "linear", "cosine", "scaled-linear"]
WeightingName = Literal["uniform", "min-snr", "sigmoid", "edm", "uncertainty"]
TimesName = Literal["uniform", "logit-normal", "edm"]
SamplerName = Literal["dpm-solver++", "ddim", "euler", "euler-ancestral", "euler-maruyama", "heun", "sde-dpm-solver++"]
SAMPLER_NAMES: tuple[str, ...] = get_args(SamplerName)
NOISE_NAMES: tuple[str, ...] = get_args(NoiseName)
WITH_NOISE_OF_THEIR_OWN = ("flow", "edm")
"""Predictions that define how images are corrupted as well."""


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """What the network learns: docs/objectives.md.

    Raises:
        ValueError: an unknown name, or a number out of its range.
    """

    prediction: PredictionName = "eps"
    """What the network predicts: the noise, v, the image, the velocity of rectified flow, or EDM's residual."""
    noise: NoiseName = "vp-sde"
    """How noise grows with time: the continuous VP-SDE, or the schedule of DDPM, ADM or Stable Diffusion. Flow and edm
    have noise of their own."""
    weighting: WeightingName = "uniform"
    """How errors count by their noise level: all alike in what the network predicts, min-SNR, SiD2's sigmoid, EDM's, or
    by a learned uncertainty (EDM2's)."""
    min_snr_gamma: float = 5.0
    """Of min-snr: the signal-to-noise ratio from which on errors of the image count alike."""
    sigmoid_bias: float = -1.0
    """Of sigmoid: the log-SNR at which the weight of errors of the noise is a half; lower for larger images."""
    times: TimesName = "uniform"
    """How training times are drawn: uniformly, as the sigmoid of a normal variable, or with normal ln sigma (EDM's)."""
    logit_mean: float = 0.0
    """Of logit-normal: the mean of ln(t / (1 - t))."""
    logit_std: float = 1.0
    """Of logit-normal: its standard deviation."""
    log_sigma_mean: float = -1.2
    """Of the times edm: the mean of ln sigma (EDM's P_mean; EDM2's is -0.8 for pixels, -0.4 for latents)."""
    log_sigma_std: float = 1.2
    """Of the times edm: its standard deviation (EDM's P_std; EDM2's is 1.6 for pixels, 1.0 for latents)."""
    sigma_data: float = 0.5
    """The standard deviation of pixels that EDM's prediction and weighting take for granted."""
    contrast: float = 0.0
    """Weight of contrastive self-distillation beside the loss: features of one view of an image are to be like those
    that the averaged network has of another (DDAE++ has 0.01 and 0.1); 0: none. What follows is inferred."""
    contrast_block: int | None = None
    """Of contrast: the block whose features are compared, by its number in execution order; that of
    model.self-condition-block if not given, or the middle one."""
    contrast_sigma: float = 0.06
    """Of contrast: the noise level sigma at which the averaged network is shown its view."""
    contrast_temperature: float = 0.2
    """Of contrast: what similarities are divided by (MoCo v3's)."""
    contrast_hidden: int = 512
    """Of contrast: hidden width of the heads (MoCo v3 has 4096)."""
    contrast_outputs: int = 128
    """Of contrast: what the heads put out (MoCo v3 has 256)."""
    augment_probability: float = 0.12
    """Of contrast: how often each of EDM's augmentations is applied to a view (EDM's, of CIFAR-10)."""

    def __post_init__(self):
        kinds = {"prediction": PredictionName, "noise": NoiseName, "weighting": WeightingName, "times": TimesName}
        for name, known in kinds.items():
            if getattr(self, name) not in get_args(known):
                raise ValueError(
                    f"unknown objective.{name} {getattr(self, name)!r}; there are {', '.join(get_args(known))}"
                )
        positive = (
            "min_snr_gamma",
            "logit_std",
            "log_sigma_std",
            "sigma_data",
            "contrast_sigma",
            "contrast_temperature",
        )
        for name in positive:
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"objective.{name} must be positive, got {getattr(self, name)}")
        for name in ("contrast_hidden", "contrast_outputs"):
            if getattr(self, name) < 1:
                raise ValueError(f"objective.{name} must be at least 1, got {getattr(self, name)}")
        if not 0 <= self.contrast < float("inf"):
            raise ValueError(f"objective.contrast must be finite and not negative, got {self.contrast}")
        if not 0 <= self.augment_probability <= 1:
            raise ValueError(f"objective.augment_probability must be in [0, 1], got {self.augment_probability}")
        for name in ("sigmoid_bias", "logit_mean", "log_sigma_mean"):
            if not -float("inf") < getattr(self, name) < float("inf"):
                raise ValueError(f"objective.{name} must be finite, got {getattr(self, name)}")

    @property
    def has_own_noise(self) -> bool:
        """Whether the prediction says how images are corrupted, so that ``noise`` does not count."""
        return self.prediction in WITH_NOISE_OF_THEIR_OWN


def check_sampler(sampler: str, objective: ObjectiveConfig) -> None:
    """
    Raises:
        ValueError: a sampler that cannot serve the objective.
    """
    if sampler == "euler-maruyama" and (objective.has_own_noise or objective.noise != "vp-sde"):
        how = objective.prediction if objective.has_own_noise else objective.noise
        raise ValueError(
            f"the sampler euler-maruyama needs a run with --objective vp-sde, not {how}; take sde-dpm-solver++"
        )


def check_guidance_interval(interval: tuple[float, float] | None) -> None:
    """
    Raises:
        ValueError: it is empty, or begins below 0.
    """
    if interval is not None and not 0 <= interval[0] < interval[1]:
        raise ValueError(f"guidance_interval must be two noise levels, 0 <= LOW < HIGH, got {interval}")


def check_contrast(
    objective: ObjectiveConfig, model: BackboneConfig, *, zero_stage: int, ema_decay: float, images_at_a_time: int
) -> None:
    """
    Raises:
        ValueError: no averaged network to compare with, nothing to compare, or a network that takes something else.
    """
    last = len(model.block_widths) - 1
    if zero_stage == 3:
        raise ValueError(
            "objective.contrast needs the averaged network whole on every process, which ZeRO 3 is there to do "
            "without: take zero_stage 0, 1 or 2"
        )
    if ema_decay == 0:
        raise ValueError("objective.contrast needs averages of the weights: optimizer.ema_decay must be above 0")
    if images_at_a_time < 2:
        raise ValueError("objective.contrast compares images: it needs at least 2 of them at a time")
    if model.context_tokens:
        raise ValueError("objective.contrast augments images, and this model takes latents with text")
    if last < 0:
        raise ValueError(f"objective.contrast: a {model.architecture} takes no augmentation labels (block_widths)")
    block = objective.contrast_block
    if block is not None and not 0 <= block <= last:
        raise ValueError(f"objective.contrast_block {block}: this {model.architecture} has the blocks 0 to {last}")
    if model.augment_dim not in (0, NUM_AUGMENT_LABELS):
        raise ValueError(
            f"objective.contrast tells the network {NUM_AUGMENT_LABELS} numbers of each image, but model.augment_dim "
            f"is {model.augment_dim}"
        )
