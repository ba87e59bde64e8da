"""Bisection (credit/bisection.py): the states that it evaluates, and its exact bias."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch

from tests.credit.test_ground_truth import ExactValues, expected_gradient, world
from vineppo.credit.bisection import bisected_vine_credit, differ
from vineppo.credit.vineppo import vine_credit
from vineppo.statistics import wilson
from vineppo.steps import build_splitter
from vineppo.types import CreditFn, Problem, Rollout, RolloutGroup
from vineppo.values import State, Value, ValueCost, ValueEstimator


@dataclass(frozen=True)
class Scripted:
    """A value estimator with one given value per response length; records the lengths of each call."""

    values: Sequence[float]
    calls: list[list[int]]
    num_mc_rollouts: int = 0

    def evaluate(self, states: Sequence[State], iteration: int) -> tuple[list[Value], ValueCost]:
        self.calls.append([len(state.response_ids) for state in states])
        values = [Value(self.values[len(state.response_ids)], self.num_mc_rollouts) for state in states]
        return values, ValueCost(len(states), len(states), 0, 0)


def bisected(estimator: ValueEstimator) -> CreditFn:
    return bisected_vine_credit(estimator, build_splitter("tokens:1"), lambda ids: ["x"] * len(ids), 0, 0.7)


def one_rollout(length: int, reward: float) -> list[RolloutGroup]:
    problem = Problem(id="p", prompt="p")
    rollout = Rollout((7,), tuple(range(length)), (0.0,) * length, "stop", "", reward)
    return [RolloutGroup(problem, (rollout,))]


def test_bisection_finds_a_wrong_step_with_a_logarithmic_number_of_values() -> None:
    """Of 64 steps step 37 is wrong: one state per halving is evaluated, and only this step has an advantage."""
    calls: list[list[int]] = []
    credit = bisected(Scripted([0.75] * 38 + [0.0] * 27, calls))
    (sample,), metrics = credit(one_rollout(64, 0.0), 0)
    assert list(sample.advantages[1:]) == [0.0] * 37 + [-0.75] + [0.0] * 26
    assert calls == [[0], [32], [48], [40], [36], [38], [37]]
    assert metrics["credit/rounds"] == 7
    assert metrics["credit/measured_share"] == 7 / 64
    assert sample.credit is not None
    assert sample.credit.boundaries[-1] == 64
    assert sum(sample.credit.step_advantages) + sample.credit.values[0] == 0


def test_a_stretch_without_a_difference_is_not_halved() -> None:
    calls: list[list[int]] = []
    credit = bisected(Scripted([8 / 9] * 32 + [1.0] * 32, calls, num_mc_rollouts=9))
    (sample,), _ = credit(one_rollout(64, 1.0), 0)
    assert calls == [[0], [32]]  # the reward 1 differs from 8 of 9, but 9 of 9 does not
    assert sample.advantages[1:] == pytest.approx([1 / 9] * 32 + [0] * 32)


def test_kept_continuations_of_a_state_that_another_rollout_evaluates_first() -> None:
    """Both responses begin with 0. The second one, which is not kept, evaluates the state after it a round earlier."""
    kept: list[tuple[int, bool]] = []

    class Recording(Scripted):
        def evaluate(self, states: Sequence[State], iteration: int) -> tuple[list[Value], ValueCost]:
            kept.extend((len(state.response_ids), state.keep) for state in states)
            return super().evaluate(states, iteration)

    responses = [((0, 1, 2, 3), 0.0), ((0, 5), 1.0)]
    rollouts = tuple(Rollout((7,), ids, (0.0,) * len(ids), "stop", "", reward) for ids, reward in responses)
    splitter = build_splitter("tokens:1")
    credit = bisected_vine_credit(
        Recording([0.5, 0.4, 0.3, 0.2, 0.1], []), splitter, lambda ids: ["x"] * len(ids), 0, 0.7, keep=1
    )
    credit([RolloutGroup(Problem(id="p", prompt="p"), rollouts)], 0)
    assert kept[0] == (0, True) and set(kept[1:3]) == {(2, True), (1, True)}


def test_the_interval_of_a_difference_is_newcombes() -> None:
    """Example from Newcombe (1998, method 10): 56/70 against 48/80, 0.0524 to 0.3339 at 95%."""
    one, other = Value(56 / 70, 70), Value(48 / 80, 80)
    assert differ(one, other, 0.95)
    a, b = wilson(56, 70), wilson(48, 80)
    assert 0.2 - math.hypot(0.8 - a.low, b.high - 0.6) == pytest.approx(0.0524, abs=5e-5)
    assert 0.2 + math.hypot(a.high - 0.8, 0.6 - b.low) == pytest.approx(0.3339, abs=5e-5)
    assert not differ(Value(0.0, 9), Value(1 / 9, 9), 0.7)
    assert differ(Value(0.5, 0), Value(0.5001, 0), 0.99)
    assert differ(Value(-1.0, 9), Value(-0.9, 9), 0.99)  # outside [0, 1]: no interval


@dataclass(frozen=True)
class Rounded:
    """Exact values with `num_mc_rollouts` set as if they were means of K continuations."""

    exact: ExactValues
    num_mc_rollouts: int

    def evaluate(self, states: Sequence[State], iteration: int) -> tuple[list[Value], ValueCost]:
        values, cost = self.exact.evaluate(states, iteration)
        return [Value(value.mean, self.num_mc_rollouts) for value in values], cost


def test_bisection_makes_the_gradient_too_short() -> None:
    """Values are exact and all responses are enumerated, so there is no noise; only the intervals depend on K."""
    w = world(4)
    exact = w.exact_gradient()
    length, cosine = {}, {}
    for K in (4, 16, 10**9):
        gradient = expected_gradient(w, bisected(Rounded(ExactValues(w), K)))
        length[K] = (gradient @ exact / (exact @ exact)).item()
        cosine[K] = torch.cosine_similarity(gradient, exact, dim=0).item()
    assert length == pytest.approx({4: 0.891, 16: 0.806, 10**9: 1.0}, abs=0.001)
    assert cosine == pytest.approx({4: 0.990, 16: 0.982, 10**9: 1.0}, abs=0.001)


def test_bisection_of_exact_values_is_plain_vineppo() -> None:
    """Exact values always differ, so all stretches are halved."""
    w = world(4)
    samples, _ = bisected(ExactValues(w))([w.group()], 0)
    plain = vine_credit(ExactValues(w), build_splitter("tokens:1"), lambda ids: ["x"] * len(ids), 0)
    for sample, expected in zip(samples, plain([w.group()], 0)[0], strict=True):
        assert sample.advantages == pytest.approx(expected.advantages, abs=1e-12)
