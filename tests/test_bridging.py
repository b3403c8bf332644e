"""One run carried over other numbers of processes and ZeRO stages, its averages and its place in the data with it."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

pytest.importorskip("deepspeed")

from running import SMALL, log_rows, losses, run_on_ranks, small_config, train_on_ranks

from scalelong.train.loop import train
from scalelong.train.run_folder import averages_folder

pytestmark = pytest.mark.slow

STEP = 32
STDS = ("0.05", "0.1")
# Three ranks share a step evenly, in numbers that one and two ranks can share too.
ARGUMENTS = [*SMALL, "--images-per-step", "48", "--optimizer.ema-stds", *STDS, "--images-per-average", "96"]


@pytest.fixture(scope="module")
def straight(tmp_path_factory) -> Path:
    """Twelve steps by one process, without ZeRO."""
    config = small_config(tmp_path_factory.mktemp("straight") / "run", images_per_step=48, images_per_average=96)
    config = replace(config, optimizer=replace(config.optimizer, ema_stds=(0.05, 0.1)))
    assert train(replace(config, total_images=12 * 48)) == 0
    return config.run


@pytest.mark.parametrize(
    "parts",
    [[(2, 0), (1, 0), (3, 0)], [(2, 1), (2, 3), (2, 2)], [(2, 2), (1, 3), (3, 1)]],
    ids=["ranks-2-1-3", "stages-1-3-2", "both"],
)
def test_a_run_goes_on_over_ranks_and_stages(straight, tmp_path, parts):
    run = tmp_path / "run"
    for number, (ranks, stage) in enumerate(parts, start=1):
        arguments = ("digits-uvit", *ARGUMENTS, "--run", run, "--zero-stage", stage, "--total-images", number * 4 * 48)
        train_on_ranks(ranks, *arguments)
    assert [row["images_seen"] for row in log_rows(run)] == [48 * step for step in range(1, 13)]
    np.testing.assert_allclose(losses(run), losses(straight), rtol=0, atol=1e-4)
    for folder in ("checkpoints/576", "averages/96", "averages/576"):
        names = {path.name for path in (straight / folder).glob("ema*.safetensors")}
        assert names >= {f"ema-{std}.safetensors" for std in STDS}
        for name in names:
            reached, expected = load_file(run / folder / name), load_file(straight / folder / name)
            assert reached.keys() == expected.keys()
            for key, value in expected.items():
                np.testing.assert_allclose(reached[key], value, rtol=0, atol=1e-4, err_msg=f"{folder}/{name} {key}")
    assert {p.name for p in averages_folder(run).iterdir()} >= {p.name for p in averages_folder(straight).iterdir()}


def test_rank_zero_alone_reads_the_newest_checkpoint_and_all_pass_over_a_damaged_one(tmp_path):
    config = small_config(tmp_path / "run", images_per_checkpoint=2 * STEP)
    train(replace(config, total_images=4 * STEP))
    damaged = config.run / "checkpoints/128/model.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"?")
    outputs = run_on_ranks(2, "hashed_on_resuming.py", config.run, 6 * STEP)
    hashed = [re.findall(r"hashed (\S+)", out) for out in outputs]
    files = ["ema.safetensors", "model.safetensors", "optimizer.safetensors", "state.json"]
    assert sorted(hashed[0]) == sorted([*(f"64/{f}" for f in files), "128/ema.safetensors", "128/model.safetensors"])
    assert hashed[1] == []
    assert all("goes on at 64" in out for out in outputs)
