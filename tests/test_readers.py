"""The two readers, DALI and Pillow: the same images in the same places, and what is drawn for each of them."""

import importlib.util
import shutil
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from images import BROKEN, encode, random_pixels, write_image
from PIL import Image
from torch import Tensor

from scalelong.train.config import DataConfig, ReaderName, TrainConfig
from scalelong.train.data.batches import Batch, choose_reader, prepare_source, read_batches
from scalelong.train.data.image_folder import ImageFolder
from scalelong.train.data.order import BatchPlan, Order, draw_noise, draw_samples
from scalelong.train.data.pillow import read_with_pillow
from scalelong.train.data.source import ImageSource
from scalelong.train.data.stand_ins import SoundImages
from scalelong.train.errors import RankError, UserError
from scalelong.train.recipes import RECIPES

HAS_DALI = choose_reader("auto") == "dali"
needs_dali = pytest.mark.skipif(not HAS_DALI, reason="NVIDIA DALI is not installed")
READERS = [pytest.param("dali", marks=needs_dali), "pillow"]
each_reader = pytest.mark.parametrize("reader", READERS)
CPU = torch.device("cpu")
SIZE = 8


def read(
    reader: str,
    source: ImageSource,
    plan: BatchPlan,
    *,
    seed: int = 0,
    img_size: int = SIZE,
    channels: int = 1,
    flip: bool = False,
    num_threads: int = 2,
) -> Iterator[Tensor]:
    how = {"img_size": img_size, "flip": flip, "num_threads": num_threads}
    images = source if isinstance(source, SoundImages) else SoundImages(source, channels)
    order = Order(seed, len(source))
    if reader == "pillow":
        return read_with_pillow(images, order, plan, **how)
    from scalelong.train.data.dali import read_with_dali

    return read_with_dali(images, order, plan, **how, device=CPU)


def read_all(reader: str, source: ImageSource, num_images: int, batch_size: int = 8, **how) -> Tensor:
    """The images at positions 0 .. num_images - 1."""
    batches = read(reader, source, BatchPlan(0, batch_size), **how)
    return torch.cat(list(islice(batches, -(-num_images // batch_size))))[:num_images]


@pytest.fixture(scope="module")
def numbered(tmp_path_factory) -> ImageFolder:
    """Twenty grey images in two classes; image n is n on its left half and n + 100 on its right one."""
    root = tmp_path_factory.mktemp("numbered")
    for n in range(20):
        pixels = np.full((SIZE, SIZE), n, dtype=np.uint8)
        pixels[:, SIZE // 2 :] += 100
        write_image(root / str(n // 10) / f"{n:02d}.png", pixels)
    return ImageFolder(root)


def numbers_of(images_BCHW: Tensor) -> tuple[list[int], list[bool]]:
    """Which of the numbered images these are, and whether mirrored."""
    corners = ((images_BCHW[:, 0, 0, [0, -1]] + 1) * 127.5).round().int().tolist()
    return [min(corner) for corner in corners], [left > right for left, right in corners]


@each_reader
def test_each_position_holds_the_image_of_the_order_and_is_flipped_as_drawn(reader, numbered):
    images = read_all(reader, numbered, 50, seed=7, flip=True)
    numbers, mirrored = numbers_of(images)
    order = Order(7, len(numbered))
    assert numbers == [order.index(p) for p in range(50)]
    assert mirrored == draw_samples(7, range(50)).flips(True).tolist()


@each_reader
def test_nothing_is_flipped_unless_asked(reader, numbered):
    _, mirrored = numbers_of(read_all(reader, numbered, 24))
    assert not any(mirrored)


@each_reader
@pytest.mark.parametrize("channels", [1, 3])
def test_batches_are_fp32_planes_in_minus_one_to_one(reader, channels, tmp_path):
    write_image(tmp_path / "0.png", np.array([[0, 255], [255, 0]], dtype=np.uint8).repeat(4, 0).repeat(4, 1))
    (batch,) = islice(read(reader, ImageFolder(tmp_path, labelled=False), BatchPlan(0, 3), channels=channels), 1)
    assert (batch.shape, batch.dtype) == ((3, channels, SIZE, SIZE), torch.float32)
    assert (batch[:, :, 0, 0] == -1).all()
    assert (batch[:, :, 0, -1] == 1).all()


@each_reader
def test_a_resumed_run_sees_the_same_images_on_other_processes(reader, numbered):
    straight = read_all(reader, numbered, 72, batch_size=24, flip=True)
    seen = {}
    for rank in range(2):
        plan = BatchPlan(24, 24, accumulation_steps=3, rank=rank, world_size=2)
        for number, images in enumerate(islice(read(reader, numbered, plan, flip=True), 6)):
            seen.update(zip(plan.positions(number), images, strict=True))
    assert sorted(seen) == list(range(24, 72))
    assert all(torch.equal(seen[p], straight[p]) for p in seen)


@each_reader
def test_a_batch_stays_as_it_was_when_later_ones_are_read(reader, numbered):
    batches = read(reader, numbered, BatchPlan(0, 4))
    first = next(batches)
    before = first.clone()
    for _ in range(6):
        next(batches)
    assert torch.equal(first, before)


@each_reader
def test_the_number_of_threads_changes_nothing(reader, numbered):
    one, many = (read_all(reader, numbered, 30, flip=True, num_threads=n) for n in (1, 4))
    assert torch.equal(one, many)


def write_noise(root: Path, shapes: list[tuple[int, int]], channels: int) -> ImageFolder:
    for n, (height, width) in enumerate(shapes):
        write_image(root / f"{n}.png", random_pixels(height, width, channels, seed=n))
    return ImageFolder(root, labelled=False)


@needs_dali
@pytest.mark.parametrize("channels", [1, 3])
def test_images_of_the_right_size_are_the_same_to_rounding(channels, tmp_path):
    source = write_noise(tmp_path, [(SIZE, SIZE)] * 12, channels)
    dali, pillow = (read_all(reader, source, 30, channels=channels, flip=True) for reader in ("dali", "pillow"))
    torch.testing.assert_close(dali, pillow, rtol=0, atol=1e-6)


@needs_dali
@pytest.mark.parametrize("channels", [1, 3])
def test_resized_images_differ_little(channels, tmp_path):
    """Noise is the worst case; the bounds are of the 0 .. 255 scale, a little above what was measured (1.7 and 12)."""
    shapes = [(16, 16), (17, 23), (53, 37), (64, 48), (20, 90), (9, 8), (5, 7), (100, 9)]
    source = write_noise(tmp_path, shapes, channels)
    dali, pillow = (read_all(reader, source, len(shapes), channels=channels) for reader in ("dali", "pillow"))
    difference = (dali - pillow).abs() * 127.5
    assert difference.mean() <= 2
    assert difference.max() <= 16


@needs_dali
@pytest.mark.parametrize(("height", "width"), [(16, 31), (31, 16), (24, 90), (9, 14), (40, 13)])
def test_the_readers_cut_out_the_same_square(height, width, tmp_path):
    # On a ramp, a crop that is off by one pixel shows in every pixel.
    ramp = np.linspace(0, 255, width)[None, :] / 2 + np.linspace(0, 255, height)[:, None] / 2
    write_image(tmp_path / "0.png", ramp.astype(np.uint8))
    source = ImageFolder(tmp_path, labelled=False)
    dali, pillow = (read_all(reader, source, 1) for reader in ("dali", "pillow"))
    step = 127.5 * (pillow[0, 0, 1:, 1:] - pillow[0, 0, :-1, :-1]).mean() / 2
    assert (dali - pillow).abs().max() * 127.5 < step / 2


@needs_dali
def test_sixteen_bits_are_read_alike(tmp_path):
    deep = np.linspace(0, 65535, SIZE * SIZE).astype(np.uint16).reshape(SIZE, SIZE)
    (tmp_path / "0.png").write_bytes(encode(deep))
    source = ImageFolder(tmp_path, labelled=False)
    dali, pillow = (read_all(reader, source, 1) for reader in ("dali", "pillow"))
    assert (dali - pillow).abs().max() * 127.5 < 1.5


@pytest.fixture
def five_images(tmp_path) -> Path:
    for n in range(5):
        write_image(tmp_path / f"{n}.png")
    return tmp_path


@each_reader
@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_image_is_replaced_and_nothing_else(reader, name, numbered, tmp_path):
    expected = read_all(reader, numbered, 20)
    root = Path(shutil.copytree(numbered.root, tmp_path / "copy"))
    bad = 13
    (root / "1" / "13.png").write_bytes(BROKEN[name])
    images = SoundImages(ImageFolder(root), 1)
    shown = read_all(reader, images, 20)
    position = next(p for p in range(20) if Order(0, 20).index(p) == bad)
    differ = [p for p in range(20) if not torch.equal(shown[p], expected[p])]
    assert differ == [position]
    stand_in = numbers_of(shown[position : position + 1])[0][0]
    assert stand_in == images.shown(bad) != bad
    assert images.label(bad) == stand_in // 10
    assert [found.index for found in images.take_found()] == [bad]


def mistreat(root: Path) -> ImageFolder:
    """Thirty numbered images of which a third is broken in some way, and some are of an odd kind but whole."""
    for n in range(30):
        pixels = np.full((SIZE, SIZE, 3), n, dtype=np.uint8)
        pixels[:, SIZE // 2 :] += 100
        write_image(root / f"{n:02d}.png", pixels)
    broken = [*BROKEN.values(), b"\xff\xd8\xff"]
    for n, data in zip(range(0, 24, 3), 2 * broken, strict=True):
        (root / f"{n:02d}.png").write_bytes(data)
    return ImageFolder(root, labelled=False)


@each_reader
def test_any_number_of_ranks_and_threads_replaces_by_the_same_images(reader, tmp_path):
    source = mistreat(tmp_path)
    expected = [SoundImages(source, 1).shown(Order(0, 30).index(p)) for p in range(60)]
    seen = {}
    for rank in range(3):
        plan = BatchPlan(0, 12, accumulation_steps=2, rank=rank, world_size=3)
        for number, images in enumerate(islice(read(reader, source, plan, num_threads=1 + rank), 10)):
            seen.update(zip(plan.positions(number), numbers_of(images)[0], strict=True))
    assert [seen[p] for p in range(60)] == expected


@each_reader
def test_when_as_good_as_nothing_can_be_read_the_run_ends_with_one_line(reader, tmp_path):
    for n in range(4):
        (tmp_path / f"{n}.png").write_bytes(b"")
    with pytest.raises(RankError, match=r"images in a row cannot be decoded, .*\.png") as caught:
        next(read(reader, ImageFolder(tmp_path, labelled=False), BatchPlan(0, 2)))
    assert "\n" not in str(caught.value)


@each_reader
def test_an_image_that_vanishes_while_it_is_read_ends_the_run(reader, five_images):
    """With another in its place the run would not go on as it was once the data is back."""
    source = SoundImages(ImageFolder(five_images, labelled=False), 1)
    batches = read(reader, source, BatchPlan(0, 5))
    next(batches)
    (five_images / "3.png").unlink()
    with pytest.raises(RankError, match=r"3\.png has vanished \(No such file or directory\)"):
        for _ in islice(batches, 4):
            pass
    assert source.take_found() == []


ODD_KINDS = {
    "cmyk.jpg": lambda image: encode(image.convert("CMYK"), "JPEG", quality=98),
    "progressive.jpg": lambda image: encode(image, "JPEG", quality=98, progressive=True),
    "sixteen bits.png": lambda image: encode(np.asarray(image.convert("L")).astype(np.uint16) * 257),
    "palette.png": lambda image: encode(image.quantize(64)),
    "alpha.png": lambda image: encode(image.convert("RGBA")),
    "grey with alpha.png": lambda image: encode(image.convert("LA")),
    "one bit.png": lambda image: encode(image.convert("1")),
    "wrong extension.jpg": lambda image: encode(image, "PNG"),
    "wrong extension.png": lambda image: encode(image, "JPEG", quality=98),
    "lossless.webp": lambda image: encode(image, "WEBP", lossless=True),
    "float.tiff": lambda image: encode(image, "TIFF"),
}


@needs_dali
@pytest.mark.parametrize("name", ODD_KINDS)
@pytest.mark.parametrize("channels", [1, 3])
def test_odd_kinds_of_images_are_read_and_by_both_readers_alike(name, channels, tmp_path):
    ramp = np.linspace(0, 255, SIZE * SIZE * 3).astype(np.uint8).reshape(SIZE, SIZE, 3)
    (tmp_path / name).write_bytes(ODD_KINDS[name](Image.fromarray(ramp)))
    images = SoundImages(ImageFolder(tmp_path, labelled=False), channels)
    dali, pillow = (read_all(reader, images, 1, batch_size=1, channels=channels) for reader in ("dali", "pillow"))
    assert images.take_found() == []
    assert (dali - pillow).abs().max() * 127.5 < 3


def without_an_end(png: bytes) -> bytes:
    return png[:-12]


def with_another_checksum(png: bytes) -> bytes:
    return png[:-16] + bytes(4) + png[-12:]


@needs_dali
@pytest.mark.parametrize("damage", [without_an_end, with_another_checksum])
def test_an_image_that_dali_alone_refuses_costs_no_batch(numbered, tmp_path, damage):
    """Pillow reads past both; the first stops DALI's parser, the second its decoder."""
    expected = read_all("dali", numbered, 60)
    folder = Path(shutil.copytree(numbered.root, tmp_path / "images"))
    for path in sorted(folder.rglob("*.png"))[10:30:10]:
        path.write_bytes(damage(path.read_bytes()))
    damaged = SoundImages(ImageFolder(folder, labelled=False), 1)
    assert torch.equal(read_all("dali", damaged, 60), expected)
    assert damaged.take_found() == []


def config_for(reader: ReaderName, num_classes: int = 2, **changes) -> TrainConfig:
    model = replace(RECIPES["digits-uvit"].model, num_classes=num_classes)
    quiet = replace(RECIPES["digits-uvit"].sample, guidance=0.0)
    changes = {"label_drop": 0.0, "seed": 3, **changes}
    return replace(
        RECIPES["digits-uvit"], model=model, sample=quiet, data=DataConfig(reader=reader, flip=True), **changes
    )


def first_batches(config: TrainConfig, source: ImageSource, plan: BatchPlan, count: int) -> list[Batch]:
    batches = read_batches(config, prepare_source(config, source), plan, num_threads=2, device=CPU)
    return list(islice(batches, count))


@each_reader
def test_labels_belong_to_their_images(reader, numbered):
    for batch in first_batches(config_for(reader), numbered, BatchPlan(0, 8), 4):
        numbers, _ = numbers_of(batch.images_BCHW)
        assert batch.condition is not None
        assert batch.condition.tolist() == [n // 10 for n in numbers]


@each_reader
def test_labels_are_dropped_as_drawn_to_the_null_label(reader, numbered):
    config = config_for(reader, num_classes=3, label_drop=0.4)
    (batch,) = first_batches(config, numbered, BatchPlan(100, 40), 1)
    dropped = draw_samples(config.seed, range(100, 140)).drops_label(0.4)
    numbers, _ = numbers_of(batch.images_BCHW)
    assert batch.condition is not None
    assert batch.condition.tolist() == [2 if drop else n // 10 for n, drop in zip(numbers, dropped, strict=True)]
    assert 0 < dropped.sum() < 40


@each_reader
def test_a_model_without_labels_gets_none(reader, numbered):
    (batch,) = first_batches(config_for(reader, num_classes=0), numbered, BatchPlan(0, 4), 1)
    assert batch.condition is None


@each_reader
def test_noise_and_time_are_those_of_the_position(reader, numbered):
    config = config_for(reader)
    plan = BatchPlan(50, 12, accumulation_steps=2, rank=1, world_size=2)
    for number, batch in enumerate(first_batches(config, numbered, plan, 3)):
        positions = plan.positions(number)
        noise = np.stack([draw_noise(config.seed, p, (1, SIZE, SIZE)) for p in positions])
        np.testing.assert_array_equal(batch.noise_BCHW, noise)
        np.testing.assert_array_equal(batch.time_u_B, draw_samples(config.seed, positions).time_u)
        assert batch.noise_BCHW.dtype == batch.time_u_B.dtype == torch.float32


def pretend(monkeypatch, installed: set[str]) -> None:
    def find_spec(name: str) -> object | None:
        parent = name.rpartition(".")[0]
        if parent and parent not in installed:
            raise ModuleNotFoundError(f"No module named {parent!r}")  # as the real one does
        return object() if name in installed else None

    monkeypatch.setattr(importlib.util, "find_spec", find_spec)


# Other packages of NVIDIA make the name "nvidia" importable without DALI.
@pytest.mark.parametrize("installed", [set(), {"nvidia"}])
def test_without_dali_pillow_reads_and_asking_for_dali_says_what_to_install(installed, monkeypatch):
    pretend(monkeypatch, installed)
    assert choose_reader("auto") == choose_reader("pillow") == "pillow"
    with pytest.raises(UserError, match=r"--data\.reader dali: .*pip install"):
        choose_reader("dali")


def test_with_dali_it_reads_unless_pillow_is_asked_for(monkeypatch):
    pretend(monkeypatch, {"nvidia", "nvidia.dali"})
    assert [choose_reader(name) for name in ("auto", "dali", "pillow")] == ["dali", "dali", "pillow"]
