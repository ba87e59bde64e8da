"""What an update is made from: training samples with the trainer's own log-probabilities, and how they are divided."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, TypeVar

from vineppo.types import Alternative, TrainingSample, UserError

T = TypeVar("T")


@dataclass(frozen=True)
class Experience:
    """A training sample with the trainer's log-probabilities of its trained tokens, shape (N,)."""

    sample: TrainingSample
    old_logprobs: tuple[float, ...]
    old_alternatives: tuple[float, ...]
    """Log-probabilities of the sample's alternatives, shape (A,)."""
    ref_logprobs: tuple[float, ...] | None


class Counts(NamedTuple):
    """What sums over a minibatch are divided by."""

    tokens: float
    """Sum of the weights of the trained tokens."""
    rollouts: float
    """Rollouts that the minibatch stands for: its share of the samples, of the iteration's rollouts."""
    seen: float
    """Sum of the weights of the tokens in the forward pass, which `policy/kl_old` is a mean over."""


def check_samples(samples: Sequence[TrainingSample], *, with_returns: bool) -> None:
    """Refuse what a credit function must not return.

    Args:
        with_returns: whether there is a value network, which learns from returns.
    Raises:
        UserError: naming the first sample that is wrong.
    """
    for number, sample in enumerate(samples):
        T = len(sample.token_ids)
        lists = {
            name: getattr(sample, name)
            for name in ("loss_mask", "sampler_logprobs", "advantages", "weights", "returns", "values")
        }
        for name, row in lists.items():
            if row is not None and len(row) != T:
                raise UserError(
                    f"training sample {number} of the credit function has {len(row)} {name} for {T} tokens; every list "
                    "of a sample has one entry per token"
                )
        wrong = [weight for weight in sample.weights or () if not 0 <= weight < math.inf]
        if wrong:
            raise UserError(
                f"training sample {number} of the credit function has a weight of {wrong[0]}; allowed: finite numbers "
                "of at least 0"
            )
        if with_returns and (sample.returns is None or sample.values is None):
            raise UserError(
                f"training sample {number} of the credit function has no returns and values, from which the value "
                "network learns; give both with every sample"
            )


def minibatches(order: Sequence[T], size: int, num_rollouts: int) -> list[Sequence[T]]:
    """The samples of an epoch cut into ceil(num_rollouts / size) minibatches, whatever the number of samples.

    Minibatch i gets the samples from round(i * size * len(order) / num_rollouts) on: with one sample per rollout
    `size` of them. Where samples are few, some minibatches are empty.
    """
    count = -(-num_rollouts // size)
    starts = [round(i * size * len(order) / num_rollouts) for i in range(count)]
    return [order[start:end] for start, end in zip(starts, [*starts[1:], len(order)], strict=True)]


def credited(minibatch: Sequence[Experience]) -> list[Experience]:
    """What of a minibatch can move the policy: the tokens with an advantage and a weight, and what leads to them.

    A token whose advantage or weight is 0 has no gradient in the clipped objective, and no token sees those behind it.
    So sequences without such a token are dropped, others end with their last one, and the rest of their tokens is left
    out of the loss: the same gradient for less work. Credit per step makes most tokens such.
    """
    parts = [part for part in map(_credited_part, minibatch) if any(part.sample.loss_mask)]
    # With nothing to learn the step is still made, of gradient 0: moments decay as they would have.
    return parts or [minibatch[0]]


def _credited_part(whole: Experience) -> Experience:
    sample, weights = whole.sample, whole.sample.trained_weights
    places = [i for i, trained in enumerate(sample.loss_mask) if trained]  # of the trained tokens in the sequence
    choices = [
        (a, old)
        for a, old in zip(sample.alternatives, whole.old_alternatives, strict=True)
        if a.advantage and weights[a.position]
    ]
    own = {n for n, i in enumerate(places) if sample.advantages[i] and weights[n]}
    kept = sorted(own | {a.position for a, _ in choices})
    number, inside = {n: new for new, n in enumerate(kept)}, {places[n] for n in kept}
    end = max(inside, default=0) + 1
    return Experience(
        TrainingSample(
            token_ids=sample.token_ids[:end],
            loss_mask=tuple(int(i in inside) for i in range(end)),
            sampler_logprobs=sample.sampler_logprobs[:end],
            advantages=sample.advantages[:end],
            alternatives=tuple(replace(a, position=number[a.position]) for a, _ in choices),
            weights=None if sample.weights is None else sample.weights[:end],
        ),
        tuple(whole.old_logprobs[n] for n in kept),
        tuple(old for _, old in choices),
        None,
    )


def total_weight(experience: Sequence[Experience]) -> float:
    """Sum of the weights of all trained tokens."""
    return sum(sum(e.sample.trained_weights) for e in experience)


def trained_part(row: Sequence[float], sample: TrainingSample) -> list[float]:
    """Entries of a list over the sequence that belong to trained tokens, shape (N,)."""
    return [x for x, trained in zip(row, sample.loss_mask, strict=True) if trained]


def padded(row: Sequence[float], sample: TrainingSample) -> tuple[float, ...]:
    """The inverse of `trained_part`: 0 for the other tokens, shape (T,)."""
    values = iter(row)
    return tuple(next(values) if trained else 0.0 for trained in sample.loss_mask)


def divided(alternatives: Sequence[Alternative], divisor: float) -> tuple[Alternative, ...]:
    """Alternatives with their advantages divided."""
    return tuple(replace(a, advantage=a.advantage / divisor) for a in alternatives)


def largest_gap(old: Sequence[Sequence[float]], samples: Sequence[TrainingSample]) -> float:
    """Largest difference between the sampler's and the trainer's log-probability of one token, in nats."""
    gaps = [
        abs(a - b)
        for row, sample in zip(old, samples, strict=True)
        for a, b in zip(row, trained_part(sample.sampler_logprobs, sample), strict=True)
    ]
    return max(gaps, default=0.0)
