"""What a run survives: kills at any moment, signals, full and read-only disks, flipped bits, data that vanishes.

After each of them the same command goes on from the last checkpoint and ends with the bits of the undisturbed run.
``make soak`` does the first of them a few hundred times.
"""

import itertools
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("deepspeed")

from killing import (
    STEP,
    Kill,
    expect_same_run,
    expect_whole_checkpoints,
    finish,
    kill_again_and_again,
    killable_config,
    last_start,
    make_images,
    output_of,
    start,
    train_to_the_end,
)
from soak import soak

from scalelong.train.checkpoint import list_checkpoints
from scalelong.train.config import TrainConfig
from scalelong.train.errors import EXIT_SAVED_AFTER_SIGNAL, EXIT_USER_ERROR

pytestmark = pytest.mark.slow

STEPS = 24
# More than a start and a checkpoint have.
FILE_OPERATIONS = 45


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    return make_images(tmp_path_factory.mktemp("data") / "images")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, images) -> TrainConfig:
    config = killable_config(tmp_path_factory.mktemp("undisturbed") / "run", images, steps=STEPS)
    train_to_the_end(config)
    return config


@pytest.fixture
def config(undisturbed, tmp_path) -> TrainConfig:
    """The same run elsewhere."""
    return replace(undisturbed, run=tmp_path / "run")


def test_kills_at_random_moments(tmp_path):
    assert soak(tmp_path, kills=4, seed=1)["kills"] >= 4


def test_a_kill_at_every_file_operation_of_a_start_and_a_checkpoint(config, undisturbed):
    """Half-written files, a folder not yet renamed, an old checkpoint half removed: nothing is taken for whole."""
    operations = itertools.count(1)

    def draw() -> tuple[Kill, int]:
        number = next(operations)
        return (Kill(operation=number) if number <= FILE_OPERATIONS else Kill(seconds=60)), 0

    # Long enough not to end before the last kill.
    long = replace(config, total_images=200 * STEP)
    kill_again_and_again(long, draw, world_size=1)
    assert next(operations) > FILE_OPERATIONS
    reference = replace(undisturbed, run=config.run.with_name("reference"), total_images=200 * STEP)
    train_to_the_end(reference)
    expect_same_run(long.run, reference.run)


def wait_until(holds: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, f"not so within {seconds} s"
        time.sleep(0.01)


def test_sigterm_at_random_moments_saves_where_it_stands(config):
    rng, endless = random.Random(0), replace(config, total_images=100_000 * STEP)
    for _ in range(3):
        output_of(config).unlink(missing_ok=True)
        (process,) = start(endless)
        wait_until(lambda: output_of(config).exists() and "images by pillow" in output_of(config).read_text())
        time.sleep(rng.uniform(0, 0.3))
        process.send_signal(signal.SIGTERM)
        assert finish([process]) == [EXIT_SAVED_AFTER_SIGNAL]
        saved = expect_whole_checkpoints(config.run)
        assert f"SIGTERM: saved at {saved:,} images" in output_of(config).read_text()
    ended = replace(config, total_images=saved + STEP)
    reference = replace(ended, run=config.run.with_name("reference"))
    for each in (ended, reference):
        train_to_the_end(each)
    expect_same_run(config.run, reference.run)


@pytest.mark.parametrize("name", ["manifest.json", "state.json", "model", "ema", "optimizer"])
def test_one_flipped_bit_falls_back_to_the_checkpoint_before(config, undisturbed, name):
    train_to_the_end(replace(config, total_images=10 * STEP))
    newest, before = list_checkpoints(config.run)[:2]
    damaged = next(newest.glob(f"{name}*"))
    data = bytearray(damaged.read_bytes())
    position = random.Random(name).randrange(8 * len(data))
    data[position // 8] ^= 1 << position % 8
    damaged.write_bytes(data)
    output_of(config).unlink()
    train_to_the_end(config)
    assert f"passing over the checkpoint {newest}" in output_of(config).read_text()
    assert last_start(output_of(config)) == int(before.name)
    expect_same_run(config.run, undisturbed.run)


def test_data_that_vanishes_ends_the_run_with_one_line_and_may_come_back(tmp_path, images):
    own = Path(shutil.copytree(images, tmp_path / "images"))
    reference = killable_config(tmp_path / "reference", own, steps=40)
    train_to_the_end(reference)
    config = replace(reference, run=tmp_path / "run")
    (process,) = start(config)
    wait_until(lambda: expect_whole_checkpoints(config.run) > 0)
    process.send_signal(signal.SIGSTOP)
    own.rename(tmp_path / "elsewhere")
    process.send_signal(signal.SIGCONT)
    assert finish([process]) == [EXIT_USER_ERROR]
    told = output_of(config).read_text()
    assert "has vanished (No such file or directory)" in told
    assert "Traceback" not in told
    (process,) = start(config)
    assert finish([process]) == [EXIT_USER_ERROR]
    assert f"error: no such folder of images: {own}" in output_of(config).read_text()
    (tmp_path / "elsewhere").rename(own)
    train_to_the_end(config)
    expect_same_run(config.run, reference.run)


@pytest.fixture
def small_disk(tmp_path) -> Iterator[tuple[int, Path, Path]]:
    """A disk of 4 MB: the process whose mounts show it, where, and the same as seen from here."""
    place = tmp_path / "disk"
    place.mkdir()
    script = f"mount -t tmpfs -o size=4m tmpfs '{place}' && echo mounted && read -r _"
    line = ["unshare", "--mount", "sh", "-c", script]
    if sys.platform != "linux" or shutil.which("unshare") is None:
        pytest.skip("unshare is not installed")
    with subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as p:
        assert p.stdout is not None
        if p.stdout.readline() != "mounted\n":
            pytest.skip(f"may not mount: {p.stderr.read() if p.stderr else ''}")
        yield p.pid, place, Path(f"/proc/{p.pid}/root{place}")
        p.communicate("\n")


def fill(disk: Path, room: int) -> Path:
    """A file that leaves ``room`` bytes."""
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            file.truncate(file.tell() - room)
    return filler


@pytest.mark.parametrize("room", [0, 8192, 300_000], ids=["no room", "room for a log", "room for a part"])
def test_a_full_disk(small_disk, config, undisturbed, room):
    pid, place, seen = small_disk
    config = replace(config, run=place / "run")
    assert finish(start(replace(config, total_images=4 * STEP), mounts_of=pid)) == [0]
    filler = fill(seen, room)
    (code,) = finish(start(config, mounts_of=pid))
    told = output_of(config).read_text()
    assert code == EXIT_USER_ERROR, told
    assert "Traceback" not in told
    assert told.splitlines()[-1].startswith("error: cannot write")
    assert expect_whole_checkpoints(seen / "run") == 4 * STEP
    filler.unlink()
    assert finish(start(config, mounts_of=pid)) == [0]
    expect_same_run(seen / "run", undisturbed.run)


def test_a_run_folder_that_has_become_read_only(small_disk, config, undisturbed):
    pid, place, seen = small_disk
    config = replace(config, run=place / "run")
    assert finish(start(replace(config, total_images=4 * STEP), mounts_of=pid)) == [0]

    def remount(mode: str) -> None:
        subprocess.run(["nsenter", "-t", str(pid), "-m", "mount", "-o", f"remount,{mode}", str(place)], check=True)

    remount("ro")
    (code,) = finish(start(config, mounts_of=pid))
    assert code == EXIT_USER_ERROR
    assert f"error: cannot write to the run folder {config.run}: Read-only file system" in output_of(config).read_text()
    remount("rw")
    assert finish(start(config, mounts_of=pid)) == [0]
    expect_same_run(seen / "run", undisturbed.run)
