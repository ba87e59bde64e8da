"""Adaptive K (values/adaptive.py) and bisection (credit/bisection.py): what they do to bias, exactly."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from math import comb

import numpy as np
import pytest
import torch
from vineppo.credit.vine import vine_credit

from tests.credit.test_ground_truth import SIGMAS, ExactValues, expected_gradient, world, z_scores
from tests.world import World
from vineppo.credit.advantages import spread_over_tokens, step_advantages
from vineppo.credit.bisection import Bisection, bisected_vine_credit, differ
from vineppo.statistics import wilson
from vineppo.steps import build_splitter
from vineppo.types import CreditFn, Problem, Rollout, RolloutGroup
from vineppo.values import AdaptiveMonteCarlo, State, Value, ValueCost, ValueEstimator
from vineppo.values.adaptive import SamplingPlan, sampling_plan

PLANS = [(3, 9, 0.7), (2, 32, 0.4), (1, 7, 0.75), (4, 4, 0.9), (5, 40, 0.3)]


def stops(plan: SamplingPlan) -> dict[tuple[int, int], int]:
    """Number of orders of outcomes that stop at (continuations, successes), by walking the rounds."""
    orders, found, held = {0: 1}, {}, 0
    for end in plan.rounds:
        reached: dict[int, int] = {}
        for successes, ways in orders.items():
            for more in range(end - held + 1):
                reached[successes + more] = reached.get(successes + more, 0) + ways * comb(end - held, more)
        found.update({(end, s): ways for s, ways in reached.items() if (end, s) in plan.shares})
        orders, held = {s: ways for s, ways in reached.items() if (end, s) not in plan.shares}, end
    assert not orders
    return found


@pytest.mark.parametrize("settings", PLANS)
@pytest.mark.parametrize("p", [0.0, 0.03, 0.3, 0.5, 0.9, 1.0])
def test_adaptive_values_are_exactly_unbiased(settings: tuple[int, int, float], p: float) -> None:
    """Over every outcome with its probability; and the variance is not below Wolfowitz' bound."""
    plan = sampling_plan(*settings)
    chances = {(n, s): ways * p**s * (1 - p) ** (n - s) for (n, s), ways in stops(plan).items()}
    assert sum(chances.values()) == pytest.approx(1, abs=1e-12)
    mean = sum(chance * plan.shares[stop] for stop, chance in chances.items())
    assert mean == pytest.approx(p, abs=1e-12)
    variance = sum(chance * (plan.shares[stop] - p) ** 2 for stop, chance in chances.items())
    expected_number = sum(chance * n for (n, _), chance in chances.items())
    assert variance >= p * (1 - p) / expected_number - 1e-12


def test_the_plain_mean_of_an_adaptive_number_would_be_biased() -> None:
    """By hand at p = 0.9: 0.729 * 1, else half of the first round (0.171 in all) and half of a second (0.27 * 0.9)."""
    plan = sampling_plan(3, 6, 0.7)
    p = 0.9
    chances = {(n, s): ways * p**s * (1 - p) ** (n - s) for (n, s), ways in stops(plan).items()}
    mean = sum(chance * s / n for (n, s), chance in chances.items())
    assert mean == pytest.approx(0.729 + 0.171 / 2 + 0.27 * 0.9 / 2)
    assert mean - p == pytest.approx(0.036)


def test_a_plan_by_hand() -> None:
    """Two continuations; two more if they differ. Three of four orders with one success in four begin with 0, 0."""
    plan = sampling_plan(2, 4, 0.75)
    assert wilson(2, 2).high - wilson(2, 2).low < 0.75 < wilson(1, 2).high - wilson(1, 2).low
    assert plan.rounds == (2, 4)
    assert plan.shares == {(2, 0): 0.0, (2, 2): 1.0, (4, 1): 0.5, (4, 2): 0.5, (4, 3): 0.5}


def test_a_plan_that_cannot_be() -> None:
    for settings in ((0, 3, 0.5), (4, 3, 0.5), (1, 3, 0.0)):
        with pytest.raises(ValueError, match="needs 1 <= first <= last"):
            sampling_plan(*settings)


def test_adaptive_values_are_unbiased_for_graded_rewards() -> None:
    """The world's rewards are spread over [0, 1): the threshold decides where continuations go, and biases nothing."""
    w, iterations = world(4), 300
    estimator = AdaptiveMonteCarlo(w.monte_carlo(8), first=3, width=0.58)
    states = [State(w.problem, w.prompt_ids, state) for state in w.states]
    found, numbers = [], []
    for iteration in range(iterations):
        values, cost = estimator.evaluate(states, iteration)
        found.append([value.mean for value in values])
        numbers.append([value.num_mc_rollouts for value in values])
        assert cost.mc_rollouts == sum(numbers[-1])
        assert cost.distinct_states == len(states)
    errors = np.array(found) - np.array([w.value(state.response_ids) for state in states])
    z = errors.mean(0) / (errors.std(0) / math.sqrt(iterations))
    assert np.abs(z).max() < SIGMAS
    assert abs(z.sum() / math.sqrt(len(z))) < SIGMAS
    assert set(np.unique(numbers)) == {3, 6, 8}
    assert np.abs(errors.std(0) / math.sqrt(iterations)).max() < 0.03


def test_adaptive_k_goes_to_the_states_that_are_open() -> None:
    """A state that is certain takes the first round only, whatever its value; the rest take more."""
    w = world(4)
    estimator = AdaptiveMonteCarlo(w.monte_carlo(32), first=3, width=0.5)
    certain = [len(state) for state in w.states]
    values, _ = estimator.evaluate([State(w.problem, w.prompt_ids, state) for state in w.states], 0)
    deep = [v.num_mc_rollouts for v, depth in zip(values, certain, strict=True) if depth == 3]
    assert np.mean(deep) < np.mean([v.num_mc_rollouts for v in values])


def test_adaptive_with_equal_ends_is_fixed_k_in_one_round() -> None:
    w = world(3)
    states = [State(w.problem, w.prompt_ids, state) for state in w.states]
    values, cost = AdaptiveMonteCarlo(w.monte_carlo(4), first=4, width=0.01).evaluate(states, 3)
    assert {value.num_mc_rollouts for value in values} == {4}
    assert cost.mc_rollouts == 4 * len(states)


# --- bisection ---


@dataclass(frozen=True)
class Scripted:
    """Values by the length of the state's response; counts what it is asked."""

    values: Sequence[float]
    asked: list[list[int]]
    num_mc_rollouts: int = 0

    def evaluate(self, states: Sequence[State], iteration: int) -> tuple[list[Value], ValueCost]:
        self.asked.append([len(state.response_ids) for state in states])
        values = [Value(self.values[len(state.response_ids)], self.num_mc_rollouts) for state in states]
        return values, ValueCost(len(states), len(states), 0, 0)


def bisected(estimator: ValueEstimator, chance: float = 0.0, level: float = 0.7, run_seed: int = 0) -> CreditFn:
    rule = Bisection(level, chance, run_seed)
    return bisected_vine_credit(estimator, build_splitter("tokens:1"), lambda ids: ["x"] * len(ids), 0, rule)


def one_rollout(length: int, reward: float) -> list[RolloutGroup]:
    problem = Problem(id="p", prompt="p")
    rollout = Rollout((7,), tuple(range(length)), (0.0,) * length, "stop", "", reward)
    return [RolloutGroup(problem, (rollout,))]


def test_bisection_finds_a_fall_in_a_logarithm_of_measurements() -> None:
    """A chain of 64 steps, lost at step 37: one value per halving, and exactly that step is blamed."""
    asked: list[list[int]] = []
    credit = bisected(Scripted([0.75] * 38 + [0.0] * 27, asked))
    (sample,), metrics = credit(one_rollout(64, 0.0), 0)
    assert list(sample.advantages[1:]) == [0.0] * 37 + [-0.75] + [0.0] * 26
    assert asked == [[0], [32], [48], [40], [36], [38], [37]]
    assert metrics["credit/rounds"] == 7
    assert metrics["credit/measured_share"] == 7 / 64
    assert sample.credit is not None
    assert sample.credit.boundaries[-1] == 64
    assert sum(sample.credit.step_advantages) + sample.credit.values[0] == 0


def test_a_stretch_without_a_difference_keeps_its_coarse_advantage() -> None:
    asked: list[list[int]] = []
    credit = bisected(Scripted([8 / 9] * 32 + [1.0] * 32, asked, num_mc_rollouts=9))
    (sample,), _ = credit(one_rollout(64, 1.0), 0)
    assert asked == [[0], [32]]  # the reward is exact and above 8/9; 9 of 9 might be the same as 8 of 9
    assert sample.advantages[1:] == pytest.approx([1 / 9] * 32 + [0] * 32)


def test_looking_by_chance_is_weighted_by_its_inverse() -> None:
    """Nothing differs, so the first half is looked into with probability 1/4, and the correction counts 4 times."""
    values = [0.5, 0.5, 0.625, 0.5, 0.5]
    seen = {}
    for seed in range(40):
        asked: list[list[int]] = []
        (sample,), _ = bisected(Scripted(values, asked, 9), 0.25, run_seed=seed)(one_rollout(4, 0.5), 0)
        seen[tuple(map(tuple, asked))] = sample.advantages[1:]
    assert seen[(0,),] == pytest.approx((0, 0, 0, 0))
    assert seen[(0,), (2,)] == pytest.approx((0.5, 0.5, -0.5, -0.5))
    assert 1 < len(seen) <= 5


def test_intervals_of_a_difference_are_newcombes() -> None:
    """His example (1998, method 10): 56/70 against 48/80, 0.0524 to 0.3339 at 95%."""
    one, other = Value(56 / 70, 70), Value(48 / 80, 80)
    assert differ(one, other, 0.95)
    a, b = wilson(56, 70), wilson(48, 80)
    assert 0.2 - math.hypot(0.8 - a.low, b.high - 0.6) == pytest.approx(0.0524, abs=5e-5)
    assert 0.2 + math.hypot(a.high - 0.8, 0.6 - b.low) == pytest.approx(0.3339, abs=5e-5)
    assert not differ(Value(0.0, 9), Value(1 / 9, 9), 0.7)
    assert differ(Value(0.5, 0), Value(0.5001, 0), 0.99)
    assert differ(Value(-1.0, 9), Value(-0.9, 9), 0.99)  # not a share: no interval


def mean_advantages(w: World, credit: CreditFn, iterations: int) -> np.ndarray:
    """Mean token advantages of every response of the world, shape (responses, tokens), nan behind the end."""
    total = np.full((len(w.outcomes), w.max_new_tokens), np.nan)
    for row, outcome in enumerate(w.outcomes):
        total[row, : len(outcome.rollout.response_ids)] = 0
    for iteration in range(iterations):
        samples, _ = credit([w.group()], iteration)
        for row, sample in enumerate(samples):
            own = sample.advantages[len(w.prompt_ids) :]
            total[row, : len(own)] += own
    return total / iterations


def exact_advantages(w: World) -> np.ndarray:
    rows = np.full((len(w.outcomes), w.max_new_tokens), np.nan)
    for row, outcome in enumerate(w.outcomes):
        response = outcome.rollout.response_ids
        values = [w.value(response[:end]) for end in range(len(response))]
        steps = step_advantages(values, outcome.rollout.reward)
        rows[row, : len(response)] = spread_over_tokens(steps, range(1, len(response) + 1))
    return rows


def test_bisection_with_a_chance_has_the_right_expectation_for_every_token() -> None:
    w, iterations = world(4), 150
    exact = exact_advantages(w)
    # With exact values a difference of any size counts, so a value is said to have come from 9 continuations.
    credit = bisected(Rounded(ExactValues(w), 9), chance=0.5)
    found = mean_advantages(w, credit, iterations)
    errors = (found - exact)[~np.isnan(exact)]
    assert np.abs(errors).mean() < 0.015
    none = mean_advantages(w, bisected(Rounded(ExactValues(w), 9), chance=0.0), 1)
    coarse = (none - exact)[~np.isnan(exact)]
    assert np.abs(coarse).mean() > 5 * np.abs(errors).mean()


@dataclass(frozen=True)
class Rounded:
    """Exact values that say they are the mean of K continuations."""

    exact: ExactValues
    num_mc_rollouts: int

    def evaluate(self, states: Sequence[State], iteration: int) -> tuple[list[Value], ValueCost]:
        values, cost = self.exact.evaluate(states, iteration)
        return [Value(value.mean, self.num_mc_rollouts) for value in values], cost


def test_bisection_with_a_chance_has_the_exact_gradient_in_expectation() -> None:
    w = world(3)
    credit = bisected(w.monte_carlo(4), chance=0.5)
    gradients = [expected_gradient(w, credit, iteration) for iteration in range(150)]
    assert max(map(abs, z_scores(gradients, w.exact_gradient()))) < SIGMAS


def test_bisection_without_a_chance_is_biased_towards_no_credit() -> None:
    """Exact values that say they come from K continuations, every response with its probability: no noise at all."""
    w = world(4)
    exact = w.exact_gradient()
    length, cosine = {}, {}
    for K in (4, 16, 10**9):
        gradient = expected_gradient(w, bisected(Rounded(ExactValues(w), K)))
        length[K] = (gradient @ exact / (exact @ exact)).item()
        cosine[K] = torch.cosine_similarity(gradient, exact, dim=0).item()
    assert length == pytest.approx({4: 0.891, 16: 0.806, 10**9: 1.0}, abs=0.001)
    assert cosine == pytest.approx({4: 0.990, 16: 0.982, 10**9: 1.0}, abs=0.001)


def test_a_level_that_any_difference_passes_is_plain_vineppo() -> None:
    w = world(4)
    samples, _ = bisected(ExactValues(w), chance=1.0)([w.group()], 0)
    plain = vine_credit(ExactValues(w), build_splitter("tokens:1"), lambda ids: ["x"] * len(ids), 0)
    for found, expected in zip(samples, plain([w.group()], 0)[0], strict=True):
        assert found.advantages == pytest.approx(expected.advantages, abs=1e-12)
