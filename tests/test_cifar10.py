"""CIFAR-10 in each form it is published in, from a small imitation, and pickles that would run code."""

import io
import os
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
from images import open_images

from scalelong.train.data.cifar10 import CLASSES, Cifar10
from scalelong.train.data.images import decode_image
from scalelong.train.errors import UserError

NAMES = [*(f"data_batch_{n}" for n in range(1, 6)), "test_batch"]
PER_BATCH = 4


def pixels_and_labels(number: int) -> tuple[np.ndarray, list[int]]:
    rng = np.random.default_rng(number)
    return rng.integers(0, 256, (PER_BATCH, 3, 32, 32), dtype=np.uint8), rng.integers(0, 10, PER_BATCH).tolist()


def pickled(pixels: np.ndarray, labels: list) -> bytes:
    """With the keys, the types and the older name of the array's constructor that the published batches have."""
    batch = {b"data": pixels.reshape(len(pixels), -1), b"labels": labels, b"batch_label": b"imitation"}
    return pickle.dumps(batch, protocol=3).replace(b"numpy._core.multiarray", b"numpy.core.multiarray")


def binary(pixels: np.ndarray, labels: list[int]) -> bytes:
    return b"".join(bytes([label]) + image.tobytes() for image, label in zip(pixels, labels, strict=True))


def write_folder(folder: Path, form: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(NAMES):
        encoded = (pickled if form == "py" else binary)(*pixels_and_labels(number))
        (folder / (name if form == "py" else f"{name}.bin")).write_bytes(encoded)
    return folder


def write_archive(root: Path, form: str) -> Path:
    name = {"py": "cifar-10-python.tar.gz", "bin": "cifar-10-binary.tar.gz"}[form]
    folder = write_folder(root / "unpacked" / f"cifar-10-batches-{form}", form)
    with tarfile.open(root / name, "w:gz") as archive:
        archive.add(folder, folder.name)
    return root / name


FORMS = {
    "python folder": lambda root: write_folder(root / "cifar-10-batches-py", "py"),
    "binary folder": lambda root: write_folder(root / "cifar-10-batches-bin", "bin"),
    "folder around it": lambda root: write_folder(root / "cifar-10-batches-py", "py").parent,
    "python archive": lambda root: write_archive(root, "py"),
    "binary archive": lambda root: write_archive(root, "bin"),
    "folder around the archive": lambda root: write_archive(root, "py").parent,
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_images_and_labels(form, tmp_path):
    path = FORMS[form](tmp_path)
    for split, numbers in (("train", range(5)), ("test", [5])):
        source = open_images(path, 10, split=split)
        expected = [pixels_and_labels(n) for n in numbers]
        pixels = np.concatenate([pixels for pixels, _ in expected]).transpose(0, 2, 3, 1)
        assert len(source) == len(pixels)
        assert source.class_names == CLASSES
        assert [source.label(i) for i in range(len(source))] == [label for _, labels in expected for label in labels]
        for index in range(len(source)):
            np.testing.assert_array_equal(decode_image(source.read(index), 3), pixels[index])


def test_the_fingerprint_is_of_the_images(tmp_path):
    python, packed = FORMS["python folder"](tmp_path), FORMS["binary archive"](tmp_path)
    assert Cifar10(python).fingerprint() == Cifar10(packed).fingerprint() != Cifar10(python, "test").fingerprint()


class Malicious:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(
    "attack",
    [
        lambda target: Malicious(os.system, f"touch {target}"),
        lambda target: Malicious(eval, f"open({str(target)!r}, 'w')"),
        lambda target: Malicious(Path.touch, target),
        lambda target: {b"data": Malicious(np.save, str(target), 1), b"labels": []},
        lambda target: Malicious(getattr, target, "touch"),
    ],
)
def test_a_pickle_that_would_run_code_is_refused_and_does_not(attack, tmp_path):
    folder, target = write_folder(tmp_path / "cifar-10-batches-py", "py"), tmp_path / "touched"
    (folder / "data_batch_3").write_bytes(pickle.dumps(attack(target), protocol=2))
    with pytest.raises(UserError, match="data_batch_3 is no batch of CIFAR-10: it names") as caught:
        Cifar10(folder)
    assert "\n" not in str(caught.value)
    assert not target.exists()


PIXELS, LABELS = pixels_and_labels(0)
DAMAGE = {
    "an odd number of labels": (pickled(PIXELS, LABELS[:-1]), "3 labels for 4 images"),
    "labels of other data": (pickled(PIXELS, [*LABELS[:-1], 10]), "not in 0 .. 9"),
    "labels that are text": (pickled(PIXELS, ["cat"] * 4), "not in 0 .. 9"),
    "images of another size": (pickled(PIXELS[:, :, :16], LABELS), "rows of 3072 bytes"),
    "images of floats": (pickled(PIXELS.astype(np.float32), LABELS), "rows of 3072 bytes"),
    "no table": (pickle.dumps([1, 2], protocol=2), "no table"),
    "cut off": (pickled(PIXELS, LABELS)[:-100], "no batch of CIFAR-10"),
    "empty": (b"", "no batch of CIFAR-10"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_batch_is_named_in_one_line(damage, tmp_path):
    folder = write_folder(tmp_path / "cifar-10-batches-py", "py")
    data, says = DAMAGE[damage]
    (folder / "data_batch_2").write_bytes(data)
    with pytest.raises(UserError, match=says) as caught:
        Cifar10(folder)
    assert "data_batch_2" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_binary_batch_that_is_cut_off_is_named(tmp_path):
    folder = write_folder(tmp_path / "cifar-10-batches-bin", "bin")
    (folder / "data_batch_2.bin").write_bytes(binary(PIXELS, LABELS)[:-1])
    with pytest.raises(UserError, match=r"data_batch_2\.bin has 12291 bytes"):
        Cifar10(folder)


def test_a_missing_batch_is_named(tmp_path):
    folder = write_folder(tmp_path / "cifar-10-batches-py", "py")
    (folder / "data_batch_4").unlink()
    with pytest.raises(UserError, match="data_batch_4 is missing"):
        Cifar10(folder)


def test_an_archive_that_is_cut_off_is_named(tmp_path):
    archive = write_archive(tmp_path, "py")
    archive.write_bytes(archive.read_bytes()[:-2000])
    with pytest.raises(UserError, match=r"cifar-10-python\.tar\.gz is no whole archive") as caught:
        Cifar10(archive)
    assert "\n" not in str(caught.value)


def test_a_device_in_the_archive_is_not_read(tmp_path):
    archive = write_archive(tmp_path, "py")
    with tarfile.open(archive, "w:gz") as tar:
        link = tarfile.TarInfo("cifar-10-batches-py/data_batch_1")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link, io.BytesIO())
    with pytest.raises(UserError, match="is missing"):
        Cifar10(archive)
