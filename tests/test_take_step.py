"""What comes of a step of the optimizer, under ZeRO and without: applied, finite, the norm of its gradient."""

from dataclasses import replace

import pytest
import torch
from running import small_config

from scalelong.model.architectures import make_backbone
from scalelong.model.layer_calls import is_called_by_class
from scalelong.train.config import TrainConfig
from scalelong.train.hosts.processes import join_processes
from scalelong.train.objective import make_objective
from scalelong.train.objective_config import ObjectiveConfig
from scalelong.train.zero import engine as zero
from scalelong.train.zero import shards

BATCH = 4


def make_engine(config: TrainConfig):
    torch.manual_seed(0)
    model = make_backbone(config.model, skip_scale=config.skip_scale)
    engine = zero.make_engine(model, config, join_processes(), BATCH)
    zero.set_learning_rate(engine, 1e-3)
    return engine


def step(engine, factor: float = 1.0, **how) -> zero.StepTaken:
    """One step on the loss times a factor."""
    generator = torch.Generator().manual_seed(1)
    images, noise = (torch.randn(BATCH, 1, 8, 8, generator=generator) for _ in range(2))
    times, labels = torch.rand(BATCH, generator=generator), torch.arange(BATCH)
    loss = make_objective(ObjectiveConfig()).loss(engine, images, noise, times, labels)
    engine.backward(zero.loss_with_telling_gradient(loss * factor))
    return zero.take_step(engine, **how)


def weights(engine) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in shards.whole_weights(engine)}


def moved(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> bool:
    return any(not torch.equal(before[name], after[name]) for name in before)


@pytest.fixture(params=[0, 1, 2, 3])
def config(request, tmp_path):
    return small_config(tmp_path / "run", images_per_step=BATCH, zero_stage=request.param)


def test_a_step_moves_the_weights_and_tells_the_norm_if_asked(config):
    engine = make_engine(config)
    before = weights(engine)
    assert step(engine) == (True, True, None)
    assert moved(before, weights(engine))
    norms = [step(make_engine(config), factor, measures=True).gradient_norm for factor in (1.0, 3.0)]
    assert norms[0] is not None
    assert norms[0] > 0
    assert norms[1] == pytest.approx(3 * norms[0], rel=1e-5)


def test_layers_stay_fused_under_every_stage(config):
    """ZeRO 3 hangs hooks on each, which only move weights."""
    layers = list(make_engine(config).module.modules())[1:]  # DeepSpeed's own hooks look at the network's output
    assert len(layers) > 20
    assert [type(layer).__name__ for layer in layers if not is_called_by_class(layer, type(layer))] == []


def test_the_norm_is_the_same_under_every_stage(config):
    plain = step(make_engine(replace(config, zero_stage=0)), measures=True)
    assert step(make_engine(config), measures=True).gradient_norm == pytest.approx(plain.gradient_norm, rel=1e-5)


def test_a_step_that_is_not_finite_is_left_out(config):
    engine = make_engine(config)
    before = weights(engine)
    taken = step(engine, float("nan"), only_finite=True)
    assert (taken.applied, taken.is_finite) == (False, False)
    assert not moved(before, weights(engine))
    assert step(engine, only_finite=True) == (True, True, None)
    assert moved(before, weights(engine))


def test_fp16_that_finds_its_loss_scale_is_not_applied_but_finite(config):
    engine = make_engine(replace(config, precision="fp16"))
    scaler = zero._grad_scaler(engine)
    assert scaler is not None
    scaler.load_state_dict({**scaler.state_dict(), "scale": 2.0**40})
    before = weights(engine)
    taken = step(engine, measures=True)
    assert (taken.applied, taken.is_finite) == (False, True)
    assert not moved(before, weights(engine))
    assert zero.loss_scale(engine) < 2.0**40


def test_the_norm_is_told_without_the_loss_scale(config):
    plain = step(make_engine(config), measures=True).gradient_norm
    half = step(make_engine(replace(config, precision="fp16")), measures=True).gradient_norm
    assert half == pytest.approx(plain, rel=2e-2)
