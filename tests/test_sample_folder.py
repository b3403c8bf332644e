"""Samples as single files: exactly so many, the same whatever the split, and resumed after any kill."""

import multiprocessing
import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from PIL import Image

from scalelong.train.errors import UserError
from scalelong.train.hosts.processes import Processes
from scalelong.train.sampling.sample_folder import fill_folder, fingerprint, is_whole, write_npz

ALONE = Processes(rank=0, world_size=1, local_rank=0, device=torch.device("cpu"), control_group=None)
ABOUT = {"weights": "abc", "steps": 3, "labels": [0, 1]}


def image_of(number: int, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 256, (4, 4, channels), dtype=np.uint8)


def draw(numbers: Sequence[int]) -> list[np.ndarray]:
    return [image_of(number) for number in numbers]


def fill(folder: Path, count: int, *, draw: Any = draw, about: Any = ABOUT, processes: Processes = ALONE) -> None:
    fill_folder(folder, draw, count, about, batch_size=4, processes=processes)


class OneAfterTheOther:
    """Processes that are run by themselves, rank 0 first, whose answers the others get."""

    def __init__(self, world_size: int):
        self.world_size, self._answers = world_size, []

    def rank(self, rank: int) -> Processes:
        asked = iter(list(self._answers))

        def on_main(action: Any) -> Any:
            if rank == 0:
                self._answers.append(action())
                return self._answers[-1]
            return next(asked)

        how = {"rank": rank, "world_size": self.world_size, "is_main": rank == 0}
        return cast(Processes, SimpleNamespace(**how, agree=lambda action: action(), on_main=on_main))


def check_is_full(folder: Path, count: int) -> None:
    assert sorted(path.name for path in folder.glob("*.png")) == [f"{n:06d}.png" for n in range(count)]
    for number in range(count):
        np.testing.assert_array_equal(np.asarray(Image.open(folder / f"{number:06d}.png")), image_of(number))
    assert not list(folder.glob(".*"))


@pytest.mark.parametrize("world_size", [1, 2, 5])
def test_there_are_exactly_so_many_whatever_the_split(tmp_path, world_size):
    asked: list[range] = []
    together = OneAfterTheOther(world_size)
    for rank in range(world_size):
        noting = lambda numbers: asked.append(numbers) or draw(numbers)  # noqa: E731
        fill(tmp_path / "out", 10, draw=noting, processes=together.rank(rank))
    check_is_full(tmp_path / "out", 10)
    # Batches are of the same numbers in any split.
    assert sorted(asked, key=min) == [range(4), range(4, 8), range(8, 10)]


def test_what_is_there_stays_and_more_can_be_asked_for(tmp_path):
    fill(tmp_path / "out", 6)
    before = (tmp_path / "out" / "000002.png").stat().st_mtime_ns
    (tmp_path / "out" / "000004.png").write_bytes((tmp_path / "out" / "000003.png").read_bytes()[:-9])
    asked: list[range] = []
    fill(tmp_path / "out", 9, draw=lambda numbers: asked.append(numbers) or draw(numbers))
    assert asked == [range(4, 8), range(8, 9)]
    check_is_full(tmp_path / "out", 9)
    assert (tmp_path / "out" / "000002.png").stat().st_mtime_ns == before


def _fill_slowly(folder: Path) -> None:
    fill(folder, 40, draw=lambda numbers: [time.sleep(0.01) or image_of(n) for n in numbers])


@pytest.mark.parametrize("seconds", [0.03, 0.1, 0.2])
def test_a_killed_command_goes_on(tmp_path, seconds):
    child = multiprocessing.get_context("fork").Process(target=_fill_slowly, args=(tmp_path / "out",))
    child.start()
    time.sleep(seconds)
    os.kill(cast(int, child.pid), signal.SIGKILL)
    child.join()
    assert len(list((tmp_path / "out").glob("*.png"))) < 40
    fill(tmp_path / "out", 40)
    check_is_full(tmp_path / "out", 40)


def test_folders_of_others_are_refused_and_nothing_is_written(tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").touch()
    fill(tmp_path / "out", 5)
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "samples.json").write_text("{")
    cases = [
        ("file", 5, ABOUT, "is a file"),
        ("full", 5, ABOUT, "is not empty, and holds no samples"),
        ("out", 5, {**ABOUT, "steps": 4}, r"samples of other settings \(steps 3 -> 4\): choose another --out"),
        ("out", 4, ABOUT, "holds 000004.png, which is none of 4 samples"),
        ("broken", 5, ABOUT, "samples.json is damaged"),
    ]
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for name, count, about, words in cases:
        with pytest.raises(UserError, match=words):
            fill(tmp_path / name, count, about=about)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(("channels", "labels"), [(1, [1, 0, 1]), (3, None)])
def test_the_npz_holds_the_same_images_and_their_labels(tmp_path, channels, labels):
    fill(tmp_path / "out", 3, draw=lambda numbers: [image_of(n, channels) for n in numbers])
    path = write_npz(tmp_path / "out", 3, labels)
    assert path.name == f"samples_3x4x4x{channels}.npz"
    with np.load(path) as found:
        assert set(found.files) == ({"arr_0", "arr_1"} if labels else {"arr_0"})
        assert found["arr_0"].dtype == np.uint8
        np.testing.assert_array_equal(found["arr_0"], np.stack([image_of(n, channels) for n in range(3)]))
        if labels:
            assert found["arr_1"].tolist() == labels


def test_a_picture_is_whole_with_its_last_byte(tmp_path):
    fill(tmp_path / "out", 1)
    path = tmp_path / "out" / "000000.png"
    data = path.read_bytes()
    assert is_whole(path)
    flipped = bytes([*data[:50], data[50] ^ 1, *data[51:]])
    for damaged in (b"", data[:-1], data[:20], flipped):
        path.write_bytes(damaged)
        assert not is_whole(path)


def test_a_fingerprint_is_of_the_weights():
    layer = torch.nn.Linear(2, 3)
    before = fingerprint(layer)
    assert fingerprint(layer) == before
    with torch.no_grad():
        layer.bias[1] += 1
    assert fingerprint(layer) != before
