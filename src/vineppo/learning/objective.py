"""Compute the policy loss of a micro-batch with all its terms, for the learner.

Letters in shapes: N trained tokens, A alternatives.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from vineppo.config.schema import LearnerConfig
from vineppo.learning.experience import Counts, Experience, trained_part
from vineppo.learning.losses import clipped_policy_loss, importance_weights, kl_estimate
from vineppo.learning.scores import weights_of
from vineppo.learning.sums import Parts
from vineppo.model.logits import TokenScores


class Tokens(NamedTuple):
    """What the objective needs to know about the N trained tokens and the A alternatives of a micro-batch."""

    weights: torch.Tensor
    """Weight of each trained token, shape (N,)."""
    scales: torch.Tensor
    """Factor of the policy loss of each trained token (`loss_scale`), shape (N,)."""
    advantages: torch.Tensor
    """Advantages of the trained tokens, then those of the alternatives, shape (N + A,)."""
    old: torch.Tensor
    """Log-probabilities before the first update of the iteration, shape (N + A,)."""
    ref: torch.Tensor
    """Log-probabilities of the trained tokens under the reference, 0 where they are not known, shape (N,)."""
    kl_weights: torch.Tensor
    """Factor of the KL term of each trained token, shape (N,)."""
    sampler: torch.Tensor
    """Log-probabilities of the trained tokens that the sampler returned, shape (N,)."""


def tokens_of(chosen: Sequence[Experience], logprobs: torch.Tensor) -> Tokens:
    """Return the numbers of the tokens of a micro-batch.

    Args:
        chosen: the samples of the micro-batch.
        logprobs: log-probabilities under the policy now, shape (N + A,). They are the old ones if the samples have no
            old log-probabilities yet.
    """
    device = logprobs.device

    def flat(numbers: list[float]) -> torch.Tensor:
        """Return the numbers as a tensor."""
        return torch.tensor(numbers, dtype=torch.float32, device=device)

    samples, counts = [e.sample for e in chosen], [sum(e.sample.loss_mask) for e in chosen]
    if any(e.old_logprobs is None for e in chosen):
        assert all(e.old_logprobs is None for e in chosen), "a micro-batch has old log-probabilities or has none"
        old = logprobs.detach()
    else:
        old = flat([x for e in chosen for x in e.old_logprobs or ()] + [x for e in chosen for x in e.old_alternatives])
    return Tokens(
        weights_of(samples, device),
        flat([e.scale for e, count in zip(chosen, counts, strict=True) for _ in range(count)]),
        flat(
            [x for s in samples for x in trained_part(s.advantages, s)]
            + [a.advantage for s in samples for a in s.alternatives]
        ),
        old,
        flat([x for e, count in zip(chosen, counts, strict=True) for x in e.ref_logprobs or (0.0,) * count]),
        flat([e.kl_weight for e, count in zip(chosen, counts, strict=True) for _ in range(count)]),
        flat([x for s in samples for x in trained_part(s.sampler_logprobs, s)]),
    )


def all_tokens_stay(config: LearnerConfig, with_kl: bool) -> bool:
    """Return whether the loss of a sample has a gradient at all its tokens, also at those with advantage 0.

    This is so with an entropy bonus, and for a sample with a KL term in the loss. From all other samples, `credited`
    removes tokens.

    Args:
        with_kl: whether the sample has a KL penalty. `learner.kl.share` draws the samples that have one.
    """
    return config.entropy_coefficient > 0 or (with_kl and config.kl.place == "loss")


def scored_in_training(config: LearnerConfig, with_kl: bool, dropout: bool) -> bool:
    """Return whether a sample of the first minibatch gets its old log-probabilities from its own training pass.

    The weights in this pass are those before the update. It is not enough if dropout is active, if the KL penalty is in
    the reward (the advantages then need the old log-probabilities), or if tokens are left out of the pass.

    Args:
        with_kl: whether the sample has a KL penalty.
        dropout: whether the policy has adapters with dropout.
    """
    in_reward = with_kl and config.kl.place == "reward"
    return not dropout and not in_reward and all_tokens_stay(config, with_kl)


def policy_loss(
    config: LearnerConfig,
    tokens: Tokens,
    scores: TokenScores,
    places: torch.Tensor,
    counts: Counts,
    divisor: float,
    kl_in_loss: bool,
) -> tuple[torch.Tensor, Parts]:
    """Compute the contribution of a micro-batch to the policy loss and the metrics of its minibatch.

    Args:
        scores: log-probabilities, and entropies if there is an entropy bonus.
        places: index of the trained token that each alternative replaces, shape (A,).
        counts: numbers of the whole minibatch, by which the sums over the micro-batch are divided.
        divisor: the number by which the sum of the policy loss is divided (`learner.reduction`).
        kl_in_loss: whether the KL penalty is a term of the loss.
    Returns:
        (contribution to the loss as a scalar tensor, contributions to the metrics, which are not waited for).
    """
    N, kl = len(tokens.weights), config.kl
    logprobs, old = scores.logprobs, tokens.old
    weights = torch.cat([tokens.weights, tokens.weights[places]])  # (N + A,)
    scales = torch.cat([tokens.scales, tokens.scales[places]])  # (N + A,)
    if config.importance_sampling_cap > 0:
        # The weights are at least 0, so they may multiply the advantages instead of the clipped loss.
        scales[:N] *= importance_weights(old[:N], tokens.sampler, config.importance_sampling_cap)
    objective, clipped = clipped_policy_loss(
        logprobs, old, tokens.advantages * scales, config.clip_low, config.clip_high, weights
    )
    loss = objective / divisor
    # How far the policy has moved since the first update of the iteration; only a metric.
    kl_old = (tokens.weights * kl_estimate(logprobs[:N].detach(), old[:N], "k3", 10.0)).sum()
    metrics = {
        "policy/loss": (loss, 1.0),
        "policy/clip_share": (clipped, counts.ratios),
        "policy/kl_old": (kl_old, counts.seen),
    }
    if config.entropy_coefficient > 0:
        assert scores.entropies is not None, "the entropy bonus needs the entropies"
        loss = loss - config.entropy_coefficient * (tokens.weights * scores.entropies).sum() / counts.tokens
    if kl_in_loss:
        penalties = kl_estimate(logprobs[:N], tokens.ref, kl.estimator, kl.clamp)  # (N,)
        if kl.importance_weighted:
            penalties = penalties * (logprobs[:N] - old[:N]).exp()  # (N,)
        if kl.reduction == "as_policy":
            penalties = penalties * tokens.scales  # (N,)
        divisors = {"sequence_sum": counts.rollouts, "token_mean": counts.tokens, "as_policy": divisor}
        total = (tokens.weights * tokens.kl_weights * penalties).sum()
        loss = loss + kl.coefficient * total / divisors[kl.reduction]
    return loss, {**metrics, "policy/objective": (loss, 1.0)}
