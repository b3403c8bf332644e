"""The validation loss: the same number whatever the run's batch, ranks, stage, accumulation, seed and restarts."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("deepspeed")

from images import random_pixels, write_image
from running import SMALL, log_rows, losses, small_config, train_on_ranks
from safetensors.torch import load_file

from scalelong.train.checkpoint import load_model
from scalelong.train.checks import check_before_training
from scalelong.train.config import DataConfig, TrainConfig
from scalelong.train.data.batches import open_validation_source, prepare_source
from scalelong.train.data.images import resize_and_crop
from scalelong.train.data.order import BatchPlan, Stream, draw_noise, generator
from scalelong.train.data.source import open_source
from scalelong.train.data.stand_ins import SoundImages, spread_indices
from scalelong.train.hosts.processes import join_if_several
from scalelong.train.loop import train
from scalelong.train.objective import make_objective
from scalelong.train.recipes import RECIPES
from scalelong.train.validation import SEED, Validation, _shares

STEP = 32
NAMES = ("validation_loss", "validation_loss_ema")


def config_of(run: Path, **changes) -> TrainConfig:
    base = small_config(run, total_images=6 * STEP, images_per_validation=2 * STEP, num_validation_images=100)
    return replace(base, **changes)


def validations(run: Path) -> dict[int, list[float]]:
    """The two losses of each row that has them, by images_seen."""
    return {row["images_seen"]: [row[name] for name in NAMES] for row in log_rows(run) if NAMES[0] in row}


@pytest.fixture(scope="module")
def straight(tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "straight"
    assert train(config_of(run)) == 0
    return run


def by_hand(config: TrainConfig, weights: str) -> float:
    """Image by image, of the last checkpoint."""
    model, _ = load_model(config.run, weights=weights)
    source = prepare_source(config, open_source("digits", 10, split="test"))
    assert isinstance(source, SoundImages)
    order = generator(SEED, Stream.VALIDATION, 0).permutation(100)
    errors = []
    for n, index in enumerate(spread_indices(len(source), 100)):
        pixels = np.asarray(resize_and_crop(source.image(index), 8), dtype=np.float32)
        image = torch.from_numpy(pixels / 127.5 - 1)[None, None]
        noise = torch.from_numpy(draw_noise(SEED, 1 + 2 * n, (1, 8, 8), Stream.VALIDATION))[None]
        u = torch.tensor([(order[n] + 0.5) / 100], dtype=torch.float32)
        with torch.no_grad():
            label = torch.tensor([source.label(index)])
            errors.append(float(make_objective(config.objective).loss(model, image, noise, u, label)))
    return float(np.mean(errors))


def test_it_is_the_mean_over_held_out_images_with_their_labels(straight):
    found = validations(straight)
    assert list(found) == [2 * STEP, 4 * STEP, 6 * STEP]
    config = config_of(straight)
    expected = [by_hand(config, weights) for weights in ("model", "ema")]
    assert found[6 * STEP] == pytest.approx(expected, rel=1e-5)
    assert found[6 * STEP][0] < found[2 * STEP][0]


def test_both_networks_compute_in_the_precision_of_the_run(straight, tmp_path):
    train(config_of(tmp_path / "run", precision="bf16"))
    found = validations(tmp_path / "run")
    for images_seen, expected in validations(straight).items():
        assert found[images_seen] == pytest.approx(expected, rel=2e-2)
        assert all(a != b for a, b in zip(found[images_seen], expected, strict=True))


@pytest.mark.parametrize("stage", [0, 3])
def test_training_has_the_same_bits_with_and_without_it(straight, tmp_path, stage):
    config = config_of(tmp_path / "without", num_validation_images=0, zero_stage=stage)
    train(config)
    assert not validations(config.run)
    with_it = straight
    if stage:
        with_it = tmp_path / "with"
        train(config_of(with_it, zero_stage=stage))
    assert losses(config.run) == losses(with_it)
    for name in ("model", "ema", "optimizer"):
        a, b = (load_file(run / f"checkpoints/192/{name}.safetensors") for run in (config.run, with_it))
        assert a.keys() == b.keys()
        assert all(torch.equal(a[key], b[key]) for key in a)
    skips = [[row["skip/1/hidden_norm"] for row in log_rows(run)] for run in (config.run, with_it)]
    assert skips[0] == skips[1]


def test_dropout_is_off_in_it_and_on_again_in_training(tmp_path):
    """Of a UNet, as U-ViT drops nothing: with dropout the two calls would differ."""
    base = small_config(tmp_path / "run", total_images=3 * STEP, images_per_validation=STEP, num_validation_images=20)
    config = replace(base, model=replace(RECIPES["digits-unet"].model, dropout=0.5))
    train(config)
    without = replace(config, run=tmp_path / "without", num_validation_images=0)
    train(without)
    assert losses(config.run) == losses(without.run)
    again = replace(without, run=tmp_path / "again", total_images=2 * STEP)
    train(again)
    train(replace(again, total_images=3 * STEP, num_validation_images=20, images_per_validation=0))
    assert validations(again.run)[3 * STEP] == validations(config.run)[3 * STEP]


@pytest.mark.parametrize("changes", [{"zero_stage": 2}, {"zero_stage": 3}, {"accumulation_steps": 4}])
def test_stages_and_accumulation_give_the_same(straight, tmp_path, changes):
    config = config_of(tmp_path / "run", **changes)
    train(config)
    for images_seen, expected in validations(straight).items():
        assert validations(config.run)[images_seen] == pytest.approx(expected, rel=2e-4)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [pytest.param(0, marks=pytest.mark.exhaustive), 3])
def test_two_ranks_give_the_same(straight, tmp_path, stage):
    """Of 100 images, in batches of 16, the last four are one rank's."""
    arguments = ["digits-uvit", *SMALL, "--run", tmp_path / "run", "--zero-stage", stage, "--total-images", 6 * STEP]
    train_on_ranks(2, *arguments, "--images-per-validation", 2 * STEP, "--num-validation-images", 100)
    for images_seen, expected in validations(straight).items():
        assert validations(tmp_path / "run")[images_seen] == pytest.approx(expected, rel=2e-4)


def test_resuming_gives_the_same_bits(straight, tmp_path):
    for total in (3, 6):
        train(config_of(tmp_path / "run", total_images=total * STEP))
    resumed = validations(tmp_path / "run")
    assert {at: resumed[at] for at in validations(straight)} == validations(straight)
    assert 3 * STEP in resumed


def shown(config: TrainConfig) -> tuple[Validation, dict[str, torch.Tensor]]:
    """What a start of a run would look at, in the order of the numbers."""
    validation = Validation(check_before_training(config, join_if_several()))
    batches = validation._read()
    return validation, {
        name: torch.cat([getattr(batch, name) for batch in batches])
        for name in ("images_BCHW", "noise_BCHW", "time_u_B", "condition")
    }


@pytest.mark.parametrize(
    "changes", [{"seed": 1}, {"images_per_step": 24}, {"label_drop": 0.5}, {"accumulation_steps": 8}]
)
def test_runs_of_other_seeds_and_batches_look_at_the_same(tmp_path, changes):
    _, expected = shown(config_of(tmp_path / "run"))
    _, found = shown(config_of(tmp_path / "run", **changes))
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert len(expected["time_u_B"]) == 100
    assert set(expected["condition"].tolist()) == set(range(10))


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize(("count", "micro_batch"), [(100, 16), (7, 16), (96, 8), (1, 1), (0, 4)])
def test_ranks_share_the_images_in_as_many_batches_each(world_size, count, micro_batch):
    plans = [BatchPlan(0, micro_batch * world_size, 1, rank, world_size) for rank in range(world_size)]
    shares = [list(_shares(plan, count)) for plan in plans]
    assert len({len(share) for share in shares}) == 1
    assert sorted(n for share in shares for batch in share for n in batch) == list(range(count))


def folder(root: Path) -> Path:
    for n in range(20):
        write_image(root / str(n % 10) / f"{n}.png", random_pixels(8, 8, 1, seed=n))
    return root


def test_data_without_a_test_split_is_validated_on_images_that_are_trained_on_which_is_said(tmp_path, capsys):
    config = config_of(tmp_path / "run", data=DataConfig(path=str(folder(tmp_path / "images"))), total_images=STEP)
    train(config)
    said = "has no test split: the validation loss is at 20 images that are trained on"
    assert capsys.readouterr().out.count(said) == 1
    assert len(validations(config.run)) == 1
    train(config_of(tmp_path / "digits", total_images=STEP))
    assert "test split" not in capsys.readouterr().out


def test_a_bad_image_that_it_meets_is_none_of_the_run(tmp_path):
    path = folder(tmp_path / "images")
    config = config_of(tmp_path / "run", data=DataConfig(path=str(path)))
    source = prepare_source(config, open_source(str(path), 10))
    apart, held_out = open_validation_source(config, source)
    (path / "3" / "3.png").write_bytes(b"")
    assert not held_out
    assert isinstance(source, SoundImages)
    assert isinstance(apart, SoundImages)
    for index in range(20):
        apart.image(index)
    assert len(apart.take_found()) == 1
    assert not source.take_found()


def test_cifar10_without_its_test_images_trains_as_before_and_says_so(tmp_path, capsys):
    for number in range(1, 6):
        rows = np.random.default_rng(number).integers(0, 10, (8, 3073), dtype=np.uint8)
        (tmp_path / f"data_batch_{number}.bin").write_bytes(rows.tobytes())
    base = config_of(tmp_path / "run", data=DataConfig(path=str(tmp_path)))
    config = replace(base, model=replace(base.model, in_channels=3, img_size=32, patch_size=8))
    source = prepare_source(config, open_source(str(tmp_path), 10))
    _, held_out = open_validation_source(config, source)
    assert not held_out
    assert "the validation loss is at images that are trained on" in capsys.readouterr().err


def test_times_are_spread_evenly_and_belong_to_no_class(tmp_path):
    _, found = shown(config_of(tmp_path / "run", num_validation_images=350))
    time_u, labels = found["time_u_B"], found["condition"]
    np.testing.assert_allclose(np.sort(time_u.numpy()), (np.arange(350) + 0.5) / 350, rtol=1e-6)
    means = [float(time_u[labels == digit].mean()) for digit in range(10)]
    assert np.ptp(means) < 0.35
    assert float(found["noise_BCHW"].std()) == pytest.approx(1, abs=0.02)
