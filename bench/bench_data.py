"""Images per second of the data pipeline alone: JPEGs of 500 x 400 pixels to 256 x 256; latents from the page cache.

A row of JPEGs is four batches, one of latents is one; each provider has as many workers as there are cores. Providers:
  ours         DALI on the CPU, or with nvJPEG where there is a GPU, as the trainer reads, each image checked before
  ours-cold    the same with each image read for the first time, when its check decodes it
  pillow       the trainer's light reader
  dataloader   torch's DataLoader with worker processes that decode, resize and crop by Pillow
For latents "gb_per_s" counts the bytes of the moments (2 x 4 x 32 x 32 in fp16 for an image): "read" gathers the batch
in the order of a run, "sampled" makes latents of them as the trainer does, noise drawn for each.
"""

import math
import os
from collections.abc import Iterator
from itertools import cycle, islice
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("nvidia.dali", reason="NVIDIA DALI is not installed")
from PIL import Image
from safetensors.numpy import save_file
from torch.utils.data import DataLoader, Dataset

from scalelong.bench.compare import DEVICE
from scalelong.bench.record import Row, environment
from scalelong.bench.timing import Timing, gb_per_s, measure
from scalelong.train.data.batches import read_latents
from scalelong.train.data.image_folder import ImageFolder
from scalelong.train.data.images import decode_image, resize_and_crop
from scalelong.train.data.latents import LatentFolder
from scalelong.train.data.order import BatchPlan, Order
from scalelong.train.data.pillow import read_with_pillow
from scalelong.train.data.source import ImageSource
from scalelong.train.data.stand_ins import SoundImages

BATCH, IMG_SIZE, NUM_IMAGES = 64, 256, 512
# Workers deliver in bursts: one batch takes no time, the next takes that of two.
BATCHES_AT_A_TIME = 4
NUM_WORKERS = len(os.sched_getaffinity(0))
NUM_LATENTS, LATENT = 8192, (4, 32, 32)


class Decoded(Dataset):
    """What the worker processes of a DataLoader do: the same pixels as the trainer's light reader."""

    def __init__(self, source: ImageSource):
        self.source = source

    def __len__(self) -> int:
        return 1_000_000

    def __getitem__(self, position: int) -> torch.Tensor:
        image = resize_and_crop(decode_image(self.source.read(position % len(self.source)), 3), IMG_SIZE)
        pixels = np.asarray(image, dtype=np.float32).transpose(2, 0, 1)
        return torch.from_numpy((pixels - np.float32(127.5)) * np.float32(1 / 127.5))


@pytest.fixture(scope="module")
def photographs(tmp_path_factory) -> ImageFolder:
    """Smooth shapes with grain, of the size of a photograph on disk (about 60 kB)."""
    root, rng = tmp_path_factory.mktemp("photographs"), np.random.default_rng(0)
    for number in range(NUM_IMAGES):
        coarse = Image.fromarray(rng.integers(0, 256, (20, 25, 3), dtype=np.uint8)).resize((500, 400))
        grain = rng.normal(0, 6, (400, 500, 3))
        pixels = (np.asarray(coarse) + grain).clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(root / f"{number:03d}.jpg", quality=90)
    return ImageFolder(root, labelled=False)


def read(source: SoundImages, reader: str) -> Iterator[torch.Tensor]:
    order, plan = Order(0, len(source)), BatchPlan(0, BATCH)
    if reader == "pillow":
        return read_with_pillow(source, order, plan, img_size=IMG_SIZE, flip=True, num_threads=NUM_WORKERS)
    from scalelong.train.data.dali import read_with_dali

    how = {"img_size": IMG_SIZE, "flip": True, "num_threads": NUM_WORKERS}
    return read_with_dali(source, order, plan, **how, device=torch.device(DEVICE))


class ForgetfulImages(SoundImages):
    """Checks an image each time, as if it had never been read."""

    def _read_if_sound(self, index: int) -> bytes | None:
        self._verdicts[index] = 0
        return super()._read_if_sound(index)


def take(batches: Iterator[torch.Tensor]) -> None:
    for _ in islice(batches, BATCHES_AT_A_TIME):
        pass


def row(op: str, shape: str, provider: str, timing: Timing, num_bytes: int | None) -> Row:
    return Row(
        **environment(DEVICE),
        op=op,
        shape=shape,
        dtype="float32",
        layout="contiguous",
        direction="step",
        provider=provider,
        ms_median=timing.ms_median,
        ms_p20=timing.ms_p20,
        ms_p80=timing.ms_p80,
        gb_per_s=gb_per_s(num_bytes, timing.ms_median) if num_bytes else None,
        percent_of_copy=None,
        peak_mb=None,
    )


def test_jpegs(benchmark, report, note, photographs):
    loader = DataLoader(Decoded(photographs), batch_size=BATCH, num_workers=NUM_WORKERS)
    batches = {
        "dataloader": iter(loader),
        "pillow": read(SoundImages(photographs, 3), "pillow"),
        "ours-cold": read(ForgetfulImages(photographs, 3), "dali"),
        "ours": read(SoundImages(photographs, 3), "dali"),
    }
    timings = {}
    for name, each in batches.items():
        # One after the other, not interleaved: all of them read ahead while another one would be timed.
        for _ in islice(each, NUM_IMAGES // BATCH):
            pass
        is_last = name == "ours"
        timings |= measure(
            benchmark if is_last else None, {name: lambda each=each: take(each)}, device="cpu", max_seconds=8
        )
        del each
        batches[name] = iter(())
    shape = f"500x400 JPEG to {IMG_SIZE}, {BATCHES_AT_A_TIME} x B={BATCH}, {NUM_WORKERS} cores"
    report([row("data_jpeg", shape, name, timing, None) for name, timing in timings.items()])
    speeds = {name: 1e3 * BATCHES_AT_A_TIME * BATCH / timing.ms_median for name, timing in timings.items()}
    shown = ", ".join(f"{name} {speed:,.0f}" for name, speed in speeds.items())
    note(f"images/s: {shown}; DALI against the DataLoader {speeds['ours'] / speeds['dataloader']:.2f}x")


@pytest.fixture(scope="module")
def latents(tmp_path_factory) -> LatentFolder:
    root = tmp_path_factory.mktemp("latents")
    rng = np.random.default_rng(0)
    moments = rng.normal(size=(NUM_LATENTS, 1, 2, *LATENT)).astype(np.float16)
    save_file({"moments": moments, "labels": np.zeros(NUM_LATENTS, np.int64)}, root / "a.safetensors")
    description = '{"class_names": ["x"], "scale": 0.18215, "shards": ["a.safetensors"]}'
    Path(root / "latents.json").write_text(description)
    return LatentFolder(root)


def test_latents(benchmark, report, note, latents):
    batch = 1024
    order, none_mirrored = Order(0, NUM_LATENTS), np.zeros(batch, dtype=bool)
    batches_of_indices = cycle(
        [np.array([order.index(p) for p in range(first, first + batch)]) for first in range(0, NUM_LATENTS, batch)]
    )
    # One after the other, because the second reads ahead.
    timings = measure(
        benchmark,
        {"read": lambda: latents.moments(next(batches_of_indices), none_mirrored)},
        device="cpu",
        max_seconds=5,
    )
    batches = read_latents(latents, order, BatchPlan(0, batch), flip=False, num_threads=NUM_WORKERS)
    timings |= measure(None, {"sampled": lambda: next(batches)}, device="cpu", min_rounds=10, max_seconds=6)
    num_bytes = 2 * batch * 2 * math.prod(LATENT)
    report([row("data_latents", f"4x32x32 B={batch}", name, timing, num_bytes) for name, timing in timings.items()])
    note(
        f"latents/s: {', '.join(f'{name} {1e3 * batch / t.ms_median:,.0f}' for name, t in timings.items())}; "
        f"read at {gb_per_s(num_bytes, timings['read'].ms_median):.1f} GB/s"
    )
