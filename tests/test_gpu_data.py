"""Reading by DALI with nvJPEG: the images that the CPU gives, at the same places, bad ones replaced alike."""

from collections.abc import Iterator
from itertools import islice

import numpy as np
import pytest
import torch
from images import encode
from PIL import Image
from test_mutated_images import InMemory, mutated_files
from torch import Tensor

from scalelong.train.data.batches import choose_reader
from scalelong.train.data.order import BatchPlan, Order
from scalelong.train.data.pillow import read_with_pillow
from scalelong.train.data.stand_ins import SoundImages

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
    pytest.mark.skipif(choose_reader("auto") != "dali", reason="NVIDIA DALI is not installed"),
    pytest.mark.filterwarnings("ignore::UserWarning:PIL"),
]

NUM_IMAGES, BATCH = 96, 16
HOW = {"img_size": 64, "flip": True, "num_threads": 2}


@pytest.fixture(scope="module")
def photographs() -> list[bytes]:
    """Smooth JPEGs, so that interpolation of the colours tells little."""
    rng = np.random.default_rng(0)
    coarse = [Image.fromarray(rng.integers(0, 256, (4, 5, 3), dtype=np.uint8)) for _ in range(NUM_IMAGES)]
    return [encode(image.resize((100, 80), Image.Resampling.BICUBIC), "JPEG", quality=92) for image in coarse]


def with_nvjpeg(images: SoundImages, first: int = 0) -> Iterator[Tensor]:
    from scalelong.train.data.dali import read_with_dali

    plan = BatchPlan(first, BATCH)
    return read_with_dali(images, Order(0, len(images)), plan, **HOW, device=torch.device("cuda", 0))


def by_pillow(images: SoundImages) -> Iterator[Tensor]:
    return read_with_pillow(images, Order(0, len(images)), BatchPlan(0, BATCH), **HOW)


def as_source(files: list[bytes]) -> SoundImages:
    return SoundImages(InMemory(files), 3)  # type: ignore[arg-type]


def test_the_images_are_those_of_the_cpu(photographs):
    both = zip(by_pillow(as_source(photographs)), with_nvjpeg(as_source(photographs)), strict=True)
    for expected, got in islice(both, 8):
        assert got.device.type == "cuda"
        assert got.shape == (BATCH, 3, 64, 64)
        difference = (got.cpu() - expected).abs() * 127.5
        assert difference.mean() < 1
        assert difference.flatten(1).mean(1).max() < 2, "another image, or mirrored otherwise"


def test_going_on_gives_the_same_bits(photographs):
    straight = list(islice(with_nvjpeg(as_source(photographs)), 6))
    resumed = list(islice(with_nvjpeg(as_source(photographs), first=2 * BATCH), 4))
    assert all(torch.equal(a, b) for a, b in zip(straight[2:], resumed, strict=True))


def test_damaged_files_are_replaced_and_accounted_for():
    files = mutated_files(1_000, seed=2)
    on_gpu, on_cpu = as_source(files), as_source(files)
    batches = len(files) // BATCH
    shown = torch.cat(list(islice(with_nvjpeg(on_gpu), batches)))
    for _ in islice(by_pillow(on_cpu), batches):
        pass
    assert shown.isfinite().all()
    assert {bad.index for bad in on_gpu.take_found()} == {bad.index for bad in on_cpu.take_found()}


def test_reading_waits_for_no_kernel_of_the_training_and_nothing_is_overwritten(photographs):
    device = torch.device("cuda", 0)
    quiet = [batch.cpu() for batch in islice(with_nvjpeg(as_source(photographs)), 6)]
    reading = with_nvjpeg(as_source(photographs))
    next(reading)  # decoders are built
    torch.cuda._sleep(20_000_000_000)  # some ten seconds on the stream that trains
    busy = list(islice(reading, 5))
    assert not torch.cuda.current_stream(device).query(), "reading has waited for the training"
    for expected, got in zip(quiet[1:], busy, strict=True):
        torch.testing.assert_close(got.cpu(), expected)
