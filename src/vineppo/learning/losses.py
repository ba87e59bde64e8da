"""Compute the policy loss, the value loss, KL estimates and the DPO-positive loss as pure functions of tensors.

Each loss is a sum: a weighted one over N trained tokens, or one over N pairs of responses. The caller divides the loss
by the sum of the weights, or by the number of pairs, of the whole minibatch, so that the result does not depend on how
the minibatch is split into micro-batches.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

ROUNDING = 1e-4
"""Difference in nats between two computations of the log-probability of a response that counts as a rounding error."""


def clipped_policy_loss(
    logprobs: torch.Tensor,
    old_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    clip_low: float,
    clip_high: float,
    weights: torch.Tensor | float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the policy loss of PPO's clipped objective (arXiv 1707.06347) as a weighted sum over tokens.

    The loss of a token with advantage A is -min(ratio * A, clip(ratio, 1 - clip_low, 1 + clip_high) * A), with
    ratio = exp(logprob - old_logprob).

    Args:
        logprobs: log-probabilities under the current policy, shape (N,).
        old_logprobs: log-probabilities under the policy before the first update of the iteration, shape (N,).
        advantages: shape (N,).
        clip_low, clip_high: bounds of the ratio, as distances from 1.
        weights: weight of each token in both returned sums, shape (N,), or one number for all tokens.
    Returns:
        (weighted sum of the losses, sum of the weights of the tokens whose gradient is 0 because of clipping); both are
        scalar tensors.
    """
    ratio = (logprobs - old_logprobs).exp()  # (N,)
    unclipped = ratio * advantages  # (N,)
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high) * advantages  # (N,)
    return -(weights * torch.minimum(unclipped, clipped)).sum(), (weights * (clipped < unclipped)).sum()


def importance_weights(old_logprobs: torch.Tensor, sampler_logprobs: torch.Tensor, cap: float) -> torch.Tensor:
    """Return the weight of each token of truncated importance sampling, min(cap, exp(old_logprob - sampler_logprob)).

    Tokens that a sampler draws with the probability q have, with these weights, the expectations that they have under
    the trainer's probability p, except for the weights that the cap lowers. Only the probability of the token itself
    is corrected, and not that of the tokens before it.

    Source: Ionides, "Truncated Importance Sampling" (2008); Yao et al., "Your Efficient RL Framework Secretly Brings
    You Off-Policy RL Training" (2025), for the difference between an inference engine and a trainer.

    Args:
        old_logprobs: log-probabilities under the trainer before the first update of the iteration, shape (N,).
        sampler_logprobs: log-probabilities that the sampler returned, shape (N,).
        cap: the largest weight, above 0.
    Returns:
        The weights, shape (N,), without gradient.
    """
    return (old_logprobs - sampler_logprobs).detach().exp().clamp(max=cap)


def kl_estimate(logprobs: torch.Tensor, ref_logprobs: torch.Tensor, estimator: str, clamp: float) -> torch.Tensor:
    """Estimate KL(policy || reference) for each token. The tokens must be sampled from the policy.

    With d = logprobs - ref_logprobs, the estimators are

    - k1 = d: unbiased, can be negative.
    - k2 = d^2 / 2: biased, but its expected gradient is that of the KL divergence.
    - k3 = exp(-d) - 1 + d: unbiased, never negative.

    Source: Schulman, "Approximating KL Divergence".

    Args:
        logprobs: log-probabilities of the tokens under the policy, shape (N,).
        ref_logprobs: log-probabilities of the tokens under the reference, shape (N,).
        estimator: "k1", "k2" or "k3".
        clamp: each estimate is clamped to [-clamp, clamp].
    Returns:
        One estimate per token in nats, shape (N,).
    """
    d = logprobs - ref_logprobs  # (N,)
    if estimator == "k1":
        estimate = d
    elif estimator == "k2":
        estimate = d.square() / 2
    elif estimator == "k3":
        # Without clamp_min, exp(-d) can overflow, and the gradient of the clamped estimate would be 0 * inf = nan.
        estimate = torch.expm1(-d.clamp_min(-80.0)) + d
    else:
        raise ValueError(f"unknown KL estimator {estimator!r}")
    return estimate.clamp(-clamp, clamp)


def clipped_value_loss(
    values: torch.Tensor,
    old_values: torch.Tensor,
    returns: torch.Tensor,
    clip: float,
    weights: torch.Tensor | float = 1.0,
) -> torch.Tensor:
    """Compute half the squared error of the value network, with PPO's value clipping, as a weighted sum over tokens.

    The loss of a token with predicted value V and return R is
    0.5 * max((V - R)^2, (V_old + clamp(V - V_old, -clip, clip) - R)^2).

    Args:
        values: values that the network predicts now, in reward units, shape (N,).
        old_values: values that the network predicted when the credit was computed, in reward units, shape (N,).
        returns: targets of the network, in reward units, shape (N,).
        clip: clipping range in reward units. 0 turns clipping off; the loss of a token is then 0.5 * (V - R)^2.
        weights: weight of each token in the sum, shape (N,), or one number for all tokens.
    Returns:
        The loss as a scalar tensor.
    """
    error = (values - returns).square()  # (N,)
    if clip > 0:
        clipped = old_values + (values - old_values).clamp(-clip, clip)  # (N,)
        error = torch.maximum(error, (clipped - returns).square())
    return 0.5 * (weights * error).sum()


def dpo_positive_loss(
    chosen: torch.Tensor,
    rejected: torch.Tensor,
    ref_chosen: torch.Tensor,
    ref_rejected: torch.Tensor,
    beta: float,
    penalty: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the DPO-positive loss (Pal et al., arXiv 2402.13228) as a sum over N pairs of responses.

    With the log-ratios c = chosen - ref_chosen and r = rejected - ref_rejected, the loss of a pair is
    -log sigmoid(beta * (c - r - penalty * max(0, -c))). With penalty 0 it is the loss of DPO (arXiv 2305.18290).

    Before the first update, c is 0 up to rounding, and the gradient of max(0, -c) would be a matter of rounding errors.
    A c above -1e-4 therefore has no penalty.

    Args:
        chosen, rejected: log-probabilities of the whole responses under the policy in nats, shape (N,).
        ref_chosen, ref_rejected: the same under the reference, shape (N,).
        beta: factor of the log-ratios.
        penalty: weight of the penalty, lambda in the paper.
    Returns:
        (sum of the losses, scalar; argument of the sigmoid of each pair, shape (N,)).
    """
    log_ratios = chosen - ref_chosen  # (N,)
    shortfall = torch.where(log_ratios < -ROUNDING, -log_ratios, 0.0)  # (N,)
    margins = beta * (log_ratios - (rejected - ref_rejected) - penalty * shortfall)  # (N,)
    return -F.logsigmoid(margins).sum(), margins
