"""Clipping that follows the gradients: known sequences, resuming to the bit, every ZeRO stage."""

import json
import math
from dataclasses import replace

import pytest
import torch

pytest.importorskip("deepspeed")

from running import log_rows, small_config
from safetensors.torch import load_file

from scalelong.train import loop
from scalelong.train.clipping import ZScoreClipping
from scalelong.train.config_json import config_from_dict, config_to_dict
from scalelong.train.errors import UserError
from scalelong.train.zero.engine_config import check_engine_config


def clipped(clipping, norm: float) -> float:
    return clipping.factor(norm) * norm


def warmed_up() -> ZScoreClipping:
    clipping = ZScoreClipping(2.5)
    for step in range(clipping.WARM_UP_STEPS + 1):
        assert clipped(clipping, 1.0 if step % 2 else 3.0) == pytest.approx(1.0 if step % 2 else 3.0)
    return clipping


def test_a_norm_many_deviations_above_the_mean_is_brought_back_reciprocally():
    clipping = warmed_up()
    mean, deviation = clipping._mean, math.sqrt(clipping._variance)
    assert (mean, deviation) == (pytest.approx(2.0, abs=0.1), pytest.approx(1.0, abs=0.1))
    norm = mean + 10 * deviation
    assert clipped(clipping, norm) == pytest.approx(mean + deviation * 2.5**2 / 10)
    assert clipping._mean < mean + 0.1  # the spike itself was not taken in
    assert clipped(clipping, clipping._mean + 2.4 * math.sqrt(clipping._variance)) > 4  # below the threshold


def test_what_is_not_finite_or_zero_is_left_alone():
    clipping = ZScoreClipping(2.5)
    before = json.dumps(clipping.state())
    assert clipping.factor(math.nan) == 1.0
    assert clipping.factor(math.inf) == 1.0
    assert json.dumps(clipping.state()) == before
    assert all(math.isfinite(clipping.factor(0.0)) for _ in range(200))


def test_what_it_remembers_goes_through_json():
    norms = torch.rand(300, generator=torch.Generator().manual_seed(0)).double().tolist()
    whole, first, second = (ZScoreClipping(1.5) for _ in range(3))
    expected = list(map(whole.factor, norms))
    found = list(map(first.factor, norms[:150]))
    second.restore(json.loads(json.dumps(first.state())))
    assert [*found, *map(second.factor, norms[150:])] == expected
    assert any(factor < 1 for factor in expected)


def weights_of(config):
    assert loop.train(config) == 0
    path = config.run / "checkpoints" / str(config.total_images) / "model.safetensors"
    return load_file(path)


THRESHOLD = 0.05  # of few deviations, so that it clips in a few steps


def test_resuming_is_exact(tmp_path, monkeypatch):
    monkeypatch.setattr(ZScoreClipping, "WARM_UP_STEPS", 4)
    base = small_config(tmp_path / "whole", total_images=32 * 16)
    rough = replace(base.optimizer, learning_rate=0.05)  # at a good rate the norm only falls in so few steps
    base = replace(base, optimizer=replace(rough, clip_z_score=THRESHOLD))
    whole = weights_of(base)
    weights_of(replace(base, run=tmp_path / "halves", total_images=32 * 8))
    halves = weights_of(replace(base, run=tmp_path / "halves"))
    assert all(torch.equal(value, halves[name]) for name, value in whole.items())
    plain = weights_of(replace(base, run=tmp_path / "plain", optimizer=rough))
    assert not all(torch.equal(value, plain[name]) for name, value in whole.items())


@pytest.mark.slow
@pytest.mark.parametrize("stage", [3, *(pytest.param(stage, marks=pytest.mark.exhaustive) for stage in (1, 2))])
def test_zero_clips_alike(stage, tmp_path, monkeypatch):
    monkeypatch.setattr(ZScoreClipping, "WARM_UP_STEPS", 4)
    norms = []
    for zero_stage in (0, stage):
        config = small_config(tmp_path / f"run{zero_stage}", total_images=32 * 12, zero_stage=zero_stage)
        config = replace(config, optimizer=replace(config.optimizer, clip_z_score=THRESHOLD))
        assert loop.train(config) == 0
        norms.append([row["grad_norm"] for row in log_rows(config.run)])
    assert norms[0] == pytest.approx(norms[1], rel=1e-3)


def test_a_run_of_a_version_that_could_clip_each_tensor_goes_on_if_it_did_not(tmp_path):
    config = small_config(tmp_path)
    values = config_to_dict(config)
    values["optimizer"]["clip_per_tensor"] = 0.0
    assert config_from_dict(values) == config
    values = config_to_dict(config)
    values["optimizer"]["clip_per_tensor"] = 1.05
    with pytest.raises(UserError, match=r"does not fit this version of scalelong: .*clip_per_tensor"):
        config_from_dict(values)


def test_there_is_one_way_of_clipping_at_a_time(tmp_path):
    base = small_config(tmp_path)
    with pytest.raises(ValueError, match="one way, not by clip_grad_norm and clip_z_score"):
        replace(base, optimizer=replace(base.optimizer, clip_grad_norm=1.0, clip_z_score=2.5))
    offloaded = replace(base, offload="optimizer", optimizer=replace(base.optimizer, clip_z_score=2.5), zero_stage=1)
    with pytest.raises(UserError, match=r"--optimizer\.clip-z-score cannot clip what is offloaded"):
        check_engine_config(offloaded, 32)
