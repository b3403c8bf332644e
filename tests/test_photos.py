"""The embedded photographs: what is cut from which file, what is held out, and that no network is touched."""

import io
import shutil
import socket
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from images import open_images
from PIL import Image

pytest.importorskip("skimage")

from scalelong.train.data import photos as photos_module
from scalelong.train.data.batches import prepare_source, read_batches
from scalelong.train.data.order import BatchPlan, Order
from scalelong.train.data.photos import CROP_SIZES, PHOTOGRAPHS, Photos, open_photograph, photos_folder
from scalelong.train.data.source import has_test_split, open_source
from scalelong.train.errors import UserError
from scalelong.train.recipes import RECIPES
from scalelong.train.scores.real_images import read_real_images

TRAIN = {"astronaut", "brick", "china", "clock", "flower", "grass", "gravel", "hubble", "retina"}
TEST = {"camera", "chelsea", "coffee", "rocket"}
NUM_CROPS = {(32, "train"): 4053, (32, "test"): 857, (64, "train"): 1012, (64, "test"): 206}


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """A cache of this file's own, which is filled without a network."""

    def no_network(*_):
        raise AssertionError("the network was touched")

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SCALELONG_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setattr(socket.socket, "connect", no_network)
        patch.setattr(socket, "getaddrinfo", no_network)
        before = set(sys.modules)
        for size in CROP_SIZES:
            photos_folder(size)
        assert not {"skimage", "pooch", "sklearn"} & (set(sys.modules) - before)
        yield photos_folder(32).parent


@pytest.mark.parametrize(("size", "split"), NUM_CROPS)
def test_each_photograph_is_a_class_of_one_split(size, split):
    source = Photos(size, split)
    assert set(source.class_names) == (TRAIN if split == "train" else TEST)
    assert len(source) == NUM_CROPS[size, split]
    labels = [source.label(i) for i in range(len(source))]
    assert all(f"/{source.class_names[label]}/" in source.key(i) for i, label in enumerate(labels))


@pytest.mark.parametrize("name", ["chelsea", "gravel", "rocket"])
def test_crops_put_together_are_the_photograph(name):
    photograph = next(p for p in PHOTOGRAPHS if p.name == name)
    whole = np.asarray(open_photograph(photograph)).astype(int)
    folder = photos_folder(32) / photograph.split / name
    crops = sorted(folder.iterdir())
    assert len(crops) == (whole.shape[0] // 32) * (whole.shape[1] // 32)  # none is black
    for path in crops:
        row, column = (32 * int(number) for number in path.stem.split("-"))
        with Image.open(path) as image:
            assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (32, 32))
            error = np.asarray(image) - whole[row : row + 32, column : column + 32]
        assert np.abs(error).max() <= 10
        assert np.square(error).mean() < 3  # 43 dB


def test_what_is_black_is_left_out_and_nothing_else():
    retina = np.asarray(open_photograph(next(p for p in PHOTOGRAPHS if p.name == "retina")))
    there = {path.stem for path in (photos_folder(64) / "train" / "retina").iterdir()}
    for row in range(retina.shape[0] // 64):
        for column in range(retina.shape[1] // 64):
            crop = retina[64 * row : 64 * (row + 1), 64 * column : 64 * (column + 1)]
            assert (f"{row:02d}-{column:02d}" in there) == (crop.max() > 12)


def test_a_fingerprint_is_of_the_pictures_and_not_of_an_encoder(tmp_path, monkeypatch, cache):
    expected = {key: Photos(*key).fingerprint() for key in NUM_CROPS}
    assert len(set(expected.values())) == 4
    shutil.copytree(cache / "photos-v1-32", tmp_path / "photos-v1-32")
    monkeypatch.setenv("SCALELONG_CACHE", str(tmp_path))
    path = tmp_path / "photos-v1-32" / "test" / "coffee" / "00-00.jpg"
    with Image.open(path) as image:
        image.convert("RGB").save(path, quality=50)
    assert Photos(32, "test").fingerprint() == expected[32, "test"]
    path.unlink()
    assert Photos(32, "test").fingerprint() != expected[32, "test"]


@pytest.mark.parametrize("recipe", ["photos32-uvit", "photos32-unet"])
def test_the_recipes_read_crops_and_hold_photographs_out(recipe):
    config = RECIPES[recipe]
    assert has_test_split(config.data.path)
    real = read_real_images(config, 100)
    assert not real.held_out_from_training
    assert real.train.shape == real.held_out.shape == (100, 32, 32, 3)


@pytest.mark.parametrize("reader", ["pillow", "dali"])
def test_readers_give_the_pixels_of_a_crop(reader):
    if reader == "dali":
        pytest.importorskip("nvidia.dali")
    base = RECIPES["photos32-uvit"]
    config = replace(base, data=replace(base.data, reader=reader, flip=False))
    source = open_images(Path("photos"), 0, img_size=32)
    plan = BatchPlan(first_position=0, images_per_step=4, accumulation_steps=1, rank=0, world_size=1)
    batch = next(read_batches(config, prepare_source(config, source), plan, num_threads=1, device=torch.device("cpu")))
    order = Order(config.seed, len(source))
    for position, image_CHW in enumerate(batch.images_BCHW):
        with Image.open(io.BytesIO(source.read(order.index(position)))) as image:
            expected = np.asarray(image).transpose(2, 0, 1) / 127.5 - 1
        np.testing.assert_allclose(image_CHW.numpy(), expected, atol=1e-6)


@pytest.mark.parametrize(("size", "words"), [(48, "32 or 64 pixels, not of 48"), (None, "32 or 64 pixels, the size")])
def test_other_sizes_are_refused(size, words):
    with pytest.raises(UserError, match=words):
        open_source("photos", 0, img_size=size)


def test_a_folder_of_that_name_is_not_mistaken_for_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    with pytest.raises(UserError, match=r"\./photos names that"):
        open_source("photos", 0, img_size=32)


def test_a_package_or_a_file_that_is_missing_is_one_line(tmp_path, monkeypatch):
    photograph = PHOTOGRAPHS[0]
    monkeypatch.setattr(photos_module.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(UserError, match="scikit-image, which is not installed: pip install scikit-image"):
        open_photograph(photograph)
    monkeypatch.undo()
    for file, what in (("data/none.png", "has no "), ("data/brick.png", "has another ")):
        with pytest.raises(UserError, match=f"this version of scikit-image {what}.*{file}"):
            open_photograph(photograph._replace(file=file))
    monkeypatch.setenv("SCALELONG_CACHE", str(tmp_path))
    monkeypatch.setattr(photos_module, "PHOTOGRAPHS", (photograph._replace(file="data/none.png"),))
    with pytest.raises(UserError, match="has no "):
        photos_folder(32)
    assert list(tmp_path.iterdir()) == []


def test_the_table_names_each_photograph_once():
    assert len({p.name for p in PHOTOGRAPHS}) == len({p.sha256 for p in PHOTOGRAPHS}) == len(TRAIN | TEST)
    assert [p.name for p in PHOTOGRAPHS] == sorted(p.name for p in PHOTOGRAPHS)
    assert {p.name for p in PHOTOGRAPHS if p.held_out} == TEST
