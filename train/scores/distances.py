"""How far two sets of features lie apart: kernel distance, precision and recall, Frechet distance.

Kernel distance: the unbiased estimator of Binkowski et al., arXiv:1801.01401 (KID), right on average for any number of
images; of equal distributions it is 0 on average, and may come out below. Its error is a jackknife over blocks.
Precision and recall: Kynkaanniemi et al., arXiv:1904.06991. Frechet distance: Heusel et al., arXiv:1706.08500, whose
estimate from few images is far too large.

Shapes: M and N images, D features.
"""

from typing import NamedTuple

import numpy as np

from scalelong.train.config import LEAST_SAMPLES

NUM_BLOCKS = 20
NEIGHBOURS = 3
ROWS_AT_A_TIME = 1024
MOST_CENTRED = 2000
"""Images of a set, drawn at random, from which the spread of equal distributions is found."""


class Estimate(NamedTuple):
    """A figure, and its standard error."""

    value: float
    error: float


def kernel_distance(a_MD: np.ndarray, b_ND: np.ndarray) -> Estimate:
    """The squared maximum mean discrepancy under k(x, y) = (x·y / D + 1)³ (arXiv:1801.01401, eq. 4).

    The mean of k over all pairs of distinct images within each set, less twice that over all pairs across. The error
    is of both sets together: each is cut into up to 20 blocks at random, and the estimates without one of them tell how
    much it varies (the delete-one-block jackknife). Of sets that hardly differ that would be small just where the
    estimate came out low; it is at least the spread that equal distributions have at these numbers.

    Raises:
        ValueError: fewer than 4 images in a set.
    """
    _check_numbers(a_MD, b_ND)
    num_blocks = min(NUM_BLOCKS, len(a_MD) // 2, len(b_ND) // 2)
    a, b = _Blocks(a_MD, num_blocks), _Blocks(b_ND, num_blocks)
    within_a, within_b, across = _sums_within(a), _sums_within(b), _sums_across(a, b)

    def discrepancy(aa, m, bb, n, ab):
        return aa / (m * (m - 1)) + bb / (n * (n - 1)) - 2 * ab / (m * n)

    m, n, aa, bb, ab = len(a_MD), len(b_ND), within_a.sum(), within_b.sum(), across.sum()
    # Without a block: all pairs less its row and its column, whose crossing would be taken away twice.
    aa_without, bb_without = (s.sum() - 2 * s.sum(1) + np.diag(s) for s in (within_a, within_b))
    without_a = discrepancy(aa_without, m - a.sizes, bb, n, ab - across.sum(1))
    without_b = discrepancy(aa, m, bb_without, n - b.sizes, ab - across.sum(0))
    variance = sum((num_blocks - 1) * np.var(without) for without in (without_a, without_b))
    error = np.sqrt(max(variance, _variance_of_equals(a.x_ND, b.x_ND)))
    return Estimate(float(discrepancy(aa, m, bb, n, ab)), float(error))


def _variance_of_equals(a_MD: np.ndarray, b_ND: np.ndarray) -> float:
    """Of the estimate, were the two distributions one: 2 E[k̃²] (1/M(M-1) + 1/N(N-1) + 2/MN), k̃ the centred kernel."""
    m, n = len(a_MD), len(b_ND)
    pairs = 1 / (m * (m - 1)) + 1 / (n * (n - 1)) + 2 / (m * n)
    return pairs * (_centred_square(a_MD[:MOST_CENTRED]) + _centred_square(b_ND[:MOST_CENTRED]))


def _centred_square(x_ND: np.ndarray) -> float:
    """E[k̃(x, x')²] without bias, by U-centring (Székely and Rizzo, arXiv:1310.2926)."""
    n, kernel = len(x_ND), (x_ND @ x_ND.T / x_ND.shape[1] + 1) ** 3
    np.fill_diagonal(kernel, 0)
    sums = kernel.sum(1)
    kernel -= sums[:, None] / (n - 2) + sums / (n - 2) - sums.sum() / ((n - 1) * (n - 2))
    np.fill_diagonal(kernel, 0)
    return float(np.square(kernel).sum() / (n * (n - 3)))


class _Blocks:
    """Features (N, D), shuffled, and where the blocks begin."""

    def __init__(self, x_ND: np.ndarray, num_blocks: int):
        # At random, because images come sorted by class, or with the classes in turn.
        self.x_ND = np.asarray(x_ND, dtype=np.float64)[np.random.default_rng(0).permutation(len(x_ND))]
        self.edges = np.linspace(0, len(x_ND), num_blocks + 1).astype(int)
        self.sizes = np.diff(self.edges)


def _sums_across(a: _Blocks, b: _Blocks) -> np.ndarray:
    """The sum of the kernel over each pair of blocks, (blocks of a, blocks of b)."""
    rows = []
    for block in np.split(a.x_ND, a.edges[1:-1]):
        kernel = (block @ b.x_ND.T / b.x_ND.shape[1] + 1) ** 3
        rows.append(np.add.reduceat(kernel.sum(0), b.edges[:-1]))
    return np.stack(rows)


def _sums_within(x: _Blocks) -> np.ndarray:
    """The same of a set with itself, without the pairs of an image with itself."""
    of_itself = (np.square(x.x_ND).sum(1) / x.x_ND.shape[1] + 1) ** 3
    return _sums_across(x, x) - np.diag(np.add.reduceat(of_itself, x.edges[:-1]))


def precision_and_recall(samples_MD: np.ndarray, real_ND: np.ndarray) -> tuple[float, float]:
    """The share of samples that lie among the real images, and of real images that lie among the samples.

    An image lies among others if it is no farther from one of them than that one's third-nearest neighbour among its
    own kind (arXiv:1904.06991, eq. 1-2, k = 3). Both depend on M and N: compare them at equal numbers.

    Raises:
        ValueError: fewer than 4 images in a set.
    """
    _check_numbers(samples_MD, real_ND)
    samples_MD, real_ND = (np.asarray(x, dtype=np.float64) for x in (samples_MD, real_ND))
    return _share_among(samples_MD, real_ND), _share_among(real_ND, samples_MD)


def _share_among(x_MD: np.ndarray, others_ND: np.ndarray) -> float:
    # The nearest of its own kind is the image itself.
    radii = [np.partition(d, NEIGHBOURS, axis=1)[:, NEIGHBOURS] for d in _squared_distances(others_ND, others_ND)]
    radius_N = np.concatenate(radii)
    return float(np.mean(np.concatenate([(d <= radius_N).any(1) for d in _squared_distances(x_MD, others_ND)])))


def _squared_distances(a_MD: np.ndarray, b_ND: np.ndarray):
    """|a - b|², some rows (rows, N) at a time."""
    norms_N = np.square(b_ND).sum(1)
    for first in range(0, len(a_MD), ROWS_AT_A_TIME):
        rows = a_MD[first : first + ROWS_AT_A_TIME]
        yield (np.square(rows).sum(1)[:, None] + norms_N - 2 * rows @ b_ND.T).clip(min=0)


def frechet_distance(a_MD: np.ndarray, b_ND: np.ndarray) -> float:
    """|μ_a - μ_b|² + tr(Σ_a + Σ_b - 2 (Σ_a Σ_b)^½) (arXiv:1706.08500, eq. 6)."""
    a, b = (np.asarray(x, dtype=np.float64) for x in (a_MD, b_ND))
    mean_term = np.square(a.mean(0) - b.mean(0)).sum()
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    # The eigenvalues of Σ_a Σ_b are real and not negative but for rounding; the root's trace is the sum of theirs.
    eigenvalues = np.linalg.eigvals(cov_a @ cov_b).real.clip(min=0)
    return float(mean_term + np.trace(cov_a) + np.trace(cov_b) - 2 * np.sqrt(eigenvalues).sum())


def least_for_frechet(num_features: int) -> int:
    """Images without which a Frechet distance says nothing: half of them must span the features of the covariance."""
    return 2 * (num_features + 1)


def _check_numbers(*sets: np.ndarray) -> None:
    if min(map(len, sets)) < LEAST_SAMPLES:
        raise ValueError(f"a distance needs at least {LEAST_SAMPLES} images of each kind, got {min(map(len, sets))}")
