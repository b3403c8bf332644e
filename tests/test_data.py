"""Sources of images: what a folder holds, the embedded digits, decoding, cropping, and finding broken files."""

import errno
import os
import shutil
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from images import BROKEN, encode, random_pixels, write_image
from PIL import Image
from programs import environment

from scalelong.train.data import digits as digits_module
from scalelong.train.data.cache import cache_folder
from scalelong.train.data.digits import digits_folder
from scalelong.train.data.image_folder import ImageFolder
from scalelong.train.data.images import decode_image, resize_and_crop
from scalelong.train.data.source import open_source
from scalelong.train.data.stand_ins import (
    BadImage,
    BadSamples,
    SoundImages,
    append_bad_samples,
    read_bad_samples,
    spread_indices,
)
from scalelong.train.errors import UserError

# Machines that are shared stall for longer than Hypothesis waits.
unhurried = settings(deadline=None)


def test_classes_are_the_sorted_folders_and_labels_their_places(tmp_path):
    for name in ("b/2.png", "a/1.png", "c/0.png", "a/0.png"):
        write_image(tmp_path / name)
    source = ImageFolder(tmp_path)
    assert source.class_names == ["a", "b", "c"]
    assert [source.key(i) for i in range(len(source))] == [
        str(tmp_path / name) for name in ("a/0.png", "a/1.png", "b/2.png", "c/0.png")
    ]
    assert [source.label(i) for i in range(len(source))] == [0, 0, 1, 2]


def test_nested_folders_belong_to_their_class(tmp_path):
    for name in ("a/deep/deeper/0.png", "a/0.png", "b/deep/0.png"):
        write_image(tmp_path / name)
    source = ImageFolder(tmp_path)
    assert source.class_names == ["a", "b"]
    assert [source.label(i) for i in range(3)] == [0, 0, 1]


@pytest.mark.parametrize("name", ["x.PNG", "x.Jpg", "x.JPEG", "x.webp", "x.TIFF", "x.pgm"])
def test_suffixes_are_known_in_any_case(tmp_path, name):
    write_image(tmp_path / "a" / name)
    assert len(ImageFolder(tmp_path)) == 1


def test_reading_gives_the_bytes_of_the_file(tmp_path):
    path = write_image(tmp_path / "a" / "0.png")
    assert ImageFolder(tmp_path).read(0) == path.read_bytes()


@pytest.mark.parametrize("stray", [".hidden/0.png", "0.png", "notes/readme.txt", "empty/"])
def test_what_is_no_class_of_images_is_ignored(tmp_path, stray):
    write_image(tmp_path / "a" / "0.png")
    if stray.endswith("/"):
        (tmp_path / stray).mkdir()
    else:
        write_image(tmp_path / stray)
    source = ImageFolder(tmp_path)
    assert (source.class_names, len(source)) == (["a"], 1)


def test_without_labels_every_image_below_the_folder_counts(tmp_path):
    for name in ("0.png", "a/1.png", "b/deep/2.png"):
        write_image(tmp_path / name)
    source = ImageFolder(tmp_path, labelled=False)
    assert source.class_names == []
    assert [source.label(i) for i in range(len(source))] == [0, 0, 0]


def make_nothing(root: Path) -> None:
    root.rmdir()


def make_file(root: Path) -> None:
    root.rmdir()
    root.write_text("a file")


def make_no_images(root: Path) -> None:
    (root / "a").mkdir()
    (root / "a" / "readme.txt").write_text("no image")


def make_flat(root: Path) -> None:
    write_image(root / "0.png")


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (make_nothing, "no such folder"),
        (make_file, "no such folder"),
        (make_no_images, "no images in"),
        (make_flat, "no class folders"),
    ],
)
def test_a_folder_that_cannot_serve_is_refused_in_one_line_that_names_it(tmp_path, make, says):
    root = tmp_path / "images"
    root.mkdir()
    make(root)
    with pytest.raises(UserError, match=says) as caught:
        ImageFolder(root)
    assert str(root) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_images_without_class_folders_serve_a_model_without_labels(tmp_path):
    make_flat(tmp_path)
    assert len(ImageFolder(tmp_path, labelled=False)) == 1


@pytest.fixture
def folder(tmp_path) -> Path:
    root = tmp_path / "images"
    for name in ("a/0.png", "a/1.png", "b/0.png"):
        write_image(root / name)
    return root


CHANGES = {
    "added": lambda root: write_image(root / "b" / "1.png"),
    "removed": lambda root: (root / "a" / "1.png").unlink(),
    "renamed": lambda root: (root / "a" / "1.png").rename(root / "a" / "2.png"),
    "moved to another class": lambda root: (root / "a" / "1.png").rename(root / "b" / "1.png"),
    "class renamed": lambda root: (root / "b").rename(root / "c"),
    "of another size": lambda root: write_image(root / "a" / "1.png", random_pixels(9, 9, 1)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_the_fingerprint_notices(folder, change):
    before = ImageFolder(folder).fingerprint()
    CHANGES[change](folder)
    assert ImageFolder(folder).fingerprint() != before


@pytest.mark.parametrize("change", ["nothing", "touched", "text beside", "moved as a whole"])
def test_the_fingerprint_does_not_mind(folder, change):
    before = ImageFolder(folder).fingerprint()
    if change == "touched":
        os.utime(folder / "a" / "0.png", (1, 1))
    elif change == "text beside":
        (folder / "a" / "readme.txt").write_text("no image")
    elif change == "moved as a whole":
        folder = folder.rename(folder.with_name("elsewhere"))
    assert ImageFolder(folder).fingerprint() == before


def test_another_number_of_classes_says_which_flag_to_set(folder):
    with pytest.raises(UserError, match=r"2 classes, the model 5 .*--model\.num-classes") as caught:
        open_source(str(folder), 5)
    assert "\n" not in str(caught.value)


def test_the_classes_of_a_model_without_labels_do_not_matter(folder):
    assert len(open_source(str(folder), 0)) == 3


def test_no_path_says_which_flag_to_set():
    with pytest.raises(UserError, match=r"--data\.path"):
        open_source("", 0)


@pytest.fixture(scope="module")
def digits(tmp_path_factory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SCALELONG_CACHE", str(tmp_path_factory.mktemp("cache")))
        return digits_folder()


def test_the_digits_are_1797_images_of_ten_classes_with_every_fifth_held_out(digits):
    train, test = ImageFolder(digits / "train"), ImageFolder(digits / "test")
    assert len(train) + len(test) == 1797
    assert train.class_names == test.class_names == [str(n) for n in range(10)]
    for source, held_out in ((train, False), (test, True)):
        numbers = [int(Path(source.key(i)).stem) for i in range(len(source))]
        assert all((number % 5 == 4) is held_out for number in numbers)


def test_the_pixels_are_those_of_scikit_learn(digits):
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    for label in range(10):
        for number, expected in enumerate(images[labels == label]):
            split = "test" if number % 5 == 4 else "train"
            with Image.open(digits / split / str(label) / f"{number:04d}.png") as image:
                assert (image.mode, image.size) == ("L", (8, 8))
                # 0 .. 16 as scikit-learn counts, 0 .. 255 as images do.
                np.testing.assert_allclose(np.asarray(image).ravel(), expected * 255 / 16, atol=0.5)


def test_open_source_finds_both_splits_of_the_digits(digits, monkeypatch):
    monkeypatch.setenv("SCALELONG_CACHE", str(digits.parent))
    assert len(open_source("digits", 10)) == 1797 - len(open_source("digits", 10, split="test"))


def test_the_digits_are_written_once(digits, monkeypatch):
    monkeypatch.setenv("SCALELONG_CACHE", str(digits.parent))

    def state() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in [digits.parent, *digits.parent.rglob("*")]}

    before = state()
    assert digits_folder() == digits
    assert state() == before


def test_processes_that_start_together_get_one_whole_copy(tmp_path):
    code = "from scalelong.train.data.digits import digits_folder; f = digits_folder(); print(len([*f.rglob('*.png')]))"
    env = {**environment(), "SCALELONG_CACHE": str(tmp_path)}
    both = [subprocess.Popen([sys.executable, "-c", code], env=env, stdout=subprocess.PIPE, text=True) for _ in "ab"]
    assert [(process.communicate(timeout=60)[0], process.returncode) for process in both] == [("1797\n", 0)] * 2
    assert [path.name for path in tmp_path.iterdir()] == [digits_module.VERSION]


def test_a_process_that_comes_second_takes_the_first_ones_copy(digits, tmp_path, monkeypatch):
    monkeypatch.setenv("SCALELONG_CACHE", str(tmp_path))
    target = tmp_path / digits_module.VERSION

    def overtaken(staging: Path) -> None:
        (staging / "train").mkdir()
        shutil.copytree(digits, target)

    monkeypatch.setattr(digits_module, "_write_digits", overtaken)
    assert digits_folder() == target
    assert [path.name for path in tmp_path.iterdir()] == [digits_module.VERSION]
    assert len(ImageFolder(target / "test")) == len(ImageFolder(digits / "test"))


def test_a_cache_that_cannot_be_made_says_which_variable_to_set(tmp_path, monkeypatch):
    # A folder below a regular file: not even root can make it.
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SCALELONG_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(UserError, match=r"file/cache.*Not a directory.*SCALELONG_CACHE") as caught:
        digits_folder()
    assert "\n" not in str(caught.value)


def test_a_full_disk_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.setenv("SCALELONG_CACHE", str(tmp_path))

    def full(staging: Path) -> None:
        (staging / "half").write_text("")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(digits_module, "_write_digits", full)
    with pytest.raises(UserError, match="No space left on device"):
        digits_folder()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"SCALELONG_CACHE": "/x", "XDG_CACHE_HOME": "/y"}, "/x"),
        ({"XDG_CACHE_HOME": "/y"}, "/y/scalelong"),
        ({"HOME": "/z"}, "/z/.cache/scalelong"),
        ({"HOME": "/z", "XDG_CACHE_HOME": ""}, "/z/.cache/scalelong"),
    ],
)
def test_where_the_cache_lies(variables, expected, monkeypatch):
    for name in ("SCALELONG_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert cache_folder() == Path(expected)


UPRIGHT = random_pixels(4, 6)
AS_STORED = {
    1: UPRIGHT,
    2: UPRIGHT[:, ::-1],
    3: UPRIGHT[::-1, ::-1],
    4: UPRIGHT[::-1],
    5: UPRIGHT.transpose(1, 0, 2),
    6: np.rot90(UPRIGHT, 1),
    7: UPRIGHT[::-1, ::-1].transpose(1, 0, 2),
    8: np.rot90(UPRIGHT, -1),
}


@pytest.mark.parametrize("orientation", AS_STORED)
def test_photographs_are_turned_upright(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(np.ascontiguousarray(AS_STORED[orientation]), exif=exif)
    np.testing.assert_array_equal(decode_image(data, 3), UPRIGHT)


def test_a_palette_gives_its_colours():
    paletted = Image.fromarray(UPRIGHT).quantize(8)
    np.testing.assert_array_equal(decode_image(encode(paletted), 3), paletted.convert("RGB"))


def test_transparency_is_dropped():
    alpha = random_pixels(4, 6, 1, seed=1)
    np.testing.assert_array_equal(decode_image(encode(np.dstack([UPRIGHT, alpha])), 3), UPRIGHT)


def test_grey_becomes_three_equal_channels():
    grey = random_pixels(4, 6, 1)
    np.testing.assert_array_equal(decode_image(encode(grey), 3), np.dstack([grey] * 3))


def test_colour_becomes_its_luma():
    luma = UPRIGHT @ [0.299, 0.587, 0.114]
    np.testing.assert_allclose(np.asarray(decode_image(encode(UPRIGHT), 1), dtype=float), luma, atol=0.51)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
@pytest.mark.parametrize("channels", [1, 3])
def test_sixteen_bits_are_scaled_to_eight(kind, channels):
    deep = np.linspace(0, 65535, 24).astype(np.uint16).reshape(4, 6)
    decoded = np.asarray(decode_image(encode(deep, kind), channels), dtype=float).reshape(4, 6, channels)
    np.testing.assert_allclose(decoded, np.dstack([deep / 257] * channels), atol=1)


def test_an_image_of_the_right_size_is_left_alone():
    image = Image.fromarray(UPRIGHT[:, :4])
    np.testing.assert_array_equal(resize_and_crop(image, 4), image)


@pytest.mark.parametrize("tall", [False, True])
def test_the_centre_square_is_kept(tall):
    pixels = UPRIGHT.transpose(1, 0, 2) if tall else UPRIGHT
    centre = UPRIGHT[:, 1:5].transpose(1, 0, 2) if tall else UPRIGHT[:, 1:5]
    np.testing.assert_array_equal(resize_and_crop(Image.fromarray(np.ascontiguousarray(pixels)), 4), centre)


def test_the_shorter_side_becomes_the_size():
    # A ramp along the longer side: after halving, the crop is its middle third, with the slope doubled.
    ramp = np.tile(np.arange(0, 240, 2, dtype=np.uint8), (40, 1))
    shrunk = np.asarray(resize_and_crop(Image.fromarray(ramp), 20), dtype=float)
    assert shrunk.shape == (20, 20)
    np.testing.assert_allclose(shrunk, np.tile(81 + 4 * np.arange(20), (20, 1)), atol=1)


@unhurried
@given(width=st.integers(1, 60), height=st.integers(1, 60), size=st.integers(1, 40))
def test_no_shape_lets_the_crop_reach_past_the_border(width, height, size):
    # Pillow fills what lies outside with black.
    white = Image.new("L", (width, height), 255)
    np.testing.assert_array_equal(resize_and_crop(white, size), np.full((size, size), 255))


@pytest.fixture
def partly_broken(tmp_path) -> ImageFolder:
    for number in range(6):
        write_image(tmp_path / f"whole{number}.png")
    for name, data in BROKEN.items():
        (tmp_path / name).write_bytes(data)
    return ImageFolder(tmp_path, labelled=False)


def test_broken_images_are_found_each_with_a_reason(partly_broken):
    images = SoundImages(partly_broken, 3)
    found = images.check(range(len(images)), num_threads=2)
    reasons = {
        "empty.png": "the file is empty",
        "garbage.png": "no image format that Pillow knows",
        "truncated.png": "image file is truncated",
    }
    assert {bad.key: bad.reason.partition(" (")[0] for bad in found} == {
        str(partly_broken.root / name): reason for name, reason in reasons.items()
    }
    assert sorted(images.take_found()) == sorted(found)
    assert images.take_found() == []


def test_whole_images_pass(folder):
    assert SoundImages(ImageFolder(folder), 1).check(range(3), num_threads=2) == []


def test_bytes_label_and_key_are_those_of_the_same_image(partly_broken):
    images = SoundImages(partly_broken, 3)
    for index in range(len(images)):
        shown = images.shown(index)
        assert images.read(index) == partly_broken.read(shown)
        assert images.key(index) == partly_broken.key(shown)
        assert (shown == index) == ("whole" in partly_broken.key(index))


def test_a_stand_in_depends_on_the_index_alone(partly_broken):
    shown = [SoundImages(partly_broken, 3).shown(i) for i in range(len(partly_broken))]
    backwards = SoundImages(partly_broken, 3)
    assert [backwards.shown(i) for i in reversed(range(len(backwards)))][::-1] == shown


@pytest.mark.parametrize("world_size", [1, 2, 4, 20])
@pytest.mark.parametrize("at_most", [0, 1, 4, 9, 100])
def test_ranks_share_the_checking_without_overlap(world_size, at_most):
    shares = [spread_indices(13, at_most, rank=rank, world_size=world_size) for rank in range(world_size)]
    together = sorted(index for share in shares for index in share)
    assert together == spread_indices(13, at_most)
    assert len(set(together)) == min(at_most, 13)
    assert at_most < 2 or (together[0], together[-1]) == (0, 12)


def test_a_file_that_vanished_is_not_bad_but_an_error(folder):
    source = ImageFolder(folder)
    (folder / "a" / "1.png").unlink()
    with pytest.raises(UserError, match=r"1\.png has vanished \(No such file or directory\)"):
        SoundImages(source, 1).check(range(3), num_threads=1)


def test_a_file_that_cannot_be_read_is_bad(folder, monkeypatch):
    source = ImageFolder(folder)

    def read(index: int) -> bytes:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(source, "read", read)
    bad = SoundImages(source, 1).check(range(3), num_threads=1)
    assert [(b.index, b.reason) for b in sorted(bad)] == [(n, "Input/output error") for n in range(3)]


def test_the_share_of_bad_images_decides(partly_broken):
    images = SoundImages(partly_broken, 3)
    bad = BadSamples(100, 0.03)
    assert len(bad.add(images.check(range(9), num_threads=1))) == 3
    bad.check_share()
    assert bad.add(images.take_found()) == []
    bad.add([BadImage(50, "x.png", "gone")])
    with pytest.raises(UserError, match=r"4 of 100 images .*--data\.max-bad-share 0\.03 .* and 1 more") as caught:
        bad.check_share()
    assert "\n" not in str(caught.value)


def test_the_list_of_bad_samples_survives_a_cut_off_line(tmp_path):
    known = [BadImage(1, "a", "empty"), BadImage(7, "b", "cut off")]
    append_bad_samples(tmp_path, known[:1])
    append_bad_samples(tmp_path, known[1:])
    with (tmp_path / "bad_samples.jsonl").open("a") as file:
        file.write('{"index": 3, "ke')
    assert read_bad_samples(tmp_path) == known
    append_bad_samples(tmp_path, [BadImage(8, "c", "empty")])
    assert read_bad_samples(tmp_path) == [*known, BadImage(8, "c", "empty")]


def png_chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def huge_png() -> bytes:
    """One that claims 20,000 x 20,000 pixels, more than Pillow agrees to decode."""
    header = struct.pack(">IIBBBBB", 20_000, 20_000, 8, 0, 0, 0, 0)
    chunks = (b"IHDR", header), (b"IDAT", zlib.compress(bytes(100))), (b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(png_chunk(*chunk) for chunk in chunks)


def test_an_image_too_large_to_decode_is_bad(folder):
    (folder / "a" / "1.png").write_bytes(huge_png())
    (bad,) = SoundImages(ImageFolder(folder), 1).check(range(3), num_threads=1)
    assert bad.key == str(folder / "a" / "1.png")
