"""Compare advantages with the exact policy gradient of the enumerable world (`vineppo.conformance.world`).

The gradient of a group of G responses is (1/G) * sum over responses and tokens of A_t * grad log pi(a_t | s_t), with
respect to the logits of the table. Its expectation should be the gradient of the expected reward.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from vineppo.conformance.world import World, build_world
from vineppo.types import CreditFn, Rollout, RolloutGroup, TrainingSample

AdvantageFn = Callable[[Sequence[Rollout]], Sequence[Sequence[float]]]
"""Function (the G responses of a group, with their rewards) -> one row per response with the advantage of each of its T
tokens. `Rollout.response_ids`, `text`, `reward` and `sampler_logprobs` describe a response."""
GradientFn = Callable[[RolloutGroup, int], np.ndarray]
"""Function (group, number of the group) -> its policy gradient, divided by the number of responses, (states, 5)."""
_MAX_TUPLES = 20_000
"""Largest number of groups that are enumerated."""


@dataclass(frozen=True)
class Conformance:
    """Bias and variance of a credit method, in units of the exact policy gradient."""

    group_size: int
    """G, the number of responses per group."""
    groups: int
    """Number of groups in the expectation: all possible ones, or the number of sampled ones."""
    enumerated: bool
    """Whether all possible groups were enumerated, so that `bias`, `length` and `cosine` have no sampling error."""
    bias: float
    """Length of (expected gradient - exact gradient), divided by the length of the exact gradient. If groups were
    sampled, the part of the squared length that noise explains is subtracted."""
    noise: float
    """Size that `bias` would have by chance alone before this subtraction; 0 if all groups were enumerated."""
    z: float
    """Number of standard errors by which the squared length of the error exceeds that of an unbiased method; NaN if all
    groups were enumerated. Above 4, the method is biased."""
    length: float
    """Length of the expected gradient along the exact one, divided by the length of the exact one. A method that is
    unbiased up to a factor has this factor here, and a `cosine` of 1."""
    cosine: float
    """Cosine of the angle between the expected and the exact gradient."""
    variance: float
    """Mean squared distance of a group's gradient from the expected one, times G, divided by the squared length of the
    exact gradient. So many independent responses give a gradient whose noise is as large as the signal."""


def check_advantages(
    advantages: AdvantageFn, *, group_size: int = 1, groups: int = 0, world: World | None = None, seed: int = 0
) -> Conformance:
    """Measure the bias and the variance of an advantage function against the exact policy gradient.

    Args:
        advantages: the function. It may be random, and may sample from `world.continuations`.
        group_size: G, the number of responses that the function gets at once.
        groups: number of groups to sample; 0 enumerates all groups, which needs a function that is not random.
        world: the world; None builds the default one with 85 responses (21 if `group_size` is above 1).
        seed: seed of the sampled groups.
    Raises:
        ValueError: if there are too many groups to enumerate, if the function does not return one number per token, or
            if a number is not finite.
    """
    world = world or build_world(3 if group_size == 1 else 2)

    def gradient(group: RolloutGroup, number: int) -> np.ndarray:
        rows = advantages(group.rollouts)
        if len(rows) != group_size or any(len(a) != len(r.response_ids) for a, r in zip(rows, group.rollouts)):
            raise ValueError("the advantage function must return one row per response with one number per token")
        result = world.gradient_of_advantages(group.rollouts, rows)
        if not np.isfinite(result).all():
            raise ValueError("the advantage function returned a number that is not finite")
        return result

    return _measured(gradient, world, group_size, groups, seed)


def check_credit(
    credit: CreditFn, *, group_size: int = 1, groups: int = 0, world: World | None = None, seed: int = 0
) -> Conformance:
    """Measure a credit function of this package in the same way, with its token weights and alternatives.

    The arguments are those of `check_advantages`. The number of the group is the credit function's iteration.
    """
    world = world or build_world(3 if group_size == 1 else 2)

    def gradient(group: RolloutGroup, number: int) -> np.ndarray:
        samples, _ = credit([group], number)
        return world.table_gradient_of((1 / group_size, _with_weights(sample)) for sample in samples)

    return _measured(gradient, world, group_size, groups, seed)


def _with_weights(sample: TrainingSample) -> TrainingSample:
    """Multiply the advantages of a sample by the weights of their tokens."""
    weights = sample.weights or (1.0,) * len(sample.token_ids)
    rows = zip(sample.advantages, weights, sample.loss_mask, strict=True)
    return replace(sample, advantages=tuple(a * w * m for a, w, m in rows))


def _all_groups(world: World, group_size: int) -> Iterator[tuple[float, RolloutGroup]]:
    """Yield (probability, group) for every possible group."""
    for outcomes in itertools.product(world.outcomes, repeat=group_size):
        rollouts = tuple(replace(outcome.rollout) for outcome in outcomes)
        yield math.prod(outcome.probability for outcome in outcomes), RolloutGroup(world.problem, rollouts)


def _sampled_groups(world: World, group_size: int, groups: int, seed: int) -> Iterator[tuple[float, RolloutGroup]]:
    """Yield (1 / groups, group) for sampled groups."""
    for number in range(groups):
        group = world.sampled_group(group_size, seed * groups + number)
        yield 1 / groups, replace(group, rollouts=tuple(replace(rollout) for rollout in group.rollouts))


def _measured(gradient: GradientFn, world: World, group_size: int, groups: int, seed: int) -> Conformance:
    """Compute the expected gradient and its variance over all or over sampled groups."""
    count = groups or len(world.responses) ** group_size
    if not groups and count > _MAX_TUPLES:
        raise ValueError(
            f"{len(world.responses)} responses in groups of {group_size} give {count:,} groups, more than "
            f"{_MAX_TUPLES:,}; set groups to the number of groups to sample"
        )
    drawn = _sampled_groups(world, group_size, groups, seed) if groups else _all_groups(world, group_size)
    weights, rows = [], []
    for number, (weight, group) in enumerate(drawn):
        weights.append(weight)
        rows.append(gradient(group, number).ravel())
    probabilities, gradients = np.array(weights), np.array(rows)  # (groups,), (groups, states * 5)
    exact = world.table_gradient.ravel()
    size = float(exact @ exact)
    mean = probabilities @ gradients
    centred = gradients - mean
    spread = float(probabilities @ (centred**2).sum(1))
    error, noise, z = float(((mean - exact) ** 2).sum()), 0.0, math.nan
    if groups:
        spread *= groups / max(1, groups - 1)
        noise = spread / groups
        # The squared length of a mean of n independent gradients with covariance C has the variance 2 tr(C^2) / n^2.
        squares = float(((centred @ centred.T) ** 2).sum()) / groups**2
        z = (error - noise) / max(1e-300, math.sqrt(2 * squares) / groups)
    return Conformance(
        group_size=group_size,
        groups=count,
        enumerated=not groups,
        bias=math.sqrt(max(0.0, error - noise) / size),
        noise=math.sqrt(noise / size),
        z=z,
        length=float(mean @ exact) / size,
        cosine=float(mean @ exact) / math.sqrt(max(1e-300, float(mean @ mean)) * size),
        variance=spread * group_size / size,
    )
