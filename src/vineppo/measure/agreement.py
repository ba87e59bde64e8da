"""Compare estimated values of states with gold values whose noise is known.

A gold value is the mean reward of N continuations. Its error has the variance s^2 / N, where s^2 is the sample variance
of the N rewards. Squared differences from gold contain this variance, so it is subtracted: the results are those
against exact values, up to their confidence intervals. n is the number of states in shapes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

CLEAR = 2.0
"""Number of standard errors by which a gold number must differ from a bound to count as above or below it."""


@dataclass(frozen=True)
class Gold:
    """Gold values of n states."""

    values: np.ndarray
    """Mean reward of the continuations of each state, shape (n,)."""
    variances: np.ndarray
    """Variance of the error of each value, s^2 / N, shape (n,)."""

    @classmethod
    def of_rewards(cls, rewards: np.ndarray) -> Gold:
        """Return the gold values of rewards, shape (n, N), in which NaN stands for a continuation without a reward."""
        known = np.isfinite(rewards)
        counts = known.sum(1)
        filled = np.where(known, rewards, 0.0)
        means = filled.sum(1) / np.maximum(1, counts)
        squares = (np.where(known, rewards - means[:, None], 0.0) ** 2).sum(1)
        means = np.where(counts > 0, means, np.nan)
        variances = squares / np.maximum(1, counts - 1) / np.maximum(1, counts)
        return cls(means, np.where(counts > 1, variances, np.nan))


def ceiling(variance_of_gold: float, noise: float) -> float:
    """Return the largest correlation with gold that an estimate can reach in expectation: that of the exact values.

    With gold = exact + error, the correlation of exact values and gold is sqrt(Var(exact) / Var(gold)), and
    Var(exact) = Var(gold) - Var(error).

    Args:
        variance_of_gold: variance of the gold values.
        noise: mean variance of their errors.
    Returns:
        The ceiling; 0 if the noise explains all of the variance, NaN if gold does not vary.
    """
    return math.sqrt(max(0.0, 1 - noise / variance_of_gold)) if variance_of_gold > 0 else math.nan


def centred(numbers: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return each number minus the mean of the numbers with the same label, shape (n,)."""
    _, places = np.unique(labels, return_inverse=True)
    means = np.bincount(places, numbers) / np.bincount(places)
    return numbers - means[places]


def correlation(first: np.ndarray, second: np.ndarray) -> float:
    """Return Pearson's correlation of two arrays, or NaN if one of them does not vary."""
    a, b = first - first.mean(), second - second.mean()
    size = math.sqrt(float((a * a).sum()) * float((b * b).sum()))
    return float((a * b).sum()) / size if size > 1e-12 else math.nan


def of_values(gold: Gold, estimate: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Compare the estimates of n states with their gold values.

    Args:
        gold: the gold values.
        estimate: estimated value of each state, shape (n,).
        labels: problem of each state, shape (n,).
    Returns:
        `bias`: mean of estimate - gold. `rmse`: root of the mean squared error against exact values.
        `explained_variance`: 1 - mse / Var(exact); 0 is the error of one constant for all states, their mean value.
        `explained_within`: the same with the variance within problems; 0 is the error of one constant per problem, the
        mean value of its states. `correlation` and `correlation_within`: over all states, and of the deviations from
        the means of the problems; `ceiling` and `ceiling_within`: what exact values would reach.
        `calibration_error`: mean distance of the mean estimate from the mean gold value over ten bins of the estimate.
    """
    noise = float(gold.variances.mean())
    mse = float(((estimate - gold.values) ** 2).mean()) - noise
    total = float(gold.values.var())
    inner = centred(gold.values, labels)
    _, places, sizes = np.unique(labels, return_inverse=True, return_counts=True)
    # The mean of a problem contains 1/size of the error of each of its states.
    inner_noise = float((gold.variances * (1 - 1 / sizes[places])).mean())
    within = float((inner**2).mean())
    return {
        "bias": float((estimate - gold.values).mean()),
        "rmse": math.sqrt(max(0.0, mse)),
        "explained_variance": _explained(mse, total - noise),
        "explained_within": _explained(mse, within - inner_noise),
        "correlation": correlation(estimate, gold.values),
        "ceiling": ceiling(total, noise),
        "correlation_within": correlation(centred(estimate, labels), inner),
        "ceiling_within": ceiling(within, inner_noise),
        "calibration_error": calibration_error(estimate, gold.values),
    }


def _explained(mse: float, variance: float) -> float:
    """Return the share of a variance that is not error, or NaN if there is no variance."""
    return 1 - mse / variance if variance > 1e-12 else math.nan


def bins_of(estimate: np.ndarray, count: int = 10) -> np.ndarray:
    """Return the bin of each estimate: 0 to count - 1, of equal width in [0, 1]; others are in the nearest bin."""
    return np.clip((estimate * count).astype(int), 0, count - 1)


def calibration(estimate: np.ndarray, gold: np.ndarray, count: int = 10) -> list[tuple[float, float, int]]:
    """Return (mean estimate, mean gold value, number of states) of each bin of the estimate that has states."""
    bins = bins_of(estimate, count)
    chosen = [bins == number for number in range(count)]
    return [(float(estimate[c].mean()), float(gold[c].mean()), int(c.sum())) for c in chosen if c.any()]


def calibration_error(estimate: np.ndarray, gold: np.ndarray) -> float:
    """Return the mean of |mean estimate - mean gold value| over the bins, weighted by their numbers of states."""
    rows = calibration(estimate, gold)
    return sum(abs(a - b) * n for a, b, n in rows) / max(1, len(estimate))


def of_labels(gold: Gold, estimate: np.ndarray, threshold: float) -> dict[str, float]:
    """Return the shares of bad states that an estimate calls good, and of good states that it calls bad.

    Good means a value of at least `threshold`. States whose gold value is within two standard errors of the threshold
    are left out.
    """
    distance = gold.values - threshold
    clear = np.abs(distance) > CLEAR * np.sqrt(gold.variances)
    bad, good = clear & (distance < 0), clear & (distance >= 0)
    called_good = estimate >= threshold
    return {
        "bad_called_good": float(called_good[bad].mean()) if bad.any() else math.nan,
        "good_called_bad": float((~called_good[good]).mean()) if good.any() else math.nan,
    }


def of_advantages(gold: Gold, estimate: np.ndarray) -> dict[str, float]:
    """Compare the estimated advantages of steps with their gold advantages.

    Args:
        gold: gold advantage of each step and the variance of its error, shape (steps,).
        estimate: estimated advantages, shape (steps,).
    Returns:
        `advantage_rmse`: root of the mean squared error, without gold's noise. `sign_accuracy`: share of the steps with
        the right sign, among those whose gold advantage is more than two standard errors from 0. An estimate of 0 has
        neither sign and counts as one half, so a guess has 1/2.
    """
    mse = float(((estimate - gold.values) ** 2).mean() - gold.variances.mean()) if len(estimate) else math.nan
    clear = np.abs(gold.values) > CLEAR * np.sqrt(gold.variances)
    clear &= np.abs(gold.values) > 1e-9
    agreement = np.sign(estimate[clear]) * np.sign(gold.values[clear])
    return {
        "advantage_rmse": math.sqrt(max(0.0, mse)) if math.isfinite(mse) else math.nan,
        "sign_accuracy": float((1 + agreement).mean() / 2) if clear.any() else math.nan,
    }


def of_depth(gold: Gold, estimate: np.ndarray, depth: np.ndarray, bins: int = 5) -> dict[str, float]:
    """Return the RMSE in bins of the relative depth, and how it changes along the response.

    Args:
        depth: share of the steps of the response that stand before the state, in [0, 1), shape (n,).
        bins: number of bins of equal width.
    Returns:
        `depth_0` to `depth_{bins-1}`: RMSE in each bin, and `trend`: RMSE over the last two fifths of the depth minus
        RMSE over the first two fifths. NaN where there is no state.
    """
    number = np.clip((depth * bins).astype(int), 0, bins - 1)
    result = {f"depth_{b}": _rmse(gold, estimate, number == b) for b in range(bins)}
    result["trend"] = _rmse(gold, estimate, depth >= 0.6) - _rmse(gold, estimate, depth < 0.4)
    return result


def _rmse(gold: Gold, estimate: np.ndarray, chosen: np.ndarray) -> float:
    """Return the RMSE of the chosen states against exact values, or NaN if there are none."""
    if not chosen.any():
        return math.nan
    squares = (estimate[chosen] - gold.values[chosen]) ** 2 - gold.variances[chosen]
    return math.sqrt(max(0.0, float(squares.mean())))


def choice_score(gold: Gold, estimate: np.ndarray) -> dict[str, float] | None:
    """Score the choice of the best of several next steps at one state.

    The top steps are those whose gold value is within two standard errors (of the difference) of the largest one. The
    estimate chooses the step with its largest value; ties are broken at random, so the score is an expectation.

    Args:
        gold: gold value of the state after each step, shape (actions,).
        estimate: estimated values of the same states, shape (actions,).
    Returns:
        `accuracy`: probability that the choice is a top step; `chance`: that of a random choice; `regret`: largest gold
        value minus that of the choice; `chance_regret`: the same for a random choice. None if all steps are top steps,
        because there is nothing to choose.
    """
    best = int(np.argmax(gold.values))
    gap = gold.values[best] - gold.values
    top = gap <= CLEAR * np.sqrt(gold.variances + gold.variances[best])
    top[best] = True
    if top.all():
        return None
    chosen = estimate >= estimate.max() - 1e-12
    return {
        "accuracy": float(top[chosen].mean()),
        "chance": float(top.mean()),
        "regret": float(gap[chosen].mean()),
        "chance_regret": float(gap.mean()),
    }
