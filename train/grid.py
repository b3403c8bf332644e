"""Grids of samples that are drawn while a run trains."""

from pathlib import Path

from torch import Tensor

from scalelong.model.architectures import make_backbone
from scalelong.train import engine as ds
from scalelong.train.config import TrainConfig
from scalelong.train.data_latents import LatentFolder
from scalelong.train.diffusion import PROCESSES
from scalelong.train.ema import FIXED_DECAY
from scalelong.train.errors import UserError
from scalelong.train.latents import to_pictures
from scalelong.train.sample import default_labels, default_texts, generate, grid_columns, save_grid
from scalelong.train.start import Run


def make_grid(run: Run) -> None:
    """Draws samples with the averaged weights; the same noise, labels and captions each time, to compare grids by."""
    weights = dict(ds.whole_tensors(run.engine, run.ema.averages[FIXED_DECAY]))
    run.processes.agree(lambda: _draw_grid(run, weights) if run.processes.is_main else None)


def _draw_grid(run: Run, weights: dict[str, Tensor]) -> None:
    config, sample = run.config, run.config.sample
    model = make_backbone(config.model, skip_scale=config.make_skip_scale())
    model.load_state_dict(weights)
    null_label, labels = config.null_label, default_labels(sample.num_images, config.num_data_classes)
    if config.model.context_tokens:
        assert isinstance(run.source, LatentFolder), "prepare_source refuses anything else for text"
        null_label, labels = run.source.empty_context, default_texts(sample.num_images, run.source)
    images = generate(
        model.to(run.processes.device).eval(),
        PROCESSES[config.objective],
        labels,
        num_images=sample.num_images,
        null_label=null_label,
        sampler=sample.sampler,
        steps=sample.steps,
        guidance=sample.guidance,
        seed=config.seed,
        to_pictures=to_pictures(config),
    )
    path = grid_path(config, run.images_seen)
    try:
        save_grid(images, path, columns=grid_columns(sample.num_images, config.num_data_classes))
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error


def grid_path(config: TrainConfig, images_seen: int) -> Path:
    return config.run / "samples" / f"{images_seen}.png"
