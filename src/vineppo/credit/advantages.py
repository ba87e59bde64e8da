"""Credit as pure mathematics: from rewards and values to advantages. No model, no text, no randomness."""

from __future__ import annotations

import math
from collections.abc import Sequence

STD_EPSILON = 1e-4
"""Added to GRPO's standard deviation; one value with TRL and the GRPO release."""


def step_advantages(values_S: Sequence[float], reward: float) -> list[float]:
    """One-step TD advantage of each reasoning step (VinePPO, arXiv 2410.01679, section 4).

    A_i = V(s_{i+1}) - V(s_i) for i < S-1, and reward - V(s_{S-1}) for the last step, so sum(A) + V(s_0) == reward.

    Args:
        values_S: value of the state *before* each step, in reward units, shape (S,).
        reward: the grader's number for the whole response.
    Returns:
        Shape (S,), in reward units.
    Raises:
        ValueError: if there is no step.
    """
    if not values_S:
        raise ValueError("a response has at least one step")
    return [after - before for before, after in zip(values_S, [*values_S[1:], reward], strict=True)]


def spread_over_tokens(step_advantages_S: Sequence[float], boundaries_S: Sequence[int]) -> list[float]:
    """Every token of a step gets the step's advantage.

    Args:
        step_advantages_S: shape (S,).
        boundaries_S: end of each step in response tokens, strictly increasing, shape (S,).
    Returns:
        token_advantages, shape (T,) with T the last boundary.
    """
    advantages_T: list[float] = []
    for advantage, end in zip(step_advantages_S, boundaries_S, strict=True):
        advantages_T.extend([advantage] * (end - len(advantages_T)))
    return advantages_T


def grpo_advantages(rewards_G: Sequence[float], scale_by_std: bool) -> list[float]:
    """A response's reward against its group's mean (GRPO, arXiv 2402.03300; without std: Dr. GRPO, 2503.20783).

    (r_i - mean) / (std + 1e-4), std with n - 1. The mean contains r_i itself, which shrinks the advantage by
    (G - 1) / G against a baseline that leaves it out.

    Args:
        rewards_G: shape (G,), G >= 2.
    Returns:
        Shape (G,).
    Raises:
        ValueError: for a group of one.
    """
    if len(rewards_G) < 2:
        raise ValueError("GRPO needs at least two responses to a problem")
    mean = sum(rewards_G) / len(rewards_G)
    centred = [reward - mean for reward in rewards_G]
    if not scale_by_std:
        return centred
    std = math.sqrt(sum(c * c for c in centred) / (len(rewards_G) - 1))
    return [c / (std + STD_EPSILON) for c in centred]


def leave_one_out_advantages(rewards: Sequence[float]) -> list[float]:
    """Each reward against the mean of the others (RLOO, arXiv 2402.14740): an unbiased baseline.

    Args:
        rewards: shape (n,), n >= 2.
    Returns:
        Shape (n,), in reward units.
    Raises:
        ValueError: for fewer than two rewards.
    """
    n = len(rewards)
    if n < 2:
        raise ValueError("leave-one-out needs at least two rewards")
    total = sum(rewards)
    return [reward - (total - reward) / (n - 1) for reward in rewards]


def node_advantages(
    own: float, state_value: float, followed: Sequence[float], left: Sequence[float]
) -> tuple[float, list[float]]:
    """Credit of everything that was chosen at one place of a response: the response's token, and others.

    n continuations came by here; each chose its next token afresh, as the response did. The policy gradient of the
    place is the expectation of (return - baseline) * grad log pi(token), so the n + 1 choices are averaged: those that
    chose the response's token share its entry, every other one has an entry of its own. The baseline of a
    continuation is the mean of the others' rewards; that of the response itself is the mean of all n.

    Args:
        own: value of the state behind the response's step: what its own choice led to.
        state_value: value of the state before the step, the baseline where nobody else came by.
        followed: rewards of the continuations that chose the response's token.
        left: rewards of those that chose another one.
    Returns:
        (advantage of the response's token, advantage of each of `left`), shares of 1 / (n + 1) included. With n < 2
        only the response's own choice counts: a single continuation has no baseline of others.
    """
    n = len(followed) + len(left)
    if n < 2:
        return own - (followed[0] if followed else left[0] if left else state_value), [0.0] * len(left)
    mean = (math.fsum(followed) + math.fsum(left)) / n
    others = n / (n - 1)  # r - (mean of the others) = others * (r - mean of all)
    by_followers = others * math.fsum(reward - mean for reward in followed)
    return (own - mean + by_followers) / (n + 1), [others * (reward - mean) / (n + 1) for reward in left]


def gae(values_T: Sequence[float], reward: float, gamma: float, gae_lambda: float) -> tuple[list[float], list[float]]:
    """Generalised advantage estimation for one response whose only reward comes with its last token (arXiv 1506.02438).

    delta_t = r_t + gamma V(s_{t+1}) - V(s_t), A_t = delta_t + gamma lambda A_{t+1}; the state behind the last token is
    terminal, V = 0. A truncated response is terminal as well (its reward is 0).

    Args:
        values_T: value of the state before each response token, shape (T,).
        reward: of the whole response.
    Returns:
        (advantages, returns), both (T,), with returns = advantages + values.
    """
    advantages_T = [0.0] * len(values_T)
    next_value, next_advantage = 0.0, 0.0
    for t in reversed(range(len(values_T))):
        token_reward = reward if t == len(values_T) - 1 else 0.0
        delta = token_reward + gamma * next_value - values_T[t]
        next_advantage = delta + gamma * gae_lambda * next_advantage
        next_value = values_T[t]
        advantages_T[t] = next_advantage
    return advantages_T, [a + v for a, v in zip(advantages_T, values_T, strict=True)]
