"""The run as a whole: what it leaves behind, and that resuming is exact."""

import json
import re
import signal
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from samples import each_value_once

pytest.importorskip("deepspeed")

from programs import start_own_process, start_python
from running import SMALL, launch, log_rows, losses, run_command, run_on_ranks, small_config, train_on_ranks

from scalelong.model.skip_scale import SKIP_SCALE_NAMES
from scalelong.model.uvit import UViT
from scalelong.train import loop
from scalelong.train.commands.evaluate import main as evaluate_main
from scalelong.train.commands.export import main as export_main
from scalelong.train.commands.sample import main as sample_main
from scalelong.train.config import DataConfig
from scalelong.train.errors import EXIT_SAVED_AFTER_SIGNAL, UserError
from scalelong.train.hosts import meeting
from scalelong.train.loop import train
from scalelong.train.run_folder import lock_path, read_config
from scalelong.train.sampling.pipeline import Pipeline
from scalelong.train.zero import engine as zero

pytestmark = pytest.mark.slow

STEP = 32
TENSOR_FILES = ("model.safetensors", "ema.safetensors", "optimizer.safetensors")


def assert_same_tensors(a: Path, b: Path) -> None:
    for name in TENSOR_FILES:
        left, right = load_file(a / name), load_file(b / name)
        assert left.keys() == right.keys()
        for key in left:
            assert torch.equal(left[key], right[key]), f"{name}: {key}"


@pytest.fixture(scope="module")
def straight(tmp_path_factory) -> Path:
    """Twenty steps at one go, with learned gates, shuffled data and dropped labels."""
    run = tmp_path_factory.mktemp("straight") / "run"
    assert train(small_config(run, skip_scale="ls", total_images=20 * STEP)) == 0
    return run


def test_a_run_leaves_what_the_house_promises(straight):
    assert json.loads((straight / "config.json").read_text())["model"]["skip_scale"]["kind"] == "ls"
    assert (straight / "samples" / "640.png").is_file()
    assert list((straight / "tensorboard").iterdir())
    files = {p.name for p in (straight / "checkpoints" / "640").iterdir()}
    assert files == {*TENSOR_FILES, "state.json", "manifest.json"}
    rows = log_rows(straight)
    assert [row["step"] for row in rows] == list(range(1, 21))
    expected = {"images_seen", "step", "loss", "grad_norm", "learning_rate", "images_per_second"}
    expected |= {"data_wait", "bad_images", "wall_seconds", "memory_gb", "tflops_per_device"}
    expected |= {"mfu"} if torch.cuda.is_available() else set()
    expected |= {f"skip/1/{what}" for what in ("scale", "kappa_eff", "scale_spread", "feature_norm", "hidden_norm")}
    expected |= {f"block/{n}/{what}" for n in range(3) for what in ("feature_norm", "magnitude")}
    of_weights = ("gradient_norm", "weight_norm", "gradient_alignment")
    expected |= {f"block/{n}/{what}" for n in (0, 1, 2, "outside") for what in of_weights}
    assert rows[0].keys() == expected
    assert rows[-1].keys() == expected | {"validation_loss", "validation_loss_ema"}
    assert all(np.isfinite(list(row.values())).all() for row in rows)


def test_training_lowers_the_loss(straight):
    values = losses(straight)
    assert np.mean(values[-4:]) < 0.98 * np.mean(values[:4])


def test_learning_rate_warms_up_then_stays(straight):
    rates = [row["learning_rate"] for row in log_rows(straight)]
    assert rates[:4] == pytest.approx([0, 7.5e-4, 1.5e-3, 1.5e-3])
    assert set(rates[2:]) == {1.5e-3}


@pytest.mark.parametrize("reader", ["dali", "pillow"])
def test_resuming_is_bit_identical(straight, tmp_path, reader):
    if reader == "dali":
        pytest.importorskip("nvidia.dali")
    config = small_config(tmp_path / "run", skip_scale="ls", data=DataConfig(reader=reader))
    train(replace(config, total_images=10 * STEP))
    # Asking for more later is the same as having asked for it at once.
    train(replace(config, total_images=20 * STEP))
    assert losses(tmp_path / "run") == losses(straight)
    assert_same_tensors(tmp_path / "run/checkpoints/640", straight / "checkpoints/640")


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_resuming_is_bit_identical_under_zero(tmp_path, stage):
    once = small_config(tmp_path / "once", total_images=6 * STEP, zero_stage=stage)
    train(once)
    twice = replace(once, run=tmp_path / "twice")
    train(replace(twice, total_images=3 * STEP))
    train(twice)
    assert losses(twice.run) == losses(once.run)
    assert_same_tensors(twice.run / "checkpoints/192", once.run / "checkpoints/192")


def test_a_run_is_deterministic_where_that_is_wanted_and_leaves_torch_as_it_was(tmp_path, monkeypatch):
    found, take_steps = [], loop.take_steps

    def noting(*arguments):
        found.append(torch.are_deterministic_algorithms_enabled())
        return take_steps(*arguments)

    monkeypatch.setattr(loop, "take_steps", noting)
    for wanted in (True, False):
        train(small_config(tmp_path / str(wanted), total_images=STEP, deterministic=wanted))
        assert not torch.are_deterministic_algorithms_enabled()
    assert found == [True, False]
    assert losses(tmp_path / "True") == losses(tmp_path / "False")


def test_resuming_passes_over_a_damaged_checkpoint(straight, tmp_path, capsys):
    config = small_config(tmp_path / "run", skip_scale="ls", images_per_checkpoint=5 * STEP)
    train(replace(config, total_images=10 * STEP))
    damaged = tmp_path / "run/checkpoints/320/model.safetensors"
    data = bytearray(damaged.read_bytes())
    data[-1] ^= 1
    damaged.write_bytes(data)
    train(replace(config, total_images=20 * STEP))
    assert "model.safetensors is not what was written" in capsys.readouterr().err
    assert losses(tmp_path / "run") == losses(straight)


def test_damaged_checkpoints_do_not_push_out_whole_ones(tmp_path):
    config = small_config(tmp_path / "run", images_per_checkpoint=2 * STEP, keep_checkpoints=3)
    train(replace(config, total_images=6 * STEP))
    for damaged in (128, 192):
        (config.run / "checkpoints" / str(damaged) / "model.safetensors").write_bytes(b"")
    train(replace(config, total_images=3 * STEP, keep_checkpoints=2))
    left = {p.name for p in (config.run / "checkpoints").iterdir()}
    assert {"64", "96"} <= left


@each_value_once("precision,stage", ["bf16", "fp16"], [0, 2, 3])
def test_mixed_precision_trains_and_resumes_exactly(tmp_path, precision, stage):
    once = small_config(tmp_path / "once", precision=precision, zero_stage=stage, total_images=4 * STEP)
    train(once)
    twice = replace(once, run=tmp_path / "twice")
    train(replace(twice, total_images=2 * STEP))
    train(twice)
    assert losses(twice.run) == losses(once.run)
    # Gradients are reported without the loss scale.
    assert all(0.01 < row["grad_norm"] < 100 for row in log_rows(once.run))


def test_an_overflow_in_fp16_lowers_the_loss_scale(tmp_path):
    original = zero.make_engine

    def overflowing(*arguments):
        engine = original(*arguments)
        scaler = zero._grad_scaler(engine)
        assert scaler is not None
        scaler.load_state_dict({**scaler.state_dict(), "scale": 2.0**30})
        return engine

    for stage in (0, 2, 3):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(zero, "make_engine", overflowing)
            run = tmp_path / str(stage)
            train(small_config(run, precision="fp16", zero_stage=stage, total_images=12 * STEP))
        scales = [row["loss_scale"] for row in log_rows(run)]
        assert scales[0] == 2.0**30
        assert scales[-1] < scales[0]


@pytest.mark.parametrize("skip_scale", SKIP_SCALE_NAMES)
def test_every_skip_scale_trains_and_logs_its_scales(tmp_path, skip_scale):
    config = small_config(tmp_path, skip_scale=skip_scale, total_images=2 * STEP)
    config = replace(config, model=replace(config.model, depth=4), run=tmp_path / "run")
    train(config)
    row = log_rows(config.run)[-1]
    expected = {"none": (1.0, 1.0), "inv-sqrt2": (2**-0.5, 2**-0.5), "cs": (1.0, 0.5), "geometric": (1.0, 0.5)}
    scales = (row["skip/1/scale"], row["skip/2/scale"])
    if skip_scale in expected:
        assert scales == pytest.approx(expected[skip_scale])
    else:
        assert all(0.3 < scale < 0.7 for scale in scales)
        assert row["skip/2/scale_spread"] > 0
    assert (row["skip/1/kappa_eff"], row["skip/2/kappa_eff"]) == pytest.approx(scales, rel=0.05)
    if skip_scale == "geometric":
        assert (row["skip/1/common_scale"], row["skip/2/common_scale"]) == pytest.approx((1.0, 1.6**0.5))
    assert row["skip/1/feature_norm"] > 0
    assert row["skip/2/feature_norm"] > 0


def test_accumulation_makes_the_same_step(straight, tmp_path):
    train(small_config(tmp_path / "run", skip_scale="ls", total_images=10 * STEP, accumulation_steps=4))
    np.testing.assert_allclose(losses(tmp_path / "run"), losses(straight)[:10], rtol=1e-5)


def test_a_finished_run_says_so_and_changes_nothing(straight, capsys):
    def times() -> dict[Path, int]:  # of all but the lock, which says who started last
        return {p: p.stat().st_mtime_ns for p in straight.rglob("*") if p != lock_path(straight)}

    before = times()
    assert train(small_config(straight, skip_scale="ls", total_images=20 * STEP)) == 0
    assert "already trained to 640 images" in capsys.readouterr().out
    assert times() == before


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_step(tmp_path, stage):
    config = small_config(tmp_path / "run", total_images=20 * STEP, images_per_checkpoint=2 * STEP, zero_stage=stage)
    config = replace(config, optimizer=replace(config.optimizer, learning_rate=1e30))
    with pytest.raises(UserError, match=r"at step [34] ") as caught:
        train(config)
    assert "\n" not in str(caught.value)
    weights = load_file(max((config.run / "checkpoints").iterdir()) / "model.safetensors")
    assert all(w.isfinite().all() for w in weights.values())


@pytest.mark.parametrize(("stage", "start"), [(0, train_on_ranks), (2, launch), (3, train_on_ranks)])
def test_two_processes_give_the_losses_of_one(straight, tmp_path, stage, start):
    run = tmp_path / "run"
    arguments = ["digits-uvit", *SMALL, "--skip-scale", "ls", "--run", run, "--zero-stage", stage]
    start(2, *arguments, "--total-images", 10 * STEP)
    np.testing.assert_allclose(losses(run), losses(straight)[:10], rtol=0, atol=1e-4)
    # One process takes up what two have left.
    train(small_config(run, skip_scale="ls", total_images=20 * STEP))
    np.testing.assert_allclose(losses(run), losses(straight), rtol=0, atol=1e-4)


def test_two_processes_take_up_what_one_has_left(straight, tmp_path):
    run = tmp_path / "run"
    train(small_config(run, skip_scale="ls", total_images=10 * STEP))
    arguments = ["digits-uvit", *SMALL, "--skip-scale", "ls", "--run", run, "--zero-stage", 3]
    train_on_ranks(2, *arguments, "--total-images", 20 * STEP, "--accumulation-steps", 2)
    np.testing.assert_allclose(losses(run), losses(straight), rtol=0, atol=1e-4)


@pytest.mark.parametrize(("number", "start"), [(signal.SIGTERM, start_own_process), (signal.SIGINT, start_python)])
def test_a_signal_saves_and_the_same_command_goes_on(straight, tmp_path, number, start):
    run = tmp_path / "run"
    arguments = ["digits-uvit", *SMALL, "--skip-scale", "ls", "--run", run, "--total-images", 10_000 * STEP]
    child = start("-m", "scalelong.train", *arguments)
    try:
        deadline = time.monotonic() + 60
        while not (run / "log.jsonl").is_file() or not log_rows_so_far(run):
            assert time.monotonic() < deadline, "no step in a minute"
            time.sleep(0.1)
        child.send_signal(number)
        while number == signal.SIGTERM and child.poll() is None:  # launchers may send it again, to its last moment
            assert time.monotonic() < deadline + 60, "no end in a minute"
            time.sleep(0.01)
            child.send_signal(number)
        out, err = child.communicate(timeout=60)
    finally:
        child.kill()
    assert child.returncode == EXIT_SAVED_AFTER_SIGNAL, err
    saved = int(max((run / "checkpoints").iterdir(), key=lambda p: int(p.name)).name)
    assert f"saved at {saved:,} images" in out
    assert f"python -m scalelong.train digits-uvit {' '.join(SMALL)}" in out
    assert losses(run)[:20] == losses(straight)[: saved // STEP]
    assert train(small_config(run, skip_scale="ls", total_images=saved + STEP)) == 0


def log_rows_so_far(run: Path) -> int:
    return (run / "log.jsonl").read_bytes().count(b"\n")


def test_a_full_disk_leaves_the_last_good_checkpoint(tmp_path):
    run = tmp_path / "run"
    arguments = ["digits-uvit", *SMALL, "--run", run]
    first = run_command(*arguments, "--total-images", 3 * STEP)
    assert first.returncode == 0, first.stderr
    # No file may grow past 40 kB: the log fits, the weights do not, as on a disk with little room.
    limit = "import resource, runpy; resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000)); "
    limit += "runpy.run_module('scalelong.train', run_name='__main__', alter_sys=True)"
    limited = start_python("-c", limit, *arguments, "--total-images", 6 * STEP)
    _, err = limited.communicate(timeout=120)
    assert limited.returncode != 0
    assert f"the last good checkpoint is {run}/checkpoints/96" in err
    assert "Traceback" not in err
    assert [p.name for p in (run / "checkpoints").iterdir()] == ["96"]
    again = run_command(*arguments, "--total-images", 6 * STEP)
    assert again.returncode == 0, again.stderr


@pytest.fixture
def own_images(tmp_path):
    """A folder of colour images of different sizes, in two classes."""
    rng = np.random.default_rng(0)
    for number in range(12):
        folder = tmp_path / "images" / ("cat" if number % 2 else "dog")
        folder.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, (20 + number, 30, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.jpg")
    return tmp_path / "images"


@pytest.mark.exhaustive
@pytest.mark.timeout(600)
@pytest.mark.parametrize("recipe", ["images32-uvit", "images64-uvit", "images64-unet"])
def test_recipes_for_own_images_train_in_their_size(recipe, own_images, tmp_path):
    done = run_command(
        *(recipe, "--run", tmp_path / "run", "--data.path", own_images, "--images-per-step", 2, "--total-images", 4),
        *("--images-per-log", 2, "--sample.num-images", 2, "--sample.steps", 2),
        timeout=500,
    )
    assert done.returncode == 0, done.stderr
    assert Image.open(tmp_path / "run/samples/4.png").size[0] == 2 * (64 + 2) + 2, "images of 32 pixels twice as large"
    assert read_config(tmp_path / "run").model.num_classes == 3


def test_an_own_folder_of_colour_images_trains(own_images, tmp_path):
    done = run_command(
        *("digits-uvit", *SMALL, "--run", tmp_path / "run", "--data.path", own_images),
        *("--model.num-classes", 3, "--model.img-size", 16, "--model.in-channels", 3, "--total-images", 2 * STEP),
    )
    assert done.returncode == 0, done.stderr
    picture = Image.open(tmp_path / "run/samples/64.png")
    assert picture.mode == "RGB"


def test_sample_export_and_evaluate_work_on_a_run(straight, tmp_path):
    done = run_command(
        "sample", straight, "--num-images", 6, "--label", 3, 5, "--out", tmp_path / "g.png", module="scalelong"
    )
    assert done.returncode == 0, done.stderr
    assert Image.open(tmp_path / "g.png").size[0] == 2 * (64 + 2) + 2

    done = run_command("export", straight, "--out", tmp_path / "exported", module="scalelong")
    assert done.returncode == 0, done.stderr
    model = UViT.from_pretrained(tmp_path / "exported")
    ema = load_file(straight / "checkpoints/640/ema.safetensors")
    assert all(torch.equal(value, ema[name]) for name, value in model.state_dict().items())

    how = ["--features", "pixels", "--num-images", 40, "--steps", 3]
    done = run_command("evaluate", tmp_path / "exported", *how, module="scalelong")
    assert done.returncode == 0, done.stderr
    scores = json.loads((tmp_path / "exported" / "evaluation.json").read_text())
    assert (scores["images_seen"], scores["weights"]) == (640, "ema")
    assert scores["real_accuracy"] > 0.97
    assert [s["guidance"] for s in scores["samples"]] == [1.0, 0.0]
    assert "label accuracy" in done.stdout


def test_a_run_its_export_and_the_pipeline_draw_the_same(straight, tmp_path):
    export_main([str(straight), "--out", str(tmp_path / "exported")])
    how = ["--num-images", "7", "--label", "3", "5", "--seed", "2", "--steps", "4", "--batch-size", "3"]
    for source in (straight, tmp_path / "exported"):
        sample_main([str(source), *how, "--out", str(tmp_path / f"{source.name}.png")])
    assert (tmp_path / f"{straight.name}.png").read_bytes() == (tmp_path / "exported.png").read_bytes()
    sample_main([str(straight), *how, "--out", str(tmp_path / "alone"), "--npz", "True"])
    # Two processes go on with what one of them has begun.
    (tmp_path / "shared").mkdir()
    for name in ("samples.json", "000001.png"):
        (tmp_path / "shared" / name).write_bytes((tmp_path / "alone" / name).read_bytes())
    run_on_ranks(2, "-m", "scalelong", "sample", straight, *how, "--out", tmp_path / "shared")
    files = [sorted((tmp_path / folder).glob("*.png")) for folder in ("alone", "shared")]
    assert [path.name for path in files[1]] == [f"{n:06d}.png" for n in range(7)]
    assert [path.read_bytes() for path in files[1]] == [path.read_bytes() for path in files[0]]
    drawn = Pipeline.from_pretrained(tmp_path / "exported")([3, 5], num_images=7, seed=2, steps=4, batch_size=3)
    with np.load(tmp_path / "alone" / "samples_7x8x8x1.npz") as npz:
        np.testing.assert_array_equal(npz["arr_0"][..., 0], np.stack([np.asarray(image) for image in drawn]))
        assert npz["arr_1"].tolist() == [3, 5, 3, 5, 3, 5, 3]


def test_samples_have_a_place_to_go(straight, tmp_path):
    (tmp_path / "grid").write_text("mine")
    for out, more, words in (
        ("grid", [], "grid is a file, and no picture by its name, which would end in .png or .jpg"),
        ("grid.png", ["--npz", "True"], "--npz is of single files"),
        ("grid.svg", [], r"written as \.png, .*, not \.svg"),
    ):
        with pytest.raises(UserError, match=words):
            sample_main([str(straight), "--out", str(tmp_path / out), *more])
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("grid", "mine")]
    export_main([str(straight), "--out", str(tmp_path / "exported")])
    for command, more, words in (
        (sample_main, ["--checkpoint", "640"], "is an export, of one checkpoint: leave out --checkpoint"),
        (evaluate_main, ["--sweep", "ema=0.05"], "--sweep ema is of runs"),
        (export_main, ["--format", "diffusers", "--out", str(tmp_path / "theirs")], "a UViT is no UNet2DModel"),
        (export_main, ["--push-to-hub", "mine", "--out", str(tmp_path / "theirs")], "is called OWNER/NAME"),
    ):
        with pytest.raises(UserError, match=words):
            command([str(tmp_path / "exported"), *more])
    assert not (tmp_path / "theirs").exists()


def test_progress_ends_at_the_images_of_the_last_step(tmp_path, capsys):
    run = tmp_path / "run"
    assert train(small_config(run, total_images=100)) == 0
    said = capsys.readouterr().out
    assert "128 / 128 images" in said
    *_, folder, picture, scores, _, sample, evaluate, export = said.splitlines()
    assert (folder, picture) == (f"run folder: {run}", f"samples to look at: {run}/samples/128.png")
    assert re.fullmatch(r"scores: loss [\d.]+, validation loss [\d.]+, validation loss ema [\d.]+", scores)
    assert sample == f"  scalelong sample {run} --out grid.png"
    assert evaluate == f"  scalelong evaluate {run}"
    assert export == f"  scalelong export {run} --out {run}-model"
    assert train(small_config(tmp_path / "run", total_images=130)) == 0
    assert "160 / 160 images" in capsys.readouterr().out


@pytest.mark.parametrize("is_long", [True, False])
def test_a_first_step_that_takes_long_is_said(tmp_path, capsys, monkeypatch, is_long):
    monkeypatch.setattr(meeting, "SECONDS_TO_SAY", 0.0 if is_long else 60.0)
    assert train(small_config(tmp_path / "run", total_images=2 * STEP)) == 0
    said = capsys.readouterr().err.count("still in the first step, of 32 images\n")
    assert said == is_long
