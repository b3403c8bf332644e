"""Distances of sets of features: against double loops and closed forms, and what they are on average."""

import numpy as np
import pytest
from scipy.linalg import sqrtm

from scalelong.train.scores.distances import frechet_distance, kernel_distance, precision_and_recall

rng = np.random.default_rng(0)


def kernel(x: np.ndarray, y: np.ndarray) -> float:
    return (float(x @ y) / len(x) + 1) ** 3


def by_double_loop(a: np.ndarray, b: np.ndarray) -> float:
    """The definition: all pairs of distinct images within each set, and all pairs across."""
    aa = [kernel(x, y) for i, x in enumerate(a) for j, y in enumerate(a) if i != j]
    bb = [kernel(x, y) for i, x in enumerate(b) for j, y in enumerate(b) if i != j]
    ab = [kernel(x, y) for x in a for y in b]
    return float(np.mean(aa) + np.mean(bb) - 2 * np.mean(ab))


@pytest.mark.parametrize(("m", "n"), [(4, 4), (5, 9), (23, 17), (47, 90)])
def test_the_kernel_distance_is_that_of_a_double_loop(m, n):
    a, b = rng.standard_normal((m, 7)), 0.5 + 2 * rng.standard_normal((n, 7))
    assert kernel_distance(a, b).value == pytest.approx(by_double_loop(a, b), rel=1e-10, abs=1e-12)
    assert kernel_distance(b, a).value == pytest.approx(kernel_distance(a, b).value, rel=1e-10)


@pytest.mark.parametrize(("m", "n"), [(4, 6), (23, 17), (50, 41)])
def test_its_error_is_that_of_leaving_out_one_block_after_another(m, n):
    a, b = rng.standard_normal((m, 5)), 3 + 2 * rng.standard_normal((n, 5))  # where that is larger than of equals
    num_blocks = min(20, m // 2, n // 2)
    shuffled = [x[np.random.default_rng(0).permutation(len(x))] for x in (a, b)]
    blocks = [np.split(x, np.linspace(0, len(x), num_blocks + 1).astype(int)[1:-1]) for x in shuffled]
    variance = 0.0
    for which in (0, 1):
        without = []
        for left_out in range(num_blocks):
            kept = [x for i, x in enumerate(blocks[which]) if i != left_out]
            sets = [*shuffled]
            sets[which] = np.concatenate(kept)
            without.append(by_double_loop(*sets))
        variance += (num_blocks - 1) / num_blocks * np.square(np.array(without) - np.mean(without)).sum()
    assert kernel_distance(a, b).error == pytest.approx(np.sqrt(variance), rel=1e-8)


@pytest.mark.parametrize(("m", "n"), [(30, 30), (40, 200)])
def test_equal_distributions_are_at_zero_on_average_and_the_error_is_not_too_small(m, n):
    estimates = [
        kernel_distance(rng.standard_normal((m, 4)) ** 2, rng.standard_normal((n, 4)) ** 2) for _ in range(300)
    ]
    values, errors = np.array(estimates).T
    spread = values.std()
    assert abs(values.mean()) < 3 * spread / np.sqrt(len(values))
    assert values.min() < 0 < values.max()
    assert spread < np.sqrt(np.mean(errors**2)) < 2 * spread
    # Those that came out low as well: the jackknife alone gives them next to no error.
    assert np.mean(np.abs(values) > 3 * errors) < 0.02


def test_the_error_of_different_distributions_is_their_spread():
    estimates = [kernel_distance(rng.standard_normal((60, 4)), 1 + rng.standard_normal((90, 4))) for _ in range(300)]
    spread = np.std([e.value for e in estimates])
    mean_error = np.sqrt(np.mean([e.error**2 for e in estimates]))
    assert 0.85 * spread < mean_error < 1.3 * spread


def test_images_sorted_by_class_have_the_error_of_shuffled_ones():
    classes = np.repeat(np.eye(10) * 3, 20, axis=0) + 0.1 * rng.standard_normal((200, 10))
    other = rng.permutation(classes)
    sorted_error, shuffled_error = (kernel_distance(x, other).error for x in (classes, rng.permutation(classes)))
    assert sorted_error == pytest.approx(shuffled_error, rel=0.6)


def test_precision_and_recall_tell_quality_from_variety():
    two_modes = np.concatenate([rng.standard_normal((100, 3)), 50 + rng.standard_normal((100, 3))])
    again = np.concatenate([rng.standard_normal((100, 3)), 50 + rng.standard_normal((100, 3))])
    precision, recall = precision_and_recall(two_modes, again)
    assert min(precision, recall) > 0.8
    precision, recall = precision_and_recall(two_modes[:100], again)
    assert precision > 0.8
    assert 0.4 < recall <= 0.5
    assert precision_and_recall(two_modes + 1000, again) == (0.0, 0.0)


def test_precision_and_recall_are_those_of_their_definition():
    samples, real = rng.standard_normal((12, 2)), 0.5 + rng.standard_normal((17, 2))

    def share(x: np.ndarray, others: np.ndarray) -> float:
        radii = [sorted(np.linalg.norm(others - other, axis=1))[3] for other in others]
        return float(np.mean([any(np.linalg.norm(v - o) <= r for o, r in zip(others, radii, strict=True)) for v in x]))

    assert precision_and_recall(samples, real) == pytest.approx((share(samples, real), share(real, samples)))


@pytest.mark.parametrize("distance", [kernel_distance, precision_and_recall])
def test_too_few_images_have_no_distance(distance):
    for numbers in ((3, 10), (10, 3)):
        with pytest.raises(ValueError, match="at least 4 images of each kind, got 3"):
            distance(*(rng.standard_normal((number, 2)) for number in numbers))
    assert np.isfinite(distance(*rng.standard_normal((2, 4, 2)))).all()


def exactly(mean: np.ndarray, covariance: np.ndarray, count: int = 200) -> np.ndarray:
    """Features whose sample mean and covariance are just these."""
    x = rng.standard_normal((count, len(mean)))
    x -= x.mean(0)
    whitened = x @ np.linalg.inv(np.linalg.cholesky(np.cov(x, rowvar=False))).T
    return mean + whitened @ np.linalg.cholesky(covariance).T


def random_covariance(size: int) -> np.ndarray:
    root = rng.standard_normal((size, size))
    return root @ root.T + 0.1 * np.eye(size)


def test_a_set_has_no_frechet_distance_from_itself():
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


def test_the_frechet_distance_is_symmetric_and_survives_features_that_never_vary():
    a, b = rng.standard_normal((2, 50, 5))
    a[:, 3] = b[:, 3] = 0.7
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a))
    assert np.isfinite(frechet_distance(a, b))
