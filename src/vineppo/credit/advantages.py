"""Compute the advantages of all built-in algorithms from rewards and values.

The functions take and return lists of numbers; they use no model, no text and no random numbers. The suffix of a
variable says what the entries of a list belong to. A list with the suffix `_S` has one entry per reasoning step of a
response (S steps), `_T` one per token of a response (T tokens), and `_G` one per response to the same problem
(G responses).

A reward of None belongs to a response to which no reward function applies. Such a response has the advantage 0, and the
other advantages are computed as if it did not exist.

If all rewards that are compared with each other are equal, the advantages are exactly 0. A rounded mean would give tiny
advantages, which the optimizer does not ignore.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate

from vineppo.statistics import mean_of

STD_EPSILON = 1e-4
"""Number that GRPO adds to the standard deviation before dividing by it, as in TRL."""


def step_advantages(values_S: Sequence[float], reward: float) -> list[float]:
    """Return the advantage of each reasoning step: the value after the step minus the value before the step.

    This is the one-step temporal difference of VinePPO (arXiv 2410.01679, section 4). Steps are counted from 0, and
    V(s_i) is the value of the state before step i. The advantage of step i is V(s_{i+1}) - V(s_i). The advantage of the
    last step is reward - V(s_{S-1}). The sum of all advantages is therefore reward - V(s_0).

    Args:
        values_S: value V(s_i) of the state *before* each step, in reward units, shape (S,).
        reward: reward of the whole response.
    Returns:
        The advantages in reward units, shape (S,).
    Raises:
        ValueError: if S is 0.
    """
    if not values_S:
        raise ValueError("a response has at least one step")
    return [after - before for before, after in zip(values_S, [*values_S[1:], reward], strict=True)]


def smallest_to_come(step_advantages_S: Sequence[float]) -> list[float]:
    """Return for each step the smallest of its own advantage and those of all later steps.

    This is the min-form of credit of PURE (arXiv 2504.15275), with the step advantages as process rewards: the return
    of a step is the minimum of the rewards from this step on instead of their sum.

    Args:
        step_advantages_S: advantage of each step, shape (S,).
    Returns:
        The changed advantages in reward units, shape (S,).
    """
    return list(accumulate(reversed(step_advantages_S), min))[::-1]


def from_first_drop(step_advantages_S: Sequence[float], drop: float) -> list[float]:
    """Return step advantages that are negative from the first large drop on, and not negative before it.

    The first step whose advantage is at most -`drop` is taken as the first error. The advantages of the steps before it
    are raised to at least 0, and all later steps get the advantage of the drop. Without such a step, the advantages
    are unchanged. The division into a good prefix and a suffix with an error is that of arXiv 2601.18984, where a
    process reward model finds the error.

    Args:
        step_advantages_S: advantage of each step, shape (S,).
        drop: size of the drop in reward units.
    Returns:
        The changed advantages in reward units, shape (S,).
    """
    first = next((i for i, advantage in enumerate(step_advantages_S) if advantage <= -drop), None)
    if first is None:
        return list(step_advantages_S)
    kept = [max(0.0, advantage) for advantage in step_advantages_S[:first]]
    return kept + [step_advantages_S[first]] * (len(step_advantages_S) - first)


def spread_over_tokens(step_advantages_S: Sequence[float], boundaries_S: Sequence[int]) -> list[float]:
    """Return the advantage of each response token: the advantage of the step that contains the token.

    Args:
        step_advantages_S: advantage of each step, shape (S,).
        boundaries_S: end of each step, as the number of response tokens up to the end, strictly increasing, shape (S,).
    Returns:
        The advantage of each token, shape (T,), where T is the last boundary.
    """
    advantages_T: list[float] = []
    for advantage, end in zip(step_advantages_S, boundaries_S, strict=True):
        advantages_T.extend([advantage] * (end - len(advantages_T)))
    return advantages_T


def grpo_advantages(rewards_G: Sequence[float | None], scale_by_std: bool) -> list[float]:
    """Return the advantage of each response to one problem, as in GRPO (arXiv 2402.03300).

    The advantage of response i is (r_i - mean) / (std + 1e-4). Here, r_i is the reward of response i, and mean and std
    are the mean and the standard deviation (divisor G - 1) of the rewards of all G responses. If `scale_by_std` is
    false, the advantage is r_i - mean, as in Dr. GRPO (arXiv 2503.20783).

    The mean includes r_i. Therefore r_i - mean is only (G - 1) / G times the difference between r_i and the mean of the
    other rewards.

    Rewards that are None are left out of mean, standard deviation and G, and their advantage is 0. If fewer than two
    rewards are left, all advantages are 0, because there is nothing to compare.

    Args:
        rewards_G: rewards of the responses to one problem, shape (G,), G >= 2.
        scale_by_std: whether to divide by the standard deviation.
    Returns:
        The advantages, shape (G,). They are in reward units if `scale_by_std` is false; otherwise they have no unit.
    Raises:
        ValueError: if G is less than 2.
    """
    if len(rewards_G) < 2:
        raise ValueError("GRPO needs at least two responses to a problem")
    known = [reward for reward in rewards_G if reward is not None]
    if len(known) < 2:
        return [0.0] * len(rewards_G)
    mean = mean_of(known)
    centred = [0.0 if reward is None else reward - mean for reward in rewards_G]
    if not scale_by_std:
        return centred
    std = math.sqrt(sum(c * c for c in centred) / (len(known) - 1))
    return [c / (std + STD_EPSILON) for c in centred]


def leave_one_out_advantages(rewards: Sequence[float | None]) -> list[float]:
    """Return each reward minus the mean of the other rewards, as in RLOO (arXiv 2402.14740).

    The mean of the other rewards does not depend on the reward that it is subtracted from. As a baseline, it therefore
    does not bias the policy gradient.

    Rewards that are None are left out of the means, and their advantage is 0. If fewer than two rewards are left, all
    advantages are 0, because there is nothing to compare.

    Args:
        rewards: rewards of n responses, shape (n,), n >= 2.
    Returns:
        The advantages in reward units, shape (n,).
    Raises:
        ValueError: if n is less than 2.
    """
    if len(rewards) < 2:
        raise ValueError("leave-one-out needs at least two rewards")
    known = [reward for reward in rewards if reward is not None]
    n, total = len(known), sum(known)
    if len(set(known)) < 2:
        return [0.0] * len(rewards)
    return [0.0 if reward is None else reward - (total - reward) / (n - 1) for reward in rewards]


def node_advantages(
    next_value: float, state_value: float, followed: Sequence[float], diverged: Sequence[float]
) -> tuple[float, list[float]]:
    """Return the advantages of all tokens that were sampled at one position of a response.

    The response was sampled from the policy. In addition, n continuations were sampled from the policy that have the
    same tokens as the response before this position. Together they give n + 1 samples of the token at this position.
    The policy gradient at this position is the expectation of (return - baseline) * grad log pi(token). It is estimated
    by the mean over the n + 1 samples:

    - For the response, the return is `next_value`, and the baseline is the mean reward of all n continuations.
    - For a continuation, the return is its reward, and the baseline is the mean reward of the other n - 1
      continuations.

    The advantage of a token is (return - baseline) / (n + 1), summed over the samples that have this token. If
    continuations sampled the response's token, they therefore contribute to the advantage of this token.

    With n = 1, the baseline of the response is the reward of the single continuation. The continuation contributes
    nothing, because there is no other continuation to compare it with. With n = 0, the baseline of the response is
    `state_value`. In both cases the advantage of the response's token is return - baseline, without the divisor.

    Args:
        next_value: value of the state after the step that contains this position; after the last step, the reward of
            the response.
        state_value: value of the state before the step that contains this position.
        followed: rewards of the continuations that sampled the response's token.
        diverged: rewards of the continuations that sampled another token.
    Returns:
        (advantage of the response's token, list with the advantage of each other token, in the order of `diverged`),
        in reward units.
    """
    n = len(followed) + len(diverged)
    if n < 2:
        baseline = followed[0] if followed else diverged[0] if diverged else state_value
        return next_value - baseline, [0.0] * len(diverged)
    if len({*followed, *diverged}) == 1:  # most positions; the rounded mean of equal rewards may differ from them
        return (next_value - (followed or diverged)[0]) / (n + 1), [0.0] * len(diverged)
    mean = (math.fsum(followed) + math.fsum(diverged)) / n
    factor = n / (n - 1)  # factor * (r - mean) is r minus the mean of the other rewards
    followed_sum = factor * math.fsum(reward - mean for reward in followed)
    return (next_value - mean + followed_sum) / (n + 1), [factor * (reward - mean) / (n + 1) for reward in diverged]


def gae(
    values_T: Sequence[float], reward: float, gamma: float, gae_lambda: float | Sequence[float]
) -> tuple[list[float], list[float]]:
    """Compute advantages and returns of one response by generalised advantage estimation (GAE, arXiv 1506.02438).

    The advantage of token t is A_t = delta_t + gamma * lambda_t * A_{t+1}, where
    delta_t = r_t + gamma * V(s_{t+1}) - V(s_t). V(s_t) is the value of the state before token t. The reward r_t is
    `reward` at the last token and 0 at all other tokens. The state after the last token has the value 0, even if the
    response was truncated by the length limit.

    Args:
        values_T: value of the state before each response token, in reward units, shape (T,).
        reward: reward of the whole response.
        gamma: discount factor per token.
        gae_lambda: lambda, or the lambda_t of each token, shape (T,). With lambda_t = 1 the value of the state after
            token t cancels.
    Returns:
        (advantages, returns), both in reward units, shape (T,). The return of a token is its advantage plus its value.
    """
    lambdas_T = [gae_lambda] * len(values_T) if isinstance(gae_lambda, (int, float)) else gae_lambda
    advantages_T = [0.0] * len(values_T)
    next_value, next_advantage = 0.0, 0.0
    for t in reversed(range(len(values_T))):
        token_reward = reward if t == len(values_T) - 1 else 0.0
        delta = token_reward + gamma * next_value - values_T[t]
        next_advantage = delta + gamma * lambdas_T[t] * next_advantage
        next_value = values_T[t]
        advantages_T[t] = next_advantage
    return advantages_T, [a + v for a, v in zip(advantages_T, values_T, strict=True)]
