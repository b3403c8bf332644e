"""What bad input meets: one line, a non-zero exit, and nothing written; bad images alone are lived with."""

import json
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("deepspeed")

from running import SMALL, log_rows, losses, run_as_own_process, run_command, small_config, train_on_ranks

from scalelong.train.checks import find_start
from scalelong.train.commands.evaluate import main as evaluate_main
from scalelong.train.commands.sample import main as sample_main
from scalelong.train.config import DataConfig
from scalelong.train.errors import UserError
from scalelong.train.loop import train
from scalelong.train.run_folder import read_config

pytestmark = pytest.mark.slow

STEP = 32


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("finished") / "run"
    assert train(small_config(run, skip_scale="ls", total_images=2 * STEP)) == 0
    return run


def expect_one_line_error(done: subprocess.CompletedProcess[str], *words: str) -> None:
    assert done.returncode != 0
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("error: ")
    for word in words:
        assert word in lines[0]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nope"], ["unknown recipe 'nope'", "digits-uvit", "cifar10-uvit-s2"]),
        ([], ["which recipe?", "digits-uvit"]),
        (["digits-uvit", "--total-image", "5"], ["--total-image", "--total-images"]),
        (["digits-uvit", "--total-images", "many"], ["--total-images", "many"]),
        (["digits-uvit", "--skip-scale", "half"], ["half", "ls-separate"]),
        (["digits-uvit", "--kappa", "1.5"], ["kappa", "1.5"]),
        (["digits-uvit", "--model.width", "33"], ["33"]),
        (["digits-uvit", "--images-per-step", "30", "--accumulation-steps", "4"], ["30", "4 accumulation steps"]),
        (["digits-uvit", "--images-per-step", "10000000000000"], ["10000000000000", "GB", "--accumulation-steps"]),
        (["cifar10-uvit-s2"], ["--data.path"]),
        (["cifar10-uvit-s2", "--data.path", "no/such/folder"], ["no/such/folder"]),
        (["images64-unet"], ["--data.path"]),
        (["images32-uvit", "--data.path", "no/such/folder"], ["no/such/folder"]),
    ],
)
def test_bad_input_gets_one_line_and_writes_nothing(tmp_path, arguments, words):
    run = tmp_path / "run"
    if arguments and not arguments[0].startswith("nope"):
        arguments = [*arguments, "--run", str(run)]
    expect_one_line_error(run_command(*arguments), *words)
    assert not run.exists()


def test_bad_input_to_a_process_of_its_own(tmp_path):
    expect_one_line_error(run_as_own_process("digits-uvit", "--run", tmp_path / "run", "--kappa", "1.5"), "kappa")
    assert not (tmp_path / "run").exists()


def test_a_broken_image_is_named_before_anything_is_written(tmp_path):
    folder = tmp_path / "images"
    for label in range(10):
        (folder / str(label)).mkdir(parents=True)
        Image.new("L", (8, 8), 20 * label).save(folder / str(label) / "a.png")
    broken = folder / "3" / "b.png"
    broken.write_bytes((folder / "3" / "a.png").read_bytes()[:40])
    done = run_command("digits-uvit", *SMALL, "--run", tmp_path / "run", "--data.path", folder)
    expect_one_line_error(done, str(broken))
    assert not (tmp_path / "run").exists()


def many_images(folder: Path, num_bad: int) -> None:
    """Two hundred and twenty images of ten classes, the first ones empty."""
    for number in range(220):
        path = folder / str(number % 10) / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), number).save(path)
        if number < num_bad:
            path.write_bytes(b"")


def test_a_few_bad_images_are_replaced_counted_and_listed_once(tmp_path):
    folder, run = tmp_path / "images", tmp_path / "run"
    many_images(folder, num_bad=2)
    config = small_config(run, data=DataConfig(path=str(folder), check_images=0))
    train(replace(config, total_images=8 * STEP))
    rows = log_rows(run)
    assert rows[-1]["bad_images"] == 2
    assert all(0 <= row["data_wait"] <= 1 for row in rows)
    listed = [json.loads(line) for line in (run / "bad_samples.jsonl").read_text().splitlines()]
    assert sorted((bad["key"], bad["reason"]) for bad in listed) == [
        (f"{folder}/{n}/{n}.png", "the file is empty") for n in range(2)
    ]
    train(replace(config, total_images=10 * STEP))
    assert len((run / "bad_samples.jsonl").read_text().splitlines()) == 2
    assert log_rows(run)[-1]["bad_images"] == 2


def test_too_many_bad_images_stop_the_run_when_they_are_met(tmp_path):
    folder = tmp_path / "images"
    many_images(folder, num_bad=3)
    config = small_config(tmp_path / "run", data=DataConfig(path=str(folder), check_images=0), total_images=8 * STEP)
    with pytest.raises(UserError, match=r"3 of 220 images cannot be decoded, more than --data.max-bad-share 0.01"):
        train(config)
    assert len((tmp_path / "run/bad_samples.jsonl").read_text().splitlines()) == 3


def test_two_processes_count_and_list_what_each_of_them_meets(tmp_path):
    folder, run = tmp_path / "images", tmp_path / "run"
    many_images(folder, num_bad=2)
    arguments = ["digits-uvit", *SMALL, "--run", run, "--data.path", folder, "--data.check-images", 0]
    train_on_ranks(2, *arguments, "--total-images", 8 * STEP)
    assert log_rows(run)[-1]["bad_images"] == 2
    alone = small_config(tmp_path / "alone", data=DataConfig(path=str(folder)), total_images=8 * STEP)
    train(alone)
    np.testing.assert_allclose(losses(run), losses(tmp_path / "alone"), rtol=0, atol=1e-4)
    lists = [(r / "bad_samples.jsonl").read_text().splitlines() for r in (run, tmp_path / "alone")]
    assert sorted(lists[0]) == sorted(lists[1])


def test_a_folder_without_images_is_an_error(tmp_path):
    (tmp_path / "empty").mkdir()
    done = run_command("digits-uvit", "--run", tmp_path / "run", "--data.path", tmp_path / "empty")
    expect_one_line_error(done, "no images", str(tmp_path / "empty"))
    assert not (tmp_path / "run").exists()


def test_another_configuration_is_refused_naming_what_differs(finished):
    before = {p: p.stat().st_mtime_ns for p in finished.rglob("*") if p.name != "lock"}
    with pytest.raises(UserError, match=r"--skip-scale ls -> cs, --seed|--seed 0 -> 1, --skip-scale ls -> cs"):
        train(small_config(finished, skip_scale="cs", seed=1, total_images=30 * STEP))
    assert {p: p.stat().st_mtime_ns for p in finished.rglob("*") if p.name != "lock"} == before


def test_a_folder_that_is_no_run_is_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="no run folder"):
        train(small_config(tmp_path, total_images=STEP))
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("name", ["slurm-17.out", "train.log", "stderr.txt", "job.err"])
def test_the_output_of_the_run_itself_may_stand_in_its_folder(tmp_path, name):
    (tmp_path / name).write_text("srun: job 17 has been allocated resources")
    checkpoint, on_record = find_start(small_config(tmp_path))
    assert checkpoint is None
    skip_scale = on_record.pop("skip_scale")
    assert skip_scale == small_config(tmp_path).skip_scale
    assert set(on_record.values()) == {None}


@pytest.mark.parametrize("name", ["notes.txt", "logo.png", "output.png", "log.jsonl", "model.safetensors"])
def test_other_files_make_it_another_folder(tmp_path, name):
    (tmp_path / name).write_text("mine")
    with pytest.raises(UserError, match="no run folder"):
        find_start(small_config(tmp_path))


@pytest.mark.parametrize("text", [b"", b"[]", b"\xff", b"[" * 200_000])
def test_a_damaged_configuration_is_named(tmp_path, text):
    (tmp_path / "config.json").write_bytes(text)
    with pytest.raises(UserError, match=r"config\.json") as caught:
        find_start(small_config(tmp_path))
    assert "\n" not in str(caught.value)


def ten_classes(folder: Path) -> Path:
    for label in range(10):
        (folder / str(label)).mkdir(parents=True)
        for number in range(4):
            Image.new("L", (8, 8), 20 * label + number).save(folder / str(label) / f"{number}.png")
    return folder


def test_data_that_has_moved_is_known_by_its_fingerprint(tmp_path):
    folder = ten_classes(tmp_path / "images")
    config = small_config(tmp_path / "run", data=DataConfig(path=str(folder)))
    train(replace(config, total_images=STEP))
    shutil.copytree(tmp_path / "run", tmp_path / "stayed")
    train(replace(config, run=tmp_path / "stayed", total_images=2 * STEP))
    moved = folder.rename(tmp_path / "staged")
    with pytest.raises(UserError, match="no such folder"):
        train(replace(config, total_images=2 * STEP))
    there = DataConfig(path=str(moved))
    assert train(replace(config, data=there, total_images=2 * STEP)) == 0
    assert losses(tmp_path / "run") == losses(tmp_path / "stayed")
    assert read_config(tmp_path / "run").data.path == str(moved)
    other = ten_classes(tmp_path / "other")
    (other / "3" / "0.png").write_bytes(b"")
    with pytest.raises(
        UserError,
        match=r"not those that .* another --run, .*branch-from .*, or the --data.path",
    ):
        train(replace(config, data=DataConfig(path=str(other)), total_images=3 * STEP))
    # Samples and scores find the data where the command line says.
    again = moved.rename(tmp_path / "again")
    how = ["--data.path", str(again), "--num-images", "4", "--steps", "2"]
    sample_main([str(tmp_path / "run"), *how, "--out", str(tmp_path / "grid.jpg")])
    with Image.open(tmp_path / "grid.jpg") as picture:
        assert picture.format == "JPEG"
    evaluate_main([str(tmp_path / "run"), "--features", "pixels", *how])
    for command in (sample_main, evaluate_main):
        with pytest.raises(UserError, match="no such folder of images: nowhere"):
            command([str(tmp_path / "run"), "--data.path", "nowhere"])
    assert (tmp_path / "run" / "evaluation.json").is_file()


def test_changed_data_is_noticed_on_resuming(tmp_path):
    folder = ten_classes(tmp_path / "images")
    config = small_config(tmp_path / "run", data=DataConfig(path=str(folder)))
    train(replace(config, total_images=STEP))
    (folder / "3" / "0.png").unlink()
    with pytest.raises(UserError, match="not those that"):
        train(replace(config, total_images=2 * STEP))


@pytest.mark.parametrize(
    ("run", "command", "arguments", "words"),
    [
        (run_command, "sample", ["RUN", "--label", "12"], ["--label 12", "0 to 9"]),
        (run_as_own_process, "sample", ["nowhere"], ["nowhere is no run folder"]),
        (run_command, "sample", ["RUN", "--checkpoint", "7"], ["checkpoints/7"]),
        (run_command, "sample", ["RUN", "--sampler", "magic"], ["magic", "ddim"]),
        (run_as_own_process, "evaluate", ["nowhere"], ["nowhere is no run folder"]),
        (run_command, "export", ["RUN"], ["--out"]),
        (run_as_own_process, "export", ["RUN", "--out", "RUN"], ["not empty"]),
    ],
)
def test_bad_input_to_the_other_commands(finished, run, command, arguments, words):
    arguments = [str(finished) if a == "RUN" else a for a in arguments]
    expect_one_line_error(run(command, *arguments, module="scalelong"), *words)
