"""Values and gradients compared with exact ones in the enumerable world (tests/world.py).

Model, sampler, grading, credit and loss are those of the package. A credit function is correct if the expectation of
sum_t A_t grad log pi(a_t) is the gradient of the expected reward. The expectation is computed by enumerating all
responses, or all tuples of responses, with their probabilities. If Monte-Carlo values are random too, the mean over
many iterations is tested with a z-test and fixed seeds. tests/credit/test_estimators.py compares every estimator more
precisely, without the model.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import cast

import numpy as np
import pytest
import torch

from tests.helpers import known
from tests.world import World, build_policy, build_world, policy_gradient
from vineppo.credit.grpo import grpo_credit
from vineppo.credit.ppo import gae_credit
from vineppo.credit.reinforce import reinforce_credit
from vineppo.credit.rloo import rloo_credit
from vineppo.credit.vineppo import vine_credit
from vineppo.model.logits import token_logprobs
from vineppo.model.policy import Policy
from vineppo.sampling.graded import grade_finished
from vineppo.seeds import derive_seed
from vineppo.steps import build_splitter
from vineppo.training.rollouts import sample_groups
from vineppo.types import CreditFn, Rollout, RolloutGroup, SampleRequest, TrainingSample
from vineppo.values import MonteCarlo, State, Value, ValueCost

ABSOLUTE = 1e-6
"""Largest accepted error of a component of an expected gradient; the largest components are 0.1 to 1."""
SIGMAS = 4.5


@cache
def world(max_new_tokens: int, problem: int = 0) -> World:
    return build_world(max_new_tokens, problem=problem, policy=policy())


@cache
def policy() -> Policy:
    return build_policy()


@dataclass(frozen=True)
class ExactValues:
    """A value estimator that returns exact values, or values with a fixed pseudo-random error."""

    world: World
    error: float = 0.0

    def evaluate(self, states: Sequence[State], iteration: int) -> tuple[list[Value], ValueCost]:
        values = [Value(value_with_error(self.world, state.response_ids, self.error), 0) for state in states]
        return values, ValueCost(len(states), len(states), 0, 0)


@dataclass(frozen=True)
class TableCritic:
    """A replacement for `Learner.predict_values` with exact values, or values with a fixed pseudo-random error."""

    world: World
    error: float = 0.0

    def __call__(self, rollouts: Sequence[Rollout]) -> list[list[float]]:
        return [
            [value_with_error(self.world, r.response_ids[:end], self.error) for end in range(len(r.response_ids))]
            for r in rollouts
        ]


def value_with_error(world: World, response_ids: tuple[int, ...], error: float) -> float:
    """V of the state plus a fixed pseudo-random error of at most `error`."""
    return world.value(response_ids) + error * (derive_seed("error", *response_ids) / 2**63)


def vine(monte_carlo: object, splitter: str, max_states: int = 0) -> CreditFn:
    return vine_credit(cast(MonteCarlo, monte_carlo), build_splitter(splitter), policy().codec.token_texts, max_states)


def ppo(critic: TableCritic, gae_lambda: float) -> CreditFn:
    return gae_credit(critic, gamma=1.0, gae_lambda=gae_lambda)


def expected_gradient(world: World, credit: CreditFn, iteration: int = 0) -> torch.Tensor:
    """Expected gradient of a credit function that treats rollouts separately, by enumeration of all responses."""
    samples, _ = credit([world.group()], iteration)
    return policy_gradient(world.policy, world.temperature, zip(world.probabilities, samples, strict=True))


def largest_error(gradient: torch.Tensor, exact: torch.Tensor) -> float:
    return (gradient - exact).abs().max().item()


# --- the world itself ---


def test_the_world_is_complete_and_its_values_are_not_trivial() -> None:
    w = world(4)
    assert len(w.responses) == 1 + 4 + 16 + 64 + 256 and len(w.states) == 1 + 4 + 16 + 64
    assert sum(w.probabilities) == pytest.approx(1, abs=1e-9)
    cut_off = sum(o.probability for o in w.outcomes if o.rollout.finish_reason == "length")
    assert 0.1 < cut_off < 0.7
    values = [w.value(state) for state in w.states]
    assert max(values) - min(values) > 0.3
    assert w.exact_gradient().abs().max() > 0.1


def test_values_obey_the_bellman_equation() -> None:
    """V(s) is the mean over next tokens of the reward (EOS), 0 (length limit) or the value of the next state."""
    w = world(3)
    ends = {o.rollout.response_ids: o.rollout.reward for o in w.outcomes}
    for state in w.states:
        logits = policy().model(input_ids=torch.tensor([w.prompt_ids + state]), use_cache=False).logits[0, -1]
        probabilities = (logits.double() / w.temperature).softmax(-1).tolist()
        nexts = [(*state, token) for token in range(5)]
        next_values = [ends[s] if s in ends else w.value(s) for s in nexts]
        expected = sum(p * v for p, v in zip(probabilities, next_values, strict=True))
        assert w.value(state) == pytest.approx(expected, abs=1e-6)


def test_a_truncated_response_has_reward_0_although_the_task_would_reward_its_text() -> None:
    w = world(4)
    cut_off = [o for o in w.outcomes if o.rollout.finish_reason == "length"]
    texts = [o.rollout.text for o in cut_off]
    assert len(cut_off) == 4**4 and min(known(w.task.grade([w.problem] * len(texts), texts))) > 0
    assert grade_finished(w.task, [w.problem] * len(texts), texts, [False] * len(texts)) == [0.0] * len(texts)
    assert {o.rollout.reward for o in cut_off} == {0.0}


def test_logprobs_of_the_trainer_are_those_of_the_world() -> None:
    w = world(4)
    samples, _ = vine(ExactValues(w), "tokens:1")([w.group()], 0)
    for sample in samples:
        ids, mask = torch.tensor([sample.token_ids]), torch.tensor([sample.loss_mask]).bool()
        logprobs, _ = token_logprobs(policy().model, ids, mask, w.temperature)
        expected = torch.tensor(sample.sampler_logprobs)[len(w.prompt_ids) :]
        torch.testing.assert_close(logprobs, expected, atol=1e-5, rtol=0)


# --- sampling and Monte-Carlo values ---


def test_sampled_responses_have_the_frequencies_of_their_probabilities() -> None:
    """Pearson's chi-square test over all 85 responses; the statistic's standard deviation is sqrt(2 * 84)."""
    w, n = world(3), 20_000
    request = SampleRequest(w.prompt_ids, n, w.max_new_tokens, seed=11, temperature=w.temperature)
    counts = Counter(completion.token_ids for completion in w.sampler().sample([request])[0])
    assert set(counts) <= set(w.responses)
    common = [o for o in w.outcomes if n * o.probability >= 5]
    rare = n * (1 - sum(o.probability for o in common))
    expected = [n * o.probability for o in common] + [rare]
    observed = [counts[o.rollout.response_ids] for o in common]
    observed.append(n - sum(observed))
    chi_square = sum((o - e) ** 2 / e for o, e in zip(observed, expected, strict=True))
    degrees = len(common)
    assert len(common) > 40 and abs(chi_square - degrees) < SIGMAS * math.sqrt(2 * degrees)


def test_sampled_rollouts_have_the_rewards_and_logprobs_of_the_world() -> None:
    w = world(4)
    truth = {o.rollout.response_ids: o.rollout for o in w.outcomes}
    (group,) = sample_groups(
        [w.problem],
        policy().codec,
        w.sampler(),
        w.task,
        group_size=256,
        max_new_tokens=4,
        temperature=w.temperature,
        address=(0, 1, "rollouts"),
    )
    assert {r.finish_reason for r in group.rollouts} == {"stop", "length"}
    for rollout in group.rollouts:
        expected = truth[rollout.response_ids]
        assert rollout.sampler_logprobs == pytest.approx(expected.sampler_logprobs, abs=1e-4)
        assert replace(rollout, sampler_logprobs=()) == replace(expected, sampler_logprobs=())


def monte_carlo_errors(w: World, num_mc_rollouts: int, iterations: int) -> np.ndarray:
    """Estimate minus exact value of every state in every iteration, shape (iterations, states)."""
    monte_carlo = w.monte_carlo(num_mc_rollouts, by_table=True)
    states = [State(w.problem, w.prompt_ids, state) for state in w.states]
    truth = np.array([w.value(state) for state in w.states])
    means = []
    for iteration in range(iterations):
        estimates, cost = monte_carlo.evaluate(states, iteration)
        values = known(estimates)
        assert {value.num_mc_rollouts for value in values} == {num_mc_rollouts}
        assert cost.mc_rollouts == num_mc_rollouts * len(states)
        means.append([value.mean for value in values])
    return np.array(means) - truth


@pytest.mark.parametrize("num_mc_rollouts", [1, 4])
def test_monte_carlo_values_are_unbiased(num_mc_rollouts: int) -> None:
    """The sum of z^2 over states has a chi-square distribution: too large values show a bias, too small ones a
    dependence between iterations.
    """
    w, iterations = world(4), 200
    errors = monte_carlo_errors(w, num_mc_rollouts, iterations).mean(0)
    variances = np.array([w.moments[state][1] for state in w.states])
    z = errors / np.sqrt(variances / (num_mc_rollouts * iterations))
    assert np.abs(z).max() < SIGMAS
    assert abs((z**2).sum() - len(z)) < SIGMAS * math.sqrt(2 * len(z))
    assert abs(z.sum() / math.sqrt(len(z))) < SIGMAS


def test_the_error_falls_as_one_over_sqrt_k() -> None:
    """With 16 times as many continuations the error is a quarter.

    With 85 states and 20 iterations the standard error of the root mean square is about 2%, and that of the ratio 3%.
    Both errors must also agree with the exact variances.
    """
    w = world(4)
    variance = np.mean([w.moments[state][1] for state in w.states])
    rms = {K: math.sqrt((monte_carlo_errors(w, K, 20) ** 2).mean()) for K in (4, 64)}
    assert rms[4] / rms[64] == pytest.approx(4, rel=0.10)
    for K, error in rms.items():
        assert error == pytest.approx(math.sqrt(variance / K), rel=0.08)


def test_values_with_a_wrong_budget_are_detectably_wrong() -> None:
    """If continuations got the full budget, values would differ by far more than the tests above accept."""
    short, long = world(3), world(4)
    prefix = max(short.states, key=lambda state: long.value(state) - short.value(state))
    state = State(short.problem, short.prompt_ids, prefix)
    (right,), _ = short.monte_carlo(4096).evaluate([state], 0)
    (wrong,), _ = replace(short.monte_carlo(4096), max_new_tokens=4).evaluate([state], 0)
    assert right and wrong
    assert right.mean == pytest.approx(short.value(prefix), abs=0.02)
    assert wrong.mean == pytest.approx(long.value(prefix), abs=0.02)
    assert long.value(prefix) - short.value(prefix) > 0.1


# --- the expected gradient: credit from values ---


@pytest.mark.parametrize("max_new_tokens", [3, 4])
@pytest.mark.parametrize("splitter", ["tokens:1", "tokens:2", "tokens:3", "tokens:9", "tests.world:cut_after_a"])
def test_vineppo_with_exact_values_has_the_exact_gradient(splitter: str, max_new_tokens: int) -> None:
    w = world(max_new_tokens)
    gradient = expected_gradient(w, vine(ExactValues(w), splitter))
    assert largest_error(gradient, w.exact_gradient()) < ABSOLUTE


def test_the_gradient_of_a_second_problem_is_exact_too() -> None:
    """The exact gradients of two problems differ, so the test fails if problems are mixed up."""
    first, second = world(4, 0), world(4, 1)
    assert largest_error(first.exact_gradient(), second.exact_gradient()) > 0.1
    gradient = expected_gradient(second, vine(ExactValues(second), "tokens:1"))
    assert largest_error(gradient, second.exact_gradient()) < ABSOLUTE


def test_cuts_that_depend_on_later_tokens_are_not_exact() -> None:
    """A splitter that makes no cut before EOS depends on the next token: the gradient is off by 28%."""
    w = world(4)
    exact = w.exact_gradient()

    def skips_the_cut_before_eos(tokens: Sequence[str], logprobs: Sequence[float] = ()) -> tuple[int, ...]:
        return (*(i for i in range(1, len(tokens)) if tokens[i]), len(tokens))

    values = cast(MonteCarlo, ExactValues(w))
    looks_ahead = vine_credit(values, skips_the_cut_before_eos, policy().codec.token_texts, max_states=0)
    gradient = expected_gradient(w, looks_ahead)
    assert ((gradient - exact).norm() / exact.norm()).item() == pytest.approx(0.282, abs=0.001)
    assert (gradient @ exact / (exact @ exact)).item() == pytest.approx(1.119, abs=0.001)


@pytest.mark.parametrize("gae_lambda", [0.0, 0.5, 1.0])
def test_ppo_with_exact_values_has_the_exact_gradient_at_any_lambda(gae_lambda: float) -> None:
    w = world(4)
    gradient = expected_gradient(w, ppo(TableCritic(w), gae_lambda))
    assert largest_error(gradient, w.exact_gradient()) < ABSOLUTE


def test_wrong_values_cause_no_bias_at_lambda_1_and_a_bias_at_lambda_0() -> None:
    w = world(4)
    exact = w.exact_gradient()
    assert largest_error(expected_gradient(w, ppo(TableCritic(w, error=0.5), 1.0)), exact) < ABSOLUTE
    assert largest_error(expected_gradient(w, ppo(TableCritic(w, error=0.5), 0.0)), exact) > 0.01
    assert largest_error(expected_gradient(w, vine(ExactValues(w, error=0.5), "tokens:1")), exact) > 0.01


def test_vineppo_with_a_step_per_token_is_gae_at_lambda_0() -> None:
    """Both give the same advantages if they use the same values."""
    w = world(4)
    by_vine, _ = vine(ExactValues(w), "tokens:1")([w.group()], 0)
    by_ppo, _ = ppo(TableCritic(w), 0.0)([w.group()], 0)
    for vine_sample, ppo_sample in zip(by_vine, by_ppo, strict=True):
        assert vine_sample.advantages == pytest.approx(ppo_sample.advantages, abs=1e-12)


# --- the expected gradient: credit relative to other responses ---


def group_gradient(worlds: Sequence[World], credit: CreditFn, *, one_group: bool) -> torch.Tensor:
    """Expected gradient by enumeration of all tuples of responses, one from each world.

    Args:
        one_group: if true, the worlds are identical and a tuple is one group; otherwise each response is one group.
    """

    def weighted() -> Iterable[tuple[float, TrainingSample]]:
        for outcomes in itertools.product(*(w.outcomes for w in worlds)):
            rollouts = tuple(outcome.rollout for outcome in outcomes)
            groups = [RolloutGroup(w.problem, (r,)) for w, r in zip(worlds, rollouts, strict=True)]
            samples, _ = credit([RolloutGroup(worlds[0].problem, rollouts)] if one_group else groups, 0)
            probability = math.prod(outcome.probability for outcome in outcomes)
            yield from ((probability, sample) for sample in samples)

    return policy_gradient(policy(), worlds[0].temperature, weighted())


@pytest.mark.parametrize(("group_size", "max_new_tokens"), [(2, 3), (3, 2)])
def test_rloo_is_exact_and_grpo_without_std_is_too_small(group_size: int, max_new_tokens: int) -> None:
    w = world(max_new_tokens)
    exact = group_size * w.exact_gradient()
    by_rloo = group_gradient([w] * group_size, rloo_credit(), one_group=True)
    by_grpo = group_gradient([w] * group_size, grpo_credit(scale_by_std=False), one_group=True)
    assert largest_error(by_rloo, exact) < ABSOLUTE * group_size
    assert largest_error(by_grpo, exact * (group_size - 1) / group_size) < ABSOLUTE * group_size
    assert largest_error(by_grpo, exact) > 0.05


def test_reinforce_is_exact_for_an_iteration_of_two_problems() -> None:
    worlds = [world(3, 0), world(3, 1)]
    gradient = group_gradient(worlds, reinforce_credit(), one_group=False)
    assert largest_error(gradient, worlds[0].exact_gradient() + worlds[1].exact_gradient()) < 2 * ABSOLUTE


# --- the expected gradient with Monte-Carlo values ---


def z_scores(gradients: Sequence[torch.Tensor], exact: torch.Tensor) -> list[float]:
    """Error of the mean gradient in standard errors, along the exact gradient and eight fixed directions."""
    random = torch.randn(8, len(exact), generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    directions = torch.cat([exact[None], random])
    errors = (torch.stack(list(gradients)) - exact) @ directions.T  # (iterations, 9)
    return (errors.mean(0) / (errors.std(0) / math.sqrt(len(errors)))).tolist()


def test_sampling_credit_and_loss_together_are_unbiased() -> None:
    """The mean gradient of sampled groups, with Monte-Carlo values for K = 2, is the exact gradient."""
    w, group_size = world(3), 8
    credit = vine(w.monte_carlo(2), "tokens:1")
    gradients = []
    for iteration in range(120):
        groups = sample_groups(
            [w.problem],
            policy().codec,
            w.sampler(),
            w.task,
            group_size=group_size,
            max_new_tokens=3,
            temperature=w.temperature,
            address=(0, iteration),
        )
        samples, _ = credit(groups, iteration)
        gradients.append(policy_gradient(policy(), w.temperature, [(1 / group_size, s) for s in samples]))
    assert max(map(abs, z_scores(gradients, w.exact_gradient()))) < SIGMAS


def test_more_continuations_have_less_variance() -> None:
    """Only the values are random, so the variance for K = 8 is an eighth of that for K = 1."""
    w = world(3)
    variance = {}
    for K in (1, 8):
        credit = vine(w.monte_carlo(K, by_table=True), "tokens:1")
        gradients = torch.stack([expected_gradient(w, credit, iteration) for iteration in range(60)])
        variance[K] = gradients.var(0).sum().item()
    assert variance[1] / variance[8] == pytest.approx(8, rel=0.25)
