"""The command that makes shards: what it keeps, what it leaves out, crops as published, and going on after a stop."""

import io
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from images import BROKEN, encode, open_images, random_pixels, write_image
from PIL import Image

from scalelong.train.commands.prepare import PrepareArguments, Work, main, prepare
from scalelong.train.commands.shard_writers import ImageWriter
from scalelong.train.data.image_folder import ImageFolder
from scalelong.train.data.images import crop_face, decode_image, halve_and_crop
from scalelong.train.data.source import open_source
from scalelong.train.errors import UserError


@pytest.fixture
def folder(tmp_path) -> Path:
    """Eleven photographs of two classes, and a broken one of each kind."""
    root = tmp_path / "photos"
    for n in range(11):
        path = root / ("cat" if n % 2 else "dog") / f"{n:02d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode(random_pixels(20 + n, 30, seed=n), "JPEG"))
    for name, data in BROKEN.items():
        (root / "cat" / name).write_bytes(data)
    return root


def arguments(source: Path | str, out: Path, **more) -> PrepareArguments:
    return PrepareArguments(source=str(source), out=out, **{"images_per_shard": 4, "num_threads": 2, **more})


def files_of(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(out.iterdir()) if not path.name.startswith(".")}


def test_shards_hold_the_sound_images_with_their_labels_as_they_were(folder, tmp_path):
    out = prepare(arguments(folder, tmp_path / "out"))
    source, before = open_images(out, 2), ImageFolder(folder)
    sound = [i for i in range(len(before)) if before.key(i).endswith(".jpg")]
    assert source.class_names == ["cat", "dog"]
    assert [source.read(i) for i in range(len(source))] == [before.read(i) for i in sound]
    assert [source.label(i) for i in range(len(source))] == [before.label(i) for i in sound]
    assert len(list(out.glob("*.tar"))) == 4
    assert not [path for path in out.iterdir() if path.name.startswith(".")]


def test_bad_images_are_listed_with_their_reasons(folder, tmp_path):
    out = prepare(arguments(folder, tmp_path / "out"))
    listed = [json.loads(line) for line in (out / "bad_samples.jsonl").read_text().splitlines()]
    assert {Path(bad["key"]).name: bad["reason"].partition(" (")[0] for bad in listed} == {
        "empty.png": "the file is empty",
        "garbage.png": "no image format that Pillow knows",
        "truncated.png": "image file is truncated",
    }


@pytest.mark.parametrize("crop", ["plain", "adm"])
def test_images_are_cropped_to_squares_of_the_size(folder, tmp_path, crop):
    source = open_images(prepare(arguments(folder, tmp_path / "out", size=8, crop=crop)), 2)
    assert {decode_image(source.read(i), 3).size for i in range(len(source))} == {(8, 8)}


def test_grey_images_stay_grey(tmp_path):
    write_image(tmp_path / "in" / "0.png", random_pixels(9, 9, 1))
    source = open_images(prepare(arguments(tmp_path / "in", tmp_path / "out", size=4, labels=False)), 0)
    with Image.open(io.BytesIO(source.read(0))) as image:
        assert image.mode == "L"


class StoppedError(Exception):
    """As Ctrl-C, but no end of the tests."""


@pytest.mark.parametrize("stop_after", [0, 1, 5, 9, 13])
def test_an_interrupted_command_goes_on_and_ends_with_the_same_files(folder, tmp_path, monkeypatch, stop_after):
    expected = files_of(prepare(arguments(folder, tmp_path / "straight", size=8)))
    asked = arguments(folder, tmp_path / "out", size=8)
    calls, encoded = [], ImageWriter.encoded

    def stopping(self, index):
        calls.append(index)
        if len(calls) > stop_after:
            raise StoppedError
        return encoded(self, index)

    monkeypatch.setattr(ImageWriter, "encoded", stopping)
    with pytest.raises(StoppedError):
        prepare(asked)
    with pytest.raises(UserError, match="is not prepared to its end"):
        open_source(str(asked.out), 2)
    done_before = {path: path.stat().st_mtime_ns for path in asked.out.glob("*.tar")}  # type: ignore[union-attr]
    monkeypatch.setattr(ImageWriter, "encoded", encoded)
    assert files_of(prepare(asked)).keys() == expected.keys()
    for name, data in files_of(asked.out).items():  # type: ignore[arg-type]
        assert data == expected[name] or name.endswith(".npz")
    assert all(path.stat().st_mtime_ns == time for path, time in done_before.items())
    assert open_source(str(asked.out), 2).fingerprint() == open_source(str(tmp_path / "straight"), 2).fingerprint()


def test_a_begun_folder_asked_for_otherwise_is_refused(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(Work, "finish", lambda self, shards: None)
    prepare(arguments(folder, tmp_path / "out", size=8))
    with pytest.raises(UserError, match="begun with another size, crop"):
        prepare(arguments(folder, tmp_path / "out", size=16, crop="adm"))


def test_a_folder_that_is_not_empty_is_left_alone(folder, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="is not empty"):
        prepare(arguments(folder, tmp_path))


def test_when_every_image_is_bad_nothing_is_made_of_them(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "0.png").write_bytes(b"")
    with pytest.raises(UserError, match="not one of the 1 images can be read"):
        prepare(arguments(tmp_path / "in", tmp_path / "out", labels=False))


def test_shards_can_be_made_of_shards_and_of_the_digits(folder, tmp_path, monkeypatch):
    first = prepare(arguments(folder, tmp_path / "first"))
    second = prepare(arguments(first, tmp_path / "second", images_per_shard=100))
    assert len(list(second.glob("*.tar"))) == 1
    a, b = open_images(first, 2), open_images(second, 2)
    assert [a.read(i) for i in range(len(a))] == [b.read(i) for i in range(len(b))]
    monkeypatch.setenv("SCALELONG_CACHE", str(tmp_path / "cache"))
    digits = prepare(arguments("digits", tmp_path / "digits", split="test", images_per_shard=1000))
    assert len(open_source(str(digits), 10)) == len(open_source("digits", 10, split="test"))


def test_without_out_shards_get_their_indices(folder, tmp_path, capsys):
    out = prepare(arguments(folder, tmp_path / "out"))
    before = open_source(str(out), 2).fingerprint()
    for index in out.glob("*.npz"):
        index.unlink()
    main([str(out)])
    assert open_source(str(out), 2).fingerprint() == before
    assert "shards and indices" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--crop", "adm"], "crop adm needs a size"),
        (["--latents", "vae"], "latents need a size"),
        (["--mirrored", "True"], "mirrored is for latents"),
        (["--images-per-shard", "0"], "images_per_shard must be at least 1"),
        (["--size", "-1"], "must not be negative"),
    ],
)
def test_options_that_do_not_fit_are_refused(flags, says, tmp_path):
    with pytest.raises(UserError, match=says):
        main([str(tmp_path), str(tmp_path / "out"), *flags])
    assert not (tmp_path / "out").exists()


def test_adm_halves_by_averaging_and_takes_the_centre():
    # 4 x as large: two halvings and no bicubic step, so each pixel is the mean of its 16, rounded four times.
    wide = random_pixels(32, 64, seed=1)
    centre = wide[:, 16:48].astype(float).reshape(8, 4, 8, 4, 3).mean((1, 3))
    np.testing.assert_allclose(np.asarray(halve_and_crop(Image.fromarray(wide), 8), float), centre, atol=2)


@pytest.mark.parametrize(("height", "width"), [(64, 64), (65, 200), (127, 130), (300, 64), (20, 33)])
def test_adm_makes_a_square_of_any_shape(height, width):
    white = Image.new("RGB", (width, height), (255, 255, 255))
    np.testing.assert_array_equal(halve_and_crop(white, 64), np.full((64, 64, 3), 255))


def test_celebas_face_is_where_u_vit_crops_it():
    pixels = np.zeros((218, 178), dtype=np.uint8)
    pixels[57:185, 25:153] = 255
    np.testing.assert_array_equal(crop_face(Image.fromarray(pixels), 64), np.full((64, 64), 255))
    pixels[:] = 255
    pixels[57:185, 25:153] = 0
    assert not np.asarray(crop_face(Image.fromarray(pixels), 64)).any()


def test_another_size_than_celebas_is_a_bad_image(folder, tmp_path):
    good = tmp_path / "photos" / "cat" / "aligned.png"
    write_image(good, random_pixels(218, 178))
    out = prepare(arguments(folder, tmp_path / "out", size=64, crop="celeba"))
    assert len(open_source(str(out), 2)) == 1
    assert re.search("CelebA's aligned images have 178 x 218", (out / "bad_samples.jsonl").read_text())
    shutil.rmtree(out)
