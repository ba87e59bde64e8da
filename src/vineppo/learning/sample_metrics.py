"""Compute the metrics of training samples before the first update of an iteration, for the learner.

Letter in shapes: N trained tokens of a sample.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from vineppo.config.schema import KLConfig
from vineppo.learning.experience import largest_gap, trained_part
from vineppo.learning.losses import importance_weights, kl_estimate
from vineppo.learning.scores import Scores
from vineppo.types import Metrics, TrainingSample


def sample_metrics(samples: Sequence[TrainingSample], scores: Scores, importance_sampling_cap: float = 0.0) -> Metrics:
    """Return the metrics of the samples that need no reference.

    Args:
        samples: the samples before their advantages are changed.
        scores: their scores under the policy.
        importance_sampling_cap: the setting of the learner; above 0 adds the metrics `policy/importance_*`.
    """
    rows, weights = [trained_part(s.advantages, s) for s in samples], [s.trained_weights for s in samples]
    return {
        "policy/entropy": scores.entropy,
        "policy/sampler_logprob_gap": largest_gap(scores.logprobs, samples),
        "policy/logprob_excess": scores.excess,
        "policy/logprob_excess_error": scores.excess_error,
        "credit/advantage_abs_mean": _weighted_sum(weights, [[abs(a) for a in row] for row in rows])
        / (sum(map(sum, weights)) or 1),
        **(_importance_metrics(samples, scores, importance_sampling_cap) if importance_sampling_cap > 0 else {}),
    }


def _importance_metrics(samples: Sequence[TrainingSample], scores: Scores, cap: float) -> Metrics:
    """Return the mean of the weights of truncated importance sampling, and the share of tokens at the cap."""
    weights = [s.trained_weights for s in samples]
    factors = [
        importance_weights(
            torch.tensor(old, dtype=torch.float64), torch.tensor(trained_part(s.sampler_logprobs, s)).double(), cap
        ).tolist()
        for old, s in zip(scores.logprobs, samples, strict=True)
    ]
    total = sum(map(sum, weights)) or 1
    return {
        "policy/importance_mean": _weighted_sum(weights, factors) / total,
        "policy/importance_capped_share": _weighted_sum(weights, [[float(x >= cap) for x in row] for row in factors])
        / total,
    }


def kl_metric(
    samples: Sequence[TrainingSample],
    old: Sequence[Sequence[float]],
    refs: Sequence[Sequence[float] | None],
    kl_weights: Sequence[float],
    kl: KLConfig,
) -> float:
    """Return the sum over the samples of the sum of the KL estimates of their tokens, in nats.

    If `kl.share` is below 1, only the samples whose KL term is computed have log-probabilities under the reference. The
    sum is then an unbiased estimate from these samples, with the same factors as in the loss.

    Args:
        old: log-probabilities of the trained tokens under the policy, one list of shape (N,) per sample.
        refs: the same under the reference, or None for samples without the KL term.
        kl_weights: factor of the KL term of each sample.
    """
    parts = zip(samples, old, refs, kl_weights, strict=True)
    return sum(
        k * _weighted_sum([s.trained_weights], [kl_of_tokens(o, r, kl)]) for s, o, r, k in parts if r is not None
    )


def kl_of_tokens(old: Sequence[float], ref: Sequence[float], kl: KLConfig) -> list[float]:
    """Return the KL estimate of each trained token of a sample. The arguments and the result have shape (N,)."""
    return kl_estimate(torch.tensor(old), torch.tensor(ref), kl.estimator, kl.clamp).tolist()


def _weighted_sum(weights: Sequence[Sequence[float]], rows: Sequence[Sequence[float]]) -> float:
    """Return the sum of weight times entry over all entries of all rows. The rows can have different lengths."""
    return sum(w * x for ws, row in zip(weights, rows, strict=True) for w, x in zip(ws, row, strict=True))
