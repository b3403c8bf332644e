"""Metrics of the laboratory on logs whose values are known."""

import math

import numpy as np
import pytest

from scalelong.bench.lab.metrics import (
    fit_depth_law,
    growth_exponent,
    images_to_target,
    learning_rate_sensitivity,
    median_loss,
    oscillation_range,
    ratio_of_medians,
    robust_deviations,
    smoothed,
    spike_score,
    stable_width,
)

INF, NAN = math.inf, math.nan


def noise(num: int, spread: float, seed: int = 0) -> np.ndarray:
    return np.exp(spread * np.random.default_rng(seed).standard_normal(num))


def test_sensitivity_is_the_mean_excess_over_log_rates():
    assert learning_rate_sensitivity([1, 2, 4], [0.2, 0.2, 0.2], 1.0) == 0
    # The excess rises linearly from 0 to all that training gains over one of two octaves: half of a half.
    assert learning_rate_sensitivity([4, 1, 2], [1.0, 0.2, 0.2], 1.0) == pytest.approx(0.25)
    assert learning_rate_sensitivity([1, 2], [0.2, 0.6], 1.0) == pytest.approx(0.25)
    assert learning_rate_sensitivity([1, 2, 4, 8], [0.2, INF, NAN, 7.0], 1.0) == pytest.approx(2.5 / 3)
    assert math.isnan(learning_rate_sensitivity([1, 2], [1.0, 2.0], 1.0))
    assert math.isnan(learning_rate_sensitivity([1], [0.5], 1.0))


def test_sensitivity_weighs_octaves_and_not_the_number_of_rates():
    assert learning_rate_sensitivity([1, 4], [0.0, 1.0], 1.0) == learning_rate_sensitivity(
        [1, 2, 2 * 2**0.5, 4], [0.0, 0.5, 0.75, 1.0], 1.0
    )


def test_stable_width_counts_octaves_of_good_rates():
    losses = [[0.5] * 3, [0.10, 0.11, 0.9], [0.1, 0.1, INF], [0.1, INF, INF], [INF] * 3]
    diverged = np.isinf(losses)
    width = stable_width([1, 2, 8, 16, 32], losses, diverged, best_loss=0.1)
    assert width == (2.0, 2.0, 8.0, 16.0)
    assert stable_width([2], [[0.1]], [[False]], 0.1) == (0.0, 2.0, 2.0, INF)
    none = stable_width([1, 2], [[0.2], [0.3]], [[False], [False]], 0.1)
    assert math.isnan(none.octaves)
    assert none.first_diverging == INF


def test_a_gap_is_no_part_of_the_stable_width():
    losses = [[0.1], [0.1], [0.9], [0.1], [0.1], [0.1]]
    assert stable_width([1, 2, 4, 8, 16, 32], losses, np.zeros((6, 1)), 0.1)[:3] == (2.0, 8.0, 32.0)


def test_a_diverged_seed_is_worse_than_any_in_a_median():
    assert median_loss([0.1, INF, 0.2]) == 0.2
    assert median_loss([0.1, INF]) == INF
    assert median_loss([0.1, NAN, 0.3]) == pytest.approx(0.2)
    assert math.isnan(median_loss([NAN]))


def test_spikes_are_counted_and_noise_is_not():
    values = noise(520, 0.05)
    assert spike_score(values) <= 2 / 500
    values[[100, 200, 300, 400]] *= 2.0
    assert spike_score(values) == pytest.approx(4 / 500, abs=2 / 500)
    other = noise(520, 0.05, seed=1)
    other[[200, 400, 450]] *= 2.0
    assert spike_score(values, other) == 2 / 500  # in both at once


def test_spikes_do_not_hide_those_that_follow():
    values = noise(200, 0.05)
    values[100:130] *= 10.0
    z = robust_deviations(values)
    assert (z[100:130] > 20).all()


def test_what_is_not_finite_spikes_and_a_fall_does_not():
    values = noise(60, 0.01)
    values[40:] /= 10
    assert spike_score(values) == 0
    values[50] = NAN
    assert spike_score(values) == 1 / 40
    assert math.isnan(spike_score(values[:20]))


def test_deviations_are_of_logarithms_over_a_window():
    values = np.tile([math.exp(-1), math.exp(1)], 50)
    z = robust_deviations([*values, math.exp(10)])
    assert z[-1] == pytest.approx(10 / 1.4826)
    assert np.isnan(z[:20]).all()


def test_oscillation_is_the_range_without_its_trend():
    times = np.arange(2001)
    wave = np.sin(2 * np.pi * times / 200)
    expected = 2 * math.sin(0.45 * math.pi)  # quantiles of a sine
    assert oscillation_range(10 + wave) == pytest.approx(expected / 10, rel=0.02)
    assert oscillation_range(10 + wave + 0.004 * (times - 1000)) == pytest.approx(expected / 10, rel=0.02)
    assert oscillation_range(np.full(10, 3.0)) == 0
    assert math.isnan(oscillation_range([1.0, INF, 2.0]))


def test_growth_is_per_layer():
    assert growth_exponent(2.0, 2.0 * math.exp(0.3 * 12), 12) == pytest.approx(0.3)
    assert math.isnan(growth_exponent(0.0, 1.0, 3))


def test_the_depth_law_is_a_line():
    law = fit_depth_law([1, 2, 6, 12], [4.0, 7.0, 19.0, 37.0])
    assert law == (pytest.approx(3), pytest.approx(1), pytest.approx(1))
    bent = fit_depth_law([0, 1, 2], [0.0, 0.0, 3.0])
    assert bent.r_squared == pytest.approx(0.75)
    assert math.isnan(fit_depth_law([1, 1], [2, 3]).slope)


def test_images_to_target_are_interpolated_and_infinite_if_it_is_never_reached():
    images, losses = [100, 200, 300, 400], [1.0, 0.8, 0.4, 0.6]
    assert images_to_target(images, losses, 0.6) == 250
    assert images_to_target(images, losses, 0.4) == 300
    assert images_to_target(images, losses, 0.3) == INF
    assert images_to_target(images, losses, 2.0) == 100
    assert images_to_target(images, losses, INF) == INF
    assert images_to_target(images, [1.0, NAN, 0.4, 0.4], 0.5) == 300


def test_smoothing_is_over_the_last_losses():
    assert smoothed([1.0, 3.0, 5.0, 7.0], 2).tolist() == [1.0, 2.0, 4.0, 6.0]
    assert smoothed([1.0, NAN, 5.0, 7.0], 2).tolist() == [1.0, INF, INF, 6.0]


def test_a_ratio_of_medians_has_an_interval_that_holds_it():
    ratio = ratio_of_medians([200.0, 210.0, 190.0, 205.0, 195.0], [100.0, 105.0, 95.0, 101.0, 99.0])
    assert ratio.value == 2.0
    assert 1.8 < ratio.low < 2.0 < ratio.high < 2.2
    assert ratio == ratio_of_medians([200.0, 210.0, 190.0, 205.0, 195.0], [100.0, 105.0, 95.0, 101.0, 99.0])
    assert ratio_of_medians([100.0] * 5, [INF] * 5).value == 0
    assert ratio_of_medians([INF] * 5, [100.0] * 5).value == INF
    assert math.isnan(ratio_of_medians([INF] * 5, [INF] * 5).value)
    assert math.isnan(ratio_of_medians([], [1.0]).value)
