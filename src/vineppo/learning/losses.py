"""Losses as pure functions of tensors.

Each returns a weighted sum over tokens. The caller divides by the sum of weights of the whole minibatch, so that the
result does not depend on micro-batches or workers.
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
    """PPO's clipped surrogate (arXiv 1707.06347), to be minimised, summed over tokens.

    -min(ratio * A, clip(ratio, 1 - clip_low, 1 + clip_high) * A) with ratio = exp(logprobs - old_logprobs).

    Args:
        logprobs, old_logprobs, advantages: shape (N,), one entry per trained token.
        weights: weights of the tokens in both sums, shape (N,).
    Returns:
        (loss sum, sum of the weights of the tokens on which clipping removed the gradient).
    """
    ratio = (logprobs - old_logprobs).exp()  # (N,)
    unclipped = ratio * advantages  # (N,)
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high) * advantages  # (N,)
    return -(weights * torch.minimum(unclipped, clipped)).sum(), (weights * (clipped < unclipped)).sum()


def kl_estimate(logprobs: torch.Tensor, ref_logprobs: torch.Tensor, estimator: str, clamp: float) -> torch.Tensor:
    """Per-token estimate of KL(policy || reference) on tokens sampled from the policy (Schulman, "Approximating KL").

    With d = logprobs - ref_logprobs: k1 = d (unbiased, signed), k2 = d^2 / 2 (biased, its gradient is the KL's), k3 =
    exp(-d) - 1 + d (unbiased, never negative). The estimate is clamped to [-clamp, clamp].

    Returns:
        Shape (N,), in nats.
    """
    d = logprobs - ref_logprobs  # (N,)
    if estimator == "k1":
        estimate = d
    elif estimator == "k2":
        estimate = d.square() / 2
    elif estimator == "k3":
        # Without this clamp exp(-d) can overflow, and the gradient of the clamped estimate is then 0 * inf = nan.
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
    """Half the squared error of the value network, summed over tokens; with clip > 0 the pessimistic clipped form.

    0.5 * max((V - R)^2, (V_old + clip(V - V_old, -clip, clip) - R)^2)

    Args:
        values, old_values, returns: shape (N,), in reward units.
        clip: 0 turns clipping off.
        weights: weights of the tokens in the sum, shape (N,).
    """
    error = (values - returns).square()  # (N,)
    if clip > 0:
        clipped = old_values + (values - old_values).clamp(-clip, clip)  # (N,)
        error = torch.maximum(error, (clipped - returns).square())
    return 0.5 * (weights * error).sum()
