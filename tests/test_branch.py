"""``--branch-from``: a new run that goes on from another's checkpoint, which is only read."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("deepspeed")

from killing import Kill, train_until_killed
from running import log_rows, losses, run_on_ranks, small_config

from scalelong.model.skip_scale import ConstantScale, LearnedScale
from scalelong.train.branch import STAYS, Origin, parse_origin
from scalelong.train.commands.ema_posthoc import kept_averages, posthoc_average
from scalelong.train.config import DataConfig, TrainConfig
from scalelong.train.errors import UserError
from scalelong.train.loop import train
from scalelong.train.run_folder import read_config

STEP = 32
TENSOR_FILES = ("model.safetensors", "ema.safetensors", "optimizer.safetensors")


def with_rate(config: TrainConfig, rate: float) -> TrainConfig:
    return replace(config, optimizer=replace(config.optimizer, learning_rate=rate))


def all_files(run: Path) -> dict[Path, tuple[int, bytes]]:
    return {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in run.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def origin(tmp_path_factory) -> Path:
    """Eight steps, of which the checkpoints after the fourth and the eighth are there."""
    config = small_config(tmp_path_factory.mktemp("origin") / "run", images_per_checkpoint=4 * STEP)
    assert train(replace(config, total_images=8 * STEP)) == 0
    return config.run


def branch_of(origin: Path, run: Path, at: int | None = 4, **changes) -> TrainConfig:
    text = str(origin) if at is None else f"{origin}@{at * STEP}"
    return small_config(run, branch_from=text, total_images=8 * STEP, images_per_checkpoint=4 * STEP, **changes)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("runs/a", ("runs/a", None)),
        ("runs/a@6400", ("runs/a", 6400)),
        ("me@home/run", ("me@home/run", None)),
        ("me@home/run@0@32", ("me@home/run@0", 32)),
        ("@5", ("@5", None)),
    ],
)
def test_the_last_number_behind_an_at_is_the_checkpoint(text, expected):
    assert parse_origin(text) == Origin(Path(expected[0]), expected[1])


@pytest.mark.slow
def test_a_branch_in_which_nothing_differs_is_the_run_itself_and_reads_only(tmp_path, origin):
    before = all_files(origin)
    config = branch_of(origin, tmp_path / "branch")
    assert train(config) == 0
    assert all_files(origin) == before
    assert losses(config.run) == losses(origin)[4:]
    for name in TENSOR_FILES:
        files = [run / "checkpoints" / str(8 * STEP) / name for run in (origin, config.run)]
        assert files[0].read_bytes() == files[1].read_bytes()
    recorded = json.loads((config.run / "config.json").read_text())["branch_from"]
    assert recorded == f"{origin.resolve()}@{4 * STEP}"


@pytest.mark.slow
def test_what_differs_takes_effect_and_the_branch_resumes_as_any_run(tmp_path, origin):
    straight = with_rate(branch_of(origin, tmp_path / "straight", images_per_step=16), 3e-3)
    assert train(replace(straight, total_images=12 * STEP)) == 0
    rows = log_rows(straight.run)
    assert [row["images_seen"] for row in rows] == [4 * STEP + 16 * n for n in range(1, 17)]
    assert [row["step"] for row in rows] == list(range(5, 21))
    assert {row["learning_rate"] for row in rows} == {3e-3}
    # The command again, without naming where it came from, though that is gone.
    gone = Path(shutil.copytree(origin, tmp_path / "gone"))
    stopped = with_rate(branch_of(gone, tmp_path / "stopped", images_per_step=16), 3e-3)
    assert train(replace(stopped, total_images=6 * STEP)) == 0
    shutil.rmtree(gone)
    assert train(replace(stopped, branch_from=None, total_images=10 * STEP)) == 0
    assert train(replace(stopped, branch_from=str(gone), total_images=12 * STEP)) == 0
    assert losses(stopped.run) == losses(straight.run)
    assert read_config(stopped.run).branch_from == f"{gone.resolve()}@{4 * STEP}"
    with pytest.raises(UserError, match=f"is a branch of {gone.resolve()}@{4 * STEP}, not of {origin}"):
        train(replace(stopped, branch_from=str(origin), total_images=14 * STEP))


@pytest.mark.slow
def test_averages_that_the_other_run_has_kept_are_found(tmp_path):
    def averaging(config: TrainConfig) -> TrainConfig:
        return replace(config, images_per_average=STEP, optimizer=replace(config.optimizer, ema_stds=(0.05, 0.1)))

    there = averaging(small_config(tmp_path / "there", images_per_checkpoint=4 * STEP, total_images=8 * STEP))
    assert train(there) == 0
    branch = averaging(branch_of(there.run, tmp_path / "branch"))
    assert train(branch) == 0
    kept = [(int(average.folder.name) // STEP, average.profile.step) for average in kept_averages(branch.run, None)]
    assert kept[::2] == [(n, n) for n in range(8, 0, -1)]
    made, error = posthoc_average(branch.run, 0.08)
    expected, expected_error = posthoc_average(there.run, 0.08)
    assert error == expected_error
    assert all(torch.equal(value, made[name]) for name, value in expected.items())
    assert {average.folder.parent.parent for average in kept_averages(branch.run, 3 * STEP)} == {there.run.resolve()}
    shutil.rmtree(there.run)
    assert {int(average.folder.name) // STEP for average in kept_averages(branch.run, None)} == {5, 6, 7, 8}


@pytest.mark.slow
def test_without_a_number_it_is_the_newest_that_is_whole(tmp_path, origin):
    copy = Path(shutil.copytree(origin, tmp_path / "copy"))
    (copy / "checkpoints" / str(8 * STEP) / "model.safetensors").write_bytes(b"?")
    config = branch_of(copy, tmp_path / "branch", at=None)
    assert train(config) == 0
    assert read_config(config.run).branch_from == f"{copy.resolve()}@{4 * STEP}"
    with pytest.raises(UserError, match=r"model\.safetensors is not what was written"):
        train(branch_of(copy, tmp_path / "other", at=8))
    shutil.rmtree(copy / "checkpoints")
    with pytest.raises(UserError, match="it has no whole checkpoint"):
        train(branch_of(copy, tmp_path / "other", at=None))
    assert not (tmp_path / "other").exists()


@pytest.mark.slow
@pytest.mark.parametrize("operation", [4, 9, 12])
def test_a_branch_that_was_killed_before_it_had_saved_branches_again(tmp_path, origin, operation):
    config = branch_of(origin, tmp_path / "branch")
    assert train_until_killed(config, Kill(operation=operation))
    assert train(replace(config, branch_from=None) if (config.run / "config.json").is_file() else config) == 0
    assert losses(config.run) == losses(origin)[4:]


@pytest.mark.slow
def test_other_data_other_ranks_and_another_stage(tmp_path, origin):
    from test_train_bad_input import ten_classes

    data = DataConfig(path=str(ten_classes(tmp_path / "images")))
    config = branch_of(origin, tmp_path / "branch", data=data, zero_stage=2)
    arguments = ["--model.width", 32, "--model.depth", 2, "--images-per-step", STEP, "--total-images", 8 * STEP]
    arguments += ["--optimizer.warmup-images", 64, "--sample.num-images", 10, "--sample.steps", 3]
    arguments += ["--run", config.run, "--branch-from", config.branch_from, "--data.path", data.path]
    arguments += ["--images-per-log", 0]
    run_on_ranks(2, "-m", "scalelong.train", "digits-uvit", *arguments, "--zero-stage", 2)
    assert [row["images_seen"] for row in log_rows(config.run)] == [n * STEP for n in (5, 6, 7, 8)]
    first = load_file(config.run / "checkpoints" / str(4 * STEP) / "model.safetensors")
    theirs = load_file(origin / "checkpoints" / str(4 * STEP) / "model.safetensors")
    assert all(torch.equal(value, theirs[name]) for name, value in first.items())


def test_what_may_not_differ_is_named_and_nothing_is_written(tmp_path, origin):
    run = tmp_path / "branch"
    base = branch_of(origin, run)
    for config, words in (
        (replace(base, skip_scale=LearnedScale()), "--skip-scale cs -> ls"),
        (replace(base, skip_scale=ConstantScale(0.7)), "--skip-scale.kappa 0.5 -> 0.7"),
        (replace(base, objective="linear"), "--objective.noise vp-sde -> linear"),
        (replace(base, model=replace(base.model, depth=4)), "--model.depth 2 -> 4"),
        (replace(base, label_drop=0.0, sample=replace(base.sample, guidance=0.0)), "--label-drop 0.1 -> 0.0"),
        (replace(base, optimizer=replace(base.optimizer, ema_stds=(0.05,))), "ema-stds 0.05"),
        (replace(base, branch_from=f"{origin}@77"), f"no such checkpoint; {origin} has {4 * STEP}, {8 * STEP}"),
        (replace(base, branch_from=str(tmp_path / "none")), "is no run folder"),
        (replace(base, run=origin, branch_from=f"{origin}@{4 * STEP}"), "was started from nothing"),
        (replace(base, total_images=4 * STEP), "nothing is left to be trained"),
    ):
        with pytest.raises(UserError) as caught:
            train(config)
        assert words in str(caught.value)
        assert "\n" not in str(caught.value)
        assert not run.exists()


def test_flags_that_stay_are_flags(origin):
    from dataclasses import fields

    flags = ["--" + f.name.replace("_", "-") for f in fields(TrainConfig)]
    assert all(any(flag.startswith(stays) for flag in flags) for stays in STAYS)


@pytest.mark.slow
def test_messages_that_advise_another_learning_rate_name_it(tmp_path, origin):
    config = small_config(origin, total_images=9 * STEP, images_per_checkpoint=4 * STEP)
    with pytest.raises(UserError, match=f"--branch-from {origin} to go on from there"):
        train(with_rate(config, 1e-3))
