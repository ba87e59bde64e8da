"""Intervals and estimators, compared with hand-computed, tabulated and enumerated numbers."""

from __future__ import annotations

import itertools
import json
import math
from typing import Any

import numpy as np
import pytest

from vineppo.statistics import (
    Interval,
    bootstrap_mean,
    interval_over_seeds,
    log_ratio_interval,
    pass_at_k,
    student_t_quantile,
    wilson,
)


@pytest.mark.parametrize(
    ("probability", "degrees", "tabulated"),
    [
        (0.975, 1, 12.706205),
        (0.975, 2, 4.302653),
        (0.975, 4, 2.776445),
        (0.975, 9, 2.262157),
        (0.975, 30, 2.042272),
        (0.975, 1000, 1.962339),
        (0.95, 4, 2.131847),
        (0.995, 7, 3.499483),
        (0.75, 1, 1.0),
        (0.9995, 1, 636.619249),
    ],
)
def test_t_quantiles_agree_with_the_table(probability: float, degrees: int, tabulated: float) -> None:
    assert student_t_quantile(probability, degrees) == pytest.approx(tabulated, abs=5e-7 * max(1, tabulated))
    assert student_t_quantile(1 - probability, degrees) == pytest.approx(-tabulated, abs=5e-6 * max(1, tabulated))


def test_t_quantile_of_one_half_is_zero() -> None:
    assert student_t_quantile(0.5, 4) == pytest.approx(0, abs=1e-9)


def test_interval_over_seeds_by_hand() -> None:
    interval = interval_over_seeds([0.6, 0.7, 0.8])  # sd 0.1, t_{0.975,2} = 4.302653, half = 0.430265 / sqrt(3)
    assert interval.mean == pytest.approx(0.7)
    assert interval.high - 0.7 == pytest.approx(0.248414, abs=1e-6)
    assert 0.7 - interval.low == pytest.approx(0.248414, abs=1e-6)


@pytest.mark.parametrize("values", [[0.4], [0.4, 0.4, 0.4]])
def test_seeds_without_spread_have_nan_bounds(values: list[float]) -> None:
    interval = interval_over_seeds(values)
    assert math.isnan(interval.low) and math.isnan(interval.high)
    assert json.loads(json.dumps(interval.as_dict())) == {"mean": pytest.approx(0.4), "low": None, "high": None}


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    [
        (0, 10, 0.0, 0.277533),  # z^2 / (n + z^2) with z^2 = 3.841459
        (10, 10, 0.722467, 1.0),
        (5, 10, 0.236593, 0.763407),
        (1, 1, 0.206549, 1.0),
        (15, 148, 0.062386, 0.160448),  # Newcombe 1998, table I: .0624 to .1605
        (81, 263, 0.255259, 0.366179),  # Newcombe 1998, table I: .2553 to .3662
    ],
)
def test_wilson_intervals_agree_with_known_values(successes: int, trials: int, low: float, high: float) -> None:
    interval = wilson(successes, trials, 0.95)
    assert interval.mean == successes / trials
    assert interval.low == pytest.approx(low, abs=1e-4)
    assert interval.high == pytest.approx(high, abs=1e-4)


def test_wilson_raises_for_impossible_counts() -> None:
    with pytest.raises(ValueError, match="0 <= successes <= trials"):
        wilson(3, 2)
    with pytest.raises(ValueError, match="trials"):
        wilson(0, 0)


@pytest.mark.parametrize(("value", "bounds"), [(0.0, (0.0, 0.161125)), (1.0, (0.838875, 1.0))])
def test_bootstrap_of_equal_zeros_or_ones_is_the_wilson_interval(value: float, bounds: tuple[float, float]) -> None:
    interval = bootstrap_mean([value] * 20, seed=0)  # z^2 / (20 + z^2) = 0.161125
    assert interval.mean == value
    assert (interval.low, interval.high) == pytest.approx(bounds, abs=1e-6)


def test_bootstrap_of_other_equal_values() -> None:
    inside = bootstrap_mean([0.5] * 10, seed=0)
    assert (inside.low, inside.high) == pytest.approx((0.236593, 0.763407), abs=1e-6)
    outside = bootstrap_mean([2.5] * 10, seed=0)
    assert outside.mean == 2.5 and math.isnan(outside.low) and math.isnan(outside.high)


def test_bootstrap_matches_the_normal_interval_of_a_large_sample() -> None:
    values = np.repeat([0.0, 1.0], [700, 300])  # standard error sqrt(.3 * .7 / 1000) = 0.014491
    interval = bootstrap_mean(values, seed=3, num_resamples=4000)
    assert interval.mean == pytest.approx(0.3)
    assert interval.low == pytest.approx(0.3 - 1.96 * 0.014491, abs=0.002)
    assert interval.high == pytest.approx(0.3 + 1.96 * 0.014491, abs=0.002)


def test_bootstrap_coverage_is_about_95_percent() -> None:
    generator = np.random.default_rng(0)
    hits = 0
    for trial in range(300):
        interval = bootstrap_mean((generator.random(80) < 0.4).astype(float), seed=trial, num_resamples=400)
        hits += interval.low <= 0.4 <= interval.high
    assert 0.91 <= hits / 300 <= 0.98


def test_bootstrap_is_deterministic_and_widens_with_the_level() -> None:
    values = [0.0, 1.0, 1.0, 0.0, 1.0, 0.5]
    assert bootstrap_mean(values, seed=7) == bootstrap_mean(np.array(values), seed=7)
    wide, narrow = bootstrap_mean(values, seed=7, level=0.99), bootstrap_mean(values, seed=7, level=0.5)
    assert wide.low < narrow.low < wide.mean < narrow.high < wide.high


@pytest.mark.parametrize("values", [[], [0.0, math.nan]])
def test_bootstrap_raises_for_no_values_or_nan(values: list[float]) -> None:
    with pytest.raises(ValueError, match="bootstrap needs"):
        bootstrap_mean(values, seed=0)


def test_pass_at_k_equals_enumeration() -> None:
    """Trap 15: pass@k averages over subsets of the samples, and pass@1 is the mean."""
    for num_samples, num_correct in itertools.product(range(1, 8), range(8)):
        if num_correct > num_samples:
            continue
        outcomes = [1] * num_correct + [0] * (num_samples - num_correct)
        for k in range(1, num_samples + 1):
            subsets = list(itertools.combinations(outcomes, k))
            share = sum(any(subset) for subset in subsets) / len(subsets)
            assert pass_at_k(num_samples, num_correct, k) == pytest.approx(share, abs=1e-12)
        assert pass_at_k(num_samples, num_correct, 1) == pytest.approx(num_correct / num_samples)


def test_pass_at_k_of_many_samples_does_not_overflow() -> None:
    assert pass_at_k(100_000, 1, 1000) == pytest.approx(0.01)


def test_pass_at_k_raises_if_k_exceeds_the_number_of_samples() -> None:
    with pytest.raises(ValueError, match="pass@5"):
        pass_at_k(4, 2, 5)


def test_interval_as_dict() -> None:
    assert Interval(0.5, 0.25, 0.75).as_dict() == {"mean": 0.5, "low": 0.25, "high": 0.75}


# --- ratios


def ratio_of_means(first: np.ndarray, second: np.ndarray) -> tuple[float, list[Any]]:
    """Return mean(first) / mean(second), and this ratio without each run of the first and of the second group."""
    means = [(values.sum() - values) / (values.size - 1) for values in (first, second)]
    return first.mean() / second.mean(), [means[0] / second.mean(), first.mean() / means[1]]


def test_log_ratio_interval_by_hand() -> None:
    """Without a run, the ratio is 2 or 8 in one group and always 4 in the other: v = 1/2 * 2 * log(2)^2, 1 degree."""
    interval = log_ratio_interval(4.0, [[2.0, 8.0], [4.0, 4.0, 4.0]])
    factor = math.exp(12.706205 * math.log(2))
    assert (interval.mean, interval.low, interval.high) == pytest.approx((4.0, 4 / factor, 4 * factor), rel=1e-6)


@pytest.mark.parametrize(
    ("ratio", "without_one"),
    [
        (2.0, [[2.0], [1.0, 3.0]]),
        (2.0, [[2.0, 2.0], [2.0, 2.0]]),
        (2.0, [[1.0, math.nan], [1.0, 3.0]]),
        (2.0, [[1.0, math.inf], [1.0, 3.0]]),
        (0.0, [[1.0, 2.0], [1.0, 3.0]]),
    ],
)
def test_log_ratio_interval_without_bounds(ratio: float, without_one: list[list[float]]) -> None:
    interval = log_ratio_interval(ratio, without_one)
    assert math.isnan(interval.low) and math.isnan(interval.high)


@pytest.mark.parametrize("num_runs", [3, 5, 10])
@pytest.mark.parametrize("kind", ["log-normal", "skewed", "discrete"])
def test_log_ratio_interval_covers(kind: str, num_runs: int) -> None:
    """The share of 2000 simulated comparisons whose interval contains the true ratio, 2, is near 95%."""
    draw = np.random.default_rng(num_runs)
    sample = {
        "log-normal": lambda: np.exp(0.4 * draw.standard_normal(num_runs)) / math.exp(0.08),
        "skewed": lambda: 0.6 + 0.4 * draw.exponential(size=num_runs),
        "discrete": lambda: draw.choice([0.8, 1.0, 1.2], size=num_runs),  # as if evaluated at few points
    }[kind]
    covered, percentile = [], []
    for _ in range(2000):
        first, second = 2 * sample(), sample()
        interval = log_ratio_interval(*ratio_of_means(first, second))
        covered.append(math.isnan(interval.low) or interval.low <= 2 <= interval.high)
        rows = draw.integers(0, num_runs, (2, 100, num_runs))
        low, high = np.quantile(first[rows[0]].mean(1) / second[rows[1]].mean(1), [0.025, 0.975])
        percentile.append(low <= 2 <= high)
    assert 0.93 <= np.mean(covered) <= 0.995
    assert np.mean(percentile) < np.mean(covered) - (0.005 if num_runs == 10 else 0.03)
