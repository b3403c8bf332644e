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
from scalelong.train.clipping import TensorClipping, ZScoreClipping, make_clipping
from scalelong.train.errors import UserError
from scalelong.train.zero.engine_config import check_engine_config


def clipped(clipping, norm: float) -> float:
    """What becomes of a gradient of one parameter."""
    return clipping.factors([norm])[0] * norm


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


def test_all_parameters_are_clipped_alike_by_the_norm_of_all():
    clipping = ZScoreClipping(2.0)
    for step in range(clipping.WARM_UP_STEPS):
        clipping.factors([3.0 + step % 2, 4.0])
    factors = clipping.factors([300.0, 400.0])
    assert factors[0] == factors[1] < 0.02


def test_each_parameter_is_held_to_a_multiple_of_its_own_running_norm():
    clipping = TensorClipping(1.05)
    for _ in range(clipping.WARM_UP_STEPS):
        assert clipping.factors([0.3, 0.4]) == [1.0, 1.0]  # of norm 0.5
    assert clipping.factors([0.3, 40.0]) == [1.0, pytest.approx(1.05 * 0.4 / 40.0)]
    assert clipping._running_P == [pytest.approx(0.3), pytest.approx(0.98 * 0.4 + 0.02 * 1.05 * 0.4)]
    assert TensorClipping(1.05).factors([3.0, 4.0]) == [pytest.approx(0.2), pytest.approx(0.2)]  # at first to norm 1


@pytest.mark.parametrize("clipping", [ZScoreClipping(2.5), TensorClipping(1.05)])
def test_what_is_not_finite_or_zero_is_left_alone(clipping):
    before = json.dumps(clipping.state())
    assert clipping.factors([1.0, math.nan]) == [1.0, 1.0]
    assert clipping.factors([math.inf, 1.0]) == [1.0, 1.0]
    assert json.dumps(clipping.state()) == before
    for _ in range(200):
        assert all(math.isfinite(factor) for factor in clipping.factors([0.0, 0.0]))


@pytest.mark.parametrize("make", [lambda: ZScoreClipping(1.5), lambda: TensorClipping(1.01)])
def test_what_it_remembers_goes_through_json(make):
    norms = torch.rand(300, 3, generator=torch.Generator().manual_seed(0)).double().tolist()
    whole, first, second = make(), make(), make()
    expected = [whole.factors(n) for n in norms]
    found = [first.factors(n) for n in norms[:150]]
    second.restore(json.loads(json.dumps(first.state())))
    assert [*found, *(second.factors(n) for n in norms[150:])] == expected
    assert any(factor < 1 for factors in expected for factor in factors)


def weights_of(config):
    assert loop.train(config) == 0
    path = config.run / "checkpoints" / str(config.total_images) / "model.safetensors"
    return load_file(path)


CLIPS = {"clip_z_score": 0.05, "clip_per_tensor": 1.01}


@pytest.mark.parametrize("clip", CLIPS)
def test_resuming_is_exact(clip, tmp_path, monkeypatch):
    monkeypatch.setattr(ZScoreClipping, "WARM_UP_STEPS", 4)
    monkeypatch.setattr(TensorClipping, "WARM_UP_STEPS", 4)
    base = small_config(tmp_path / "whole", total_images=32 * 16)
    rough = replace(base.optimizer, learning_rate=0.05)  # at a good rate the norm only falls in so few steps
    base = replace(base, optimizer=replace(rough, **{clip: CLIPS[clip]}))
    whole = weights_of(base)
    weights_of(replace(base, run=tmp_path / "halves", total_images=32 * 8))
    halves = weights_of(replace(base, run=tmp_path / "halves"))
    assert all(torch.equal(value, halves[name]) for name, value in whole.items())
    plain = weights_of(replace(base, run=tmp_path / "plain", optimizer=rough))
    assert not all(torch.equal(value, plain[name]) for name, value in whole.items())


SAMPLED = ((3, "clip_per_tensor"),)
OTHERS = [(stage, clip) for stage in (1, 2, 3) for clip in CLIPS if (stage, clip) not in SAMPLED]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "clip"), [*SAMPLED, *(pytest.param(*other, marks=pytest.mark.exhaustive) for other in OTHERS)]
)
def test_zero_clips_alike(stage, clip, tmp_path, monkeypatch):
    monkeypatch.setattr(ZScoreClipping, "WARM_UP_STEPS", 4)
    monkeypatch.setattr(TensorClipping, "WARM_UP_STEPS", 4)
    norms = []
    for zero_stage in (0, stage):
        config = small_config(tmp_path / f"run{zero_stage}", total_images=32 * 12, zero_stage=zero_stage)
        config = replace(config, optimizer=replace(config.optimizer, **{clip: CLIPS[clip]}))
        assert loop.train(config) == 0
        norms.append([row["grad_norm"] for row in log_rows(config.run)])
    assert norms[0] == pytest.approx(norms[1], rel=1e-3)


def test_there_is_one_way_of_clipping_at_a_time(tmp_path):
    base = small_config(tmp_path)
    assert make_clipping(base.optimizer) is None
    with pytest.raises(ValueError, match="one way, not by clip_grad_norm and clip_z_score"):
        replace(base, optimizer=replace(base.optimizer, clip_grad_norm=1.0, clip_z_score=2.5))
    with pytest.raises(ValueError, match="clip_per_tensor must be 0 or above 1"):
        replace(base, optimizer=replace(base.optimizer, clip_per_tensor=0.5))
    offloaded = replace(base, offload="optimizer", optimizer=replace(base.optimizer, clip_z_score=2.5), zero_stage=1)
    with pytest.raises(UserError, match=r"--optimizer\.clip-z-score cannot clip what is offloaded"):
        check_engine_config(offloaded, 32)
