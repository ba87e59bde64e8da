"""Give statistics of states a confidence interval by resampling problems."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from vineppo.statistics import Interval

MIN_PROBLEMS = 10
"""With fewer problems, a percentile bootstrap over problems is too narrow to conclude anything."""

Statistic = Callable[[np.ndarray, np.ndarray], Mapping[str, float]]
"""Function (indices of rows, label of the problem of each row) -> name -> number; NaN if it is not defined. In a
resample, a problem that was drawn twice has two labels."""


def bootstrap(
    problems: Sequence[int] | np.ndarray,
    statistic: Statistic,
    *,
    seed: int,
    num_resamples: int = 500,
    level: float = 0.95,
) -> dict[str, Interval]:
    """Return statistics of rows with percentile bootstrap intervals over problems.

    All rows of a problem are drawn together, because the states of a problem are not independent of each other.

    Args:
        problems: problem of each row, shape (n,).
        statistic: computes the statistics from rows.
        seed: seed of the resampling.
        num_resamples: number of resamples.
        level: confidence level.
    Returns:
        Name -> interval. Its mean is the statistic of all rows. Its bounds are NaN for a single problem, or if the
        statistic is not defined in more than half of the resamples.
    """
    labels = np.asarray(problems)
    rows = [np.flatnonzero(labels == problem) for problem in np.unique(labels)]
    point = statistic(np.arange(len(labels)), labels)
    draws: dict[str, list[float]] = {name: [] for name in point}
    if len(rows) > 1:
        generator = np.random.default_rng(seed)
        for _ in range(num_resamples):
            chosen = generator.integers(0, len(rows), len(rows))
            indices = np.concatenate([rows[problem] for problem in chosen])
            drawn = np.concatenate([np.full(len(rows[problem]), n) for n, problem in enumerate(chosen)])
            for name, value in statistic(indices, drawn).items():
                if math.isfinite(value):
                    draws[name].append(value)
    return {name: _interval(value, draws[name], num_resamples, level) for name, value in point.items()}


def _interval(value: float, draws: Sequence[float], num_resamples: int, level: float) -> Interval:
    """Return the percentile interval of the draws around a value, with NaN bounds if too few are known."""
    if not math.isfinite(value) or len(draws) <= num_resamples / 2:
        return Interval(value, math.nan, math.nan)
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return Interval(value, float(low), float(high))
