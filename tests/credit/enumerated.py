"""Expected gradients of credit functions by enumeration, for the tests of several algorithms."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from dataclasses import replace

import numpy as np

from tests.world import World
from vineppo.types import CreditFn, RolloutGroup, TrainingSample


def weighted(samples: Iterable[TrainingSample], factor: float = 1.0) -> Iterable[tuple[float, TrainingSample]]:
    """Return pairs (factor, sample) for `World.table_gradient_of`, with the weights of tokens in the advantages."""
    for sample in samples:
        weights = sample.weights or (1.0,) * len(sample.token_ids)
        advantages = tuple(a * w * m for a, w, m in zip(sample.advantages, weights, sample.loss_mask, strict=True))
        yield factor, replace(sample, advantages=advantages)


def of_single_responses(w: World, credit: CreditFn) -> np.ndarray:
    """Expected gradient of a credit function that treats rollouts separately, shape (states, 5)."""
    samples, _ = credit([w.group()], 0)
    return w.table_gradient_of(zip(w.probabilities, samples, strict=True))


def of_groups(w: World, credit: CreditFn, group_size: int) -> np.ndarray:
    """Expected gradient of a group of independent responses, summed over the group, shape (states, 5)."""

    def terms() -> Iterable[tuple[float, TrainingSample]]:
        for outcomes in itertools.product(w.outcomes, repeat=group_size):
            group = RolloutGroup(w.problem, tuple(replace(outcome.rollout) for outcome in outcomes))
            yield from weighted(credit([group], 0)[0], math.prod(outcome.probability for outcome in outcomes))

    return w.table_gradient_of(terms())


def error(gradient: np.ndarray, exact: np.ndarray) -> float:
    """Length of the error relative to the length of the exact gradient."""
    return float(np.linalg.norm(gradient - exact) / np.linalg.norm(exact))


def length(gradient: np.ndarray, exact: np.ndarray) -> float:
    """Length of the gradient along the exact one; 1 for the exact one."""
    return float((gradient * exact).sum() / (exact * exact).sum())


def cosine(gradient: np.ndarray, exact: np.ndarray) -> float:
    """Cosine of the angle between two gradients."""
    return float((gradient * exact).sum() / np.linalg.norm(gradient) / np.linalg.norm(exact))
