"""Folders as people have them: links, labels in a file, archives, odd names; read whole or refused, never in part."""

import hashlib
import json
import os
from pathlib import Path

import numpy as np
import pytest
from images import encode, random_pixels, write_image
from PIL import Image

from scalelong.train.data.image_folder import ImageFolder
from scalelong.train.data.images import decode_image
from scalelong.train.data.source import open_source
from scalelong.train.data.stand_ins import SoundImages, check_image
from scalelong.train.errors import UserError


def labels_of(source: ImageFolder) -> dict[str, int]:
    return {source.key(i): source.label(i) for i in range(len(source))}


def refusal(root: Path, *, labelled: bool = True) -> str:
    with pytest.raises(UserError) as caught:
        ImageFolder(root, labelled=labelled)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("labelled", [True, False])
def test_links_to_classes_to_folders_within_them_and_to_files_are_followed(tmp_path, labelled):
    root, elsewhere = tmp_path / "root", tmp_path / "elsewhere"
    write_image(root / "b" / "0.png")
    for name in ("a/1.png", "more/2.png", "3.png"):
        write_image(elsewhere / name)
    (root / "a").symlink_to(elsewhere / "a")
    (root / "b" / "deep").symlink_to(elsewhere / "more")
    (root / "b" / "3.png").symlink_to(elsewhere / "3.png")
    source = ImageFolder(root, labelled=labelled)
    names = ["a/1.png", "b/0.png", "b/3.png", "b/deep/2.png"]
    assert list(labels_of(source)) == [str(root / name) for name in names]
    assert source.class_names == (["a", "b"] if labelled else [])


@pytest.mark.parametrize("name", ["b", "a/1.png"])
def test_a_broken_link_is_named(tmp_path, name):
    write_image(tmp_path / "a" / "0.png")
    (tmp_path / name).symlink_to(tmp_path / "gone")
    assert f"{tmp_path / name} is a link to what is not there" in refusal(tmp_path)


def test_a_link_that_leads_back_is_named(tmp_path):
    write_image(tmp_path / "a" / "0.png")
    (tmp_path / "a" / "again").symlink_to(tmp_path)
    assert "again is a link to a folder that it lies in" in refusal(tmp_path)


@pytest.mark.parametrize("place", ["", "a", "a/deep"])
@pytest.mark.parametrize("labelled", [True, False])
def test_a_folder_without_permission_is_named(tmp_path, monkeypatch, place, labelled):
    write_image(tmp_path / "a" / "deep" / "0.png")
    write_image(tmp_path / "b" / "0.png")
    closed = str(tmp_path / place)

    def refusing(function):
        def list_names(path, *args):
            if str(path) == closed:
                raise PermissionError(13, "Permission denied", str(path))
            return function(path, *args)

        return list_names

    # Root may read everything, so that a mode alone would not do.
    monkeypatch.setattr(os, "scandir", refusing(os.scandir))
    monkeypatch.setattr(os, "listdir", refusing(os.listdir))
    assert f"cannot read {closed}: Permission denied" in refusal(tmp_path, labelled=labelled)


def test_names_that_are_not_utf8_are_read_and_shown(tmp_path):
    name = os.fsdecode(b"caf\xe9")
    write_image(tmp_path / name / f"{name}.png")
    source = ImageFolder(tmp_path)
    assert source.key(0).encode().decode() == str(tmp_path / "caf\\xe9" / "caf\\xe9.png")
    assert source.class_names == ["caf\\xe9"]
    assert len(source.fingerprint()) == 64
    assert source.read(0)


def test_fingerprints_are_what_they_were(tmp_path):
    for name in ("b/é.png", "a/0.png"):
        write_image(tmp_path / name, np.zeros((2, 2), np.uint8)).write_bytes(b"1234")
    expected = hashlib.sha256("a/0.png\x004\nb/é.png\x004\n".encode()).hexdigest()
    assert ImageFolder(tmp_path).fingerprint() == ImageFolder(tmp_path, labelled=False).fingerprint() == expected


@pytest.mark.parametrize("names", [("train", "val"), ("train", "test", "validation"), ("Train", "Val")])
def test_splits_side_by_side_are_no_classes(tmp_path, names):
    for name in names:
        write_image(tmp_path / name / "cat" / "0.png")
    assert f"take one, --data.path {tmp_path / sorted(names)[0]}" in refusal(tmp_path)
    assert ImageFolder(tmp_path / names[0]).class_names == ["cat"]


def test_a_class_may_be_called_train(tmp_path):
    for name in ("train", "ship"):
        write_image(tmp_path / name / "0.png")
    assert ImageFolder(tmp_path).class_names == ["ship", "train"]


def write_labelled(root: Path, labels: object, num: int = 3) -> Path:
    for n in range(num):
        write_image(root / f"0000{n % 2}" / f"img{n}.png")
    (root / "dataset.json").write_text(json.dumps({"labels": labels}))
    return root


LABELS = [["00000/img0.png", 2], ["00001/img1.png", 0], ["00000/img2.png", 2]]


def test_labels_in_dataset_json_count_instead_of_the_folders(tmp_path):
    source = ImageFolder(write_labelled(tmp_path, LABELS))
    assert labels_of(source) == {str(tmp_path / str(name)): label for name, label in LABELS}
    assert source.class_names == ["0", "1", "2"]
    before = source.fingerprint()
    write_labelled(tmp_path, [[name, 1] for name, _ in LABELS])
    assert ImageFolder(tmp_path).fingerprint() != before


@pytest.mark.parametrize(
    ("labels", "says"),
    [
        (LABELS[:2], "00000/img2.png has no label"),
        ([*LABELS, ["00000/gone.png", 0]], "00000/gone.png has no image"),
        ([[name, 0.5] for name, _ in LABELS], "damaged"),
        ([[name, [1, 0]] for name, _ in LABELS], "damaged"),
        ([[name, -1] for name, _ in LABELS], "damaged"),
        (7, "damaged"),
    ],
)
def test_labels_that_do_not_fit_the_images_are_refused(tmp_path, labels, says):
    assert says in refusal(write_labelled(tmp_path, labels))


def test_dataset_json_may_say_that_there_are_no_labels(tmp_path):
    write_labelled(tmp_path, None)
    assert len(ImageFolder(tmp_path, labelled=False)) == 3
    with pytest.raises(UserError, match="has no labels"):
        open_source(str(tmp_path), 2)


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("cats.zip", "unzip -q {a}.zip -d {a} && scalelong prepare {a} OUT"),
        ("cats.tar.gz", "mkdir -p {a} && tar -xf {a}.tar.gz -C {a} && scalelong prepare {a} OUT"),
        ("cats.tgz", "mkdir -p {a} && tar -xf {a}.tgz -C {a} && scalelong prepare {a} OUT"),
    ],
)
def test_an_archive_and_a_folder_of_them_are_refused_with_the_commands_that_convert_them(
    tmp_path, inside, name, command
):
    (tmp_path / name).write_bytes(b"PK")
    with pytest.raises(UserError) as caught:
        open_source(str(tmp_path if inside else tmp_path / name), 0)
    assert str(caught.value).endswith(command.format(a=tmp_path / "cats"))


def test_a_shard_that_is_compressed_beside_others_is_not_passed_over(tmp_path):
    (tmp_path / "a.tar").write_bytes(bytes(1024))
    (tmp_path / "b.tar.gz").write_bytes(b"")
    with pytest.raises(UserError, match=r"b\.tar\.gz is an archive"):
        open_source(str(tmp_path), 0)


@pytest.mark.parametrize(("suffix", "kind"), [(".gif", "GIF"), (".jfif", "JPEG"), (".avif", "AVIF")])
def test_rarer_suffixes_are_read(tmp_path, suffix, kind):
    (tmp_path / f"0{suffix}").write_bytes(encode(random_pixels(8, 8), kind))
    source = SoundImages(ImageFolder(tmp_path, labelled=False), 3)
    assert source.image(0).size == (8, 8)
    assert not source.take_found()


@pytest.mark.parametrize("labelled", [True, False])
def test_images_that_cannot_be_read_are_named_not_passed_over(tmp_path, labelled):
    for name in ("a/0.png", "a/1.HEIC"):
        write_image(tmp_path / name)
    assert ".heic files are not read" in refusal(tmp_path, labelled=labelled)


@pytest.mark.parametrize(
    ("dtype", "white"),
    [("f4", 1), ("f4", 255), ("f4", 65_535), ("i4", 255), ("i4", 65_535), ("u2", 255), ("u2", 65_535)],
)
def test_a_tiff_of_more_bits_is_as_bright_as_it_means(dtype, white):
    levels = np.arange(256).reshape(16, 16)
    data = encode(Image.fromarray((levels / 255 * white).astype(dtype)), "TIFF")
    np.testing.assert_array_equal(np.asarray(decode_image(data, 1)), levels)
    assert not check_image(data)


@pytest.mark.parametrize("values", [[-1.0, 0.5], [0.0, np.nan], [0.0, np.inf], [0.0, 1e6]])
def test_a_tiff_whose_white_cannot_be_told_is_a_bad_image(values):
    data = encode(Image.fromarray(np.array([values], np.float32)), "TIFF")
    for read in (check_image, lambda data: decode_image(data, 3)):
        with pytest.raises(ValueError, match="values from"):
            read(data)


def test_a_dark_png_of_16_bits_stays_dark():
    data = encode(Image.fromarray(np.full((2, 2), 200, np.uint16)))
    assert np.asarray(decode_image(data, 1)).max() == 1
