"""Grids of samples that are drawn while a run trains."""

import numpy as np

from scalelong.model.architectures import make_backbone
from scalelong.train.errors import UserError
from scalelong.train.objective import make_objective
from scalelong.train.run import Run
from scalelong.train.run_folder import grid_path
from scalelong.train.sampling.autoencoder import to_pictures
from scalelong.train.sampling.conditions import default_conditions, null_condition_of, settings_of, texts_of
from scalelong.train.sampling.generate import generate
from scalelong.train.sampling.grid import grid_columns, save_grid
from scalelong.train.zero.averages import averaged_network
from scalelong.train.zero.engine_config import AUTOCAST


def make_grid(run: Run) -> None:
    """Draws samples with the averaged weights, on all processes together, in the precision that the run computes in.

    The noise, labels and captions are the same each time, to compare grids by.
    """
    config, sample, processes = run.config, run.config.sample, run.processes
    model = averaged_network(run.ema, lambda: make_backbone(config.model, skip_scale=config.skip_scale))
    texts = texts_of(config, run.source)
    images = generate(
        model,
        make_objective(config.objective),
        default_conditions(config, texts, sample.num_images),
        range(sample.num_images),
        null_condition=null_condition_of(config, texts),
        **settings_of(config),
        autocast=AUTOCAST.get(config.precision),
        to_pictures=processes.agree(lambda: to_pictures(config)),
        processes=processes,
    )
    drawn = np.stack(list(images))
    processes.agree(lambda: _write_grid(run, drawn) if processes.is_main else None)


def _write_grid(run: Run, images_NHWC: np.ndarray) -> None:
    config, count = run.config, len(images_NHWC)
    path = grid_path(config.run, run.images_seen)
    names = run.source.class_names if config.num_data_classes else []
    captions = [names[n % len(names)] for n in range(count)] if names else []
    try:
        save_grid(images_NHWC, path, columns=grid_columns(count, config.num_data_classes), captions=captions)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error
