"""Continuations that count for several states (values/reuse.py), compared with exact values of the enumerable world.

The values are unbiased and as precise as those of K new continuations, and the variance of their differences is that of
the formula in docs/algorithms.md.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest

from tests.credit.test_ground_truth import SIGMAS, world, z_scores
from tests.helpers import known
from tests.world import World, policy_gradient
from vineppo.credit.sample import reward_of
from vineppo.credit.vineppo import VinePPOSettings, build_vine_credit, vine_node_credit
from vineppo.sampling.wrapped import WrappedSampler
from vineppo.steps import build_splitter
from vineppo.types import (
    Capabilities,
    Completion,
    Rollout,
    RolloutGroup,
    Sampler,
    SampleRequest,
    UserError,
)
from vineppo.values import ReusingMonteCarlo, State, ValueCost

K = 4
ITERATIONS = 1500


def reusing(w: World, num_mc_rollouts: int = K, sampler: Sampler | None = None) -> ReusingMonteCarlo:
    """The estimator with a sampler; the default samples from the table of the world."""
    monte_carlo = w.monte_carlo(num_mc_rollouts, by_table=sampler is None)
    return ReusingMonteCarlo(replace(monte_carlo, sampler=sampler) if sampler else monte_carlo)


def rollouts(w: World) -> list[Rollout]:
    """Four responses: two that start with the same tokens, one of them truncated; another one; and a duplicate."""
    by_ids = {o.rollout.response_ids: o.rollout for o in w.outcomes}
    likely = sorted((o for o in w.outcomes if len(o.rollout.response_ids) == 4), key=lambda o: -o.probability)
    first = likely[0].rollout
    second = next(
        o.rollout
        for o in likely
        if o.rollout.response_ids[:2] == first.response_ids[:2]
        and o.rollout.response_ids[2] != first.response_ids[2]
        and o.rollout.finish_reason != first.finish_reason
    )
    third = next(o.rollout for o in likely if o.rollout.response_ids[0] != first.response_ids[0])
    return [first, second, third, by_ids[first.response_ids]]


def states_of(w: World, chosen: Sequence[Rollout]) -> list[State]:
    """The state before every token of every rollout."""
    return [
        State(w.problem, w.prompt_ids, rollout.response_ids[:end], rollout)
        for rollout in chosen
        for end in range(len(rollout.response_ids))
    ]


def estimates(w: World, chosen: Sequence[Rollout], iterations: int) -> tuple[np.ndarray, list[ValueCost]]:
    """Values of the states in many iterations, shape (iterations, states), and the cost of each iteration."""
    monte_carlo, states = reusing(w), states_of(w, chosen)
    means, costs = [], []
    for iteration in range(iterations):
        estimated, cost = monte_carlo.evaluate(states, iteration)
        values = known(estimated)
        assert {value.num_mc_rollouts for value in values} == {K}
        means.append([value.mean for value in values])
        costs.append(cost)
    return np.array(means), costs


def test_values_are_unbiased_and_as_precise_as_k_new_continuations() -> None:
    w = world(4)
    chosen = rollouts(w)[:3]
    means, costs = estimates(w, chosen, ITERATIONS)
    states = states_of(w, chosen)
    truth = np.array([w.value(state.response_ids) for state in states])
    variance = np.array([w.moments[state.response_ids][1] for state in states]) / K
    z = (means.mean(0) - truth) / np.sqrt(variance / ITERATIONS)
    assert np.abs(z).max() < SIGMAS
    # The variance of a single state is not precisely known after 1500 iterations; the mean over states is.
    assert (means.var(0) / variance).mean() == pytest.approx(1, abs=0.06)
    assert means.var(0) == pytest.approx(variance, rel=0.35)
    without_reuse = K * len({state.key for state in states})
    assert 0.2 * without_reuse < np.mean([cost.mc_rollouts for cost in costs]) < 0.95 * without_reuse
    assert {cost.distinct_states for cost in costs} == {without_reuse // K}


def test_the_variance_of_an_advantage_is_that_of_the_continuations_that_leave() -> None:
    """Each of the K continuations of a state leaves the response before the next state with probability q.

    There it is replaced by a new one. D = V(b) - V(a) is a mean of K independent terms: 0 if the continuation does not
    leave, otherwise F - L, with L the reward of the continuation that leaves and F that of its replacement. So
    Var D = (q E (F - L)^2 - (q (E F - E L))^2) / K.
    """
    w = world(4)
    chosen = rollouts(w)[:1]
    means, _ = estimates(w, chosen, ITERATIONS)
    response = chosen[0].response_ids
    probability = np.exp(chosen[0].sampler_logprobs)
    for step in range(len(response) - 1):
        (mean_a, var_a), (mean_b, var_b) = w.moments[response[:step]], w.moments[response[: step + 1]]
        p, q = probability[step], 1 - probability[step]
        mean_left = (mean_a - p * mean_b) / q
        square_left = (var_a + mean_a**2 - p * (var_b + mean_b**2)) / q
        square = var_b + mean_b**2 - 2 * mean_b * mean_left + square_left
        expected = (q * square - (q * (mean_b - mean_left)) ** 2) / K
        differences = means[:, step + 1] - means[:, step]
        assert differences.mean() == pytest.approx(mean_b - mean_a, abs=SIGMAS * math.sqrt(expected / ITERATIONS))
        assert differences.var() == pytest.approx(expected, rel=0.2)
        assert expected < (var_a + var_b) / K  # the variance without reuse


def test_a_tree_that_contains_all_responses_needs_no_sampling() -> None:
    w = world(3)
    all_rollouts = [outcome.rollout for outcome in w.outcomes]
    monte_carlo, states = reusing(w, 4096), states_of(w, all_rollouts)
    values, cost = monte_carlo.evaluate(states, 0)
    assert (cost.mc_rollouts, cost.tokens) == (0, 0)
    for state, value in zip(states, known(values), strict=True):
        mean, variance = w.moments[state.response_ids]
        assert value.mean == pytest.approx(mean, abs=SIGMAS * math.sqrt(variance / 4096) + 1e-4)


@dataclass
class Recording(WrappedSampler):
    """A sampler that records its requests and completions."""

    seen: list[tuple[SampleRequest, Completion]] = field(default_factory=list)

    def sample(self, requests: Sequence[SampleRequest], on_finished: Any = None) -> list[list[Completion]]:
        completions = self.sampler.sample(requests)
        self.seen.extend((r, c) for r, group in zip(requests, completions, strict=True) for c in group)
        return completions


def test_sampled_continuations_leave_the_tree_at_their_first_token() -> None:
    w = world(4)
    recording = Recording(w.sampler())
    chosen = rollouts(w)
    _, cost = reusing(w, 64, recording).evaluate(states_of(w, chosen), 0)
    assert len(recording.seen) == cost.mc_rollouts > 100
    known = {rollout.response_ids[:end] for rollout in chosen for end in range(1 + len(rollout.response_ids))}
    for request, completion in recording.seen:
        response = request.prompt_ids[len(w.prompt_ids) :]
        assert response in known and (*response, completion.token_ids[0]) not in known
        assert request.max_new_tokens == w.max_new_tokens - len(response)
        assert completion.logprobs[0] < 0 or len(request.excluded_first) == 4


@dataclass
class OnlyPlain(WrappedSampler):
    """A sampler that cannot exclude first tokens, and fails if a request has excluded tokens."""

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(excluded_first=False, reproducible=False)

    def sample(self, requests: Sequence[SampleRequest], on_finished: Any = None) -> list[list[Completion]]:
        assert not any(request.excluded_first for request in requests)
        return self.sampler.sample(requests)


def test_a_sampler_that_cannot_exclude_tokens_gives_new_continuations_and_one_warning() -> None:
    w, num_mc_rollouts = world(4), 256
    monte_carlo = w.monte_carlo(num_mc_rollouts)
    limited = replace(monte_carlo, sampler=OnlyPlain(w.sampler()))
    settings = VinePPOSettings(num_mc_rollouts=num_mc_rollouts, splitter="tokens:1")
    groups = [RolloutGroup(w.problem, tuple(rollouts(w)))]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        credit = build_vine_credit(settings, limited, w.policy.codec)
        samples, metrics = credit(groups, 0)
        assert credit(groups, 0) == (samples, metrics)
    message = "continuations are not reused: this sampler cannot exclude first tokens, so every state gets "
    message += f"{num_mc_rollouts} new"
    assert [str(warning.message).startswith(message) for warning in caught] == [True]
    assert "\n" not in str(caught[0].message) and "times as many tokens" in str(caught[0].message)

    without_reuse = build_vine_credit(settings.model_copy(update={"reuse": False}), monte_carlo, w.policy.codec)
    assert (samples, metrics) == without_reuse(groups, 0)
    for rollout, sample in zip(groups[0].rollouts, samples, strict=True):
        assert sample.credit is not None
        for depth, value in enumerate(sample.credit.values):
            mean, variance = w.moments[rollout.response_ids[:depth]]
            assert value == pytest.approx(mean, abs=SIGMAS * math.sqrt(variance / num_mc_rollouts) + 1e-4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _, reused = build_vine_credit(settings, monte_carlo, w.policy.codec)(groups, 0)
    assert reused["tokens/mc"] < 0.5 * metrics["tokens/mc"]


def test_alternatives_are_refused_if_the_sampler_cannot_exclude_tokens() -> None:
    w = world(3)
    monte_carlo = replace(w.monte_carlo(2), sampler=OnlyPlain(w.sampler()))
    with pytest.raises(UserError, match=r"vineppo.alternatives is true, but this sampler cannot exclude first tokens"):
        build_vine_credit(VinePPOSettings(alternatives=True), monte_carlo, w.policy.codec)


def test_excluding_tokens_renormalizes_the_probabilities_of_the_others() -> None:
    w, n = world(3), 20_000
    probabilities = {
        token: sum(o.probability for o in w.outcomes if o.rollout.response_ids[0] == token) for token in range(5)
    }
    request = SampleRequest(w.prompt_ids, n, 3, 5, excluded_first=(1, 4), temperature=w.temperature)
    first = [c.token_ids[0] for c in w.sampler().sample([request])[0]]
    rest = 1 - probabilities[1] - probabilities[4]
    assert not {1, 4} & set(first)
    for token in (0, 2, 3):
        share = probabilities[token] / rest
        assert first.count(token) / n == pytest.approx(share, abs=SIGMAS * math.sqrt(share * (1 - share) / n))
    for completion in w.sampler().sample([request])[0][:100]:
        assert math.exp(completion.logprobs[0]) == pytest.approx(
            probabilities[completion.token_ids[0]] / rest, abs=1e-4
        )


def test_neither_order_nor_repetition_nor_other_problems_change_a_value() -> None:
    w, other = world(4), world(4, 1)
    states, estimator = states_of(w, rollouts(w)), reusing(w, sampler=w.sampler())
    values, cost = estimator.evaluate(states, 3)
    assert cost.states == len(states) > cost.distinct_states
    reversed_values, _ = estimator.evaluate(states[::-1], 3)
    assert reversed_values[::-1] == values
    other_states = states_of(other, [other.outcomes[-1].rollout])
    together, _ = estimator.evaluate([*other_states, *states], 3)
    assert together[len(other_states) :] == values
    assert estimator.evaluate(states, 4)[0] != values


# --- alternatives: next tokens of continuations at each token of a rollout ---


def test_nodes_contain_all_continuations_that_pass_through() -> None:
    """At a state there are K continuations; at the next token those of them that follow the response."""
    w = world(4)
    chosen = rollouts(w)
    by_step = [s for s in states_of(w, chosen) if len(s.response_ids) % 2 == 0]
    for iteration in range(20):
        values, nodes, cost = reusing(w).evaluate_nodes(by_step, [(w.problem, r) for r in chosen], iteration)
        again, same_cost = reusing(w).evaluate(by_step, iteration)
        assert (values, cost) == (again, same_cost)
        value_of = {state.key: value.mean for state, value in zip(by_step, known(values), strict=True)}
        for rollout, nodes_T in zip(chosen, nodes, strict=True):
            assert len(nodes_T) == len(rollout.response_ids)
            assert nodes_T == nodes[chosen.index(rollout)]
            for t, node in enumerate(nodes_T):
                rewards = [*node.followed, *(reward for _, reward in node.diverged)]
                assert rollout.response_ids[t] not in {token for token, _ in node.diverged}
                if t % 2 == 0:
                    assert len(rewards) == K
                    mean = value_of[State(w.problem, w.prompt_ids, rollout.response_ids[:t]).key]
                    assert sum(rewards) / K == pytest.approx(mean)
                else:
                    assert sorted(rewards) == sorted(nodes_T[t - 1].followed)


def test_next_tokens_of_a_node_have_the_distribution_of_the_policy() -> None:
    """At the first node each token has its probability, and its rewards have the right mean."""
    w = world(3)
    first_token = rollouts(world(4))[0].response_ids[:1]
    outcome = next(o.rollout for o in w.outcomes if o.rollout.response_ids[:1] == first_token)
    rewards_by_token: dict[int, list[float]] = {}
    for iteration in range(ITERATIONS):
        _, nodes, _ = reusing(w).evaluate_nodes(states_of(w, [outcome]), [(w.problem, outcome)], iteration)
        first = nodes[0][0]
        for token, reward in [*((outcome.response_ids[0], r) for r in first.followed), *first.diverged]:
            rewards_by_token.setdefault(token, []).append(reward)
    total = sum(map(len, rewards_by_token.values()))
    assert total == K * ITERATIONS
    for token, rewards in rewards_by_token.items():
        paths = [o for o in w.outcomes if o.rollout.response_ids[0] == token]
        p = sum(o.probability for o in paths)
        mean = sum(o.probability * reward_of(o.rollout) for o in paths) / p
        variance = max(0.0, sum(o.probability * reward_of(o.rollout) ** 2 for o in paths) / p - mean**2)
        assert len(rewards) / total == pytest.approx(p, abs=SIGMAS * math.sqrt(p * (1 - p) / total))
        assert np.mean(rewards) == pytest.approx(mean, abs=SIGMAS * math.sqrt(variance / len(rewards)) + 1e-12)


def test_the_loss_with_alternatives_has_the_exact_gradient() -> None:
    """The model samples, and the package's loss trains the alternatives (tests/credit/test_estimators.py: by table)."""
    w = world(3)
    credit = vine_node_credit(reusing(w, 3, w.sampler()), build_splitter("tokens:2"), w.policy.codec.token_texts, 0)
    gradients = []
    for iteration in range(120):
        samples, _ = credit([w.sampled_group(8, iteration)], iteration)
        gradients.append(policy_gradient(w.policy, w.temperature, [(1 / 8, sample) for sample in samples]))
    assert max(map(abs, z_scores(gradients, w.exact_gradient()))) < SIGMAS
