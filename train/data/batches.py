"""Training batches: images from a reader, and what (seed, position) decides about each of them."""

import importlib.util
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import count, repeat
from typing import Any

import numpy as np
import torch
from torch import Tensor

from scalelong.model.sparse_middle import MiddleTokens
from scalelong.train.config import TrainConfig
from scalelong.train.data.augment import Views, two_views
from scalelong.train.data.latents import EMPTY_CONTEXT
from scalelong.train.data.middle import draw_middle
from scalelong.train.data.order import BatchPlan, Order, Stream, draw_noise, draw_samples, draw_seed
from scalelong.train.data.side_stream import beside_training, hand_over
from scalelong.train.data.source import ImageSource, LatentSource, Source, has_test_split, open_data
from scalelong.train.data.stand_ins import SoundImages
from scalelong.train.errors import UserError, warn


@dataclass(frozen=True)
class Batch:
    """One micro-batch on the training device."""

    images_BCHW: Tensor
    """fp32 in [-1, 1]."""
    noise_BCHW: Tensor
    """Standard normal."""
    time_u_B: Tensor
    """Uniform in [0, 1): the objective makes its time of it."""
    condition: Tensor | None
    """Labels (B,), or text features (B, L, D), fp32. Dropped ones are the null label, or the empty text; None without
    either."""
    dropout_seed: int
    """Of the activations that the network drops."""
    views: Views | None = None
    """Of a contrast: how the images were augmented, and another view of each."""
    middle: MiddleTokens | None = None
    """What a sparse middle sees of the images; None: all tokens."""


def choose_reader(name: str) -> str:
    """ "dali" or "pillow" for a configured reader.

    Raises:
        UserError: DALI is asked for and not installed.
    """
    has_dali = importlib.util.find_spec("nvidia") is not None and importlib.util.find_spec("nvidia.dali") is not None
    if name == "dali" and not has_dali:
        raise UserError("--data.reader dali: NVIDIA DALI is not installed (pip install nvidia-dali-cuda130)")
    return name if name != "auto" else ("dali" if has_dali else "pillow")


def num_reader_threads(config: TrainConfig, num_cores: int) -> int:
    """Threads that decode, of a process that has so many cores."""
    return config.data.num_threads or min(4, num_cores)


def prepare_source(config: TrainConfig, source: ImageSource | LatentSource) -> SoundImages | LatentSource:
    """The source as batches are read from it: images with stand-ins for bad ones, or latents as they are.

    Raises:
        UserError: the model takes something else than the source holds.
    """
    model = config.model
    if source.holds == "latents":
        if config.objective.contrast:
            raise UserError(f"--objective.contrast augments images, and {config.data.path} holds latents")
        expected = (model.in_channels, model.img_size, model.img_size)
        if source.shape != expected:
            raise UserError(f"{config.data.path} holds latents of {source.shape}, the model takes {expected}")
        if config.data.flip and not source.has_mirrored:
            raise UserError(
                f"{config.data.path} holds no latents of mirrored images: prepare it with --mirrored True, or set "
                f"--data.flip False"
            )
        if config.context_shape is not None:
            _check_text(config, source)
        return source
    if config.context_shape is not None:
        raise UserError(f"{config.data.path} holds images; a model with text takes latents with text features")
    if model.in_channels not in (1, 3):
        raise UserError(
            f"{config.data.path} holds images; a model of {model.in_channels} channels takes latents: scalelong prepare"
        )
    return SoundImages(source, model.in_channels)


def open_validation_source(
    config: TrainConfig, source: SoundImages | LatentSource
) -> tuple[SoundImages | LatentSource, bool]:
    """What the validation loss is of: the test split of the data, or else the source itself, read apart from training.

    Args:
        source: of training, as ``prepare_source`` returns it.

    Returns:
        The source, and whether it is held out. A test split that cannot be read is warned of, and not held out.
    """
    if config.num_validation_images and has_test_split(config.data.path):
        try:
            return prepare_source(config, open_data(config, split="test")), True
        except UserError as error:
            warn(f"the validation loss is at images that are trained on: {error}")
    # An image that is found bad here is none that training has met.
    return (source if source.holds == "latents" else SoundImages(source.source, source.channels)), False


def _check_text(config: TrainConfig, source: LatentSource) -> None:
    path, expected = config.data.path, config.context_shape
    if source.context_shape is None:
        raise UserError(f"{path} holds no text features, which a model with text (model.context_tokens) needs")
    if source.context_shape != expected:
        raise UserError(f"{path} holds text features of {source.context_shape}, the model takes {expected}")
    if config.label_drop and source.empty_context is None:
        raise UserError(f"{path} has no {EMPTY_CONTEXT}, which --label-drop and guidance need")


def read_batches(
    config: TrainConfig, source: SoundImages | LatentSource, plan: BatchPlan, *, num_threads: int, device: torch.device
) -> Iterator[Batch]:
    """Endless micro-batches of this process, from ``plan.first_position`` on.

    Args:
        source: what ``prepare_source`` returns.

    Raises:
        UserError: as good as no image can be decoded, or a reader that is not installed.
    """
    order = Order(config.seed, len(source))
    how: Any = {"flip": config.data.flip, "num_threads": num_threads}
    contexts: Iterator[Tensor | None] = repeat(None)
    if source.holds == "latents":
        images = read_latents(source, order, plan, **how)
        if config.context_shape is not None:
            contexts = read_contexts(source, order, plan, label_drop=config.label_drop)
    else:
        how["img_size"] = config.model.img_size
        if choose_reader(config.data.reader) == "dali":
            from scalelong.train.data.dali import read_with_dali

            images = read_with_dali(source, order, plan, **how, device=device)
        else:
            from scalelong.train.data.pillow import read_with_pillow

            images = read_with_pillow(source, order, plan, **how)
    for number, (images_BCHW, context_BLD) in enumerate(zip(images, contexts, strict=True)):
        drops = config.drops_tokens_at(plan.step_of(number))
        yield _with_draws(config, source, order, plan.positions(number), images_BCHW, context_BLD, device, drops=drops)


def _with_draws(
    config: TrainConfig,
    source: Source,
    order: Order,
    positions: range,
    images_BCHW: Tensor,
    context_BLD: Tensor | None,
    device: torch.device,
    *,
    drops: bool,
) -> Batch:
    draws = draw_samples(config.seed, positions)
    noise = np.stack([draw_noise(config.seed, p, tuple(images_BCHW.shape[1:])) for p in positions])
    condition = context_BLD
    if config.model.num_classes:
        dropped = draws.drops_label(config.label_drop)
        labels = [
            config.null_label if drop else source.label(order.index(p))
            for p, drop in zip(positions, dropped, strict=True)
        ]
        condition = torch.tensor(labels)
    middle = draw_middle(config.model, config.seed, positions, drops=drops)
    with beside_training(device):
        images_BCHW, views = images_BCHW.to(device), None
        if config.objective.contrast:
            how: Any = {"probability": config.objective.augment_probability, "mirrors": config.data.flip}
            images_BCHW, views = two_views(images_BCHW, config.seed, positions, **how)
        batch = Batch(
            images_BCHW=images_BCHW,
            noise_BCHW=torch.from_numpy(noise).to(device),
            time_u_B=torch.tensor(draws.time_u).to(device),
            condition=None if condition is None else condition.to(device),
            dropout_seed=draw_seed(config.seed, Stream.DROPOUT, positions.start),
            views=views,
            middle=None if middle is None else middle.to(device),
        )
    hand_over(
        batch.images_BCHW, batch.noise_BCHW, batch.time_u_B, batch.condition, *(views or ()), *(batch.middle or ())
    )
    return batch


def read_latents(
    source: LatentSource, order: Order, plan: BatchPlan, *, flip: bool, num_threads: int
) -> Iterator[Tensor]:
    """Endless micro-batches (B, C, H, W), fp32: scale (mean + std ε), with ε of (seed, position)."""

    def noise(position: int) -> np.ndarray:
        return draw_noise(order.seed, position, source.shape, Stream.LATENT)

    with ThreadPoolExecutor(num_threads) as pool:
        for batch in count():
            positions = plan.positions(batch)
            noises = pool.map(noise, positions)  # drawn while the moments are read
            mirrored = draw_samples(order.seed, positions).flips(flip)
            mean, std = source.moments(_indices(order, positions), mirrored).float().unbind(1)
            yield source.scale * (mean + std * torch.from_numpy(np.stack(list(noises))))


def read_contexts(source: LatentSource, order: Order, plan: BatchPlan, *, label_drop: float) -> Iterator[Tensor]:
    """Endless micro-batches (B, L, D), fp32: of each image the caption of (seed, position), or the empty one."""
    for batch in count():
        positions = plan.positions(batch)
        indices, draws = _indices(order, positions), draw_samples(order.seed, positions)
        context_BLD = source.contexts(indices, draws.captions(source.num_captions(indices)))
        if source.empty_context is not None:
            context_BLD[torch.from_numpy(draws.drops_label(label_drop))] = source.empty_context
        yield context_BLD


def _indices(order: Order, positions: range) -> np.ndarray:
    return np.array([order.index(p) for p in positions])
