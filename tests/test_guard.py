"""Steps that are not finite, and losses that climb: left out, undone, or the end of the run."""

import gc
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from samples import each_value_once

pytest.importorskip("deepspeed")

from killing import STEP, killable_config, make_images
from running import log_rows, run_on_ranks
from safetensors.torch import load_file

from scalelong.train import loop
from scalelong.train.checkpoint import numbered_folders
from scalelong.train.config import GuardConfig, TrainConfig
from scalelong.train.config_json import config_from_dict, config_to_dict
from scalelong.train.errors import UserError
from scalelong.train.guard import LOSSES_BEFORE_JUDGING, Guard
from scalelong.train.objective import Objective
from scalelong.train.run import Run
from scalelong.train.zero import engine as zero
from scalelong.train.zero.averages import exponent_of_std, share_of_newest

NAN, INF = float("nan"), float("inf")


def judge(guard: Guard, losses: list[float]) -> list[bool]:
    return [guard.admits(loss, True, step, range(step - 1, step)) for step, loss in enumerate(losses, start=1)]


@given(st.lists(st.sampled_from([1.0, NAN, INF]), max_size=40), st.integers(0, 4))
def test_so_many_steps_in_a_row_may_be_left_out_and_no_more(losses, allowed):
    in_a_row = longest = 0
    for loss in losses:
        in_a_row = 0 if loss == 1.0 else in_a_row + 1
        longest = max(longest, in_a_row)
    guard = Guard(GuardConfig(skip_steps=allowed))
    if longest <= allowed:
        assert judge(guard, losses) == [loss == 1.0 for loss in losses]
        assert guard.left_out == sum(loss != 1.0 for loss in losses)
    else:
        with pytest.raises(UserError, match=r"the loss is (nan|inf) at step"):
            judge(guard, losses)


def test_a_gradient_that_is_not_finite_is_told_from_a_loss():
    with pytest.raises(UserError, match="the gradient is not finite at step 7 "):
        Guard(GuardConfig()).admits(1.0, False, 7, range(6, 7))


def test_only_a_row_of_high_losses_asks_to_roll_back():
    calm = [1.0] * LOSSES_BEFORE_JUDGING
    guard = Guard(GuardConfig(roll_back_factor=2.0, roll_back_steps=3))
    judge(guard, [*calm, 3.0, 3.0, 1.0, 3.0, 3.0])
    assert not guard.asks_to_roll_back
    guard.admits(3.0, True, LOSSES_BEFORE_JUDGING + 6, range(90, 100))
    assert guard.asks_to_roll_back
    # Of the row, the first step's own count is that of judge: one image a step.
    assert guard.roll_back() == LOSSES_BEFORE_JUDGING + 3
    assert not guard.asks_to_roll_back


def test_high_losses_do_not_raise_the_median_and_few_losses_are_not_judged():
    guard = Guard(GuardConfig(roll_back_factor=2.0, roll_back_steps=500))
    judge(guard, [1.0] * LOSSES_BEFORE_JUDGING + [3.0] * 499)
    assert not guard.asks_to_roll_back
    guard.admits(3.0, True, 600, range(599, 600))
    assert guard.asks_to_roll_back
    early = Guard(GuardConfig(roll_back_factor=2.0, roll_back_steps=1))
    judge(early, [1.0] * (LOSSES_BEFORE_JUDGING - 1) + [100.0])
    assert not early.asks_to_roll_back


def test_roll_backs_are_counted():
    guard = Guard(GuardConfig(roll_back_factor=2.0, roll_back_steps=1, roll_backs=1))
    judge(guard, [1.0] * LOSSES_BEFORE_JUDGING + [3.0])
    guard.roll_back()
    judge(guard, [3.0])
    with pytest.raises(UserError, match="after 1 roll-backs"):
        guard.roll_back()


@pytest.mark.parametrize("values", [{"skip_steps": -1}, {"roll_back_factor": 0.5}, {"roll_back_steps": 0}])
def test_values_that_make_no_sense_are_refused(tmp_path, values):
    with pytest.raises(ValueError, match=next(iter(values))):
        killable_config(tmp_path, tmp_path, steps=1, guard=GuardConfig(**values))


def test_runs_older_than_the_guard_are_read(tmp_path):
    config = killable_config(tmp_path, tmp_path, steps=1)
    values = config_to_dict(config)
    del values["guard"]
    assert config_from_dict(values) == config


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    return make_images(tmp_path_factory.mktemp("data") / "images")


@pytest.fixture
def disturb(monkeypatch) -> Callable[[Callable], None]:
    """Lets a function of (number of the loss in this process, loss) replace each loss."""

    def install(change: Callable[[int, torch.Tensor], torch.Tensor]) -> None:
        original, count = Objective.loss, 0

        def changed(*arguments):
            nonlocal count
            count += 1
            return change(count, original(*arguments))

        monkeypatch.setattr(Objective, "loss", changed)

    return install


def hashes(run: Path, step: int) -> dict[str, str]:
    values = json.loads((run / "checkpoints" / str(step * STEP) / "manifest.json").read_text())["sha256"]
    return {name: value for name, value in values.items() if name.endswith(".safetensors")}


@pytest.mark.slow
@pytest.mark.parametrize("bad", [NAN, INF])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_step_that_is_not_finite_changes_nothing_and_the_run_goes_on(tmp_path, images, disturb, stage, bad):
    """An infinite loss may have finite gradients (those of loss + inf are the loss's own): it is left out too."""
    config = killable_config(
        tmp_path / "run",
        images,
        steps=6,
        zero_stage=stage,
        images_per_checkpoint=STEP,
        keep_checkpoints=9,
        guard=GuardConfig(skip_steps=2),
    )
    disturb(lambda number, loss: loss + bad if number in (3, 4) else loss)
    assert loop.train(config) == 0
    assert hashes(config.run, 2) == hashes(config.run, 3) == hashes(config.run, 4)
    assert hashes(config.run, 5) != hashes(config.run, 4)
    rows = log_rows(config.run)
    assert [row["loss"] is None for row in rows] == [False, False, True, True, False, False]
    assert rows[-1]["steps_left_out"] == 2


def with_gradient(loss: torch.Tensor, factor: float) -> torch.Tensor:
    """The same loss, whose gradient is multiplied."""
    loss.register_hook(lambda gradient: gradient * factor)
    return loss


@pytest.mark.slow
@each_value_once("looks,stage,first", [True, False], [0, 1, 2, 3], [8, 2])
def test_no_gradient_that_is_not_finite_passes_unnoticed(tmp_path, images, disturb, monkeypatch, stage, looks, first):
    """On a GPU nothing is looked at between two logs; here there is one look, after the eighth step."""
    monkeypatch.setattr(Run, "looks_at_each_step", looks)
    config = killable_config(
        tmp_path / "run", images, steps=8, zero_stage=stage, images_per_checkpoint=8 * STEP, images_per_log=8 * STEP
    )
    disturb(lambda number, loss: with_gradient(loss, NAN) if number in (first, first + 1) else loss)
    with pytest.raises(UserError, match=f"the gradient is not finite at step {first} "):
        loop.train(config)
    assert not (config.run / "checkpoints").exists()


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 2])
def test_steps_that_are_not_looked_at_compute_the_same(tmp_path, images, monkeypatch, stage):
    config = killable_config(
        tmp_path / "looks", images, steps=8, zero_stage=stage, images_per_checkpoint=8 * STEP, images_per_log=4 * STEP
    )
    assert loop.train(config) == 0
    monkeypatch.setattr(Run, "looks_at_each_step", False)
    looks_seldom = replace(config, run=tmp_path / "seldom")
    assert loop.train(looks_seldom) == 0
    assert hashes(config.run, 8) == hashes(looks_seldom.run, 8)
    assert [row["loss"] for row in log_rows(config.run)] == [row["loss"] for row in log_rows(looks_seldom.run)]


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 2])
def test_too_many_in_a_row_stop_the_run(tmp_path, images, disturb, stage):
    guard = GuardConfig(skip_steps=2)
    config = killable_config(tmp_path / "run", images, steps=9, zero_stage=stage, guard=guard)
    disturb(lambda number, loss: loss * NAN if number > 3 else loss)
    with pytest.raises(UserError, match=r"the loss is nan at step 6 .*, as in the 2 steps before it"):
        loop.train(config)


def rolling_back_config(tmp_path: Path, images: Path, first: int, **changes: Any) -> TrainConfig:
    """Of a run that returns once three losses from step number ``first`` on were too high, and goes on for a while."""
    guard = GuardConfig(roll_back_factor=5.0, roll_back_steps=3)
    return killable_config(tmp_path / "run", images, steps=first + 8, guard=guard, **changes)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_loss_that_climbs_brings_back_the_checkpoint_before(tmp_path, images, disturb, stage):
    first = LOSSES_BEFORE_JUDGING + 4
    config = rolling_back_config(tmp_path, images, first, zero_stage=stage, keep_checkpoints=99)
    disturb(lambda number, loss: loss * 100 if first <= number < first + 3 else loss)
    assert loop.train(config) == 0
    # The climb begins at step 24, saves come every second step: 22 is the last one before it, 26 follows the return.
    assert hashes(config.run, first + 2) == hashes(config.run, first - 2)
    assert hashes(config.run, first + 4) != hashes(config.run, first - 2)
    assert [row["step"] for row in log_rows(config.run)] == list(range(1, first + 9))
    assert log_rows(config.run)[-1]["loss"] < 5
    # A restart goes on from what the return has saved.
    longer = replace(config, total_images=config.total_images + 2 * STEP)
    assert loop.train(longer) == 0


def bytes_of_tensors() -> int:
    # By type: other tests may have left tensors that stand for real ones.
    tensors = [each for each in gc.get_objects() if type(each) in (torch.Tensor, torch.nn.Parameter)]
    storages = {each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in tensors}
    return sum(storages.values())


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_return_frees_before_it_builds_and_drops_the_averages_it_gives_up(
    tmp_path, images, disturb, monkeypatch, stage
):
    first = LOSSES_BEFORE_JUDGING + 4
    config = rolling_back_config(tmp_path, images, first, zero_stage=stage, images_per_average=STEP)
    config = replace(config, optimizer=replace(config.optimizer, ema_stds=(0.05, 0.2)))
    disturb(lambda number, loss: loss * 100 if first <= number < first + 3 else loss)
    bytes_when_built, kept_when_built = [], []
    make_engine = zero.make_engine

    def build(model, *arguments):
        bytes_when_built.append(bytes_of_tensors())
        kept_when_built.append(sorted(int(folder.name) // STEP for folder in numbered_folders(config.run / "averages")))
        return make_engine(model, *arguments)

    monkeypatch.setattr(zero, "make_engine", build)
    assert loop.train(config) == 0
    first_time, second_time = bytes_when_built
    # At most images and losses; weights, gradients, averages and AdamW's state are six times the weights.
    assert second_time - first_time < 4 * 41_198
    # Back from step 26 to the weights after step 22; the averages of 23 to 25 are given up.
    assert kept_when_built[1] == list(range(1, first - 1))
    counted = {
        int(folder.name) // STEP: json.loads((folder / "state.json").read_text())["step"]
        for folder in numbered_folders(config.run / "averages")
    }
    assert counted == {n: n for n in range(1, first - 1)} | {n: n - 4 for n in range(first + 2, first + 9)}


@pytest.mark.slow
def test_the_main_process_alone_hashes_the_checkpoint_to_return_to(tmp_path, images):
    main, other = run_on_ranks(2, "rolling_back.py", tmp_path / "run", images)
    assert re.findall(r"hashed (\d+)", main) == [str(22 * STEP)]
    assert "back to the weights of" in main
    assert "hashed" not in other


@pytest.mark.slow
def test_averages_after_a_return_are_those_of_a_run_without_the_steps_given_up(tmp_path, images, disturb):
    """The steps 23 to 26 are undone; nothing else moves the weights, so that their average is what it was."""
    first = LOSSES_BEFORE_JUDGING + 4
    config = rolling_back_config(tmp_path, images, first, images_per_average=STEP, keep_checkpoints=99)
    config = replace(config, optimizer=replace(config.optimizer, ema_stds=(0.2,)))
    disturb(lambda number, loss: loss * 100 if first <= number < first + 3 else loss)
    assert loop.train(config) == 0
    name, exponent = "ema-0.2", exponent_of_std(0.2)
    before, *after = (load_file(config.run / "averages" / str(n * STEP) / f"{name}.safetensors") for n in (22, 27))
    model = load_file(config.run / "checkpoints" / str(28 * STEP) / "model.safetensors")
    at_28 = load_file(config.run / "checkpoints" / str(28 * STEP) / f"{name}.safetensors")
    for key, value in at_28.items():
        # Step 28 is the 24th on the way to these weights.
        expected = after[0][key].lerp(model[key], share_of_newest(exponent, 24))
        torch.testing.assert_close(value, expected, rtol=0, atol=1e-7)
    assert before.keys() == at_28.keys()


@pytest.mark.slow
def test_a_divergence_without_a_checkpoint_before_it_stops_the_run(tmp_path, images, disturb):
    guard = GuardConfig(roll_back_factor=5.0, roll_back_steps=2)
    config = killable_config(tmp_path / "run", images, steps=40, images_per_checkpoint=100 * STEP, guard=guard)
    disturb(lambda number, loss: loss * 100 if number > 30 else loss)
    with pytest.raises(UserError, match="no checkpoint is as old as that"):
        loop.train(config)
