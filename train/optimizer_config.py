"""The optimizer of a run, its learning rate over time and its averages; imports no torch."""

import math
from dataclasses import dataclass, field
from typing import Any, Literal

OptimizerName = Literal["adamw", "muon"]
ScheduleName = Literal["constant", "cosine", "inverse-sqrt", "warmup-stable-decay"]
# Relative width of a power-function average: that of the plain mean over all steps, gamma = 0.
LARGEST_STD = math.sqrt(1 / 12)


def bookkeeping(default: Any = None, **kwargs: Any) -> Any:
    """A field that changes how a run is carried out or shown but not what it computes: free to differ on resuming."""
    if "default_factory" not in kwargs:
        kwargs["default"] = default
    return field(metadata={"bookkeeping": True}, **kwargs)


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """The optimizer; the learning rate rises linearly over the warm-up, then follows the schedule."""

    kind: OptimizerName = "adamw"
    """adamw for all parameters, or muon for hidden matrices and adamw for the others: docs/methods.md."""
    momentum: float = 0.95
    """Of muon: decay of the mean of hidden matrices' gradients, per step; they have no other decay."""
    learning_rate: float = 2e-4
    """After the warm-up."""
    beta1: float = 0.99
    """Decay of the mean of gradients, per step."""
    beta2: float = 0.999
    """Decay of the mean of squared gradients, per step."""
    weight_decay: float = 0.03
    """Decoupled, on every parameter, as published."""
    warmup_images: int = 320_000
    """Length of the warm-up, in images."""
    schedule: ScheduleName = bookkeeping("constant")
    """What the learning rate does after the warm-up. This and its numbers may change on resuming, as long as no step
    taken would have had another rate."""
    horizon_images: int = bookkeeping(0)
    """Where cosine and warmup-stable-decay end; 0: at the total_images that the run is started with."""
    decay_images: int = bookkeeping(0)
    """Length of the decay that ends warmup-stable-decay; 0: a fifth of the horizon."""
    stable_images: int = bookkeeping(0)
    """Where inverse-sqrt begins to fall; 0: at the end of the warm-up."""
    final_factor: float = bookkeeping(0.0)
    """What cosine and warmup-stable-decay leave of the learning rate."""
    clip_grad_norm: float = 0.0
    """Largest norm of the gradient; 0: no clipping."""
    clip_z_score: float = 0.0
    """How many deviations above its running mean the gradient's norm may be (ZClip; 2.5, say); 0: any number."""
    ema_decay: float = 0.9999
    """Decay of the averaged weights, per step."""
    ema_rampup: float = 0.0
    """The half-life of that average is at most this share of the steps so far (EDM's 0.05), so that short runs, and
    those that start from weights, forget their beginning; 0: the decay from the first step on."""
    ema_stds: tuple[float, ...] = ()
    """Relative widths of further averages, kept to make one of any width later (ema_posthoc): 0.05 0.1, say."""

    def __post_init__(self):
        object.__setattr__(self, "ema_stds", tuple(self.ema_stds))  # JSON has lists


def check_optimizer_of_unit_rows(optimizer: OptimizerConfig) -> None:
    """What suits weights whose rows keep their norm (EDM2, arXiv:2312.02696, sections 2.3 and B.5).

    Raises:
        ValueError: a decay that would be undone after every step, or a rate that nothing lets fall.
    """
    if optimizer.weight_decay:
        raise ValueError(
            f"a magnitude-preserving network restores the norm of its weights after every step, so that they do not "
            f"decay: optimizer.weight_decay must be 0, got {optimizer.weight_decay:g}"
        )
    if optimizer.schedule == "constant":
        raise ValueError(
            "the weights of a magnitude-preserving network do not grow, which elsewhere makes steps ever smaller: "
            "optimizer.schedule must fall (inverse-sqrt, cosine or warmup-stable-decay), got 'constant'"
        )


def check_ema_stds(stds: tuple[float, ...]) -> None:
    """Raises:
    ValueError: a width that no power function has, or one given twice.
    """
    for std in stds:
        if not 0.001 <= std <= LARGEST_STD:
            raise ValueError(f"a relative width must be in [0.001, {LARGEST_STD:.4f}], got {std:g}")
    if len({f"{std:g}" for std in stds}) < len(stds):
        raise ValueError(f"ema_stds must differ, got {' '.join(f'{std:g}' for std in stds)}")
