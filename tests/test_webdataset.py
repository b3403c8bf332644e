"""Tar shards: the index, labels, and what is refused before training starts."""

import io
import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
from images import encode, open_images, random_pixels

from scalelong.train.commands.prepare import index_shards
from scalelong.train.data.source import open_source
from scalelong.train.data.stand_ins import SoundImages
from scalelong.train.data.tar_shards import WebDataset, index_path
from scalelong.train.errors import UserError


def image_of(number: int) -> bytes:
    return encode(random_pixels(8, 8, seed=number))


def write_shard(path: Path, files: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def labelled(numbers: range, label_of=lambda n: str(n % 3).encode()) -> dict[str, bytes]:
    return {
        name: data for n in numbers for name, data in ((f"{n:04d}.png", image_of(n)), (f"{n:04d}.cls", label_of(n)))
    }


@pytest.fixture
def shards(tmp_path) -> Path:
    root = tmp_path / "shards"
    for number in range(3):
        write_shard(root / f"s-{number}.tar", labelled(range(5 * number, 5 * number + 5)))
    index_shards(root, "label")
    return root


def test_images_are_read_by_number_across_shards(shards):
    source = open_images(shards, 3)
    assert len(source) == 15
    assert [source.read(i) for i in range(15)] == [image_of(i) for i in range(15)]
    assert [source.label(i) for i in range(15)] == [i % 3 for i in range(15)]
    assert source.key(7) == f"{shards}/s-1.tar: 0007"


def test_one_shard_alone_will_do(shards):
    assert len(open_source(str(shards / "s-1.tar"), 0)) == 5


def test_labels_stand_in_a_field_of_json(tmp_path):
    files = {f"{n}.{end}": data for n in range(4) for end, data in (("jpg", image_of(n)), ("json", b'{"y": %d}' % n))}
    write_shard(tmp_path / "a.tar", files)
    index_shards(tmp_path, "y")
    source = open_source(str(tmp_path), 4)
    assert [source.label(i) for i in range(4)] == [0, 1, 2, 3]


def test_the_files_of_a_sample_share_the_name_up_to_the_first_dot(tmp_path):
    write_shard(
        tmp_path / "a.tar", {"x/1.cls": b"1", "x/1.input.txt": b"", "x/1.PNG": image_of(0), "y/1.jpeg": image_of(1)}
    )
    index_shards(tmp_path, "label")
    with pytest.raises(UserError, match=r"1 of the 2 images in .* have no label"):
        WebDataset(tmp_path)


def test_shards_without_labels_serve_a_model_without(tmp_path):
    write_shard(tmp_path / "a.tar", {f"{n}.png": image_of(n) for n in range(3)})
    index_shards(tmp_path, "label")
    assert open_source(str(tmp_path), 0).class_names == []
    with pytest.raises(UserError, match="has no labels"):
        open_source(str(tmp_path), 3)


def test_names_of_classes_stand_in_the_description(shards):
    (shards / "dataset.json").write_text(json.dumps({"class_names": ["ant", "bee", "cat", "dog"]}))
    assert open_source(str(shards), 4).class_names == ["ant", "bee", "cat", "dog"]


def test_the_fingerprint_notices_another_label_but_no_other_folder(shards, tmp_path):
    before = WebDataset(shards).fingerprint()
    moved = Path(shutil.copytree(shards, tmp_path / "moved"))
    assert WebDataset(moved).fingerprint() == before
    write_shard(moved / "s-1.tar", labelled(range(5, 10), lambda n: b"0"))
    index_shards(moved, "label")
    assert WebDataset(moved).fingerprint() != before


def no_index(root: Path) -> None:
    index_path(root / "s-1.tar").unlink()


def grown(root: Path) -> None:
    write_shard(root / "s-1.tar", labelled(range(50)))


def damaged_index(root: Path) -> None:
    index_path(root / "s-1.tar").write_bytes(b"PK no archive")


def pickled_index(root: Path) -> None:
    np.savez(index_path(root / "s-1.tar").open("wb"), tar_bytes=np.array([object()], dtype=object))


@pytest.mark.parametrize("harm", [no_index, grown, damaged_index, pickled_index])
def test_a_shard_whose_index_does_not_serve_is_refused_with_the_command_that_makes_it(shards, harm):
    harm(shards)
    with pytest.raises(UserError, match=rf"s-1\.tar .*scalelong prepare {shards}$") as caught:
        open_source(str(shards), 3)
    assert "\n" not in str(caught.value)
    index_shards(shards, "label")
    assert len(open_source(str(shards), 3)) >= 15


@pytest.mark.parametrize("text", [b"cat", b"-1", b"", b"1.5", b"\xff", b"10000000"])
def test_a_label_that_is_no_whole_number_is_named(tmp_path, text):
    write_shard(tmp_path / "a.tar", labelled(range(3), lambda n: text if n == 1 else b"0"))
    with pytest.raises(UserError, match=r"a\.tar: 0001\.cls holds no label") as caught:
        index_shards(tmp_path, "label")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("keep", [100, 700, 3000])
def test_a_tar_that_is_cut_off_is_named(tmp_path, keep):
    shard = write_shard(tmp_path / "a.tar", labelled(range(6)))
    shard.write_bytes(shard.read_bytes()[:keep])
    with pytest.raises(UserError, match=r"a\.tar is no whole tar"):
        index_shards(tmp_path, "label")


def test_a_folder_without_shards_says_how_to_make_some(tmp_path):
    with pytest.raises(UserError, match=r"no tar shards .*scalelong prepare SOURCE OUT"):
        index_shards(tmp_path, "label")


def test_an_image_that_the_shard_lost_is_bad(shards):
    source = SoundImages(WebDataset(shards), 3)
    with (shards / "s-2.tar").open("r+b") as file:
        file.truncate(2000)
    bad = source.check(range(15), num_threads=1)
    assert {image.index for image in bad} >= {11, 12, 13, 14}
    assert all(image.reason == "the shard ends within the image" for image in bad[1:])
