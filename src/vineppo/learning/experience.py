"""Prepare the data for the learner: check training samples, split them into minibatches, and remove unneeded tokens.

A *trained token* is a token of a training sample with `loss_mask` 1; the other tokens are only context. An
*alternative* is a further token that is trained in place of a trained token (`types.Alternative`). Letters in shapes: T
tokens of a sample, N trained tokens of a sample, A alternatives of a sample.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, TypeVar

from vineppo.learning.scaling import scale_advantages, shift_and_divisor
from vineppo.types import Alternative, TrainingSample, UserError

T = TypeVar("T")


@dataclass(frozen=True)
class Experience:
    """A training sample with log-probabilities that the learner computed before the first update of the iteration."""

    sample: TrainingSample
    old_logprobs: tuple[float, ...] | None
    """Log-probabilities of the trained tokens under the policy, shape (N,). None before the forward pass of the first
    minibatch, if they are taken from it."""
    old_alternatives: tuple[float, ...]
    """Log-probabilities of the alternatives under the policy, shape (A,)."""
    ref_logprobs: tuple[float, ...] | None
    """Log-probabilities of the trained tokens under the reference model, shape (N,); None without a reference model and
    for samples whose KL term is left out."""
    scale: float = 1.0
    """Factor of the policy loss of every trained token (`loss_scale`)."""
    kl_weight: float = 1.0
    """Factor of the KL term of every trained token: 0 if it is left out (`learner.kl.share`)."""


class Counts(NamedTuple):
    """The numbers by which sums over the tokens of a minibatch are divided."""

    tokens: float
    """Sum of the weights of all trained tokens of the minibatch."""
    rollouts: float
    """Number of rollouts in the iteration, multiplied by the fraction of the samples that are in the minibatch. The KL
    penalty in the loss is divided by this number if `learner.kl.reduction` is `sequence_sum`, and the policy loss if
    `learner.reduction` is `sequence_mean`, or by its product with the maximum length of a response for `constant`."""
    seen: float
    """Sum of the weights of the trained tokens that remain after the function `credited` has removed others. Only these
    tokens are in the forward pass, so the metric `policy/kl_old` is a mean over them."""
    ratios: float
    """Sum of the weights of all trained tokens and alternatives of the minibatch. Each of them has a ratio that can be
    clipped, so the metric `policy/clip_share` is a share of them. An alternative has the weight of the token that it
    replaces."""


def check_samples(samples: Sequence[TrainingSample], *, with_returns: bool) -> None:
    """Check the lengths and numbers of the training samples that a credit function returned.

    Args:
        with_returns: whether the samples must have `returns` and `values`, because a value network is trained. Samples
            of rollouts without a reward need none.
    Raises:
        UserError: if a sample is invalid. The message describes the first invalid sample.
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
                    "of a sample must have one entry for each token of the sequence"
                )
        if any(sample.loss_mask[:1]):
            raise UserError(
                f"training sample {number} of the credit function has loss_mask 1 for its first token, whose "
                "probability is not defined because no token precedes it; set its loss_mask to 0"
            )
        weights = () if sample.weights is None else sample.weights
        wrong = [weight for weight in weights if not 0 <= weight < math.inf]
        if wrong:
            raise UserError(
                f"training sample {number} of the credit function has a weight of {wrong[0]}; allowed: finite numbers "
                "of at least 0"
            )
        for name in ("advantages", "returns", "values"):
            row = lists[name]
            infinite = [] if row is None else [entry for entry in row if entry is None or not math.isfinite(entry)]
            if infinite:
                raise UserError(
                    f"training sample {number} of the credit function has {infinite[0]} in {name}; allowed: finite "
                    "numbers"
                )
        if with_returns and not sample.without_reward and (sample.returns is None or sample.values is None):
            raise UserError(
                f"training sample {number} of the credit function has no returns or no values, but the training "
                "of the value network needs both; set returns and values in every sample"
            )


def without_truncated(samples: Sequence[TrainingSample]) -> list[TrainingSample]:
    """Return the samples with a weight of 0 for all tokens of rollouts that reached the limit of new tokens.

    These samples stay in their minibatches, so that the number of rollouts of a minibatch does not change. Samples that
    were not built from one rollout stay unchanged.
    """
    return [
        replace(sample, weights=(0.0,) * len(sample.token_ids))
        if sample.rollout is not None and sample.rollout.finish_reason == "length"
        else sample
        for sample in samples
    ]


def loss_scale(sample: TrainingSample, reduction: str) -> float:
    """Return the factor of the policy loss of every token of a sample, before the sum over the minibatch is divided.

    It is 1, or 1 / (sum of the weights of the sample's trained tokens) for the reduction `sequence_mean`.

    Args:
        reduction: the setting `learner.reduction`.
    """
    return 1 / (sum(sample.trained_weights) or 1) if reduction == "sequence_mean" else 1.0


def minibatches(order: Sequence[T], size: int, num_rollouts: int) -> list[Sequence[T]]:
    """Split the samples of an epoch into ceil(num_rollouts / size) minibatches.

    The number of minibatches does not depend on the number of samples. With one sample per rollout, a minibatch has
    `size` samples, and the last one can have fewer. With other numbers of samples, the samples are spread evenly. If
    there are few samples, some minibatches are empty.

    Args:
        order: the samples of the iteration, or their indices, in the order of the epoch.
        size: number of rollouts per minibatch (the setting `learner.minibatch_size`).
        num_rollouts: number of rollouts of the iteration.
    Returns:
        One list of elements of `order` per minibatch.
    """
    count = -(-num_rollouts // size)  # rounded up
    starts = [round(i * size * len(order) / num_rollouts) for i in range(count)]
    return [order[start:end] for start, end in zip(starts, [*starts[1:], len(order)], strict=True)]


def credited(minibatch: Sequence[Experience], whole: Sequence[bool] = ()) -> list[tuple[int, Experience]]:
    """Remove the tokens that do not contribute to the gradient of PPO's clipped objective, to save computation.

    A token contributes if its weight is not 0, and its advantage or that of an alternative at its position is not 0.
    With credit per step, most tokens do not contribute. A sample is removed if none of its tokens contributes. Every
    other sample is cut after its last token that contributes, and `loss_mask` becomes 0 for the remaining tokens that
    do not contribute. The update stays the same, because the probability of a token does not depend on later tokens.

    Args:
        minibatch: the samples.
        whole: True for samples of which all tokens stay, because they have other terms of the loss; one entry for each
            sample, or none for all False.
    Returns:
        (index in the minibatch, the remaining sample) of the remaining samples; at least one, even if no token
        contributes.
    """
    parts = [(i, e if whole and whole[i] else _part_with_gradient(e)) for i, e in enumerate(minibatch)]
    parts = [(i, part) for i, part in parts if (whole and whole[i]) or any(part.sample.loss_mask)]
    # If no token contributes, the optimizer still makes a step, with gradient 0, so that Adam's moments decay as usual.
    return parts or [(0, minibatch[0])]


def _part_with_gradient(experience: Experience) -> Experience:
    """Return a sample without the tokens that `credited` removes, and without the reference log-probabilities."""
    assert experience.old_logprobs is not None, "tokens are removed after the old log-probabilities are known"
    sample, weights, old_logprobs = experience.sample, experience.sample.trained_weights, experience.old_logprobs
    # The index of each trained token in the sequence. Below, n is the index of a token among the trained tokens.
    positions = [i for i, trained in enumerate(sample.loss_mask) if trained]
    alternatives = [
        (a, old)
        for a, old in zip(sample.alternatives, experience.old_alternatives, strict=True)
        if a.advantage and weights[a.position]
    ]
    with_advantage = {n for n, i in enumerate(positions) if sample.advantages[i] and weights[n]}
    kept = sorted(with_advantage | {a.position for a, _ in alternatives})
    new_number, kept_positions = {n: new for new, n in enumerate(kept)}, {positions[n] for n in kept}
    end = max(kept_positions, default=0) + 1
    return Experience(
        TrainingSample(
            token_ids=sample.token_ids[:end],
            loss_mask=tuple(int(i in kept_positions) for i in range(end)),
            sampler_logprobs=sample.sampler_logprobs[:end],
            advantages=sample.advantages[:end],
            alternatives=tuple(replace(a, position=new_number[a.position]) for a, _ in alternatives),
            weights=None if sample.weights is None else sample.weights[:end],
        ),
        tuple(old_logprobs[n] for n in kept),
        tuple(old for _, old in alternatives),
        None,
        experience.scale,
        experience.kl_weight,
    )


def total_weight(experience: Sequence[Experience]) -> float:
    """Return the sum of the weights of all trained tokens of the samples."""
    return sum(sum(e.sample.trained_weights) for e in experience)


def ratio_weight(experience: Sequence[Experience]) -> float:
    """Return the sum of the weights of all trained tokens and alternatives of the samples."""
    total = total_weight(experience)
    for sample in (e.sample for e in experience if e.sample.alternatives):
        weights = sample.trained_weights
        total += sum(weights[a.position] for a in sample.alternatives)
    return total


def trained_part(row: Sequence[float], sample: TrainingSample) -> list[float]:
    """Return the entries of the trained tokens from a list with one entry per token; the opposite of `padded`.

    Args:
        row: one entry for each token of the sample, shape (T,).
    Returns:
        One entry for each trained token, shape (N,).
    """
    return [x for x, trained in zip(row, sample.loss_mask, strict=True) if trained]


def padded(row: Sequence[float], sample: TrainingSample) -> tuple[float, ...]:
    """Add entries of 0 for the tokens that are not trained; the opposite of `trained_part`.

    Args:
        row: one entry for each trained token of the sample, shape (N,).
    Returns:
        One entry for each token of the sample, shape (T,).
    """
    values = iter(row)
    return tuple(next(values) if trained else 0.0 for trained in sample.loss_mask)


def scaled_samples(
    samples: Sequence[TrainingSample], rows: Sequence[Sequence[float]], scaling: str
) -> list[TrainingSample]:
    """Return the samples with scaled advantages.

    Args:
        rows: advantages of the trained tokens of each sample, before the scaling.
        scaling: as in `scale_advantages`.
    """
    # Rollouts without a reward are left out of the mean and the standard deviation, and 0 remains 0 with `whiten`.
    counted = [(0.0,) * len(s.trained_weights) if s.without_reward else s.trained_weights for s in samples]
    # The advantages of alternatives are divided by the same number as those of tokens, but are not shifted.
    divisor = shift_and_divisor(rows, scaling, counted)[1]
    return [
        replace(s, advantages=padded(row, s), alternatives=divided(s.alternatives, divisor))
        for s, row in zip(samples, scale_advantages(rows, scaling, counted), strict=True)
    ]


def divided(alternatives: Sequence[Alternative], divisor: float) -> tuple[Alternative, ...]:
    """Return the alternatives with their advantages divided by `divisor`."""
    return tuple(replace(a, advantage=a.advantage / divisor) for a in alternatives)


def largest_gap(old: Sequence[Sequence[float]], samples: Sequence[TrainingSample]) -> float:
    """Return the largest absolute difference between the log-probabilities of learner and sampler for a token, in nats.

    Args:
        old: log-probabilities that the learner computed before the first update, one list of shape (N,) per sample.
        samples: the training samples, with the log-probabilities that the sampler returned.
    """
    gaps = [
        abs(a - b)
        for row, sample in zip(old, samples, strict=True)
        for a, b in zip(row, trained_part(sample.sampler_logprobs, sample), strict=True)
    ]
    return max(gaps, default=0.0)
