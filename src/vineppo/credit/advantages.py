"""Functions that compute advantages from rewards and values. They use no model, no text and no random numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence

STD_EPSILON = 1e-4
"""Added to the standard deviation in GRPO, as in TRL and in the GRPO release."""


def step_advantages(values_S: Sequence[float], reward: float) -> list[float]:
    """Return the one-step TD advantage of each reasoning step (VinePPO, arXiv 2410.01679, section 4).

    The advantage of step i is V(s_{i+1}) - V(s_i), and that of the last step is reward - V(s_{S-1}). The sum of all
    advantages is therefore reward - V(s_0).

    Args:
        values_S: value of the state *before* each step, in reward units, shape (S,).
        reward: reward of the whole response.
    Returns:
        The advantages in reward units, shape (S,).
    Raises:
        ValueError: if S is 0.
    """
    if not values_S:
        raise ValueError("a response has at least one step")
    return [after - before for before, after in zip(values_S, [*values_S[1:], reward], strict=True)]


def spread_over_tokens(step_advantages_S: Sequence[float], boundaries_S: Sequence[int]) -> list[float]:
    """Give every token the advantage of its step.

    Args:
        step_advantages_S: advantage of each step, shape (S,).
        boundaries_S: end of each step as a number of response tokens, strictly increasing, shape (S,).
    Returns:
        The advantage of each token, shape (T,), where T is the last boundary.
    """
    advantages_T: list[float] = []
    for advantage, end in zip(step_advantages_S, boundaries_S, strict=True):
        advantages_T.extend([advantage] * (end - len(advantages_T)))
    return advantages_T


def grpo_advantages(rewards_G: Sequence[float], scale_by_std: bool) -> list[float]:
    """Return the difference of each reward from the mean of its group, as in GRPO (arXiv 2402.03300).

    The advantage of response i is (r_i - mean) / (std + 1e-4). The standard deviation is computed with the divisor
    G - 1. Without the division by the standard deviation, the advantages are those of Dr. GRPO (arXiv 2503.20783). The
    mean includes r_i, so r_i - mean is (G - 1) / G times the difference between r_i and the mean of the other rewards.

    Args:
        rewards_G: rewards of the responses to one problem, shape (G,), G >= 2.
        scale_by_std: whether to divide by the standard deviation.
    Returns:
        The advantages, shape (G,).
    Raises:
        ValueError: if G is less than 2.
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
    """Return the difference of each reward from the mean of the other rewards, as in RLOO (arXiv 2402.14740).

    The mean of the other rewards is an unbiased baseline.

    Args:
        rewards: n rewards, shape (n,), n >= 2.
    Returns:
        The advantages in reward units, shape (n,).
    Raises:
        ValueError: if n is less than 2.
    """
    n = len(rewards)
    if n < 2:
        raise ValueError("leave-one-out needs at least two rewards")
    total = sum(rewards)
    return [reward - (total - reward) / (n - 1) for reward in rewards]


def node_advantages(
    next_value: float, state_value: float, followed: Sequence[float], diverged: Sequence[float]
) -> tuple[float, list[float]]:
    """Return the advantages of all tokens that were sampled at one position of a response.

    Let n continuations pass through the state before this position. Together with the response, they give n + 1 samples
    of the next token from the policy. The policy gradient at this position is the expectation of
    (return - baseline) * grad log pi(token). It is estimated as the mean over the n + 1 samples:

    - The return of a continuation is its reward. Its baseline is the mean reward of the other n - 1 continuations.
    - The return of the response is `next_value`. Its baseline is the mean reward of all n continuations.

    If a continuation sampled the same token as the response, its term is added to the advantage of that token.

    If n is 1, the single reward is the baseline of the response, and the continuation gets no credit because there is
    no other continuation to compare it with. If n is 0, `state_value` is the baseline.

    Args:
        next_value: value of the state after the response's step.
        state_value: value of the state before the response's step.
        followed: rewards of the continuations that sampled the response's token.
        diverged: rewards of the continuations that sampled another token.
    Returns:
        (advantage of the response's token, advantage of each token in `diverged`). If n is at least 2, all of them
        include the factor 1 / (n + 1) of the mean.
    """
    n = len(followed) + len(diverged)
    if n < 2:
        baseline = followed[0] if followed else diverged[0] if diverged else state_value
        return next_value - baseline, [0.0] * len(diverged)
    mean = (math.fsum(followed) + math.fsum(diverged)) / n
    factor = n / (n - 1)  # factor * (r - mean) is r minus the mean of the other rewards
    followed_sum = factor * math.fsum(reward - mean for reward in followed)
    return (next_value - mean + followed_sum) / (n + 1), [factor * (reward - mean) / (n + 1) for reward in diverged]


def gae(values_T: Sequence[float], reward: float, gamma: float, gae_lambda: float) -> tuple[list[float], list[float]]:
    """Compute advantages and returns of one response by generalised advantage estimation (arXiv 1506.02438).

    The reward r_t is 0 except at the last token. The advantages are A_t = delta_t + gamma lambda A_{t+1} with
    delta_t = r_t + gamma V(s_{t+1}) - V(s_t). The state after the last token is terminal and has the value 0, also if
    the response was truncated by the length limit.

    Args:
        values_T: value of the state before each response token, shape (T,).
        reward: reward of the whole response.
        gamma: discount factor per token.
        gae_lambda: lambda.
    Returns:
        (advantages, returns), both of shape (T,). The returns are the sums of advantages and values.
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
