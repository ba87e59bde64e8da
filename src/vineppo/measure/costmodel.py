"""Fit the seconds of a computation over the length of a chain, and find where two costs are equal."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

POWERS = (0, 1, 2, 3)
"""Powers of the number of steps in the cost model."""


@dataclass(frozen=True)
class CostModel:
    """Seconds = sum of coefficient * steps^power, with coefficients of at least 0.

    The power 0 is work per response whatever its length, such as a share of the optimizer step. The power 1 is work per
    token of the response, 2 is work per token of continuations (and attention of a forward pass), 3 is the attention of
    continuations to their context.
    """

    coefficients: tuple[float, ...]
    """Seconds, and seconds per steps, steps^2 and steps^3, shape (4,)."""

    def seconds(self, steps: float) -> float:
        """Return the predicted seconds for a chain of this number of steps."""
        return sum(c * steps**power for c, power in zip(self.coefficients, POWERS, strict=True))


def fit_cost(steps: Sequence[float], seconds: Sequence[float]) -> CostModel:
    """Fit a cost model by least squares of the relative errors, with coefficients of at least 0.

    All subsets of the powers are fitted, and the best one without a negative coefficient is the result. That is the
    constrained optimum, because the optimum is unconstrained in its own subset.

    Args:
        steps: numbers of steps, at least one.
        seconds: measured seconds, above 0.
    Raises:
        ValueError: if a number is not positive.
    """
    x, y = np.asarray(steps, dtype=float), np.asarray(seconds, dtype=float)
    if not len(x) or (x <= 0).any() or (y <= 0).any():
        raise ValueError("a cost model needs positive numbers of steps and seconds")
    # Dividing each row by its seconds makes the errors relative, so that long chains do not decide alone.
    rows = np.stack([x**power for power in POWERS], axis=1) / y[:, None]  # (n, 4)
    best, best_error = (0.0,) * len(POWERS), math.inf
    for size in range(1, min(len(x), len(POWERS)) + 1):
        for chosen in itertools.combinations(range(len(POWERS)), size):
            scale = np.abs(rows[:, chosen]).max(axis=0)
            found = np.linalg.lstsq(rows[:, chosen] / scale, np.ones(len(x)), rcond=None)[0] / scale
            error = float(((rows[:, chosen] @ found - 1) ** 2).sum())
            if (found >= 0).all() and error < best_error - 1e-15:
                whole = [0.0] * len(POWERS)
                for place, value in zip(chosen, found, strict=True):
                    whole[place] = float(value)
                best, best_error = tuple(whole), error
    return CostModel(best)


def break_even(
    first: Callable[[float], float], second: Callable[[float], float], longest: float, shortest: float = 1.0
) -> float | None:
    """Return the smallest number of steps at which two costs are equal, or None if one of them is always smaller.

    The range is searched at 400 lengths with equal ratios, and the first change of order is refined by bisection.

    Args:
        first: seconds over the number of steps.
        second: the same of the alternative.
        longest, shortest: range of the numbers of steps.
    """
    lengths = [shortest * (longest / shortest) ** (n / 399) for n in range(400)]
    cheaper = [first(n) <= second(n) for n in lengths]
    for low, high, before, after in zip(lengths, lengths[1:], cheaper, cheaper[1:], strict=False):
        if before == after:
            continue
        for _ in range(60):
            middle = math.sqrt(low * high)
            low, high = (middle, high) if (first(middle) <= second(middle)) == before else (low, middle)
        return math.sqrt(low * high)
    return None
