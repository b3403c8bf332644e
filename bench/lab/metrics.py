"""What logs of training runs amount to: stability, sensitivity to the learning rate, speed. Imports no torch.

Each function has its equation and source. Losses that are not finite count as infinite.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from scalelong.train.spikes import ROWS_BEFORE_JUDGING, SMALLEST_DEVIATION, THRESHOLD, WINDOW

STABLE_LOSS = 1.1
"""How many times the best loss of all modes a rate's median loss may be to count as stable."""
STABLE_SHARE = 2 / 3
"""Of the seeds that must not diverge."""


def learning_rate_sensitivity(rates: ArrayLike, losses: ArrayLike, start_loss: float) -> float:
    """How much loss a wrong learning rate costs, as a share of what training gains at all: 0 is best, 1 worst.

    S = E_eta[min(l(eta), l0) - l*] / (l0 - l*), l* = min l, with eta log-uniform over [min rates, max rates]
    (Wortsman et al., arXiv:2309.14322, section 2, divided by l0 - l*). Between the rates l is interpolated linearly in
    log eta.

    Args:
        rates: (R,) learning rates, at least two different ones, in any order.
        losses: (R,) final losses; infinite or NaN where a run diverged.
        start_loss: l0, the loss before training.

    Returns:
        NaN if no rate improves on the start.
    """
    order = np.argsort(rates)
    log_rates = np.log2(np.asarray(rates, dtype=float)[order])
    capped = np.minimum(np.nan_to_num(np.asarray(losses, dtype=float)[order], nan=np.inf), start_loss)
    gain = start_loss - capped.min()
    width = log_rates[-1] - log_rates[0]
    if gain <= 0 or width == 0:
        return math.nan
    return float(np.trapezoid(capped - capped.min(), log_rates) / (width * gain))


class StableWidth(NamedTuple):
    """Which learning rates a network survives."""

    octaves: float
    """log2(largest / smallest) of the stable rates; 0 if there is one, NaN if there is none."""
    smallest: float
    largest: float
    """The ends of the stable rates; NaN if there are none."""
    first_diverging: float
    """The smallest rate at which more than a third of the seeds diverged; infinite if there is none."""


def stable_width(rates: ArrayLike, losses: ArrayLike, diverged: ArrayLike, best_loss: float) -> StableWidth:
    """How wide the band of good learning rates is.

    log2(eta_max / eta_min) over rates whose median loss is at most 1.1 x ``best_loss`` and of which at least 2/3 of the
    seeds did not diverge. Where such rates lie on both sides of others, the widest unbroken band counts.

    Args:
        rates: (R,), in any order.
        losses: (R, S) final losses of S seeds; NaN where there is no run.
        diverged: (R, S) whether the run diverged.
        best_loss: the best median loss of all modes that are compared.
    """
    order = np.argsort(rates)
    rates_R = np.asarray(rates, dtype=float)[order]
    losses_RS, diverged_RS = np.atleast_2d(losses)[order], np.atleast_2d(diverged)[order].astype(bool)
    medians_R = np.array([median_loss(row) for row in losses_RS])
    num_runs_R = np.maximum((~np.isnan(losses_RS) | diverged_RS).sum(axis=1), 1)
    # Counts are compared, not shares, whose rounding would decide at exactly two of three.
    survives_R = 3 * (num_runs_R - diverged_RS.sum(axis=1)) >= 3 * STABLE_SHARE * num_runs_R - 1e-9
    stable_R = (medians_R <= STABLE_LOSS * best_loss) & survives_R
    first_diverging = float(rates_R[~survives_R][0]) if not survives_R.all() else math.inf
    bands = np.split(np.flatnonzero(stable_R), np.flatnonzero(np.diff(np.flatnonzero(stable_R)) > 1) + 1)
    band = max(bands, key=lambda places: np.log2(rates_R[places[-1]] / rates_R[places[0]]) if len(places) else -1.0)
    if not len(band):
        return StableWidth(math.nan, math.nan, math.nan, first_diverging)
    smallest, largest = float(rates_R[band[0]]), float(rates_R[band[-1]])
    return StableWidth(math.log2(largest / smallest), smallest, largest, first_diverging)


def median_loss(losses: ArrayLike) -> float:
    """The median over seeds, in which a run that diverged (infinite) is worse than any; NaN are no runs.

    Of an even number the upper one of the two in the middle where they lie an infinity apart.
    """
    values = np.sort(np.asarray(losses, dtype=float))
    values = values[~np.isnan(values)]
    if not len(values):
        return math.nan
    low, high = values[(len(values) - 1) // 2], values[len(values) // 2]
    return float((low + high) / 2)


def robust_deviations(values: ArrayLike, window: int = WINDOW) -> np.ndarray:
    """How many robust deviations each value's logarithm lies above the median of those before it.

    z_t = (x_t - median) / max(1.4826 MAD, 0.01), x = log of the value, over the ``window`` values before it; NaN for
    the first 20, infinite where the value is not finite.
    """
    with np.errstate(all="ignore"):
        logs_T = np.log(np.asarray(values, dtype=float))
    z_T = np.full(len(logs_T), np.nan)
    for t in range(ROWS_BEFORE_JUDGING, len(logs_T)):
        before = logs_T[max(0, t - window) : t]
        before = before[np.isfinite(before)]
        if not np.isfinite(logs_T[t]):
            z_T[t] = -math.inf if logs_T[t] == -math.inf else math.inf
        elif len(before):
            median = np.median(before)
            deviation = max(1.4826 * np.median(np.abs(before - median)), SMALLEST_DEVIATION)
            z_T[t] = (logs_T[t] - median) / deviation
    return z_T


def spike_score(*series: ArrayLike, window: int = WINDOW, threshold: float = THRESHOLD) -> float:
    """The share of steps that spike, in all of the series at once if there are several.

    After OLMo 2 (arXiv:2501.00656, section 4.1), which counts values 7 standard deviations from a running mean; here 5
    robust deviations above the running median (``robust_deviations``), which spikes themselves do not widen. The first
    20 steps cannot be judged and do not count.

    Args:
        series: (T,) each, losses or norms of gradients, positive.
    """
    spikes_T = np.all([robust_deviations(values, window) > threshold for values in series], axis=0)
    num_judged = len(spikes_T) - ROWS_BEFORE_JUDGING
    return float(spikes_T[ROWS_BEFORE_JUDGING:].mean()) if num_judged > 0 else math.nan


def oscillation_range(norms: ArrayLike) -> float:
    """How far a norm swings: (q95 - q05) / median over the window given, its linear trend taken out.

    The quantity of ScaleLong's figure 1 (arXiv:2310.13545), made a number: ||h_i|| over steps.

    Args:
        norms: (T,), of consecutive logged steps.
    """
    values_T = np.asarray(norms, dtype=float)
    if len(values_T) < 3 or not np.isfinite(values_T).all():
        return math.nan
    times_T = np.arange(len(values_T)) - (len(values_T) - 1) / 2
    slope = (times_T * values_T).sum() / (times_T**2).sum()
    low, high = np.quantile(values_T - slope * times_T, [0.05, 0.95])
    return float((high - low) / np.median(values_T))


def growth_exponent(first: float, last: float, layers: int) -> float:
    """How fast a norm grows from layer to layer: (1 / layers) log(||last|| / ||first||); of gradients from the last
    layer to the first. 0: norms are preserved (Pennington et al., arXiv:1711.04735, in the log domain)."""
    return math.log(last / first) / layers if first > 0 and last > 0 else math.nan


class DepthLaw(NamedTuple):
    """E‖h_0‖² / ‖x‖² = slope * sum kappa_i² + offset, fitted."""

    slope: float
    offset: float
    r_squared: float


def fit_depth_law(kappa_squares: ArrayLike, ratios: ArrayLike) -> DepthLaw:
    """The least-squares line through points of different depths (arXiv:2310.13545, theorem 3.1).

    The theorem bounds ||h_i||² between lines in the sum of kappa_j² over j >= i; i = 0 is the whole network.

    Args:
        kappa_squares: (N,) the sum of squared factors of each network.
        ratios: (N,) its E‖h_0‖² / ‖x‖².

    Returns:
        R² is NaN where all ratios, or all sums, are the same.
    """
    x_N, y_N = np.asarray(kappa_squares, dtype=float), np.asarray(ratios, dtype=float)
    if np.ptp(x_N) == 0:
        return DepthLaw(math.nan, math.nan, math.nan)
    slope, offset = np.polyfit(x_N, y_N, 1)
    total = ((y_N - y_N.mean()) ** 2).sum()
    residual = ((y_N - slope * x_N - offset) ** 2).sum()
    return DepthLaw(float(slope), float(offset), float(1 - residual / total) if total > 0 else math.nan)


def smoothed(losses: ArrayLike, window: int) -> np.ndarray:
    """The mean of each loss and of those before it, ``window`` in all: (T,)."""
    values_T = np.nan_to_num(np.asarray(losses, dtype=float), nan=np.inf)
    return np.array([values_T[max(0, t + 1 - window) : t + 1].mean() for t in range(len(values_T))])


def images_to_target(images: ArrayLike, losses: ArrayLike, target: float) -> float:
    """How many images it takes until the loss is at most ``target``; infinite if it never is, or if there is no target.

    Between two points the loss is interpolated linearly.

    Args:
        images: (T,) images seen, ascending.
        losses: (T,) validation losses, or smoothed training losses.
        target: infinite where none is known.
    """
    images_T, losses_T = np.asarray(images, dtype=float), np.nan_to_num(np.asarray(losses, dtype=float), nan=np.inf)
    reached = np.flatnonzero(losses_T <= target)
    if not len(reached) or target == math.inf:
        return math.inf
    t = int(reached[0])
    if t == 0 or not np.isfinite(losses_T[t - 1]) or losses_T[t - 1] == losses_T[t]:
        return float(images_T[t])
    share = (losses_T[t - 1] - target) / (losses_T[t - 1] - losses_T[t])
    return float(images_T[t - 1] + share * (images_T[t] - images_T[t - 1]))


class Ratio(NamedTuple):
    """A ratio of medians with the interval that holds 95 % of its bootstrap replicates."""

    value: float
    low: float
    high: float


def ratio_of_medians(baseline: Sequence[float], other: Sequence[float], *, replicates: int = 10_000) -> Ratio:
    """How many times fewer images ``other`` takes: median(baseline) / median(other), over seeds.

    The interval is that of the percentile bootstrap (Efron and Tibshirani, 1993, chapter 13), seeds drawn with
    replacement from each side. Runs that never came there are infinite: so is a median of theirs, and the ratio is then
    infinite where only the baseline's is, 0 where only the other's is, NaN where both are.
    """
    if not len(baseline) or not len(other):
        return Ratio(math.nan, math.nan, math.nan)
    generator = np.random.default_rng(0)
    drawn = [
        _medians(generator.choice(np.asarray(side, dtype=float), (replicates, len(side)))) for side in (baseline, other)
    ]
    ratios = np.sort(_divide(*drawn))
    ratios = ratios[~np.isnan(ratios)]
    value = _divide(_medians(np.array([baseline], dtype=float)), _medians(np.array([other], dtype=float)))[0]
    if not len(ratios):
        return Ratio(float(value), math.nan, math.nan)
    low, high = (float(ratios[round(q * (len(ratios) - 1))]) for q in (0.025, 0.975))
    return Ratio(float(value), low, high)


def _medians(values: np.ndarray) -> np.ndarray:
    values = np.sort(values, axis=1)
    with np.errstate(invalid="ignore"):
        return (values[:, (values.shape[1] - 1) // 2] + values[:, values.shape[1] // 2]) / 2


def _divide(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    with np.errstate(all="ignore"):
        return a / b
