"""Files damaged at random, ten thousand of them: none stops a reader, and each is either shown or accounted for."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice

import numpy as np
import pytest
import torch
from images import encode, random_pixels
from PIL import Image

from scalelong.train.data.batches import choose_reader
from scalelong.train.data.images import decode_image
from scalelong.train.data.order import BatchPlan, Order
from scalelong.train.data.pillow import read_with_pillow
from scalelong.train.data.stand_ins import IMAGE_ERRORS, SoundImages, check_image

SIZE = 16
NUM_FILES = 10_000
needs_dali = pytest.mark.skipif(choose_reader("auto") != "dali", reason="NVIDIA DALI is not installed")
# What a damaged header may ask Pillow to say.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::UserWarning:PIL"),
    pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning"),
]


@functools.cache
def whole_files() -> list[bytes]:
    photograph = np.asarray(Image.fromarray(random_pixels(6, 8, seed=1)).resize((40, 32)))
    exif = Image.Exif()
    exif[0x0112] = 6
    return [
        encode(photograph, "JPEG", quality=85, exif=exif),
        encode(photograph, "JPEG", quality=90, progressive=True, subsampling=0),
        encode(photograph[..., 0], "JPEG", quality=75, restart_marker_blocks=2),
        encode(photograph),
        encode(photograph[..., 0].astype(np.uint16) * 257),
        encode(Image.fromarray(photograph).quantize(32)),
    ]


def cut(data: bytes, rng: np.random.Generator) -> bytes:
    return data[: int(rng.integers(len(data)))]


def flip_bits(data: bytes, rng: np.random.Generator) -> bytes:
    changed = bytearray(data)
    for place in rng.integers(len(data), size=int(rng.integers(1, 12))):
        changed[place] ^= 1 << int(rng.integers(8))
    return bytes(changed)


def spoil_header(data: bytes, rng: np.random.Generator) -> bytes:
    length = int(rng.integers(1, 64))
    return rng.bytes(length) + data[length:]


def take_out(data: bytes, rng: np.random.Generator) -> bytes:
    first, last = sorted(rng.integers(len(data), size=2))
    return data[:first] + data[last:]


def swap_head(data: bytes, rng: np.random.Generator) -> bytes:
    other = whole_files()[int(rng.integers(6))]
    at = int(rng.integers(2, 200))
    return other[:at] + data[at:]


def empty(data: bytes, rng: np.random.Generator) -> bytes:
    return b""


MUTATIONS: list[Callable[[bytes, np.random.Generator], bytes]] = [
    *(cut, flip_bits, flip_bits, flip_bits, spoil_header, take_out, swap_head, empty)
]


def mutated_files(count: int, seed: int = 0) -> list[bytes]:
    rng, whole = np.random.default_rng(seed), whole_files()
    return [MUTATIONS[n % len(MUTATIONS)](whole[int(rng.integers(len(whole)))], rng) for n in range(count)]


@dataclass
class InMemory:
    """A source of given files."""

    files: list[bytes]
    class_names = ()

    def __len__(self) -> int:
        return len(self.files)

    def read(self, index: int) -> bytes:
        return self.files[index]

    def label(self, index: int) -> int:
        return index

    def key(self, index: int) -> str:
        return f"file {index}"

    def fingerprint(self) -> str:
        return ""


def is_whole(data: bytes) -> bool:
    try:
        decode_image(data, 3)
    except IMAGE_ERRORS:
        return False
    return True


def passes_check(data: bytes) -> bool:
    try:
        check_image(data)
    except IMAGE_ERRORS:
        return False
    return True


def test_the_check_says_what_decoding_would_say():
    files = mutated_files(NUM_FILES)
    sound = [is_whole(data) for data in files]
    assert [passes_check(data) for data in files] == sound
    assert 0.1 < np.mean(sound) < 0.9, "the mutations are too gentle or too rough to tell anything"


@pytest.mark.parametrize("reader", ["pillow", pytest.param("dali", marks=needs_dali)])
def test_each_mutated_file_is_shown_or_accounted_for(reader):
    files, count = mutated_files(NUM_FILES, seed=1), NUM_FILES
    images, order, batch = SoundImages(InMemory(files), 3), Order(0, count), 50  # type: ignore[arg-type]
    how = {"img_size": SIZE, "flip": False, "num_threads": 2}
    if reader == "pillow":
        batches = read_with_pillow(images, order, BatchPlan(0, batch), **how)
    else:
        from scalelong.train.data.dali import read_with_dali

        batches = read_with_dali(images, order, BatchPlan(0, batch), **how, device=torch.device("cpu"))
    shown = torch.cat(list(islice(batches, count // batch)))
    assert shown.shape == (count, 3, SIZE, SIZE)
    assert shown.isfinite().all()
    bad = {found.index: found for found in images.take_found()}
    assert bad.keys() == {n for n, data in enumerate(files) if not is_whole(data)}
    assert all(found.reason and "\n" not in found.reason for found in bad.values())
    for index in bad:
        assert images.shown(index) not in bad
    # A bad image's place shows its stand-in's pixels.
    places = {order.index(position): position for position in range(count)}
    different = [n for n in bad if (shown[places[n]] - shown[places[images.shown(n)]]).abs().max() > 0.1]
    assert different == []
