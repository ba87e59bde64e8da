"""Compute the policy loss, the value loss and KL estimates as pure functions of tensors.

Each loss is a weighted sum over tokens. The caller divides the loss by the sum of the weights of the whole minibatch,
so that the result does not depend on the micro-batches or on the number of workers.
"""

from __future__ import annotations

import torch


def clipped_policy_loss(
    logprobs: torch.Tensor,
    old_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    clip_low: float,
    clip_high: float,
    weights: torch.Tensor | float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the loss of PPO's clipped objective (arXiv 1707.06347), summed over tokens.

    The loss of a token with advantage A is -min(ratio * A, clip(ratio, 1 - clip_low, 1 + clip_high) * A), with
    ratio = exp(logprob - old_logprob).

    Args:
        logprobs, old_logprobs, advantages: one entry for each of N trained tokens, shape (N,).
        weights: weight of each token in both returned sums, shape (N,), or one number for all tokens.
    Returns:
        (weighted sum of the losses, sum of the weights of the tokens for which clipping set the gradient to 0).
    """
    ratio = (logprobs - old_logprobs).exp()  # (N,)
    unclipped = ratio * advantages  # (N,)
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high) * advantages  # (N,)
    return -(weights * torch.minimum(unclipped, clipped)).sum(), (weights * (clipped < unclipped)).sum()


def kl_estimate(logprobs: torch.Tensor, ref_logprobs: torch.Tensor, estimator: str, clamp: float) -> torch.Tensor:
    """Estimate KL(policy || reference) for each token. The tokens must be sampled from the policy.

    Source: Schulman, "Approximating KL Divergence".

    With d = logprobs - ref_logprobs, the estimators are k1 = d (unbiased, can be negative), k2 = d^2 / 2 (biased, but
    its expected gradient is that of the KL divergence), and k3 = exp(-d) - 1 + d (unbiased, never negative). The
    estimate is clamped to [-clamp, clamp].

    Returns:
        One estimate for each of N tokens, shape (N,), in nats.
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
    """Compute half the squared error of the value network, summed over tokens, with the value clipping of PPO.

    The loss of a token with value V and return R is
    0.5 * max((V - R)^2, (V_old + clamp(V - V_old, -clip, clip) - R)^2).

    Args:
        values, old_values, returns: one entry for each of N trained tokens, shape (N,), in reward units.
        clip: clipping range in reward units; 0 turns clipping off, so that the loss is 0.5 * (V - R)^2.
        weights: weight of each token in the sum, shape (N,), or one number for all tokens.
    """
    error = (values - returns).square()  # (N,)
    if clip > 0:
        clipped = old_values + (values - old_values).clamp(-clip, clip)  # (N,)
        error = torch.maximum(error, (clipped - returns).square())
    return 0.5 * (weights * error).sum()
