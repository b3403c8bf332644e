"""Latents: made by an autoencoder, stored, sampled by position, and trained on."""

import json
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from images import BROKEN, random_pixels, write_image
from safetensors.numpy import save_file

pytest.importorskip("diffusers")

from scalelong.model.uvit import UViT, UViTConfig
from scalelong.train.commands.prepare import PrepareArguments, prepare
from scalelong.train.commands.shard_writers import LatentWriter
from scalelong.train.config import DataConfig, TrainConfig
from scalelong.train.data.batches import prepare_source, read_batches
from scalelong.train.data.latents import LatentFolder, map_safetensors
from scalelong.train.data.order import BatchPlan, Order, Stream, draw_noise, draw_samples
from scalelong.train.data.source import open_source
from scalelong.train.errors import UserError
from scalelong.train.recipes import RECIPES
from scalelong.train.sampling.autoencoder import load_vae, to_pictures
from scalelong.train.sampling.pipeline import Pipeline
from scalelong.train.sampling.pipeline_config import PipelineConfig

CPU = torch.device("cpu")
SHAPE = (4, 4, 4)


def moments_of(source: LatentFolder, index: int, mirrored: bool = False) -> np.ndarray:
    """Mean and standard deviation (2, C, H, W)."""
    return source.moments(np.array([index]), np.array([mirrored]))[0].numpy()


@pytest.fixture(scope="module")
def vae(tmp_path_factory) -> Path:
    """A random autoencoder of diffusers, small: 8 x 8 pixels to 4 channels of 4 x 4."""
    from diffusers.models import AutoencoderKL

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("vae")
    make: Any = AutoencoderKL  # its annotations know tuples of one alone
    make(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        latent_channels=4,
        scaling_factor=0.25,
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("photos")
    for n in range(12):
        write_image(root / str(n % 3) / f"{n:02d}.png", random_pixels(8, 8, seed=n))
    (root / "1" / "bad.png").write_bytes(BROKEN["truncated.png"])
    return root


def arguments(photos: Path, out: Path, vae: Path, **more) -> PrepareArguments:
    asked = {"size": 8, "images_per_shard": 5, "batch_size": 2, "num_threads": 1, "mirrored": True, "dtype": "fp32"}
    return PrepareArguments(source=str(photos), out=out, latents=vae, **{**asked, **more})


@pytest.fixture(scope="module")
def latents(photos, vae, tmp_path_factory) -> Path:
    return prepare(arguments(photos, tmp_path_factory.mktemp("latents") / "out", vae))


def test_latents_are_the_moments_that_the_autoencoder_gives(photos, vae, latents):
    source, images = open_source(str(latents), 3), open_source(str(photos), 3)
    assert isinstance(source, LatentFolder)
    assert (len(source), source.shape, source.scale, source.has_mirrored) == (12, SHAPE, 0.25, True)
    encoder = load_vae(vae)
    sound = [i for i in range(len(images)) if not images.key(i).endswith("bad.png")]
    for index, before in enumerate(sound):
        pixels = torch.from_numpy(random_pixels(8, 8, seed=int(Path(images.key(before)).stem)))
        image = pixels.permute(2, 0, 1)[None].float() / 127.5 - 1
        for mirrored, view in ((False, image), (True, image.flip(-1))):
            with torch.no_grad():
                distribution = encoder.encode(view).latent_dist
            expected = torch.cat([distribution.mean, distribution.std]).numpy()
            np.testing.assert_allclose(moments_of(source, index, mirrored), expected, rtol=1e-4, atol=1e-5)
        assert source.label(index) == images.label(before)
    assert "bad.png" in (latents / "bad_samples.jsonl").read_text()


def test_half_precision_is_half_as_large(photos, vae, latents, tmp_path):
    half = prepare(arguments(photos, tmp_path / "out", vae, dtype="fp16"))
    assert moments_of(LatentFolder(half), 0).dtype == np.float16
    np.testing.assert_allclose(
        moments_of(LatentFolder(half), 3), moments_of(LatentFolder(latents), 3), rtol=2e-3, atol=1e-4
    )


def test_preparing_latents_goes_on_where_it_was_stopped(photos, vae, latents, tmp_path, monkeypatch):
    asked, encode, calls = arguments(photos, tmp_path / "out", vae), LatentWriter.encode, []

    def stopping(self, images):
        calls.append(len(images))
        if len(calls) == 5:
            raise KeyboardInterrupt
        return encode(self, images)

    monkeypatch.setattr(LatentWriter, "encode", stopping)
    with pytest.raises(KeyboardInterrupt):
        prepare(asked)
    monkeypatch.setattr(LatentWriter, "encode", encode)
    assert LatentFolder(prepare(asked)).fingerprint() == LatentFolder(latents).fingerprint()


def config_for(path: Path, **data) -> TrainConfig:
    base = RECIPES["digits-uvit"]
    model = replace(base.model, img_size=4, in_channels=4, num_classes=3)
    quiet = replace(base.sample, guidance=0.0)
    return replace(base, model=model, sample=quiet, label_drop=0.0, data=DataConfig(path=str(path), **data))


def read(config: TrainConfig, plan: BatchPlan, count: int, num_threads: int = 2) -> list:
    source = prepare_source(config, open_source(config.data.path, config.num_data_classes))
    return list(islice(read_batches(config, source, plan, num_threads=num_threads, device=CPU), count))


def test_a_position_samples_its_latent_by_its_own_noise(latents):
    source, order = LatentFolder(latents), Order(0, 12)
    (batch,) = read(config_for(latents, flip=True), BatchPlan(5, 20), 1)
    flips = draw_samples(0, range(5, 25)).flips(True)
    assert 0 < flips.sum() < 20
    for row, (position, mirrored) in enumerate(zip(range(5, 25), flips, strict=True)):
        mean, std = moments_of(source, order.index(position), mirrored)
        expected = 0.25 * (mean + std * draw_noise(0, position, SHAPE, Stream.LATENT))
        np.testing.assert_allclose(batch.images_BCHW[row], expected, rtol=1e-6, atol=1e-6)
        assert batch.condition[row] == source.label(order.index(position))


def test_the_same_image_is_sampled_anew_each_epoch(latents):
    (batch,) = read(config_for(latents), BatchPlan(0, 24), 1)
    order = Order(0, 12)
    first = {order.index(p): batch.images_BCHW[p] for p in range(12)}
    assert not any(torch.equal(first[order.index(p)], batch.images_BCHW[p]) for p in range(12, 24))


def test_any_number_of_ranks_and_threads_sees_the_same(latents):
    config = config_for(latents, flip=True)
    expected = torch.cat([batch.images_BCHW for batch in read(config, BatchPlan(0, 12), 4)])
    for rank in range(3):
        plan = BatchPlan(0, 12, accumulation_steps=2, rank=rank, world_size=3)
        for number, batch in enumerate(read(config, plan, 8, num_threads=1 + rank)):
            assert torch.equal(batch.images_BCHW, expected[list(plan.positions(number))])


def test_plain_arrays_serve_as_well(latents, tmp_path):
    source = LatentFolder(latents)
    np.save(tmp_path / "moments.npy", np.stack([moments_of(source, i) for i in range(12)]))
    np.save(tmp_path / "labels.npy", np.array([source.label(i) for i in range(12)]))
    plain = open_source(str(tmp_path), 3)
    assert isinstance(plain, LatentFolder)
    assert (plain.shape, plain.has_mirrored, plain.scale) == (SHAPE, False, 1.0)
    assert all((moments_of(plain, i) == moments_of(source, i)).all() for i in range(12))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"img_size": 8, "patch_size": 2}, r"latents of \(4, 4, 4\), the model takes \(4, 8, 8\)"),
        ({"in_channels": 3}, r"the model takes \(3, 4, 4\)"),
    ],
)
def test_a_model_of_another_shape_is_refused(latents, changes, says):
    config = config_for(latents)
    config = replace(config, model=replace(config.model, **changes))
    with pytest.raises(UserError, match=says):
        read(config, BatchPlan(0, 4), 1)


def test_flipping_needs_the_latents_of_mirrored_images(photos, vae, tmp_path):
    plain = prepare(arguments(photos, tmp_path / "out", vae, mirrored=False))
    with pytest.raises(UserError, match=r"--mirrored True, or set --data\.flip False"):
        read(config_for(plain, flip=True), BatchPlan(0, 4), 1)


def test_images_are_no_latents(photos):
    with pytest.raises(UserError, match="a model of 4 channels takes latents"):
        read(config_for(photos), BatchPlan(0, 4), 1)


def write_shard(
    folder: Path, name: str, num: int, *, labels: int | None = None, shape=SHAPE, dtype: Any = np.float16
) -> None:
    moments = np.zeros((num, 1, 2, *shape), dtype=dtype)
    save_file({"moments": moments, "labels": np.zeros(labels or num, dtype=np.int64)}, folder / name)


def cut_off(folder: Path) -> None:
    path = folder / "a.safetensors"
    path.write_bytes(path.read_bytes()[:-10])


HARM = {
    "cut off": (cut_off, "a.safetensors is no whole file"),
    "empty": (lambda folder: (folder / "a.safetensors").write_bytes(b""), "a.safetensors is no whole file"),
    "gone": (lambda folder: (folder / "a.safetensors").unlink(), "a.safetensors .*No such file"),
    "odd number of labels": (
        lambda folder: write_shard(folder, "a.safetensors", 3, labels=2),
        "2 labels for 3 latents",
    ),
    "another shape": (lambda folder: write_shard(folder, "b.safetensors", 3, shape=(4, 8, 8)), "the first shard"),
    "another dtype": (lambda folder: write_shard(folder, "a.safetensors", 3, dtype=np.float64), "no whole file"),
    "too few dimensions": (
        lambda folder: save_file({"moments": np.zeros((3, 2)), "labels": np.zeros(3)}, folder / "a.safetensors"),
        "no whole file",
    ),
    "scale not finite": (
        lambda folder: (folder / "latents.json").write_text('{"class_names": ["x"], "scale": NaN, "shards": ["a"]}'),
        "latents.json is damaged: .*scale must be positive",
    ),
    "class names no list": (
        lambda folder: (folder / "latents.json").write_text('{"class_names": "x", "scale": 1, "shards": ["a"]}'),
        "latents.json is damaged",
    ),
    "deep description": (lambda folder: (folder / "latents.json").write_text("[" * 200_000), "latents.json is damaged"),
    "moments not finite": (
        lambda folder: save_file(
            {"moments": np.full((3, 1, 2, *SHAPE), np.nan, np.float16), "labels": np.zeros(3, np.int64)},
            folder / "a.safetensors",
        ),
        "a.safetensors has moments that are not finite",
    ),
    "labels one-hot": (
        lambda folder: save_file(
            {"moments": np.zeros((3, 1, 2, *SHAPE), np.float16), "labels": np.zeros((3, 2), np.int64)},
            folder / "a.safetensors",
        ),
        r"labels must be \(N,\)",
    ),
    "labels between classes": (
        lambda folder: save_file(
            {"moments": np.zeros((3, 1, 2, *SHAPE), np.float16), "labels": np.full(3, 0.5, np.float32)},
            folder / "a.safetensors",
        ),
        "no whole numbers",
    ),
    "description damaged": (lambda folder: (folder / "latents.json").write_text("{"), "latents.json is damaged"),
    "not finished": (lambda folder: (folder / ".preparing.json").write_text("{}"), "not prepared to its end"),
}


@pytest.mark.parametrize("harm", HARM)
def test_latents_that_cannot_serve_are_refused_in_one_line(harm, tmp_path):
    for name in ("a.safetensors", "b.safetensors"):
        write_shard(tmp_path, name, 3)
    description = {"class_names": ["x"], "scale": 1.0, "shards": ["a.safetensors", "b.safetensors"]}
    (tmp_path / "latents.json").write_text(json.dumps(description))
    assert len(open_source(str(tmp_path), 1)) == 6
    function, says = HARM[harm]
    function(tmp_path)
    with pytest.raises(UserError, match=says) as caught:
        open_source(str(tmp_path), 1)
    assert "\n" not in str(caught.value)


def test_a_shard_without_rows_adds_nothing(tmp_path):
    for name, num in (("a.safetensors", 0), ("b.safetensors", 3)):
        write_shard(tmp_path, name, num)
    description = {"class_names": ["x"], "scale": 1.0, "shards": ["a.safetensors", "b.safetensors"]}
    (tmp_path / "latents.json").write_text(json.dumps(description))
    source = LatentFolder(tmp_path)
    assert len(source) == 3
    assert source.fingerprint()
    assert source.moments(np.arange(3), np.zeros(3, dtype=np.int64)).shape == (3, 2, *SHAPE)


def test_labels_may_stand_in_a_column(tmp_path):
    np.save(tmp_path / "moments.npy", np.zeros((3, 2, *SHAPE), np.float32))
    np.save(tmp_path / "labels.npy", np.array([[0], [2], [1]]))
    source = LatentFolder(tmp_path)
    assert [source.label(i) for i in range(3)] == [0, 2, 1]


@pytest.mark.parametrize("labels", [[0.0, np.nan, 1.0], [0.0, 1.5, 1.0], [0, 10**12, 1]])
def test_plain_labels_that_are_no_classes_are_refused(labels, tmp_path):
    np.save(tmp_path / "moments.npy", np.zeros((3, 2, *SHAPE), np.float32))
    np.save(tmp_path / "labels.npy", np.array(labels))
    with pytest.raises(UserError, match=r"labels\.npy has labels that are no whole numbers"):
        LatentFolder(tmp_path)


def test_a_latent_that_is_not_finite_is_named_when_it_is_met(tmp_path):
    moments = np.zeros((5, 2, *SHAPE), np.float32)
    moments[3, 1, 0, 0, 0] = np.inf
    np.save(tmp_path / "moments.npy", moments)
    np.save(tmp_path / "labels.npy", np.zeros(5, np.int64))
    with pytest.raises(UserError, match=r"latent 3 has moments that are not finite"):
        LatentFolder(tmp_path).moments(np.arange(5), np.zeros(5, dtype=np.int64))


def test_the_map_gives_what_the_library_wrote(tmp_path):
    rng = np.random.default_rng(0)
    tensors = {"a": rng.normal(size=(3, 5)).astype(np.float32), "b": np.arange(7), "c": np.ones((2, 2), np.float16)}
    save_file(tensors, tmp_path / "x.safetensors")
    for name, array in map_safetensors(tmp_path / "x.safetensors").items():
        np.testing.assert_array_equal(array, tensors[name])
        assert array.dtype == tensors[name].dtype


def test_pictures_of_latents_are_decoded_by_the_autoencoder(latents, vae):
    x_BCHW = torch.randn(3, *SHAPE)
    decode = to_pictures(config_for(latents, vae=str(vae)))
    assert decode is not None
    with torch.no_grad():
        expected = load_vae(vae).decode(x_BCHW / 0.25).sample
        torch.testing.assert_close(decode(x_BCHW), expected, rtol=1e-4, atol=1e-4)
    show = to_pictures(config_for(latents))
    assert show is not None
    assert show(x_BCHW).shape == (3, 3, 4, 4)


def test_an_export_takes_its_autoencoder_along(vae, tmp_path):
    config = UViTConfig(img_size=4, in_channels=SHAPE[0], patch_size=2, width=16, depth=2, num_heads=2)
    Pipeline(UViT(config), PipelineConfig(steps=1), autoencoder=vae).save_pretrained(tmp_path / "export")
    assert (tmp_path / "export" / "autoencoder" / "config.json").read_bytes() == (vae / "config.json").read_bytes()
    pipe = Pipeline.from_pretrained(tmp_path / "export", device="cpu")
    (decoded,) = pipe()
    (shown,) = Pipeline(pipe.model, pipe.config)()
    assert decoded.size[0] > shown.size[0] == 4


def test_a_folder_without_an_autoencoder_is_named(tmp_path):
    with pytest.raises(UserError, match="no such folder of an AutoencoderKL"):
        load_vae(tmp_path / "nothing")
    with pytest.raises(UserError, match="holds no AutoencoderKL of diffusers") as caught:
        load_vae(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_a_run_on_latents_trains_resumes_and_draws_pictures(latents, vae, tmp_path):
    pytest.importorskip("deepspeed")
    from PIL import Image
    from running import losses, small_config

    from scalelong.train.loop import train

    config = config_for(latents, flip=True, vae=str(vae))
    small = small_config(tmp_path / "run")
    model, sample = replace(config.model, width=32, depth=2), replace(small.sample, guidance=0.0)
    small = replace(small, data=config.data, label_drop=0.0, model=model, sample=sample)
    straight = replace(small, run=tmp_path / "straight", total_images=96)
    assert train(replace(small, total_images=32)) == 0
    assert train(replace(small, total_images=96)) == 0
    assert train(straight) == 0
    assert losses(small.run) == losses(straight.run)
    assert Image.open(small.run / "samples/96.png").mode == "RGB"
