"""Case 3: rewards that do not apply. Such a response has the advantage 0 and is in no baseline and in no MC mean."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import pytest
import torch

from tests.credit.test_credit import (
    FIRST,
    FOUR,
    RIGHT,
    SECOND,
    build_learner,
    completion,
    credit_of,
    fresh_policy,
    group_of,
    group_with,
    ids,
    no_values,
    policy,
    response_part,
    scripted,
    vine_samples,
)
from tests.credit.test_ground_truth import SIGMAS, expected_gradient, z_scores
from tests.world import PartlyApplicable, World, build_policy, flat_gradient, world_of
from vineppo.config.schema import LearnerConfig
from vineppo.credit import BUILT_IN
from vineppo.credit.bisection import bisected_vine_credit
from vineppo.credit.grpo import grpo_credit
from vineppo.credit.ppo import gae_credit
from vineppo.credit.reinforce import reinforce_credit
from vineppo.credit.rloo import rloo_credit
from vineppo.credit.sample import training_sample
from vineppo.credit.vineppo import VinePPOSettings, build_vine_credit, vine_credit
from vineppo.learning.learner import TorchLearner
from vineppo.learning.scaling import scale_advantages
from vineppo.model.critic import ValueNetwork
from vineppo.seeds import derive_seed
from vineppo.steps import build_splitter
from vineppo.tasks.grading.graded import Graded
from vineppo.tasks.grading.judge import InProcess
from vineppo.types import RolloutGroup, Task, TrainingSample
from vineppo.values import State, Value, ValueCost, ValueEstimator

CASE = [-1.0, -0.5, None, -1.0]


def advantages(samples: Sequence[TrainingSample]) -> list[float]:
    """The advantage of each response, all of whose tokens have the same one."""
    assert all(len(set(response_part(sample))) == 1 for sample in samples)
    return [response_part(sample)[0] for sample in samples]


def without_none(groups: Sequence[RolloutGroup]) -> list[RolloutGroup]:
    return [replace(g, rollouts=tuple(r for r in g.rollouts if r.reward is not None)) for g in groups]


# --- credit relative to other responses ---


def test_a_reward_that_does_not_apply_is_in_no_baseline() -> None:
    """-1 + .75, -.5 + 1, none, -1 + .75; for GRPO the mean is -5/6 and the variance (1/36 + 4/36 + 1/36) / 2 = 1/12."""
    group = [group_with(CASE)]
    assert advantages(rloo_credit()(group, 1)[0]) == [-0.25, 0.5, 0.0, -0.25]
    assert advantages(reinforce_credit()(group, 1)[0]) == [-0.25, 0.5, 0.0, -0.25]
    assert advantages(grpo_credit(False)(group, 1)[0]) == pytest.approx([-1 / 6, 1 / 3, 0, -1 / 6])
    scaled = advantages(grpo_credit(True)(group, 1)[0])
    assert scaled == pytest.approx([a / (math.sqrt(1 / 12) + 1e-4) for a in (-1 / 6, 1 / 3, 0, -1 / 6)])
    assert scaled[2] == 0.0


def test_the_other_advantages_are_those_of_a_smaller_group() -> None:
    groups = [group_with([0.3, None, 0.9, 0.4, None]), group_with([None, 0.1, 0.7])]
    for credit in (rloo_credit(), reinforce_credit(), grpo_credit(True), grpo_credit(False)):
        samples = credit(groups, 1)[0]
        assert len(samples) == 8
        with_reward = [sample for sample in samples if sample.rollout and sample.rollout.reward is not None]
        assert with_reward == credit(without_none(groups), 1)[0]
        assert {a for sample in samples if sample.without_reward for a in sample.advantages} == {0.0}


def test_a_single_reward_has_nothing_to_be_compared_with() -> None:
    for credit in (rloo_credit(), reinforce_credit(), grpo_credit(True), grpo_credit(False)):
        assert advantages(credit([group_with([None, 0.7, None])], 1)[0]) == [0.0, 0.0, 0.0]


def test_groups_without_different_rewards_are_counted_as_without_credit() -> None:
    groups = [group_with(rewards) for rewards in ([None, None], [None, 1], [1, None, 1], [1, None, 0])]
    assert rloo_credit()(groups, 1)[1] == {"credit/zero_group_share": 3 / 4}


@pytest.mark.parametrize("algorithm", BUILT_IN)
@pytest.mark.parametrize("more", [{}, {"bisection": True}])
def test_a_group_without_any_reward_gets_no_credit(algorithm: str, more: dict[str, Any]) -> None:
    """The script has no continuations: a sampler that is asked for one fails."""
    settings = {"reuse": False, "num_mc_rollouts": 4, **more} if algorithm == "vineppo" else {}
    credit = credit_of(algorithm, settings, scripted({}), graded_by({}), no_values)
    group = group_with([None, None, None])
    if algorithm == "tree":  # four copies of a response that ended before it could branch
        group = replace(group, rollouts=tuple(replace(group.rollouts[0]) for _ in range(4)))
    samples, metrics = credit([group], 1)
    assert [sample.rollout for sample in samples] == list(group.rollouts)
    assert {a for sample in samples for a in sample.advantages} == {0.0}
    assert all(math.isfinite(value) for value in metrics.values())


# --- VinePPO ---


def graded_by(rewards: dict[str, float | None]) -> Task:
    """A task that gives these rewards to these responses; a response that is not among them fails the test."""

    def grade(completions: Sequence[str], **_: Any) -> list[float | None]:
        return [rewards[text] for text in completions]

    return Graded(PartlyApplicable(), InProcess((grade,)), ("grade",), (1.0,), grade_truncated=True)


def continuations(prefix: str, rewards: Sequence[float | None]) -> tuple[list[str], dict[str, float | None]]:
    """One continuation of a prefix per reward, and the reward of each whole response."""
    texts = ["\n" + "1" * (1 + number) for number in range(len(rewards))]
    responses = {policy().codec.decode(ids(prefix + text)): r for text, r in zip(texts, rewards, strict=True)}
    return [text + "</s>" for text in texts], responses


THREE = FIRST + SECOND + FOUR
"""A response of three steps."""


def vine_with(rewards_by_prefix: dict[str, Sequence[float | None]], reward: float | None) -> TrainingSample:
    """The sample of a response of three steps whose continuations have these rewards."""
    script, rewards = {}, {policy().codec.decode(ids(THREE)): reward}
    for prefix, given in rewards_by_prefix.items():
        script[prefix], more = continuations(prefix, given)
        rewards |= more
    (sample,), _ = vine_samples(
        [group_of([completion(THREE)], graded_by(rewards))], scripted(script), task=graded_by(rewards)
    )
    return sample


def steps_of(sample: TrainingSample) -> tuple[tuple[float, ...], tuple[int, ...], tuple[float, ...]]:
    """(values, number of MC rollouts of each, step advantages) after a check that they add up to the reward."""
    assert sample.credit is not None and sample.rollout is not None and sample.rollout.reward is not None
    credit = sample.credit
    assert credit.values[0] + sum(credit.step_advantages) == sample.rollout.reward
    lengths = [len(ids(text)) for text in (FIRST, SECOND, FOUR)]
    spread = [a for a, n in zip(credit.step_advantages, lengths, strict=True) for _ in range(n)]
    assert response_part(sample) == spread
    return credit.values, credit.num_mc_rollouts, credit.step_advantages


NONE = [None] * 4


def test_an_mc_mean_leaves_out_continuations_without_a_reward() -> None:
    """(1 + 0) / 2, 1 / 1 and (0 + 1 + 1 + 1) / 4."""
    sample = vine_with({"": [1, None, 0, None], FIRST: [None, None, None, 1], FIRST + SECOND: [0, 1, 1, 1]}, 1.0)
    assert steps_of(sample) == ((0.5, 1.0, 0.75), (2, 1, 4), (0.5, -0.25, 0.25))


def test_a_state_without_any_reward_takes_the_next_known_value() -> None:
    """Its step has nothing to be compared with and gets 0; the step before it gets the change up to the known value."""
    middle = vine_with({"": [0, 0, 0, 1], FIRST: NONE, FIRST + SECOND: [0, 1, 1, 1]}, 1.0)
    assert steps_of(middle) == ((0.25, 0.75, 0.75), (4, 4, 4), (0.5, 0.0, 0.25))
    first = vine_with({"": NONE, FIRST: NONE, FIRST + SECOND: [0, 1, 1, 1]}, 0.0)
    assert steps_of(first) == ((0.75, 0.75, 0.75), (4, 4, 4), (0.0, 0.0, -0.75))
    last = vine_with({"": [0, 1, None, None], FIRST: [1, 1, 1, 1], FIRST + SECOND: NONE}, 0.0)
    assert steps_of(last) == ((0.5, 1.0, 0.0), (2, 4, 0), (0.5, -1.0, 0.0))
    none = vine_with({"": NONE, FIRST: NONE, FIRST + SECOND: NONE}, 0.5)
    assert steps_of(none) == ((0.5, 0.5, 0.5), (0, 0, 0), (0.0, 0.0, 0.0))


def test_the_states_of_a_rollout_without_a_reward_are_not_evaluated() -> None:
    sampler = scripted({"": ["1</s>", "2</s>", "3</s>", "4</s>"]})
    rewards: dict[str, float | None] = {"1": 1, "2": None, "3": 0, "4": 0, "5": 1}
    rewards[policy().codec.decode(ids(RIGHT))] = None
    task = graded_by(rewards)
    group = group_of([completion(RIGHT), completion("5</s>")], task)
    samples, metrics = vine_samples([group], sampler, task=task)
    assert [len(request.prompt_ids) for request in sampler.requests] == [len(group.rollouts[0].prompt_ids)]
    assert [response_part(sample) for sample in samples] == [[0.0] * 31, [1 - 1 / 3] * 2]
    assert samples[0].credit is None
    assert (metrics["credit/states"], metrics["credit/steps_per_response"]) == (1, 1)


@dataclass(frozen=True)
class Scripted:
    """A value estimator with one given value per response length."""

    values: Sequence[float | None]

    def evaluate(self, states: Sequence[State], iteration: int) -> tuple[list[Value | None], ValueCost]:
        means = [self.values[len(state.response_ids)] for state in states]
        return [None if mean is None else Value(mean, 0) for mean in means], ValueCost(len(states), len(states), 0, 0)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        # Without a value in the middle, the first half gets the whole change and is halved further.
        ([0.5, 0.5, None, 0.0], [0.0, -0.5, 0.0, 0.0]),
        # Without a value of the prompt, there is nothing to compare with.
        ([None, 0.5, 0.5, 0.0], [0.0, 0.0, 0.0, 0.0]),
        ([0.5, None, None, None], [-0.5, 0.0, 0.0, 0.0]),
    ],
)
def test_bisection_takes_the_next_known_value(values: list[float | None], expected: list[float]) -> None:
    estimator: ValueEstimator = Scripted(values)
    credit = bisected_vine_credit(estimator, build_splitter("tokens:1"), lambda ids: ["x"] * len(ids), 0, 0.7)
    (sample, other), _ = credit([bisection_group()], 0)
    assert response_part(sample) == expected
    assert sample.credit is not None and sample.credit.values[0] + sum(sample.credit.step_advantages) == 0
    assert response_part(other) == [0.0] * 4


def bisection_group() -> RolloutGroup:
    """A rollout of four tokens with the reward 0, and one without a reward."""
    group = group_with([0.0, None])
    return replace(
        group,
        rollouts=tuple(replace(r, response_ids=(8,) * 4, sampler_logprobs=(-1.0,) * 4) for r in group.rollouts),
    )


# --- the expected gradient in the enumerable world ---


@cache
def world() -> World:
    task = PartlyApplicable()
    return world_of(build_policy(), task, task.problem("train", 0), 3)


@cache
def moments() -> dict[tuple[int, ...], tuple[float, float, float]]:
    """For every state and response: its probability, that it has a reward in the end, and its mean reward if so."""
    sums: dict[tuple[int, ...], list[float]] = {}
    for outcome in world().outcomes:
        response, reward = outcome.rollout.response_ids, outcome.rollout.reward
        for end in range(len(response) + 1):
            entry = sums.setdefault(response[:end], [0.0, 0.0, 0.0])
            entry[0] += outcome.probability
            entry[1] += 0.0 if reward is None else outcome.probability
            entry[2] += 0.0 if reward is None else outcome.probability * reward
    return {key: (p, a / p, r / a if a else 0.0) for key, (p, a, r) in sums.items()}


def exact_gradient(known: Callable[[tuple[int, ...]], float]) -> torch.Tensor:
    """The sum over states s of P(s) * known(s) * sum over tokens a of grad pi(a|s) * p(s, a) * (V(s, a) - V(s)).

    p is the probability that a response has a reward, and V its mean reward if it has one. This is the gradient of the
    mean reward from s of the responses that have one, times their probability.

    Args:
        known: probability that the value of a state is known. Without a known value, the next token gets no credit.
    """
    w, expected = world(), torch.zeros((), dtype=torch.float64)
    for state in w.states:
        reached, applies, value = moments()[state]
        logits = w.policy.model(input_ids=torch.tensor([w.prompt_ids + state]), use_cache=False).logits[0, -1]
        probabilities = (logits.double() / w.temperature).softmax(-1)
        for token in range(5) if applies else ():
            _, next_applies, next_value = moments()[(*state, token)]
            weight = reached * known(state) * next_applies * (next_value - value)
            expected = expected + weight * probabilities[token]
    return flat_gradient(expected, w.policy)


def is_known(state: tuple[int, ...]) -> bool:
    """A pseudo-random choice of the states whose values are known."""
    return moments()[state][1] > 0 and derive_seed("known", *state) / 2**63 < 0.6


@dataclass(frozen=True)
class ExactValues:
    """A value estimator with exact values, which are unknown for some states."""

    def evaluate(self, states: Sequence[State], iteration: int) -> tuple[list[Value | None], ValueCost]:
        values = [Value(moments()[s.response_ids][2], 0) if is_known(s.response_ids) else None for s in states]
        return values, ValueCost(len(states), len(states), 0, 0)


def test_the_world_has_responses_with_and_without_a_reward_and_states_of_all_kinds() -> None:
    w = world()
    assert len(w.outcomes) == 1 + 4 + 16 + 64
    applies = [moments()[state][1] for state in w.states]
    assert 0.1 < applies[0] < 0.5 and min(applies) == 0 and max(applies) > 0.5
    assert sum(map(is_known, w.states)) in range(8, 17)


def test_the_expected_credit_is_that_of_the_states_with_a_known_value() -> None:
    """Steps after an unknown state get 0; all others are exact, also where the next value is unknown."""
    w, exact = world(), exact_gradient(is_known)
    credit = vine_credit(ExactValues(), build_splitter("tokens:1"), w.policy.codec.token_texts, 0)
    gradient = expected_gradient(w, credit)
    assert (gradient - exact).abs().max() < 1e-6 < 0.01 < exact.abs().max()


@pytest.mark.parametrize("alternatives", [False, True])
def test_mc_values_that_leave_out_continuations_are_unbiased(alternatives: bool) -> None:
    """The value of a state is known if one of its K continuations has a reward: 1 - (1 - p)^K."""
    w, K = world(), 4
    settings = VinePPOSettings(splitter="tokens:1", alternatives=alternatives)
    credit = build_vine_credit(settings, w.monte_carlo(K), w.policy.codec)
    gradients = [expected_gradient(w, credit, iteration) for iteration in range(60)]
    exact = exact_gradient(lambda state: 1 - (1 - moments()[state][1]) ** K)
    assert max(map(abs, z_scores(gradients, exact))) < SIGMAS
    assert abs(z_scores(gradients, 2 * exact)[0]) > SIGMAS


# --- PPO and the learner ---


def rollouts_with(*rewards: float | None) -> list[RolloutGroup]:
    """One group of responses with different tokens and these rewards."""
    group = group_of([completion(FIRST + 3 * str(n) + "</s>") for n in range(len(rewards))])
    return [replace(group, rollouts=tuple(replace(r, reward=x) for r, x in zip(group.rollouts, rewards, strict=True)))]


def learner_with(critic: ValueNetwork | None, **options: Any) -> TorchLearner:
    config = LearnerConfig(lr=1e-4, minibatch_size=8, warmup_updates=0, **options)
    return TorchLearner(fresh_policy(), None, critic, config, None, temperature=1.0, total_updates=10, seed=0)


def test_ppo_has_no_target_for_a_rollout_without_a_reward() -> None:
    values = build_learner(ValueNetwork(policy(), seed=0)).predict_values
    credit = gae_credit(values, gamma=1.0, gae_lambda=0.9)
    groups = rollouts_with(1.0, None, 0.0)
    samples, metrics = credit(groups, 1)
    others, expected = credit(without_none(groups), 1)
    assert [samples[0], samples[2]] == others and metrics == expected
    assert set(samples[1].advantages) == {0.0}
    assert samples[1].returns is None and samples[1].values is None


def test_the_value_network_is_not_trained_on_a_rollout_without_a_reward() -> None:
    results = []
    for groups in (rollouts_with(1.0, None, 0.0), without_none(rollouts_with(1.0, None, 0.0)), rollouts_with(None)):
        critic = ValueNetwork(policy(), seed=0)
        before = torch.cat([p.detach().reshape(-1).clone() for p in critic.parameters()])
        learner = learner_with(critic)
        samples, _ = gae_credit(learner.predict_values, gamma=1.0, gae_lambda=1.0)(groups, 1)
        metrics = learner.update(samples, 1, len(samples))
        after = torch.cat([p.detach().reshape(-1) for p in critic.parameters()])
        results.append((metrics["value/loss"], after - before))
    assert results[0][0] == pytest.approx(results[1][0])
    torch.testing.assert_close(results[0][1], results[1][1], atol=1e-6, rtol=1e-3)
    assert results[0][1].abs().max() > 1e-5
    assert results[2][0] == 0 and results[2][1].abs().max() == 0


def test_whitening_leaves_the_advantage_0_of_a_rollout_without_a_reward() -> None:
    """Mean and standard deviation are those of the other tokens: 1 and 3 become -1 and 1."""
    assert scale_advantages([[1.0], [3.0], [0.0]], "whiten", [[1.0], [1.0], [0.0]]) == [[-1.0], [1.0], [0.0]]
    assert scale_advantages([[1.0], [3.0], [0.0]], "std", [[1.0], [1.0], [0.0]]) == [[1.0], [3.0], [0.0]]
    weights = []
    (group,) = rollouts_with(1.0, 1.0, None)
    for scaling, given in (("whiten", (1.0, 3.0, 0.0)), ("none", (-1.0, 1.0, 0.0))):
        learner = learner_with(None, advantage_scaling=scaling)
        samples = [
            training_sample(rollout, [a] * len(rollout.response_ids))
            for rollout, a in zip(group.rollouts, given, strict=True)
        ]
        learner.update(samples, 1, 3)
        weights.append(torch.cat([p.detach().reshape(-1) for p in learner.policy.model.parameters()]))
    assert torch.equal(*weights)
