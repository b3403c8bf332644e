"""Instruments of a run: what blocks and gradients do, without a change of the training, and what is said of spikes."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("deepspeed")

from running import SMALL, log_rows, small_config, train_on_ranks
from safetensors.torch import load_file
from test_take_step import BATCH, make_engine

from scalelong.model.architectures import make_backbone
from scalelong.train import loop
from scalelong.train.config import GuardConfig
from scalelong.train.errors import DivergedError
from scalelong.train.monitor import Monitor
from scalelong.train.objective import make_objective
from scalelong.train.objective_config import ObjectiveConfig
from scalelong.train.recipes import RECIPES
from scalelong.train.zero.gradients import gradient_norms, gradients_against_weights, scale_gradients

STEPS = 20


def batch_of(config: Any) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(BATCH, 1, 8, 8, generator=generator)
    return images, torch.rand(BATCH, generator=generator) * 999, torch.arange(BATCH)


@pytest.mark.parametrize("recipe", ["digits-uvit", "digits-unet"])
@pytest.mark.parametrize("recompute", ["none", "blocks"])
def test_norms_of_blocks_are_those_of_their_features_and_gradients(recipe, recompute):
    config = RECIPES[recipe]
    model = make_backbone(config.model, skip_scale=config.skip_scale, recompute=recompute)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    names = [name for name, _ in model.named_blocks()]
    monitor = Monitor(model)
    monitor.active = True
    batch = batch_of(config)
    features = model.features(*batch, blocks=names)
    model(*batch).square().sum().backward()
    pairs = [(p.detach(), p.grad) for p in model.parameters() if p.grad is not None]
    weight_norms, norms = (torch.stack([p.norm() for p in tensors]) for tensors in zip(*pairs, strict=True))
    monitor.record_gradients(
        norms, weight_norms, torch.stack([(weight * gradient).sum() for weight, gradient in pairs])
    )
    found = monitor.take()
    parts: dict[str, list[torch.Tensor]] = {name: [] for name in [*names, "outside"]}
    for name, parameter in model.named_parameters():
        block = next((block for block in names if name.startswith(block + ".")), "outside")
        assert parameter.grad is not None
        parts[block].append(torch.stack([parameter.detach().flatten(), parameter.grad.flatten()]))
    for number, name in enumerate(names):
        expected = features[name].flatten(1).norm(dim=1).mean().item()
        assert found[f"block/{number}/feature_norm"] == pytest.approx(expected)
        assert found[f"block/{number}/magnitude"] == pytest.approx(features[name].square().mean().sqrt().item())
    for number, name in [*enumerate(names), ("outside", "outside")]:
        weight, gradient = torch.cat(parts[name], dim=1)
        cosine = torch.cosine_similarity(weight, gradient, dim=0).item()
        assert found[f"block/{number}/gradient_norm"] == pytest.approx(gradient.norm().item(), rel=1e-4)
        assert found[f"block/{number}/weight_norm"] == pytest.approx(weight.norm().item(), rel=1e-4)
        assert found[f"block/{number}/gradient_alignment"] == pytest.approx(cosine, abs=1e-4)


def test_a_block_that_no_gradient_reaches_has_no_alignment():
    model = make_backbone(RECIPES["digits-dit"].model)
    monitor, zeros = Monitor(model), torch.zeros(len(list(model.parameters())))
    monitor.record_gradients(zeros, zeros + 1, zeros)
    assert monitor.take()["block/0/gradient_alignment"] == 0


def test_the_spread_of_gates_is_that_of_their_factors():
    config = small_config(Path("run"))
    from scalelong.model.skip_scale import make_skip_scale

    model: Any = make_backbone(config.model, skip_scale=make_skip_scale("ls"))
    gates = []
    model.se.register_forward_hook(lambda _, inputs, output: gates.append(output))
    monitor = Monitor(model)
    monitor.active = True
    model(*batch_of(config))
    assert monitor.take()["skip/1/scale_spread"] == pytest.approx(gates[0].std().item())


def gradients_of(config, *, scales: bool = True) -> list[float]:
    """Their norms, those of the weights, and the inner products of both."""
    engine = make_engine(config)
    generator = torch.Generator().manual_seed(1)
    images, noise = (torch.randn(BATCH, 1, 8, 8, generator=generator) for _ in range(2))
    loss = make_objective(ObjectiveConfig()).loss(
        engine, images, noise, torch.rand(BATCH, generator=generator), torch.arange(BATCH)
    )
    engine.backward(loss)
    norms, against_weights = gradient_norms(engine), gradients_against_weights(engine)
    if scales:
        scale_gradients(engine, 0.5)
        torch.testing.assert_close(gradient_norms(engine), norms / 2)
    return torch.cat([norms, *against_weights]).tolist()


@pytest.mark.parametrize(
    ("stage", "offload"), [(1, "none"), (2, "none"), (3, "none"), (1, "optimizer"), (2, "optimizer"), (3, "parameters")]
)
def test_norms_of_gradients_are_the_same_under_every_stage(stage, offload, tmp_path):
    config = small_config(tmp_path / "run", images_per_step=BATCH)
    sharded = replace(config, zero_stage=stage, offload=offload)
    found = gradients_of(sharded, scales=offload == "none")
    assert found == pytest.approx(gradients_of(config), rel=1e-5, abs=1e-7)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, *(pytest.param(stage, marks=pytest.mark.exhaustive) for stage in (1, 3))])
def test_norms_of_gradients_are_the_same_on_two_ranks(stage, tmp_path):
    flags = [*SMALL, "--total-images", 64, "--sample.steps", 1]
    assert loop.train(small_config(tmp_path / "one", total_images=64)) == 0
    train_on_ranks(2, "digits-uvit", "--run", tmp_path / "two", *flags, "--zero-stage", stage)
    one, two = (log_rows(tmp_path / name)[-1] for name in ("one", "two"))
    weights, cosines, names = (
        [name for name in one if name.endswith(end)]
        for end in ("/weight_norm", "/gradient_alignment", "/gradient_norm")
    )
    assert len(weights) == len(cosines) == len(names) == 4
    assert [two[name] for name in names] == pytest.approx([one[name] for name in names], rel=1e-3)
    assert [two[name] for name in weights] == pytest.approx([one[name] for name in weights], rel=1e-5)
    assert [two[name] for name in cosines] == pytest.approx([one[name] for name in cosines], abs=1e-4)
    assert any(abs(one[name]) > 1e-3 for name in cosines)
    assert sum(two[name] ** 2 for name in names) ** 0.5 == pytest.approx(two["grad_norm"], rel=1e-4)


def test_instruments_do_not_move_a_bit_of_the_training(tmp_path):
    weights = []
    for images_per_log in (0, 32 * STEPS):
        run = tmp_path / f"every{images_per_log}"
        config = small_config(run, total_images=32 * STEPS, images_per_log=images_per_log)
        assert loop.train(config) == 0
        weights.append(load_file(run / "checkpoints" / str(32 * STEPS) / "model.safetensors"))
    assert len(log_rows(tmp_path / "every0")) == STEPS
    assert len(log_rows(tmp_path / f"every{32 * STEPS}")) == 1
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


def spikes_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "spikes.jsonl").read_text().splitlines()]


def plant(monkeypatch, at_step: int, change) -> None:
    """Has something happen to a step of the run."""
    plain, count = loop.train_step, iter(range(1, 10_000))

    def train_step(run, *, measures):
        if next(count) == at_step:
            change(run)
        return plain(run, measures=measures)

    monkeypatch.setattr(loop, "train_step", train_step)


def test_a_bad_batch_is_found_and_its_image_named(tmp_path, monkeypatch, capsys):
    def spoil(run):
        batch = next(run.batches)
        batch.images_BCHW[5] = 1e4
        run.batches = iter_with_seconds(batch, run.batches)

    plant(monkeypatch, 40, spoil)
    monkeypatch.setattr(loop, "note_bad_samples", lambda run: None)
    assert loop.train(small_config(tmp_path / "run", total_images=32 * 45)) == 0
    (spike,) = spikes_of(tmp_path / "run")
    assert (spike["kind"], spike["step"], spike["first_step"]) == ("spike", 40, 40)
    assert spike["images"] == [39 * 32, 40 * 32]
    assert spike["outliers"][0] == 39 * 32 + 5
    assert (spike["first"], spike["block"]) == ("block/0/feature_norm", "in_blocks.0")
    assert "spike in step 40" in capsys.readouterr().out


class iter_with_seconds:  # noqa: N801 - stands for a function
    """One batch, then those of a reader."""

    def __init__(self, batch, rest):
        self._first, self._rest = [batch], rest

    def __next__(self):
        return self._first.pop() if self._first else next(self._rest)

    def take_seconds(self):
        return self._rest.take_seconds()


def test_a_rate_that_is_far_too_high_is_found_and_what_grew_first_named(tmp_path, monkeypatch):
    plain, run = loop.learning_rate, tmp_path / "run"
    rate = {"factor": 1.0}
    monkeypatch.setattr(loop, "learning_rate", lambda config, seen: rate["factor"] * plain(config, seen))
    plant(monkeypatch, 40, lambda run: rate.update(factor=3000.0))
    assert loop.train(small_config(run, total_images=32 * 60)) == 0
    spike = spikes_of(run)[0]
    assert 40 <= spike["first_step"] <= spike["step"] <= 43
    assert spike["first"] in spike["deviations"] or len(spike["deviations"]) == 5
    assert spike["block"] in ("in_blocks.0", "mid_block", "out_blocks.0")


def test_a_loss_that_stays_too_high_is_reported_from_the_step_in_which_it_rose(tmp_path, monkeypatch):
    plain, run = loop.learning_rate, tmp_path / "run"
    rate = {"factor": 1.0}
    monkeypatch.setattr(loop, "learning_rate", lambda config, seen: rate["factor"] * plain(config, seen))
    plant(monkeypatch, 40, lambda run: rate.update(factor=3000.0))
    guard = GuardConfig(roll_back_factor=1.5, roll_back_steps=3, roll_backs=0)
    with pytest.raises(DivergedError) as diverged:
        loop.train(small_config(run, total_images=32 * 60, guard=guard))
    end = spikes_of(run)[-1]
    assert (end["kind"], end["step"]) == ("divergence", diverged.value.step)
    assert 40 <= end["first_step"] <= end["step"] <= 44
    assert end["block"] is not None


def test_a_divergence_is_reported_before_it_ends_the_run(tmp_path, monkeypatch):
    def spoil(run):
        with torch.no_grad():
            next(run.engine.module.out_blocks.parameters()).fill_(float("nan"))

    plant(monkeypatch, 30, spoil)
    with pytest.raises(DivergedError):
        loop.train(small_config(tmp_path / "run", total_images=32 * 60))
    (spike,) = spikes_of(tmp_path / "run")
    assert (spike["kind"], spike["step"], spike["first_step"]) == ("divergence", 30, 30)
    assert (spike["first"], spike["block"]) == ("block/2/feature_norm", "out_blocks.0")
    assert spike["what"] == "the loss is nan"
