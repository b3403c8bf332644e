"""Grids of samples that are drawn while a run trains."""

import math
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from scalelong.model.architectures import make_backbone
from scalelong.train.errors import UserError
from scalelong.train.objective import PROCESSES
from scalelong.train.run import Run
from scalelong.train.run_folder import grid_path
from scalelong.train.sampling.autoencoder import to_pictures
from scalelong.train.sampling.generate import (
    default_conditions,
    generate,
    null_condition_of,
    texts_of,
)
from scalelong.train.write_whole import staged
from scalelong.train.zero import engine as zero
from scalelong.train.zero.averages import FIXED_DECAY


def make_grid(run: Run) -> None:
    """Draws samples with the averaged weights; the same noise, labels and captions each time, to compare grids by."""
    weights = dict(zero.whole_tensors(run.engine, run.ema.averages[FIXED_DECAY]))
    run.processes.agree(lambda: _draw_grid(run, weights) if run.processes.is_main else None)


def _draw_grid(run: Run, weights: dict[str, Tensor]) -> None:
    config, sample = run.config, run.config.sample
    model = make_backbone(config.model, skip_scale=config.make_skip_scale())
    model.load_state_dict(weights)
    texts = texts_of(config, run.source)
    images = generate(
        model.to(run.processes.device).eval(),
        PROCESSES[config.objective],
        default_conditions(config, texts, sample.num_images),
        num_images=sample.num_images,
        null_condition=null_condition_of(config, texts),
        sampler=sample.sampler,
        steps=sample.steps,
        guidance=sample.guidance,
        seed=config.seed,
        to_pictures=to_pictures(config),
    )
    path = grid_path(config.run, run.images_seen)
    try:
        save_grid(images, path, columns=grid_columns(sample.num_images, config.num_data_classes))
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error


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
    with staged(path) as staging:  # so that a viewer never meets half a picture
        Image.fromarray(canvas.squeeze(-1) if channels == 1 else canvas).save(staging, "PNG")


def grid_columns(num_images: int, num_classes: int) -> int:
    """One column for each class if that makes a sensible grid, else a square."""
    if 2 <= num_classes <= 16 and num_images >= num_classes:
        return num_classes
    return max(1, math.ceil(math.sqrt(num_images)))
