"""TEMPO: values of prefixes from the tree that the responses of a group form by themselves (arXiv 2509.18314).

The responses of a group begin with the same tokens until they part. A state, which is the prompt with the first tokens
of a response, is therefore visited by several responses, and the mean of their rewards estimates its value. Nothing is
sampled in addition to the group.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import Field

from vineppo.config.settings import Settings
from vineppo.credit.advantages import grpo_advantages
from vineppo.credit.algorithm import Algorithm, CreditParts
from vineppo.credit.sample import one_per_rollout, reward_of, training_sample, with_reward
from vineppo.statistics import mean_of
from vineppo.types import CreditFn, Metrics, RolloutGroup, TrainingSample


class TempoSettings(Settings):
    """TEMPO: values of prefixes are means over the responses of the group that begin with them."""

    form: Literal["leave_one_out", "paper"] = "leave_one_out"
    """`leave_one_out`: the advantage of a token is the mean reward of the group's responses that begin with the tokens
    up to this one, minus the value of the state before it as estimated by the *other* responses. It is unbiased.
    `paper`: GRPO's advantage of the response, plus the change of the mean reward from the state before the token to the
    state after it, both with the response itself. It is biased (docs/algorithms.md)."""
    prior: float = Field(2.0, ge=0)
    """For `form: leave_one_out`: weight of the value of the state at which the other responses last parted, in numbers
    of responses. The value of a state that n other responses pass through is (n * their mean reward + prior * that
    value) / (n + prior). With 0, a single response decides the value if no other passes through the state."""
    scale_by_std: bool = True
    """For `form: paper`: divide the advantages of a group by the standard deviation of its rewards (plus 1e-4)."""
    divide_by_visits: bool = False
    """Divide the advantage of each token by the number of responses that begin with the tokens up to this one, so that
    a token that n responses share counts once and not n times (arXiv 2509.21154). It is biased: it gives tokens near
    the prompt less weight."""


def shared_lengths(responses_G: Sequence[Sequence[int]]) -> list[list[int]]:
    """Return the number of equal first tokens of every pair of responses, shape (G, G).

    Args:
        responses_G: the token ids of each of the G responses to one problem.
    """
    G = len(responses_G)
    shared = [[len(response)] * G for response in responses_G]
    for i in range(G):
        for j in range(i):
            pairs = zip(responses_G[i], responses_G[j], strict=False)
            end = min(len(responses_G[i]), len(responses_G[j]))
            shared[i][j] = shared[j][i] = next((t for t, (a, b) in enumerate(pairs) if a != b), end)
    return shared


def leave_one_out_tree(
    responses_G: Sequence[Sequence[int]], rewards_G: Sequence[float], prior: float
) -> list[list[float]]:
    """Return the advantages of all tokens of a group, in which no token is compared with itself.

    Let s be the state before a token of response i, and s' the state after it. The return of the token is the mean
    reward of all responses that pass through s', including response i. The baseline is the value of s, estimated from
    the other responses only, so it does not depend on the token. At the prompt, and until a response leaves response i,
    it is the mean reward of the other responses. If n > 0 other responses pass through a later s, the baseline is
    (n * their mean reward + `prior` * b) / (n + `prior`), where b is the baseline at the last state before s at which
    one of the other responses left response i. If no other response passes through s, the baseline is b.

    Args:
        responses_G: the token ids of each of the G responses to one problem.
        rewards_G: reward of each response, shape (G,).
        prior: weight of the earlier baseline, as a number of responses.
    Returns:
        One list per response with the advantage of each of its T tokens, in reward units, shape (T,). All advantages
        are 0 if the rewards are equal or there is only one response.
    """
    if len(set(rewards_G)) < 2:
        return [[0.0] * len(response) for response in responses_G]
    advantages = []
    for i, (response, shared_G) in enumerate(zip(responses_G, shared_lengths(responses_G), strict=True)):
        baselines, returns = [], []
        others = [j for j in range(len(rewards_G)) if j != i]
        baseline = mean_of([rewards_G[j] for j in others])
        for t in range(len(response)):
            baselines.append(baseline)
            remaining = [j for j in others if shared_G[j] > t]
            if len(remaining) < len(others):
                others = remaining
                if others:
                    mean = mean_of([rewards_G[j] for j in others])
                    baseline = (len(others) * mean + prior * baseline) / (len(others) + prior)
            returns.append(mean_of([rewards_G[i], *(rewards_G[j] for j in others)]))
        advantages.append([after - before for after, before in zip(returns, baselines, strict=True)])
    return advantages


def paper_tree(
    responses_G: Sequence[Sequence[int]], rewards_G: Sequence[float], scale_by_std: bool
) -> list[list[float]]:
    """Return the advantages of all tokens of a group as in the paper (arXiv 2509.18314).

    The advantage of a token is r_i - mean + V(s') - V(s), optionally divided by the standard deviation of the rewards.
    V of a state is the mean reward of all responses of the group that pass through it, including response i. At tokens
    at which no response leaves response i, V(s') - V(s) is 0, so that GRPO's advantage remains.

    Args:
        responses_G: the token ids of each of the G responses to one problem.
        rewards_G: reward of each response, shape (G,).
        scale_by_std: whether to divide by the standard deviation of the rewards (plus 1e-4).
    Returns:
        One list per response with the advantage of each of its T tokens, shape (T,).
    """
    if len(set(rewards_G)) < 2:
        return [[0.0] * len(response) for response in responses_G]
    centred = grpo_advantages(rewards_G, scale_by_std=False)
    scaled = grpo_advantages(rewards_G, scale_by_std=scale_by_std)
    divisor = max(map(abs, centred)) / max(map(abs, scaled))
    advantages = []
    for response, own, shared_G in zip(responses_G, centred, shared_lengths(responses_G), strict=True):
        values = [_mean_of_passing(rewards_G, shared_G, t) for t in range(len(response) + 1)]
        advantages.append([(own + values[t + 1] - values[t]) / divisor for t in range(len(response))])
    return advantages


def _mean_of_passing(rewards_G: Sequence[float], shared_G: Sequence[int], t: int) -> float:
    """Return the mean reward of the responses that share at least the first `t` tokens with a response."""
    return mean_of([reward for reward, shared in zip(rewards_G, shared_G, strict=True) if shared >= t])


def tempo_credit(settings: TempoSettings) -> CreditFn:
    """Build the credit function of TEMPO. Responses without a reward are left out of the tree.

    The credit function also returns the metrics `credit/zero_group_share` (as for GRPO) and `credit/shared_share`: the
    share of the response tokens that at least one other response of the group has in the same state.
    """

    def credit(groups: list[RolloutGroup], iteration: int) -> tuple[list[TrainingSample], Metrics]:
        samples: list[TrainingSample] = []
        tokens = shared_tokens = equal_groups = 0
        for group in groups:
            rollouts = [rollout for _, rollout in with_reward([group])]
            responses, rewards = [rollout.response_ids for rollout in rollouts], [reward_of(r) for r in rollouts]
            if settings.form == "paper":
                advantages = paper_tree(responses, rewards, settings.scale_by_std)
            else:
                advantages = leave_one_out_tree(responses, rewards, settings.prior)
            for rollout, row, shared_G in zip(rollouts, advantages, shared_lengths(responses), strict=True):
                visits = [sum(shared > t for shared in shared_G) for t in range(len(row))]
                if settings.divide_by_visits:
                    row = [a / n for a, n in zip(row, visits, strict=True)]
                samples.append(training_sample(rollout, row))
                tokens, shared_tokens = tokens + len(row), shared_tokens + sum(n > 1 for n in visits)
            equal_groups += len(set(rewards)) <= 1
        metrics = {
            "credit/zero_group_share": equal_groups / len(groups),
            "credit/shared_share": shared_tokens / max(1, tokens),
        }
        return one_per_rollout(groups, samples), metrics

    return credit


def _build(settings: TempoSettings, parts: CreditParts) -> CreditFn:
    """Build the credit function of TEMPO for a run (`Algorithm.build`)."""
    return tempo_credit(settings)


TEMPO = Algorithm(name="tempo", label="TEMPO", build=_build, settings=TempoSettings, min_group_size=2, colour="#117733")
