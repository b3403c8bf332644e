"""The two measures of samples: Frechet distance against closed forms, and a judge that knows real digits."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from images import random_pixels, write_image
from scipy.linalg import sqrtm

from scalelong.train.commands.evaluate import Judge, RealImages, frechet_distance, read_real_images
from scalelong.train.config import DataConfig
from scalelong.train.errors import UserError
from scalelong.train.recipes import RECIPES

rng = np.random.default_rng(0)


def exactly(mean: np.ndarray, covariance: np.ndarray, count: int = 200) -> np.ndarray:
    """Features whose sample mean and covariance are just these."""
    x = rng.standard_normal((count, len(mean)))
    x -= x.mean(0)
    whitened = x @ np.linalg.inv(np.linalg.cholesky(np.cov(x, rowvar=False))).T
    return mean + whitened @ np.linalg.cholesky(covariance).T


def random_covariance(size: int) -> np.ndarray:
    root = rng.standard_normal((size, size))
    return root @ root.T + 0.1 * np.eye(size)


def test_a_set_has_no_distance_from_itself():
    features = rng.standard_normal((100, 8))
    assert frechet_distance(features, features) == pytest.approx(0, abs=1e-6)


def test_independent_features_differ_by_mean_and_spread_alone():
    means, stds = np.array([[0.0, 1, 2], [3, 1, 0]]), np.array([[1.0, 2, 0.5], [4, 2, 1]])
    a, b = (exactly(mean, np.diag(std**2)) for mean, std in zip(means, stds, strict=True))
    # (3² + 0 + 2²) + (3² + 0 + 0.5²)
    assert frechet_distance(a, b) == pytest.approx(22.25, rel=1e-9)


def test_correlated_features_agree_with_the_matrix_root_of_scipy():
    mean_a, mean_b = rng.standard_normal((2, 6))
    cov_a, cov_b = random_covariance(6), random_covariance(6)
    root = np.real(np.asarray(sqrtm(cov_a @ cov_b)))
    expected = np.sum((mean_a - mean_b) ** 2) + np.trace(cov_a + cov_b - 2 * root)
    found = frechet_distance(exactly(mean_a, cov_a), exactly(mean_b, cov_b))
    assert found == pytest.approx(expected, rel=1e-9)


def test_the_distance_is_symmetric_and_survives_features_that_never_vary():
    a, b = rng.standard_normal((2, 50, 5))
    a[:, 3] = b[:, 3] = 0.7
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a))
    assert np.isfinite(frechet_distance(a, b))


@pytest.fixture(scope="module")
def real(tmp_path_factory) -> RealImages:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SCALELONG_CACHE", str(tmp_path_factory.mktemp("cache")))
        return read_real_images(RECIPES["digits-uvit"], 10_000)


@pytest.fixture(scope="module")
def judge(real) -> Judge:
    return Judge(real)


def test_the_digits_bring_held_out_images_of_their_own(real):
    assert not real.held_out_from_training
    assert (real.train.shape[1], len(real.train) + len(real.held_out)) == (64, 1797)
    assert (real.train.min(), real.train.max()) == (0, 1)


def test_the_judge_names_held_out_digits(judge, real):
    assert judge.accuracy(real.held_out, real.held_out_labels) > 0.97


def test_the_judge_finds_wrong_labels_wrong(judge, real):
    assert judge.accuracy(real.held_out, (real.held_out_labels + 1) % 10) < 0.03


def test_noise_lies_far_from_digits(judge, real):
    half = np.arange(len(real.held_out)) % 2 == 0
    between_halves = judge.distance(real.held_out[half], real.held_out[~half])
    noise = rng.random((len(real.held_out), 64))
    assert judge.distance(noise, real.held_out) > 20 * between_halves


def test_one_class_repeated_lies_farther_from_digits_than_digits_do(judge, real):
    half = np.arange(len(real.held_out)) % 2 == 0
    between_halves = judge.distance(real.held_out[half], real.held_out[~half])
    zeros = real.train[real.train_labels == 0]
    assert judge.distance(zeros, real.held_out) > 5 * between_halves


def test_images_of_one_class_have_no_accuracy():
    images, labels = rng.random((40, 16)), np.zeros(40)
    judge = Judge(RealImages(images, labels, images, labels, held_out_from_training=True))
    assert judge.accuracy(images, labels) is None


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
    found = {np.round(pixels * 255).astype(np.uint8).tobytes(): label for pixels, label in everything}
    assert found == labels


def test_no_more_real_images_are_read_than_asked(tmp_path):
    write_folder(tmp_path, 20)
    real = read_real_images(folder_config(tmp_path), 20)
    assert len(real.train) + len(real.held_out) == 20
    assert {*real.train_labels} == {0, 1}


def test_a_folder_too_small_to_hold_some_out_is_refused(tmp_path):
    write_folder(tmp_path, 4)
    with pytest.raises(UserError, match="8 images, too few"):
        read_real_images(folder_config(tmp_path), 10_000)
