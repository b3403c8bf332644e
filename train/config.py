"""The configuration of a run: one frozen dataclass, every field of it a flag on the command line."""

import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, cast

from scalelong.model.backbone_config import BackboneConfig, Recompute
from scalelong.model.skip_scale import ConstantScale, SkipScale, make_skip_scale
from scalelong.train.objective_config import (
    NUM_AUGMENT_LABELS,
    NUM_TIMES,
    NoiseName,
    ObjectiveConfig,
    SamplerName,
    check_contrast,
    check_guidance_interval,
)
from scalelong.train.optimizer_config import (
    OptimizerConfig,
    bookkeeping,
    check_ema_stds,
    check_optimizer_of_unit_rows,
)

ReaderName = Literal["auto", "dali", "pillow"]
PrecisionName = Literal["fp32", "bf16", "fp16"]
OffloadName = Literal["none", "optimizer", "parameters"]
FeaturesName = Literal["efficientnet", "inception", "pixels"]
CompileName = Literal["none", "model", "blocks"]
LEAST_SAMPLES, LEAST_REAL_IMAGES = 4, 20
"""For a kernel distance with its error, two blocks of two images; and of data of which a fifth has to be as many."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What is trained on."""

    path: str = bookkeeping("digits")
    """A folder of images, shards or latents, CIFAR-10 as published, or embedded data ("digits", "cluttered-digits",
    "photos"): docs/data.md. It may move."""
    flip: bool = False
    """Mirror half of the images."""
    reader: ReaderName = bookkeeping("auto")
    """Who decodes: NVIDIA DALI, or Pillow where DALI is not installed; "auto" takes DALI if it is there."""
    num_threads: int = bookkeeping(0)
    """Decoding threads for each process; 0: the cores divided among the processes of this host, at most 4."""
    check_images: int = bookkeeping(20_000)
    """How many images are checked before training starts, to find bad ones early (spread evenly over the data)."""
    max_bad_share: float = bookkeeping(0.01)
    """A run with a larger share of images that cannot be decoded stops; others stand in for the bad ones until then."""
    vae: str = bookkeeping("")
    """Folder of the AutoencoderKL that decodes latents for pictures; without, they show three of their channels."""


@dataclass(frozen=True, kw_only=True)
class GuardConfig:
    """What is done about instability. Off: a loss that is not finite stops the run, and no loss is too high."""

    skip_steps: int = bookkeeping(0)
    """How many steps in a row are left out if their loss or gradient is not finite; 0: the first stops the run."""
    roll_back_factor: float = bookkeeping(0.0)
    """How many times its running median a loss may be; 0: any number."""
    roll_back_steps: int = bookkeeping(10)
    """How many losses in a row above that undo the steps since the last checkpoint before them."""
    roll_backs: int = bookkeeping(3)
    """How often that is done in one start; then the run stops."""


@dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """The grids of samples made during training."""

    sampler: SamplerName = bookkeeping("dpm-solver++")
    """Who solves the reverse process: docs/objectives.md."""
    steps: int = bookkeeping(50)
    """Network evaluations for each image (two each with guidance)."""
    guidance: float = bookkeeping(0.0)
    """s in eps_c + s (eps_c - eps_u); 0: no guidance."""
    guidance_interval: tuple[float, float] | None = bookkeeping(None)
    """LOW HIGH: guidance only at noise levels sigma in (LOW, HIGH]; at all of them if not given."""
    skip_tuning: tuple[float, float] | None = bookkeeping(None)
    """BOTTOM TOP: factors of the innermost and of the outermost long skip while sampling (Skip-Tuning), those between
    on a line; as trained if not given."""
    path_drop: bool = bookkeeping(False)
    """Guidance by a pass that leaves out the sparse middle (SPRINT), of a model trained with model.path-drop."""
    num_images: int = bookkeeping(100)
    """Images in a grid."""

    def __post_init__(self):
        for name in ("guidance_interval", "skip_tuning"):
            if getattr(self, name) is not None:  # JSON has lists
                object.__setattr__(self, name, tuple(getattr(self, name)))


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """How samples are scored against real images."""

    features: FeaturesName = bookkeeping("efficientnet")
    """In which space: EfficientNet-Lite0's features, Inception's, or principal components of pixels."""
    inception_file: Path | None = bookkeeping(None)
    """Weights of torch-fidelity's Inception, a file on this machine."""
    num_images: int = bookkeeping(1000)
    """Samples, spread evenly over the classes."""
    max_real_images: int = bookkeeping(10_000)
    """At most so many real images are read, of those trained on and of those held out."""

    def __post_init__(self):
        if self.inception_file is not None:  # JSON has strings
            object.__setattr__(self, "inception_file", Path(self.inception_file))


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    """Where else a run is watched than in its folder and on the terminal."""

    wandb: str = bookkeeping("")
    """Project of Weights & Biases that rows and grids go to as well; none if not given."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A training run. Progress is counted in images."""

    run: Path = bookkeeping(Path("runs/default"))
    """Run folder; running the same command again resumes it."""
    branch_from: str | None = bookkeeping(None)
    """RUN or RUN@IMAGES: start from the newest or that checkpoint of another run; what the network computes stays."""
    init_from: str | None = bookkeeping(None)
    """Start a new run from weights: a file, an export, RUN or RUN@IMAGES (its averages), or a folder of diffusers."""
    init_sha256: str | None = bookkeeping(None)
    """SHA-256 of the weights that init_from names, which is recorded; where it is given, others are refused."""
    total_images: int = bookkeeping(64_000_000)
    """Images to train on in all; a larger number continues a finished run."""
    images_per_step: int = 128
    """Global batch: over all processes and accumulation steps."""
    images_per_checkpoint: int = bookkeeping(1_280_000)
    """How often a checkpoint is written."""
    images_per_grid: int = bookkeeping(1_280_000)
    """How often a grid of samples is made; 0: only at the end."""
    images_per_average: int = bookkeeping(1_280_000)
    """How often the averages of optimizer.ema_stds are kept; 0: only at the end."""
    images_per_log: int = bookkeeping(12_800)
    """How often a line is logged; 0: every step."""
    images_per_validation: int = bookkeeping(1_280_000)
    """How often the validation loss is logged; 0: only at the end. It changes no bit of the training."""
    num_validation_images: int = bookkeeping(1024)
    """Images of the validation loss, the same each time, held out if the data has a test split; 0: no such loss."""
    images_per_evaluation: int = bookkeeping(0)
    """How often samples are scored against real images, and at the end; 0: never."""
    keep_checkpoints: int = bookkeeping(2)
    """How many checkpoints are kept, at least 2."""
    seed: int = 0
    """Of the weights, the order of the data, flips, dropped labels, times and noise."""
    skip_scale: SkipScale = field(default_factory=ConstantScale)
    """What multiplies the long skips: a policy, or its name."""
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    """What the network learns."""
    sparse_images: int = 0
    """Of a model with a sparse middle: from so many images on it sees all tokens (SPRINT's second stage); 0: never."""
    label_drop: float = 0.0
    """Share of labels replaced by the null label, or texts by the empty one, for guidance; 0: no null label."""
    precision: PrecisionName = "fp32"
    """fp32, or autocast to bf16 or fp16 with fp32 weights."""
    zero_stage: Literal[0, 1, 2, 3] = bookkeeping(0)
    """What DeepSpeed ZeRO shards: nothing, optimizer state, gradients too, parameters too."""
    offload: OffloadName = bookkeeping("none")
    """What lies in the host's memory: nothing, optimizer state (ZeRO 1 to 3), parameters as well (ZeRO 3)."""
    deepspeed_config: Path | None = bookkeeping(None)
    """A DeepSpeed JSON whose values are added to those that the flags give."""
    accumulation_steps: int = bookkeeping(1)
    """Micro-batches that make one step on each process."""
    recompute: Recompute = bookkeeping("none")
    """What blocks keep for backward: all, only their inputs ("blocks"), or (U-ViT) at most a share in (0, 1)."""
    compile: CompileName = bookkeeping("none")
    """What torch.compile makes of the network in training: nothing, one graph of it, or one of each kind of block."""
    deterministic: bool = bookkeeping(False)
    """On a GPU, algorithms that give the same bits each time, where PyTorch has them; a CPU's do so anyway."""
    profile: int | None = bookkeeping(None)
    """Steps to trace with torch.profiler, after the first ones of the first start, into the run folder."""
    model: BackboneConfig
    """The network."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    data: DataConfig = field(default_factory=DataConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)
    guard: GuardConfig = bookkeeping(default_factory=GuardConfig)
    evaluation: EvaluationConfig = bookkeeping(default_factory=EvaluationConfig)
    log: LogConfig = bookkeeping(default_factory=LogConfig)

    def __post_init__(self):
        if isinstance(self.skip_scale, str):
            object.__setattr__(self, "skip_scale", make_skip_scale(self.skip_scale))
        if isinstance(self.objective, str):
            object.__setattr__(self, "objective", ObjectiveConfig(noise=cast(NoiseName, self.objective)))
        positive = ("total_images", "images_per_step", "images_per_checkpoint", "accumulation_steps")
        not_negative = ("images_per_grid", "images_per_average", "images_per_log", "images_per_validation")
        not_negative += ("num_validation_images", "images_per_evaluation", "seed", "sparse_images")
        _check(self, positive, lambda v: v >= 1, "at least 1")
        _check(self, not_negative, lambda v: v >= 0, "not negative")
        _check(self, ("keep_checkpoints",), lambda v: v >= 2, "at least 2")
        _check(self, ("profile",), lambda v: v is None or v >= 1, "at least 1")
        _check(self, ("label_drop",), lambda v: 0 <= v < 1, "in [0, 1)")
        _check(self.optimizer, ("learning_rate",), lambda v: v > 0, "positive")
        _check(self.optimizer, ("beta1", "beta2", "momentum", "ema_decay"), lambda v: 0 <= v < 1, "in [0, 1)")
        _check(self.optimizer, ("final_factor", "ema_rampup"), lambda v: 0 <= v <= 1, "in [0, 1]")
        not_negative = ("weight_decay", "warmup_images", "clip_grad_norm", "clip_z_score")
        not_negative += ("horizon_images", "decay_images", "stable_images")
        _check(self.optimizer, not_negative, lambda v: v >= 0, "not negative")
        if self.optimizer.clip_grad_norm and self.optimizer.clip_z_score:
            raise ValueError("gradients are clipped in one way, not by clip_grad_norm and clip_z_score")
        check_ema_stds(self.optimizer.ema_stds)
        _check(self.sample, ("num_images",), lambda v: v >= 1, "at least 1")
        _check(self.sample, ("steps",), lambda v: 1 <= v <= NUM_TIMES, f"in 1 .. {NUM_TIMES}")
        _check(self.sample, ("guidance",), lambda v: 0 <= v < math.inf, "finite and not negative")
        check_guidance_interval(self.sample.guidance_interval)
        self.model.check_skip_tuning(self.sample.skip_tuning)
        self.model.check_path_drop(self.sample.path_drop)
        _check(self.data, ("num_threads", "check_images"), lambda v: v >= 0, "not negative")
        _check(self.data, ("max_bad_share",), lambda v: 0 <= v < 1, "in [0, 1)")
        _check(self.guard, ("skip_steps", "roll_backs"), lambda v: v >= 0, "not negative")
        _check(self.guard, ("roll_back_factor",), lambda v: v == 0 or v > 1, "0 or above 1")
        _check(self.guard, ("roll_back_steps",), lambda v: v >= 1, "at least 1")
        least, least_real = LEAST_SAMPLES, LEAST_REAL_IMAGES
        _check(self.evaluation, ("num_images",), lambda v: v >= least, f"at least {least} for an evaluation")
        _check(self.evaluation, ("max_real_images",), lambda v: v >= least_real, f"at least {least_real}")
        if self.seed >= 2**63:
            raise ValueError(f"seed must be below 2^63, got {self.seed}")
        if self.label_drop and not (self.model.num_classes or self.model.context_tokens):
            raise ValueError("label_drop needs a model with labels or text (model.num_classes, model.context_tokens)")
        if self.sample.guidance and not self.label_drop:
            raise ValueError("sample.guidance needs label_drop above 0 in training")
        if self.sparse_images and not self.model.sparse_ratio:
            raise ValueError("sparse_images is of a model whose middle drops patches: model.sparse_ratio above 0")
        if self.model.channels_out != self.model.in_channels:
            raise ValueError("a learned variance is not trained: model.out_channels must be 0 or model.in_channels")
        if self.branch_from is not None and self.init_from is not None:
            raise ValueError(
                "branch_from takes the weights of a run and all else of it, init_from weights alone: give one"
            )
        if self.objective.contrast:
            check_contrast(
                self.objective,
                self.model,
                zero_stage=self.zero_stage,
                ema_decay=self.optimizer.ema_decay,
                images_at_a_time=self.images_per_step // self.accumulation_steps,
            )
            object.__setattr__(self, "model", replace(self.model, augment_dim=NUM_AUGMENT_LABELS))
        self.model.check_recompute(self.recompute)
        if self.model.preserves_magnitude:
            check_optimizer_of_unit_rows(self.optimizer)

    @property
    def contrast_block(self) -> int:
        """The number of the block whose features are compared."""
        given = (self.objective.contrast_block, self.model.self_condition_block)
        return next((block for block in given if block is not None), len(self.model.block_widths) // 2)

    def drops_tokens_at(self, images_seen: int) -> bool:
        """Whether the middle does not see all tokens in the step that begins there."""
        return bool(self.model.sparse_ratio) and not 0 < self.sparse_images <= images_seen

    @property
    def null_label(self) -> int | None:
        """The label that stands for "no label", the last row of the embedding; None without guidance or labels."""
        return self.model.num_classes - 1 if self.label_drop and self.model.num_classes else None

    @property
    def context_shape(self) -> tuple[int, int] | None:
        """(L, D) of the text features that the model takes; None for a model without text."""
        return self.model.context_shape

    @property
    def num_data_classes(self) -> int:
        """Classes that the data must have; 0: labels are not used."""
        return self.model.num_classes - (0 if self.null_label is None else 1)


def _check(config: Any, names: tuple[str, ...], holds: Any, what: str) -> None:
    for name in names:
        value = getattr(config, name)
        if not holds(value):
            raise ValueError(f"{name} must be {what}, got {value}")
