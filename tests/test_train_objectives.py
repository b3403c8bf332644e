"""Runs of every objective and schedule: they train, resume exactly, and those of before are what they were."""

import json
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("deepspeed")

from running import SMALL, log_rows, losses, run_on_ranks, small_config

from scalelong.train import loop
from scalelong.train.checkpoint import load_model
from scalelong.train.config import TrainConfig
from scalelong.train.errors import UserError
from scalelong.train.loop import train
from scalelong.train.objective import Objective
from scalelong.train.objective_config import ObjectiveConfig, PredictionName, TimesName, WeightingName
from scalelong.train.recipes import RECIPES
from scalelong.train.run_folder import config_path, read_config, write_config
from scalelong.train.schedule import constant

STEP = 32


def files(run: Path) -> dict[str, bytes]:
    """The tensors of the newest checkpoint."""
    newest = max((run / "checkpoints").iterdir(), key=lambda folder: int(folder.name))
    return {path.name: path.read_bytes() for path in newest.glob("*.safetensors")}


def resumes_exactly(config: TrainConfig, tmp_path: Path, steps: int = 4) -> Path:
    """Trains at one go, and in two; returns the first run."""
    once = replace(config, run=tmp_path / "once", total_images=steps * STEP)
    twice = replace(once, run=tmp_path / "twice")
    train(once)
    train(replace(twice, total_images=steps // 2 * STEP))
    train(twice)
    assert losses(twice.run) == losses(once.run)
    assert files(twice.run) == files(once.run)
    assert all(torch.tensor(losses(once.run)).isfinite())
    return once.run


def sampled(*fields: dict[str, Any], of: list[dict[str, Any]]) -> Any:
    """These, and all of them where it is exhaustive."""
    others = [pytest.param(rest, marks=pytest.mark.exhaustive) for rest in of if rest not in fields]
    return pytest.mark.parametrize("fields", [*fields, *others], ids=lambda values: "-".join(map(str, values.values())))


names = product(get_args(PredictionName), get_args(WeightingName), get_args(TimesName))


@pytest.mark.slow
@sampled(
    {"prediction": "flow", "weighting": "uniform", "times": "logit-normal"},
    {"prediction": "edm", "weighting": "uncertainty", "times": "edm"},
    {"prediction": "v", "weighting": "min-snr", "times": "uniform"},
    of=[{"prediction": p, "weighting": w, "times": t} for p, w, t in names],
)
def test_an_objective_trains_and_resumes_exactly(tmp_path, fields):
    resumes_exactly(small_config(tmp_path, objective=ObjectiveConfig(**fields)), tmp_path)


UNCERTAIN = ObjectiveConfig(prediction="edm", times="edm", weighting="uncertainty")


@pytest.mark.slow
@pytest.mark.parametrize("stage", [pytest.param(1, marks=pytest.mark.exhaustive), 2, 3])
def test_a_learned_weighting_resumes_exactly_under_zero(tmp_path, stage):
    config = small_config(tmp_path, objective=UNCERTAIN, zero_stage=stage)
    run = resumes_exactly(config, tmp_path)
    plain = replace(config, run=tmp_path / "plain", zero_stage=0, total_images=4 * STEP)
    train(plain)
    assert losses(run) == pytest.approx(losses(plain.run), rel=1e-5)


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.parametrize("stage", [0, 2, 3])
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_learned_weighting_is_fp32_in_every_precision(tmp_path, precision, stage):
    run = resumes_exactly(small_config(tmp_path, objective=UNCERTAIN, precision=precision, zero_stage=stage), tmp_path)
    learned = load_file(run / "checkpoints" / str(4 * STEP) / "loss_weighting.safetensors")
    assert all(value.dtype == torch.float32 and not torch.equal(value, value.bfloat16()) for value in learned.values())


@pytest.mark.slow
def test_a_learned_weighting_is_saved_beside_the_network_and_is_no_part_of_it(tmp_path):
    config = small_config(tmp_path / "run", objective=UNCERTAIN, total_images=4 * STEP)
    config = replace(config, optimizer=replace(config.optimizer, ema_stds=(0.05, 0.1)))
    train(config)
    checkpoint = config.run / "checkpoints" / str(4 * STEP)
    learned = load_file(checkpoint / "loss_weighting.safetensors")
    assert {name: tuple(value.shape) for name, value in learned.items()} == {"weight": (128,), "bias": (1,)}
    assert all(value.any() for value in learned.values())
    model, _ = load_model(config.run)
    for name in ("model", "ema", "ema-0.05", "ema-0.1"):
        assert load_file(checkpoint / f"{name}.safetensors").keys() == model.state_dict().keys()
    optimizer = load_file(checkpoint / "optimizer.safetensors")
    assert optimizer["exp_avg.loss_weighting.weight"].any()
    # It is missed: without it the run cannot go on as it was.
    plain = replace(config, run=tmp_path / "plain", objective=replace(UNCERTAIN, weighting="uniform"))
    train(plain)
    assert not (plain.run / "checkpoints" / str(4 * STEP) / "loss_weighting.safetensors").exists()


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_two_processes_learn_the_weighting_of_one(tmp_path, stage):
    config = small_config(tmp_path / "one", objective=UNCERTAIN, total_images=4 * STEP)
    train(config)
    flags = ["--objective.prediction", "edm", "--objective.times", "edm", "--objective.weighting", "uncertainty"]
    flags += ["--run", tmp_path / "two", "--total-images", 4 * STEP, "--zero-stage", stage]
    run_on_ranks(2, "-m", "scalelong.train", "digits-uvit", *SMALL, *flags)
    assert losses(tmp_path / "two") == pytest.approx(losses(config.run), abs=1e-4)
    one, two = (load_file(run / "checkpoints/128/loss_weighting.safetensors") for run in (config.run, tmp_path / "two"))
    torch.testing.assert_close(two, one, rtol=0, atol=1e-4)


def loss_of_before(self: Objective, network, x0_BCHW, noise_BCHW, time_u_B, condition):
    """L_simple of the VP-SDE as it was computed before there were other objectives."""
    t_B111 = time_u_B[:, None, None, None]
    alpha_bar = torch.exp(-(0.1 * t_B111 + 0.5 * (20.0 - 0.1) * t_B111**2))
    x_BCHW = alpha_bar.sqrt() * x0_BCHW + (1 - alpha_bar).sqrt() * noise_BCHW
    error_BCHW = network(x_BCHW, 999 * time_u_B, condition).float() - noise_BCHW
    return (1.0 * error_BCHW.square()).mean()


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["digits-uvit", pytest.param("digits-unet", marks=pytest.mark.exhaustive)])
def test_recipes_of_before_train_to_the_same_bits(tmp_path, monkeypatch, recipe):
    base = replace(RECIPES[recipe], images_per_grid=0, images_per_log=0)
    base = replace(base, sample=replace(base.sample, num_images=1, steps=1, guidance=0.0))
    now = replace(base, run=tmp_path / "now", total_images=20 * base.images_per_step)
    train(now)
    monkeypatch.setattr(Objective, "loss", loss_of_before)
    rate = lambda config, seen: config.optimizer.learning_rate * constant(config.optimizer, seen)  # noqa: E731
    monkeypatch.setattr(loop, "learning_rate", rate)
    before = replace(now, run=tmp_path / "before")
    train(before)
    timed = ("images_per_second", "data_wait", "wall_seconds", "memory_gb", "tflops_per_device")
    rows = [[{k: v for k, v in row.items() if k not in timed} for row in log_rows(run.run)] for run in (now, before)]
    assert len(rows[0]) == 20
    assert rows[0] == rows[1]
    assert files(now.run) == files(before.run)


@pytest.mark.slow
def test_a_run_of_before_resumes(tmp_path):
    """Its config.json named the noise's schedule where the objective is now, and knew of one schedule of the rate."""
    config = small_config(tmp_path / "run", total_images=2 * STEP, objective="cosine")
    train(config)
    values = json.loads(config_path(config.run).read_text())
    assert values["objective"]["noise"] == "cosine"
    values["objective"] = "cosine"
    for name in ("schedule", "horizon_images", "decay_images", "stable_images", "final_factor"):
        del values["optimizer"][name]
    del values["sample"]["guidance_interval"]
    config_path(config.run).write_text(json.dumps(values))
    assert read_config(config.run).objective == ObjectiveConfig(noise="cosine")
    train(replace(config, total_images=4 * STEP))
    straight = replace(config, run=tmp_path / "straight", total_images=4 * STEP)
    train(straight)
    assert losses(config.run) == losses(straight.run)


def test_a_sampler_that_cannot_serve_the_objective_is_refused_before_anything_is_written(tmp_path):
    """But the run that is there is read, whatever its sampler: it may be given another."""
    config = small_config(tmp_path / "run", objective=ObjectiveConfig(prediction="flow"), total_images=STEP)
    with pytest.raises(UserError, match="euler-maruyama needs a run with --objective vp-sde, not flow"):
        train(replace(config, sample=replace(config.sample, sampler="euler-maruyama")))
    assert not config.run.exists()
    write_config(replace(config, sample=replace(config.sample, sampler="euler-maruyama")))
    assert train(config) == 0


def scheduled(run: Path, steps: int, **fields: Any) -> TrainConfig:
    config = small_config(run, total_images=steps * STEP)
    return replace(config, optimizer=replace(config.optimizer, warmup_images=STEP, **fields))


def rates(run: Path) -> list[float]:
    return [row["learning_rate"] for row in log_rows(run)]


@pytest.mark.slow
def test_a_horizon_is_on_record_and_another_is_refused_once_it_would_have_counted(tmp_path):
    config = scheduled(tmp_path / "run", 4, schedule="cosine")
    train(config)
    assert read_config(config.run).optimizer.horizon_images == 4 * STEP
    assert rates(config.run)[1] == 1.5e-3
    assert rates(config.run)[2:] == pytest.approx([1.5e-3 * 0.75, 1.5e-3 * 0.25])
    with pytest.raises(UserError) as caught:
        train(replace(config, total_images=8 * STEP))
    for words in ("--optimizer.horizon-images 128 -> 256", "step at 64 images", "--branch-from"):
        assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"the learning rate is 0 from --optimizer\.horizon-images 128 on"):
        train(scheduled(config.run, 8, schedule="cosine", horizon_images=4 * STEP))
    # Where a rate is left at the horizon, the run may go on with it.
    left = scheduled(tmp_path / "left", 4, schedule="cosine", final_factor=0.1)
    train(left)
    train(scheduled(left.run, 6, schedule="cosine", final_factor=0.1, horizon_images=4 * STEP))
    assert rates(left.run)[4:] == pytest.approx([1.5e-4] * 2)


@pytest.mark.slow
def test_a_horizon_may_move_while_the_rate_is_stable_and_that_is_exact(tmp_path):
    config = scheduled(tmp_path / "run", 3, schedule="constant")
    train(config)
    decaying = scheduled(config.run, 6, schedule="warmup-stable-decay", decay_images=2 * STEP)
    train(decaying)
    straight = replace(decaying, run=tmp_path / "straight")
    train(straight)
    assert rates(straight.run)[3:] == pytest.approx([1.5e-3, 1.5e-3, 1.5e-3 * (1 - 0.5**0.5)])
    assert losses(config.run) == losses(straight.run)
    assert files(config.run) == files(straight.run)
