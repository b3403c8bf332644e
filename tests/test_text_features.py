"""Text features beside latents: read, chosen by position, trained on, sampled for, and made of U-ViT's files."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from images import random_pixels, write_image
from safetensors.numpy import load_file, save_file

from scalelong.model.presets import UVIT_PRESETS
from scalelong.train.commands.prepare import PrepareArguments, Work, main, prepare
from scalelong.train.config import DataConfig, TrainConfig
from scalelong.train.data.batches import Batch, prepare_source, read_batches
from scalelong.train.data.latents import LatentFolder
from scalelong.train.data.mscoco_features import FeatureFolder, read_array
from scalelong.train.data.order import BatchPlan, Order, draw_samples
from scalelong.train.data.source import open_source
from scalelong.train.errors import UserError
from scalelong.train.objective import make_objective
from scalelong.train.objective_config import ObjectiveConfig
from scalelong.train.recipes import RECIPES
from scalelong.train.sampling.conditions import spread_texts
from scalelong.train.sampling.generate import guided

CPU = torch.device("cpu")
SHAPE, TOKENS, FEATURES = (4, 4, 4), 3, 6
SIZES = {"a.safetensors": (7, 2), "b.safetensors": (5, 3)}
"""Images of each shard, and captions of each of its images."""


def text(image: int, caption: int) -> np.ndarray:
    """Features (L, D) that tell the image and the caption."""
    return np.full((TOKENS, FEATURES), image + caption / 8, dtype=np.float32)


EMPTY = np.full((TOKENS, FEATURES), -1, dtype=np.float32)


def write_shard(path: Path, first: int, num: int, captions: int, *, labels: bool = False, **changes) -> None:
    """Mean i and standard deviation 0 for image number i."""
    moments = np.zeros((num, 1, 2, *SHAPE), dtype=np.float16)
    moments[:, :, 0] = np.arange(first, first + num)[:, None, None, None, None]
    context = np.array([[text(i, k) for k in range(captions)] for i in range(first, first + num)], np.float16)
    tensors = {"moments": moments, "context": context, **({"labels": np.arange(num)} if labels else {}), **changes}
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, path)


def write_folder(root: Path, *, labels: bool = False) -> Path:
    """Twelve images in two shards."""
    root.mkdir(exist_ok=True)
    first = 0
    for name, (num, captions) in SIZES.items():
        write_shard(root / name, first, num, captions, labels=labels)
        first += num
    np.save(root / "empty_context.npy", EMPTY)
    names = [str(n) for n in range(7)] if labels else []
    (root / "latents.json").write_text(json.dumps({"class_names": names, "scale": 0.5, "shards": list(SIZES)}))
    return root


@pytest.fixture
def folder(tmp_path) -> Path:
    return write_folder(tmp_path / "latents")


MODEL = replace(UVIT_PRESETS["mscoco-uvit-s2"], img_size=4, width=32, depth=2, num_heads=2)
MODEL = replace(MODEL, context_tokens=TOKENS, context_dim=FEATURES)


def config_for(path: Path, **changes) -> TrainConfig:
    base = RECIPES["mscoco-uvit-s2"]
    changes = {"model": MODEL, "seed": 3, "label_drop": 0.3, **changes}
    return replace(base, data=DataConfig(path=str(path), check_images=0), **changes)


def open_for(config: TrainConfig):
    return prepare_source(config, open_source(config.data.path, config.num_data_classes))


def read(config: TrainConfig, plan: BatchPlan, count: int) -> list[Batch]:
    return list(islice(read_batches(config, open_for(config), plan, num_threads=2, device=CPU), count))


def captions_of(batch: Batch) -> torch.Tensor:
    """The number that fills each text of a batch."""
    assert batch.condition is not None
    assert batch.condition.dtype == torch.float32
    assert batch.condition.shape[1:] == (TOKENS, FEATURES)
    assert (batch.condition == batch.condition[:, :1, :1]).all()
    return batch.condition[:, 0, 0]


def test_the_other_draws_are_as_they_were_before_there_was_one_for_captions():
    draws = draw_samples(7, range(1000, 1003))
    expected = {
        "flip_u": [4766594, 16641597, 9249065],
        "drop_u": [3270805, 3850389, 1567306],
        "time_u": [6385998, 1869591, 15911650],
    }
    assert {name: (getattr(draws, name) * 2**24).astype(int).tolist() for name in expected} == expected


def test_captions_are_drawn_alike_often_and_stay_within_their_number():
    draws = draw_samples(0, range(30_000))
    chosen = draws.captions(np.full(30_000, 5))
    np.testing.assert_allclose(np.bincount(chosen) / 30_000, 0.2, atol=0.01)
    highest = replace(draws, caption_u=np.full(9, 1 - 2.0**-24, dtype=np.float32))
    np.testing.assert_array_equal(highest.captions(np.arange(1, 10)), np.arange(9))


def test_texts_are_read_by_image_and_caption_across_shards(folder):
    source = open_source(str(folder), 0)
    assert isinstance(source, LatentFolder)
    assert (len(source), source.context_shape, source.class_names, source.label(3)) == (12, (TOKENS, FEATURES), [], 0)
    indices, captions = np.array([11, 0, 6, 7, 3]), np.array([2, 1, 0, 1, 0])
    np.testing.assert_array_equal(source.num_captions(indices), [3, 2, 2, 3, 2])
    expected = np.stack([text(i, k) for i, k in zip(indices, captions, strict=True)])
    np.testing.assert_array_equal(source.contexts(indices, captions), expected)
    np.testing.assert_array_equal(source.empty_context, EMPTY)


def test_labels_may_stand_beside_texts_and_serve_a_model_with_classes(tmp_path):
    root = write_folder(tmp_path / "latents", labels=True)
    model = replace(MODEL, context_tokens=0, num_classes=8)
    (batch,) = read(config_for(root, model=model), BatchPlan(0, 12), 1)
    assert batch.condition is not None
    assert batch.condition.shape == (12,)
    assert len(read(config_for(root), BatchPlan(0, 4), 1)) == 1


def test_a_position_takes_the_caption_of_its_draw_or_the_empty_one(folder):
    (batch,) = read(config_for(folder), BatchPlan(5, 40), 1)
    draws, order = draw_samples(3, range(5, 45)), Order(3, 12)
    indices = np.array([order.index(p) for p in range(5, 45)])
    captions, dropped = draws.captions(np.where(indices < 7, 2, 3)), draws.drops_label(0.3)
    assert 0 < dropped.sum() < 40
    assert set(captions) == {0, 1, 2}
    np.testing.assert_array_equal(captions_of(batch), np.where(dropped, -1, indices + captions / 8))
    # Mean i, standard deviation 0, scale 0.5: text and latent are of one image.
    np.testing.assert_array_equal(batch.images_BCHW[:, 0, 0, 0], indices / 2)


def test_nothing_is_dropped_unless_asked(folder):
    quiet = replace(RECIPES["mscoco-uvit-s2"].sample, guidance=0.0)
    (batch,) = read(config_for(folder, label_drop=0.0, sample=quiet), BatchPlan(0, 40), 1)
    assert (captions_of(batch) >= 0).all()


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("accumulation_steps", [1, 2])
def test_captions_depend_neither_on_the_batch_size_nor_on_the_ranks(folder, world_size, accumulation_steps):
    config = config_for(folder)
    expected = torch.cat([captions_of(batch) for batch in read(config, BatchPlan(24, 6), 8)])
    for rank in range(world_size):
        plan = BatchPlan(24, 12, accumulation_steps, rank, world_size)
        for number, batch in enumerate(read(config, plan, 4 * accumulation_steps)):
            assert torch.equal(captions_of(batch), expected[[p - 24 for p in plan.positions(number)]])


@pytest.mark.parametrize("dimensions", [3, 4])
def test_plain_arrays_serve_as_well(tmp_path, dimensions):
    context = np.stack([text(i, 0) for i in range(5)])
    np.save(tmp_path / "moments.npy", np.zeros((5, 2, *SHAPE), dtype=np.float32))
    np.save(tmp_path / "context.npy", context if dimensions == 3 else context[:, None])
    np.save(tmp_path / "empty_context.npy", EMPTY.astype(np.float16))
    source = open_for(config_for(tmp_path))
    assert isinstance(source, LatentFolder)
    np.testing.assert_array_equal(source.contexts(np.arange(5), np.zeros(5, dtype=int)), context)
    np.testing.assert_array_equal(source.num_captions(np.arange(5)), 1)


def test_the_fingerprint_covers_texts_and_leaves_other_folders_as_they_were(folder, tmp_path):
    before = LatentFolder(folder).fingerprint()
    assert LatentFolder(folder).fingerprint() == before
    np.save(folder / "empty_context.npy", EMPTY - 1)
    assert LatentFolder(folder).fingerprint() != before
    np.save(folder / "empty_context.npy", EMPTY)
    assert LatentFolder(folder).fingerprint() == before
    last = np.array([[text(i, k) for k in range(3)] for i in (7, 8, 9, 10, 12)], np.float16)
    write_shard(folder / "b.safetensors", 7, 5, 3, context=last)
    assert LatentFolder(folder).fingerprint() != before
    write_shard(folder / "b.safetensors", 7, 5, 4)
    assert LatentFolder(folder).fingerprint() != before

    np.save(tmp_path / "moments.npy", np.arange(2 * 2 * 4, dtype=np.float32).reshape(2, 2, 1, 2, 2))
    np.save(tmp_path / "labels.npy", np.array([0, 1]))
    assert LatentFolder(tmp_path).fingerprint().startswith("d0efd9b7cfdf6bf4")


def damage(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


def rewrite(folder: Path, **changes: Any) -> None:
    write_shard(folder / "b.safetensors", 7, 5, 3, **changes)


def save_empty(folder: Path, array: np.ndarray) -> None:
    np.save(folder / "empty_context.npy", array)


FULL = np.zeros((5, 3, TOKENS, FEATURES), np.float16)
HARM: dict[str, tuple[Callable[[Path], Any], str]] = {
    "other number of images": (
        lambda folder: rewrite(folder, context=FULL[:4].copy()),
        r"b\.safetensors has the text features of 4 images for 5 latents",
    ),
    "other tokens": (
        lambda folder: rewrite(folder, context=FULL[:, :, 1:].copy()),
        r"b\.safetensors holds text features of \(2, 6\), the first \(3, 6\)",
    ),
    "no text in one shard": (
        lambda folder: rewrite(write_folder(folder, labels=True), context=None, labels=True),
        r"b\.safetensors has no text features, unlike the first shard",
    ),
    "labels in one shard": (
        lambda folder: rewrite(folder, labels=True),
        r"b\.safetensors has labels, unlike the first shard",
    ),
    "three dimensions": (
        lambda folder: rewrite(folder, context=FULL[:, 0].copy()),
        r"b\.safetensors: text features must be \(N, K, L, D\) in fp16 or fp32, not \(5, 3, 6\)",
    ),
    "no captions": (lambda folder: rewrite(folder, context=FULL[:, :0].copy()), r"b\.safetensors: text features must"),
    "integers": (lambda folder: rewrite(folder, context=FULL.astype(np.int64)), r"b\.safetensors: text .* int64"),
    "cut off": (lambda folder: damage(folder / "b.safetensors"), r"b\.safetensors is no whole file"),
    "empty context of another shape": (
        lambda folder: save_empty(folder, EMPTY[:1]),
        r"empty_context\.npy holds \(1, 6\) in float32, the shards text of \(3, 6\)",
    ),
    "empty context of integers": (lambda folder: save_empty(folder, EMPTY.astype(int)), r"empty_context\.npy .*int64"),
    "empty context cut off": (lambda folder: damage(folder / "empty_context.npy"), r"cannot read .*empty_context\.npy"),
    "empty context with a bad header": (
        lambda folder: (folder / "empty_context.npy").write_bytes(b"\x93NUMPY\x01\x00\x04\x00((((" + b"\0" * 64),
        r"cannot read .*empty_context\.npy",
    ),
    "empty context gone": (
        lambda folder: (folder / "empty_context.npy").unlink(),
        r"has no empty_context\.npy, which --label-drop and guidance need",
    ),
    "classes without labels": (
        lambda folder: (folder / "latents.json").write_text(
            json.dumps({"class_names": ["x"], "scale": 1, "shards": list(SIZES)})
        ),
        "names classes and has no labels",
    ),
    "no shards": (
        lambda folder: (folder / "latents.json").write_text('{"class_names": [], "scale": 1, "shards": []}'),
        "no latents in",
    ),
}


@pytest.mark.parametrize("harm", HARM)
def test_what_cannot_serve_is_refused_in_one_line(harm, folder):
    function, says = HARM[harm]
    assert len(open_for(config_for(folder))) == 12
    function(folder)
    with pytest.raises(UserError, match=says) as caught:
        open_for(config_for(folder))
    assert "\n" not in str(caught.value)


def test_a_plain_array_of_another_length_is_named(tmp_path):
    np.save(tmp_path / "moments.npy", np.zeros((5, 2, *SHAPE), dtype=np.float32))
    np.save(tmp_path / "context.npy", np.stack([text(i, 0) for i in range(4)]))
    with pytest.raises(UserError, match=r"context\.npy has the text features of 4 images for 5 latents"):
        open_for(config_for(tmp_path))


def test_without_an_empty_context_a_run_may_train_that_drops_nothing(folder):
    (folder / "empty_context.npy").unlink()
    quiet = replace(RECIPES["mscoco-uvit-s2"].sample, guidance=0.0)
    assert len(read(config_for(folder, label_drop=0.0, sample=quiet), BatchPlan(0, 4), 1)) == 1


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"context_tokens": 4}, r"text features of \(3, 6\), the model takes \(4, 6\)"),
        ({"context_dim": 5}, r"text features of \(3, 6\), the model takes \(3, 5\)"),
    ],
)
def test_a_model_of_other_text_is_refused(folder, changes, says):
    with pytest.raises(UserError, match=says):
        open_for(config_for(folder, model=replace(MODEL, **changes)))


def test_latents_without_text_and_images_are_refused(tmp_path):
    np.save(tmp_path / "moments.npy", np.zeros((5, 2, *SHAPE), dtype=np.float32))
    np.save(tmp_path / "labels.npy", np.zeros(5, dtype=np.int64))
    with pytest.raises(UserError, match=r"holds no text features, which a model with text .* needs"):
        open_for(config_for(tmp_path))
    write_image(tmp_path / "photos" / "0.png", random_pixels(4, 4))
    for channels in (3, 4):
        with pytest.raises(UserError, match="holds images; a model with text takes latents with text features"):
            open_for(config_for(tmp_path / "photos", model=replace(MODEL, in_channels=channels)))


def test_a_configuration_with_text_has_neither_classes_nor_a_null_label(folder):
    config = config_for(folder)
    assert (config.null_label, config.num_data_classes) == (None, 0)
    with pytest.raises(ValueError, match="label_drop needs a model with labels or text"):
        replace(config, model=replace(MODEL, context_tokens=0))
    with pytest.raises(ValueError, match=r"guidance needs label_drop"):
        replace(config, label_drop=0.0)


@pytest.mark.parametrize("name", ["mscoco-uvit-s2", "mscoco-uvit-s2-deep"])
def test_the_presets_are_the_published_recipe(name):
    config = RECIPES[name]
    assert (config.total_images, config.images_per_step, config.label_drop) == (256_000_000, 256, 0.1)
    optimizer = config.optimizer
    assert (optimizer.learning_rate, optimizer.beta1, optimizer.beta2) == (2e-4, 0.9, 0.9)
    assert (optimizer.weight_decay, optimizer.warmup_images, optimizer.ema_decay) == (0.03, 5_000 * 256, 0.9999)
    assert (config.objective.noise, config.sample.guidance, config.data.flip) == ("scaled-linear", 1.0, False)
    assert config.model == UVIT_PRESETS[name]


def test_guidance_leads_away_from_the_empty_text():
    def network(x_BCHW, t_B, y_B):
        return x_BCHW * 0 + y_B.mean((1, 2))[:, None, None, None]

    x, texts = torch.zeros(2, *SHAPE), torch.from_numpy(np.stack([text(1, 0), text(5, 0)]))
    network_of_text: Any = network
    found = guided(network_of_text, make_objective(ObjectiveConfig()), texts, torch.from_numpy(EMPTY), 2.0)(x, 1.0)
    # The noise is 1 + 2 (1 - -1) and 5 + 2 (5 - -1), the image 0 less that.
    np.testing.assert_allclose(found[:, 0, 0, 0], [-5, -17], rtol=1e-6)


def test_grids_are_drawn_for_first_captions_spread_over_the_data(folder):
    source = LatentFolder(folder)
    np.testing.assert_array_equal(spread_texts(source, 4)(range(4))[:, 0, 0], [0, 3, 6, 9])
    np.testing.assert_array_equal(spread_texts(source, 24)(range(24))[:, 0, 0], np.arange(24) // 2)
    np.testing.assert_array_equal(spread_texts(source, 24)([7, 20])[:, 0, 0], [3, 10])


def small_run(folder: Path, run: Path) -> TrainConfig:
    from running import small_config

    base = config_for(folder)
    sample = replace(base.sample, num_images=4, steps=2, guidance=1.0)
    return replace(
        small_config(run, model=MODEL, label_drop=0.3, objective="scaled-linear", images_per_step=8),
        data=base.data,
        sample=sample,
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> TrainConfig:
    """A run of three steps, stopped after the first one and continued."""
    pytest.importorskip("deepspeed")
    pytest.importorskip("diffusers")
    from scalelong.train.loop import train

    root = tmp_path_factory.mktemp("finished")
    config = small_run(write_folder(root / "latents"), root / "run")
    assert train(replace(config, total_images=8)) == 0
    assert train(replace(config, total_images=24)) == 0
    return replace(config, total_images=24)


@pytest.mark.slow
def test_a_resumed_run_has_the_bits_of_an_undisturbed_one(finished, tmp_path):
    from running import losses

    from scalelong.train.loop import train

    straight = replace(finished, run=tmp_path / "straight")
    assert train(straight) == 0
    assert len(losses(straight.run)) == 3
    assert losses(finished.run) == losses(straight.run)
    for name in ("model", "ema", "optimizer"):
        files = sorted((straight.run / "checkpoints" / "24").glob(f"{name}*.safetensors"))
        assert files
        assert all((finished.run / "checkpoints/24" / f.name).read_bytes() == f.read_bytes() for f in files)
    assert (finished.run / "samples/24.png").read_bytes() == (straight.run / "samples/24.png").read_bytes()


@pytest.mark.slow
def test_samples_are_drawn_for_captions_of_the_data_with_and_without_guidance(finished, tmp_path, capsys):
    from scalelong.train.commands.sample import main as sample

    grids = []
    for guidance in ("0", "1", "1"):
        grids.append(tmp_path / f"{len(grids)}.png")
        sample([str(finished.run), "--num-images", "4", "--guidance", guidance, "--out", str(grids[-1])])
    assert "4 samples ->" in capsys.readouterr().out
    first, second, third = (grid.read_bytes() for grid in grids)
    assert first != second == third
    # The run's own grid: the same captions, noise and guidance, of the averaged weights too.
    assert second == (finished.run / "samples/24.png").read_bytes()


@pytest.mark.slow
def test_the_other_commands_say_in_one_line_what_is_not_for_text(finished, tmp_path, monkeypatch):
    from scalelong.model.uvit import UViT
    from scalelong.train.commands.evaluate import main as evaluate
    from scalelong.train.commands.export import main as export
    from scalelong.train.commands.sample import main as sample

    with pytest.raises(UserError, match="the scores are of images alone, not of latents or text"):
        evaluate([str(finished.run)])
    with pytest.raises(UserError, match="--label 1: the run's labels are none"):
        sample([str(finished.run), "--label", "1", "--out", str(tmp_path / "x.png")])
    export([str(finished.run), "--out", str(tmp_path / "export")])
    assert UViT.from_pretrained(tmp_path / "export").config == MODEL
    data = Path(finished.data.path)
    moved = data.rename(data.with_name("moved"))
    try:
        with pytest.raises(UserError, match=r"captions of the run's data, and .*latents is gone") as caught:
            sample([str(finished.run), "--out", str(tmp_path / "x.png")])
        assert "\n" not in str(caught.value)
    finally:
        moved.rename(data)


def test_a_plan_counts_the_text():
    pytest.importorskip("deepspeed")
    from scalelong.train.commands.plan import simulate

    config = replace(RECIPES["mscoco-uvit-s2"], model=MODEL, precision="fp32")
    longer = replace(config, model=replace(MODEL, context_tokens=4 * TOKENS))
    assert simulate(longer, 2, keeps_gradients=True) > simulate(config, 2, keeps_gradients=True)


CAPTIONS = [2, 1, 5, 3, 4, 2, 1]


def moments_of(number: int) -> np.ndarray:
    """Mean and log variance (2C, H, W)."""
    return np.random.default_rng(number).normal(size=(2 * SHAPE[0], *SHAPE[1:])).astype(np.float32)


@pytest.fixture
def features(tmp_path) -> Path:
    """Seven images with one to five captions, as U-ViT stores them."""
    root = tmp_path / "coco" / "train"
    root.mkdir(parents=True)
    for number, count in enumerate(CAPTIONS):
        np.save(root / f"{number}.npy", moments_of(number))
        for k in range(count):
            np.save(root / f"{number}_{k}.npy", text(number, k))
    np.save(root.parent / "empty_context.npy", EMPTY)
    return root


def arguments(source: Path, out: Path, **more) -> PrepareArguments:
    asked = {"images_per_shard": 3, "num_threads": 2, "dtype": "fp32", **more}
    return PrepareArguments(source=str(source), out=out, **asked)


def files_of(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(out.iterdir())}


def test_features_become_shards_of_latents_with_text(features, tmp_path):
    out = prepare(arguments(features, tmp_path / "out", scale=0.25))
    assert sorted(path.name for path in out.iterdir()) == [
        *("bad_samples.jsonl", "empty_context.npy", "latents.json"),
        *(f"shard-{n:05d}.safetensors" for n in range(3)),
    ]
    source = open_source(str(out), 0)
    assert isinstance(source, LatentFolder)
    assert (len(source), source.shape, source.scale, source.class_names) == (7, SHAPE, 0.25, [])
    np.testing.assert_array_equal(source.empty_context, EMPTY)
    np.testing.assert_array_equal(source.num_captions(np.arange(7)), [5, 5, 5, 4, 4, 4, 1])
    for number, count in enumerate(CAPTIONS):
        mean, std = source.moments(np.array([number]), np.array([False]))[0].numpy()
        log_variance = moments_of(number)[SHAPE[0] :]
        np.testing.assert_array_equal(mean, moments_of(number)[: SHAPE[0]])
        np.testing.assert_allclose(std, np.exp(0.5 * log_variance), rtol=1e-6)
        for k in range(int(source.num_captions(np.array([number]))[0])):
            # Those that are missing are the image's own again, in turn.
            np.testing.assert_array_equal(
                source.contexts(np.array([number]), np.array([k]))[0], text(number, k % count)
            )
    assert {k: v.shape for k, v in load_file(out / "shard-00000.safetensors").items()} == {
        "moments": (3, 1, 2, *SHAPE),
        "context": (3, 5, TOKENS, FEATURES),
    }
    assert len(read(config_for(out), BatchPlan(0, 4), 1)) == 1


def test_by_default_they_are_stored_in_half_precision_at_the_scale_of_stable_diffusion(features, tmp_path):
    out = prepare(PrepareArguments(source=str(features), out=tmp_path / "out"))
    assert {tensor.dtype for tensor in load_file(out / "shard-00000.safetensors").values()} == {np.dtype(np.float16)}
    assert np.load(out / "empty_context.npy").dtype == np.float16
    assert LatentFolder(out).scale == 0.2301


def test_extreme_log_variances_are_clamped(features, tmp_path):
    extreme = moments_of(0)
    extreme[SHAPE[0] :], extreme[SHAPE[0]] = -100, 100
    np.save(features / "0.npy", extreme)
    source = LatentFolder(prepare(arguments(features, tmp_path / "out")))
    std = source.moments(np.array([0]), np.array([False]))[0, 1].numpy()
    np.testing.assert_allclose([std.min(), std.max()], np.exp([-15, 10]), rtol=1e-6)


class StoppedError(Exception):
    """As Ctrl-C, but no end of the tests."""


@pytest.mark.parametrize("stop_after", [0, 2, 4, 6])
def test_an_interrupted_command_goes_on_and_ends_with_the_same_files(features, tmp_path, monkeypatch, stop_after):
    (features / "4_1.npy").write_bytes(b"nonsense")
    expected = files_of(prepare(arguments(features, tmp_path / "straight")))
    asked, calls, whole = arguments(features, tmp_path / "out"), [], FeatureFolder.features

    def stopping(self, index):
        calls.append(index)
        if len(calls) > stop_after:
            raise StoppedError
        return whole(self, index)

    monkeypatch.setattr(FeatureFolder, "features", stopping)
    with pytest.raises(StoppedError):
        prepare(asked)
    done = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("shard*.safetensors")}
    monkeypatch.setattr(FeatureFolder, "features", whole)
    with pytest.raises(UserError, match="is not prepared to its end"):
        open_source(str(asked.out), 0)
    assert files_of(prepare(asked)) == expected
    assert all(path.stat().st_mtime_ns == time for path, time in done.items())


def test_a_begun_folder_asked_for_at_another_scale_is_refused(features, tmp_path, monkeypatch):
    monkeypatch.setattr(Work, "finish", lambda self, shards: None)
    prepare(arguments(features, tmp_path / "out"))
    with pytest.raises(UserError, match="begun with another scale"):
        prepare(arguments(features, tmp_path / "out", scale=0.5))


def not_finite(root: Path) -> None:
    np.save(root / "2.npy", np.full_like(moments_of(2), np.nan))


BROKEN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "latent cut off": (lambda root: damage(root / "2.npy"), r"2\.npy: "),
    "latent empty": (lambda root: (root / "2.npy").write_bytes(b""), r"2\.npy: EOF"),
    "latent of another shape": (lambda root: np.save(root / "2.npy", np.zeros((8, 2, 2))), r"\(8, 2, 2\), not \(8, 4"),
    "latent not finite": (not_finite, r"2\.npy has values that are not finite"),
    "latent gone": (lambda root: (root / "2.npy").unlink(), r"2\.npy: No such file"),
    "a pickle": (
        lambda root: np.save(root / "2.npy", np.array([{}]), allow_pickle=True),
        r"2\.npy: .*allow_pickle=False",
    ),
    "text cut off": (lambda root: damage(root / "2_3.npy"), r"2_3\.npy: "),
    "text of another shape": (lambda root: np.save(root / "2_3.npy", EMPTY[:2]), r"2_3\.npy holds \(2, 6\)"),
    "text of integers": (lambda root: np.save(root / "2_3.npy", EMPTY.astype(int)), r"2_3\.npy holds int64"),
    "no text": (lambda root: [path.unlink() for path in root.glob("2_*.npy")], r"there is no 2_0\.npy"),
}


@pytest.mark.parametrize("broken", BROKEN)
def test_an_image_with_a_broken_file_is_listed_and_left_out(broken, features, tmp_path, capsys):
    harm, says = BROKEN[broken]
    harm(features)
    flags = ["--images-per-shard", "3", "--num-threads", "1"]
    main([str(features), str(tmp_path / "out"), *flags])
    assert "1 images left out" in capsys.readouterr().out
    (bad,) = [json.loads(line) for line in (tmp_path / "out" / "bad_samples.jsonl").read_text().splitlines()]
    assert (bad["index"], Path(bad["key"]).name) == (2, "2.npy")
    assert re.search(says, bad["reason"])
    source = LatentFolder(tmp_path / "out")
    assert len(source) == 6
    np.testing.assert_array_equal(spread_texts(source, 6)(range(6))[:, 0, 0], [0, 1, 3, 4, 5, 6])


def test_a_shard_without_a_sound_image_is_left_out(features, tmp_path):
    for number in range(3):
        (features / f"{number}.npy").write_bytes(b"nonsense")
    out = prepare(arguments(features, tmp_path / "out"))
    assert json.loads((out / "latents.json").read_text())["shards"] == [f"shard-{n:05d}.safetensors" for n in (1, 2)]
    assert len(LatentFolder(out)) == 4


def test_without_a_sound_image_nothing_is_made(features, tmp_path):
    for number in range(7):
        (features / f"{number}_0.npy").write_bytes(b"nonsense")
    with pytest.raises(UserError, match="not one of the 7 images can be read"):
        prepare(arguments(features, tmp_path / "out"))
    for number in range(7):
        (features / f"{number}.npy").write_bytes(b"nonsense")
    with pytest.raises(UserError, match="not one of the 7 images in"):
        prepare(arguments(features, tmp_path / "more"))


def test_the_empty_context_may_lie_among_the_features(features, tmp_path):
    (features.parent / "empty_context.npy").rename(features / "empty_context.npy")
    assert len(LatentFolder(prepare(arguments(features, tmp_path / "out")))) == 7


@pytest.mark.parametrize(
    ("harm", "says"),
    [
        (lambda empty: empty.unlink(), r"there is no empty_context\.npy in it or above it"),
        (lambda empty: empty.write_bytes(b""), r"cannot read .*coco: empty_context\.npy: EOF"),
        (lambda empty: np.save(empty, EMPTY[0]), r"empty_context\.npy holds \(6,\), not \(L, D\)"),
    ],
)
def test_an_empty_context_that_cannot_serve_is_named(features, tmp_path, harm, says):
    harm(features.parent / "empty_context.npy")
    with pytest.raises(UserError, match=says) as caught:
        prepare(arguments(features, tmp_path / "out"))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_options_of_images_are_refused_and_so_is_training_on_single_files(features, tmp_path):
    with pytest.raises(UserError, match="holds features, not images"):
        prepare(arguments(features, tmp_path / "out", size=8))
    with pytest.raises(UserError, match="scale must be positive"):
        main([str(features), str(tmp_path / "out"), "--scale", "0"])
    with pytest.raises(UserError, match="make shards of them: scalelong prepare"):
        open_for(config_for(features))


def test_flipped_bits_in_an_array_are_an_error_of_one_kind(tmp_path):
    path = tmp_path / "x.npy"
    np.save(path, EMPTY)
    whole, rng = bytearray(path.read_bytes()), np.random.default_rng(0)
    refused = 0
    for _ in range(300):
        data = bytearray(whole)
        data[rng.integers(128)] = rng.integers(256)
        path.write_bytes(data)
        try:
            read_array(path)
        except ValueError:
            refused += 1
    assert refused > 200
