"""Sampling through the schedulers of diffusers, and the command ``python -m scalelong.train.sample RUN``.

Classifier-free guidance is eps_c + s (eps_c - eps_u) (Ho and Salimans, arXiv:2207.12598, with s = w; s = 0 is none).

Shapes: B batch, C channels, H height, W width.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from scalelong.model.backbone import Backbone
from scalelong.train.command_line import RunArguments, parse, run_command
from scalelong.train.config import SAMPLER_NAMES, SamplerName, TrainConfig
from scalelong.train.data import open_source
from scalelong.train.data_latents import LatentFolder
from scalelong.train.data_loader import prepare_source
from scalelong.train.data_order import Stream, draw_noise, draw_seed
from scalelong.train.diffusion import NUM_TIMES, PROCESSES, VPSDE, Process
from scalelong.train.errors import UserError
from scalelong.train.latents import to_pictures
from scalelong.train.run_folder import load_model

Denoiser = Callable[[Tensor, Tensor], Tensor]


def make_scheduler(sampler: str, process: Process):
    """diffusers' scheduler for a sampler, with the process's ᾱ on the grid n = 1 .. 1000.

    Raises:
        UserError: an unknown sampler, or Euler-Maruyama for a process that is no SDE.
    """
    import diffusers

    n = torch.arange(1, NUM_TIMES + 1, dtype=torch.float64)
    alpha_bar = process.alpha_bar(process.grid_time(n))
    betas = 1 - alpha_bar / torch.cat([alpha_bar.new_ones(1), alpha_bar[:-1]])
    grid = {"num_train_timesteps": NUM_TIMES, "trained_betas": betas.tolist(), "timestep_spacing": "trailing"}
    if sampler == "dpm-solver++":
        return diffusers.DPMSolverMultistepScheduler(**grid, algorithm_type="dpmsolver++", solver_order=2)
    if sampler == "ddim":
        # DDIM is DPM-Solver++ of order 1 (arXiv:2211.01095, section 4). diffusers' own DDIMScheduler steps back by
        # 1000 // steps whatever the grid, which is wrong where steps does not divide 1000.
        return diffusers.DPMSolverMultistepScheduler(**grid, algorithm_type="dpmsolver++", solver_order=1)
    if sampler == "euler":
        return diffusers.EulerDiscreteScheduler(**grid)
    if sampler == "euler-ancestral":
        return diffusers.EulerAncestralDiscreteScheduler(**grid)
    if sampler == "euler-maruyama":
        if not isinstance(process, VPSDE):
            raise UserError("the sampler euler-maruyama needs a run with --objective vp-sde")
        # From its own file: the package beside it imports transformers, which nothing here needs.
        from diffusers.schedulers.deprecated.scheduling_sde_vp import ScoreSdeVpScheduler

        return ScoreSdeVpScheduler()
    raise UserError(f"unknown sampler {sampler!r}; there are {', '.join(SAMPLER_NAMES)}")


def denoise(
    denoiser: Denoiser,
    process: Process,
    noise_BCHW: Tensor,
    *,
    sampler: str,
    steps: int,
    generators: list[torch.Generator] | None = None,
) -> Tensor:
    """Solves the reverse process from pure noise.

    Args:
        denoiser: (x_BCHW, network time, a scalar) -> predicted noise.
        noise_BCHW: standard normal.
        steps: network evaluations.
        generators: of the noise that stochastic samplers add, one for each image.

    Returns:
        (B, C, H, W), not clamped.

    Raises:
        UserError: more steps than the grid has points, or a sampler that does not fit the process.
    """
    if not 1 <= steps <= NUM_TIMES:
        raise UserError(f"a sampler takes 1 to {NUM_TIMES} steps, not {steps}")
    scheduler: Any = make_scheduler(sampler, process)
    if sampler == "euler-maruyama":
        return _euler_maruyama(denoiser, process, scheduler, noise_BCHW, steps, generators)
    scheduler.set_timesteps(steps, device=noise_BCHW.device)
    stochastic = {"generator": generators} if sampler == "euler-ancestral" else {}
    x_BCHW = noise_BCHW * scheduler.init_noise_sigma
    for k in scheduler.timesteps:
        # diffusers counts its grid from 0.
        t = process.network_time(process.grid_time(k.to(x_BCHW.dtype) + 1))
        predicted = denoiser(scheduler.scale_model_input(x_BCHW, k), t)
        x_BCHW = scheduler.step(predicted, k, x_BCHW, **stochastic).prev_sample
    return x_BCHW


def _euler_maruyama(
    denoiser: Denoiser,
    process: Process,
    scheduler,
    x_BCHW: Tensor,
    steps: int,
    generators: list[torch.Generator] | None,
) -> Tensor:
    """The reverse SDE of arXiv:2011.13456, eq. 6, on t from 1 to 10⁻³; the last step takes the mean."""
    scheduler.set_timesteps(steps, device=x_BCHW.device)
    mean_BCHW = x_BCHW
    for t in scheduler.timesteps:
        predicted = denoiser(x_BCHW, process.network_time(t))
        x_BCHW, mean_BCHW = scheduler.step_pred(predicted, x_BCHW, t, generator=generators)
    return mean_BCHW


def guided(model: Backbone, labels_B: Tensor | None, null_label: int | Tensor | None, guidance: float) -> Denoiser:
    """The model's noise prediction for the labels, with classifier-free guidance of strength s = ``guidance``.

    Args:
        labels_B: labels, or text features (B, L, D).
        null_label: what stands for none: a label, or the features (L, D) of the empty text.
    """

    def predict(x_BCHW: Tensor, t: Tensor) -> Tensor:
        t_B = t.to(x_BCHW.dtype).expand(len(x_BCHW))
        if guidance == 0 or labels_B is None:
            return model(x_BCHW, t_B, labels_B)
        assert null_label is not None, "guidance needs a null label"
        null_B = torch.as_tensor(null_label).to(labels_B).expand_as(labels_B)
        # One pass over both halves: the batch is doubled, the launches are not.
        both = model(torch.cat([x_BCHW, x_BCHW]), torch.cat([t_B, t_B]), torch.cat([labels_B, null_B]))
        conditional, unconditional = both.chunk(2)
        return conditional + guidance * (conditional - unconditional)

    return predict


@torch.inference_mode()
def generate(
    model: Backbone,
    process: Process,
    labels: list[int] | Tensor | None,
    *,
    num_images: int,
    null_label: int | Tensor | None,
    sampler: str,
    steps: int,
    guidance: float,
    seed: int = 0,
    batch_size: int = 256,
    to_pictures: Callable[[Tensor], Tensor] | None = None,
) -> np.ndarray:
    """Images (N, H, W, C) in uint8; image n depends on (seed, n), its label and the settings, not on the batches.

    Args:
        labels: one for each image, or text features (N, L, D); None for a model without labels.
        null_label: as ``guided`` takes it.
        to_pictures: makes images (B, C, H, W) in [-1, 1] of what the model draws; None: it draws images.
    """
    config = model.config
    device = next(model.parameters()).device
    shape = (config.in_channels, config.img_size, config.img_size)
    images = []
    for first in range(0, num_images, batch_size):
        numbers = range(first, min(first + batch_size, num_images))
        noise = np.stack([draw_noise(seed, n, shape, Stream.GENERATION) for n in numbers])
        labels_B = None if labels is None else torch.as_tensor(labels[first : numbers.stop]).to(device)
        x_BCHW = denoise(
            guided(model, labels_B, null_label, guidance),
            process,
            torch.from_numpy(noise).to(device),
            sampler=sampler,
            steps=steps,
            generators=[_torch_generator(seed, n) for n in numbers],
        )
        images.append(to_uint8(x_BCHW if to_pictures is None else to_pictures(x_BCHW)))
    return np.concatenate(images)


def _torch_generator(seed: int, number: int) -> torch.Generator:
    """Of the noise that a stochastic sampler adds to image ``number``."""
    return torch.Generator().manual_seed(draw_seed(seed, Stream.SAMPLER, number))


def to_uint8(x_BCHW: Tensor) -> np.ndarray:
    """(B, H, W, C): [-1, 1] to 0 .. 255, rounded and clamped."""
    return ((x_BCHW.float() + 1) * 127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1).cpu().numpy()


def default_labels(num_images: int, num_classes: int) -> list[int] | None:
    """Every class in turn; None for a model without labels."""
    return [n % num_classes for n in range(num_images)] if num_classes else None


def open_texts(config: TrainConfig) -> LatentFolder | None:
    """The source of a run whose model takes text; None for other runs.

    Raises:
        UserError: it is gone, or no longer what the model takes.
    """
    if not config.model.context_tokens:
        return None
    if not Path(config.data.path).is_dir():
        raise UserError(f"samples are drawn for captions of the run's data, and {config.data.path} is gone")
    source = prepare_source(config, open_source(config.data.path, config.num_data_classes))
    assert isinstance(source, LatentFolder), "prepare_source refuses anything else for text"
    return source


def default_texts(num_images: int, source: LatentFolder) -> Tensor:
    """Text features (N, L, D) of the first captions of images spread evenly over the data."""
    indices = np.arange(num_images) * len(source) // num_images
    return source.contexts(indices, np.zeros_like(indices))


def save_grid(images_NHWC: np.ndarray, path: Path, *, columns: int, tile: int = 48) -> None:
    """A PNG with the images row by row, small ones enlarged by a whole factor to about ``tile`` pixels."""
    count, height, width, channels = images_NHWC.shape
    factor, gap = max(1, tile // height), 2
    rows = math.ceil(count / columns)
    cell_h, cell_w = height * factor + gap, width * factor + gap
    canvas = np.full((rows * cell_h + gap, columns * cell_w + gap, channels), 255, dtype=np.uint8)
    for n, image in enumerate(images_NHWC):
        top, left = n // columns * cell_h + gap, n % columns * cell_w + gap
        enlarged = image.repeat(factor, axis=0).repeat(factor, axis=1)
        canvas[top : top + enlarged.shape[0], left : left + enlarged.shape[1]] = enlarged
    path.parent.mkdir(parents=True, exist_ok=True)
    # Written aside first, so that a viewer never meets half a picture.
    staging = path.with_name(f".{path.name}.writing")
    Image.fromarray(canvas.squeeze(-1) if channels == 1 else canvas).save(staging, "PNG")
    staging.rename(path)


def grid_columns(num_images: int, num_classes: int) -> int:
    """One column for each class if that makes a sensible grid, else a square."""
    if 2 <= num_classes <= 16 and num_images >= num_classes:
        return num_classes
    return max(1, math.ceil(math.sqrt(num_images)))


@dataclass(frozen=True, kw_only=True)
class SamplingArguments(RunArguments):
    """What every command that draws samples takes."""

    guidance: float | None = None
    """s in eps_c + s (eps_c - eps_u); 0: none. The run's own if not given."""
    sampler: SamplerName | None = None
    """The run's own if not given."""
    steps: int | None = None
    """Network evaluations for each image. The run's own if not given."""
    seed: int = 0
    """Of the noise."""


@dataclass(frozen=True)
class Sampling:
    """A run's model and how to sample from it."""

    model: Backbone
    config: TrainConfig
    settings: dict[str, Any]
    """Keyword arguments of ``generate``: null_label, sampler, steps, guidance, seed, to_pictures."""
    texts: LatentFolder | None
    """Where the captions are, of a run with text."""


def load_sampling(arguments: SamplingArguments) -> Sampling:
    """The model of a run, and its own settings where the command line gives no others.

    Raises:
        UserError: no such run or checkpoint, or settings that do not fit it, naming the flag.
    """
    if arguments.steps is not None and not 1 <= arguments.steps <= NUM_TIMES:
        raise UserError(f"--steps must be in 1 .. {NUM_TIMES}, got {arguments.steps}")
    if not 0 <= arguments.seed < 2**63:
        raise UserError(f"--seed must be in 0 .. 2^63 - 1, got {arguments.seed}")
    model, config = load_model(arguments.run, checkpoint=arguments.checkpoint, weights=arguments.weights)
    guidance = config.sample.guidance if arguments.guidance is None else arguments.guidance
    if guidance and not config.label_drop:
        raise UserError("--guidance needs a run that was trained with --label-drop above 0")
    texts = open_texts(config)
    settings = {
        "null_label": config.null_label if texts is None else texts.empty_context,
        "sampler": arguments.sampler or config.sample.sampler,
        "steps": arguments.steps or config.sample.steps,
        "guidance": guidance,
        "seed": arguments.seed,
        "to_pictures": to_pictures(config),
    }
    return Sampling(model, config, settings, texts)


@dataclass(frozen=True, kw_only=True)
class SampleArguments(SamplingArguments):
    """Draw samples from a run and save them as one picture."""

    out: Path = Path("grid.png")
    """The PNG to write."""
    num_images: int = 100
    """How many."""
    label: tuple[int, ...] = ()
    """Which classes, in turn; all of them if not given."""


def main(argv: list[str] | None = None) -> None:
    """The command ``scalelong sample``."""
    arguments = parse(SampleArguments, argv, prog="scalelong sample")
    if arguments.num_images < 1:
        raise UserError("--num-images must be at least 1")
    sampling = load_sampling(arguments)
    config = sampling.config
    num_classes = config.num_data_classes
    unknown = [label for label in arguments.label if not 0 <= label < num_classes]
    if unknown:
        known = f"0 to {num_classes - 1}" if num_classes else "none: it was trained without labels"
        raise UserError(f"--label {unknown[0]}: the run's labels are {known}")
    labels = default_labels(arguments.num_images, num_classes)
    if arguments.label:
        labels = [arguments.label[n % len(arguments.label)] for n in range(arguments.num_images)]
    process, texts = PROCESSES[config.objective], sampling.texts
    conditions = labels if texts is None else default_texts(arguments.num_images, texts)
    images = generate(sampling.model, process, conditions, num_images=arguments.num_images, **sampling.settings)
    columns = grid_columns(arguments.num_images, len(set(labels)) if labels else 0)
    try:
        save_grid(images, arguments.out, columns=columns)
    except OSError as error:
        raise UserError(f"cannot write {arguments.out}: {error}") from error
    print(f"{arguments.num_images} samples -> {arguments.out}")


if __name__ == "__main__":
    run_command(main)
