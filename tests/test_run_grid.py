"""Grids that are drawn while a run trains: by all ranks, with the averaged weights, in the precision of the run."""

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("deepspeed")

from running import SMALL, small_config, train_on_ranks

from scalelong.train import loop, run_grid
from scalelong.train.checkpoint import load_model
from scalelong.train.objective import make_objective
from scalelong.train.run_folder import grid_path
from scalelong.train.sampling.conditions import default_conditions
from scalelong.train.sampling.generate import generate
from scalelong.train.sampling.grid import grid_columns, save_grid

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)]
)
def test_the_network_computes_in_the_precision_of_the_run_and_is_no_copy(precision, dtype, tmp_path, monkeypatch):
    seen = []

    def noting(network, *arguments, **how):
        hook = network.decoder_pred.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
        yield from generate(network, *arguments, **how)
        hook.remove()

    monkeypatch.setattr(run_grid, "generate", noting)
    assert loop.train(small_config(tmp_path / "run", total_images=32, precision=precision)) == 0
    assert set(seen) == {dtype}
    assert grid_path(tmp_path / "run", 32).is_file()


@pytest.mark.parametrize("stage", [2, 3])
def test_ranks_draw_what_one_process_draws_of_the_checkpoint(stage, tmp_path):
    run = tmp_path / "run"
    train_on_ranks(2, "digits-uvit", *SMALL, "--run", run, "--total-images", 64, "--zero-stage", stage)
    model, config = load_model(run)
    count, sample = config.sample.num_images, config.sample
    images = generate(
        model,
        make_objective(config.objective),
        default_conditions(config, None, count),
        range(count),
        null_condition=config.null_label,
        **{"sampler": sample.sampler, "steps": sample.steps, "guidance": sample.guidance, "seed": config.seed},
    )
    how = {"columns": grid_columns(count, config.num_data_classes), "captions": [f"{n % 10}" for n in range(count)]}
    save_grid(np.stack(list(images)), tmp_path / "alone.png", **how)
    pictures = [np.asarray(Image.open(path)).astype(int) for path in (tmp_path / "alone.png", grid_path(run, 64))]
    assert np.ptp(pictures[0]) > 100
    assert np.abs(pictures[0] - pictures[1]).max() <= 1  # batches of five round otherwise than one of ten
