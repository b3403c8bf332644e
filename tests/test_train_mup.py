"""muP through the trainer: every stage of ZeRO on two ranks, and on another number of them after that."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("deepspeed")

from running import SMALL, losses, small_config, train_on_ranks
from safetensors.torch import load_file

from scalelong.train.config import TrainConfig
from scalelong.train.loop import train

STEP, HALF, WHOLE = 32, 3, 6
MUP = ("--parametrization", "mup", "--base-width", "16")
pytestmark = pytest.mark.slow


def mup_config(run: Path, **changes) -> TrainConfig:
    """What SMALL and MUP make of the embedded default: twice the base width."""
    config = small_config(run, skip_scale="ls", **changes)
    return replace(config, model=replace(config.model, parametrization="mup", base_width=16))


@pytest.fixture(scope="module")
def straight(tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("straight") / "run"
    assert train(mup_config(run, total_images=WHOLE * STEP)) == 0
    return run


@pytest.mark.parametrize("stage", [*(pytest.param(n, marks=pytest.mark.exhaustive) for n in (0, 1, 2)), 3])
def test_two_ranks_take_the_steps_of_one_and_one_goes_on_from_them(straight, tmp_path, stage):
    run = tmp_path / "run"
    arguments = ["digits-uvit", *SMALL, *MUP, "--skip-scale", "ls", "--run", run, "--zero-stage", stage]
    train_on_ranks(2, *arguments, "--total-images", HALF * STEP)
    assert train(mup_config(run, total_images=WHOLE * STEP)) == 0
    np.testing.assert_allclose(losses(run), losses(straight), rtol=0, atol=1e-4)
    for name in ("model", "ema"):
        mine, other = (
            load_file(r / "checkpoints" / str(WHOLE * STEP) / f"{name}.safetensors") for r in (run, straight)
        )
        assert mine.keys() == other.keys()
        # AdamW moves a weight whose gradient is all rounding by its whole rate; the mean over a tensor tells.
        assert all((mine[key] - other[key]).abs().mean() < 1e-4 for key in mine)


@pytest.mark.exhaustive
def test_a_rate_that_is_not_divided_is_another_run(straight, tmp_path):
    """The losses tell: what the test above compares is not the same whatever the groups."""
    config = mup_config(tmp_path / "run", total_images=WHOLE * STEP)
    train(replace(config, model=replace(config.model, base_width=32)))
    assert np.abs(np.subtract(losses(config.run), losses(straight))).max() > 1e-3
