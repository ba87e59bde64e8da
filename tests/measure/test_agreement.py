"""Statistics of estimates against gold values: numbers by hand, and estimates in the enumerable world."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cache
from typing import Any

import numpy as np
import pytest

from tests.world import World, build_policy, build_world
from vineppo.config.measure import ValuesSpec
from vineppo.conformance.world import TableSampler
from vineppo.measure import agreement
from vineppo.measure.agreement import Gold
from vineppo.measure.estimates import group_means, monte_carlo, state_table, tempo_values
from vineppo.measure.intervals import bootstrap
from vineppo.measure.session import Session
from vineppo.measure.values import _picture
from vineppo.steps import build_splitter
from vineppo.types import Rollout, RolloutGroup
from vineppo.values import State


def exact(*values: float) -> Gold:
    return Gold(np.array(values), np.zeros(len(values)))


def test_gold_values_and_their_noise_by_hand() -> None:
    """Rewards 1, 0, 0, 1: mean 1/2, sample variance 1/3, variance of the mean 1/12. A missing reward does not count."""
    gold = Gold.of_rewards(np.array([[1, 0, 0, 1], [1, 1, math.nan, 0]]))
    assert gold.values == pytest.approx([1 / 2, 2 / 3])
    assert gold.variances == pytest.approx([1 / 12, (1 / 3) / 3])


def test_the_ceiling_is_the_correlation_of_exact_values_and_gold() -> None:
    assert agreement.ceiling(0.25, 0.09) == pytest.approx(0.8)
    assert agreement.ceiling(0.1, 0.2) == 0 and math.isnan(agreement.ceiling(0.0, 0.0))
    generator = np.random.default_rng(0)
    truth = generator.random(40_000)
    gold = truth + 0.2 * generator.standard_normal(40_000)
    found = agreement.of_values(Gold(gold, np.full(40_000, 0.04)), truth, np.arange(40_000) % 100)
    for kind in ("", "_within"):
        assert found[f"correlation{kind}"] == pytest.approx(found[f"ceiling{kind}"], abs=0.01)
    assert found["ceiling"] == pytest.approx(math.sqrt((1 / 12) / (1 / 12 + 0.04)), abs=0.01)
    assert found["rmse"] < 0.02 and found["explained_variance"] == pytest.approx(1, abs=0.01)


def test_numbers_of_four_states_by_hand() -> None:
    """Two problems with exact values 0.1, 0.3 and 0.7, 0.9; the estimate is the mean of the problem plus 0.1."""
    labels = np.array([0, 0, 1, 1])
    found = agreement.of_values(exact(0.1, 0.3, 0.7, 0.9), np.array([0.3, 0.3, 0.9, 0.9]), labels)
    assert found["bias"] == pytest.approx(0.1)
    assert found["rmse"] == pytest.approx(math.sqrt((0.2**2 + 0 + 0.2**2 + 0) / 4))
    assert found["explained_variance"] == pytest.approx(1 - 0.02 / 0.1)  # variance: (0.4^2 + 0.2^2) / 2 = 0.1
    assert found["explained_within"] == pytest.approx(1 - 0.02 / 0.01)
    assert found["correlation"] == pytest.approx(0.3 / math.sqrt(0.1), abs=1e-9)  # between: 0.09 of 0.1
    assert math.isnan(found["correlation_within"]) and found["ceiling_within"] == 1
    assert found["calibration_error"] == pytest.approx(0.1)


def test_signs_labels_and_depth_by_hand() -> None:
    gold = Gold(np.array([0.4, -0.4, 0.1, 0.0]), np.array([0.01, 0.01, 0.01, 0.0]))
    found = agreement.of_advantages(gold, np.array([0.2, 0.0, -1.0, 1.0]))
    assert found["sign_accuracy"] == pytest.approx((1 + 0.5) / 2)  # 0.1 is within two standard errors, 0.0 has no sign
    labels = agreement.of_labels(
        Gold(np.array([0.2, 0.45, 0.6]), np.array([0.0, 0.01, 0.0])), np.array([0.5, 0.9, 0.4]), 0.5
    )
    assert labels == {"bad_called_good": 1.0, "good_called_bad": 1.0}
    depth = agreement.of_depth(exact(0, 0, 0), np.array([0.1, 0.0, 0.5]), np.array([0.0, 0.5, 0.9]))
    assert depth["depth_0"] == pytest.approx(0.1) and depth["depth_4"] == pytest.approx(0.5)
    assert depth["trend"] == pytest.approx(0.4) and math.isnan(depth["depth_1"])


def test_the_choice_of_a_next_step_by_hand() -> None:
    gold = Gold(np.array([0.9, 0.85, 0.5, 0.1, 0.1]), np.full(5, 0.05**2 / 2))  # two standard errors: 0.1
    score = agreement.choice_score(gold, np.array([0.3, 0.3, 0.3, 0.0, 0.0]))
    assert score is not None
    assert score["accuracy"] == pytest.approx(2 / 3) and score["chance"] == pytest.approx(2 / 5)
    assert score["regret"] == pytest.approx((0 + 0.05 + 0.4) / 3)
    assert score["chance_regret"] == pytest.approx((0 + 0.05 + 0.4 + 0.8 + 0.8) / 5)
    assert agreement.choice_score(Gold(np.full(5, 0.5), np.full(5, 0.01)), np.arange(5.0)) is None


def test_intervals_resample_problems_and_not_rows() -> None:
    """Twenty equal rows of each of two problems say no more than one row each: the interval spans both means."""
    values = np.array([0.0] * 20 + [1.0] * 20)
    problems = [0] * 20 + [1] * 20

    def mean(rows: np.ndarray, labels: np.ndarray) -> Mapping[str, float]:
        return {"mean": float(values[rows].mean()), "drawn": float(len(np.unique(labels)))}

    found = bootstrap(problems, mean, seed=0)
    assert found["mean"].mean == 0.5 and (found["mean"].low, found["mean"].high) == (0, 1)
    assert found["drawn"].low == 2  # a problem that is drawn twice has two labels
    assert math.isnan(bootstrap([3, 3], lambda rows, labels: {"x": 1.0}, seed=0)["x"].low)


# --- the enumerable world ---


@cache
def world() -> World:
    return build_world(4, policy=build_policy())


def session(**settings: Any) -> Session:
    w = world()
    spec = ValuesSpec(splitter="tokens:1", max_new_tokens=4, temperature=w.temperature, **settings)
    problems = [w.problem]
    return Session(spec, w.policy, w.task, TableSampler(w), build_splitter("tokens:1"), problems, lambda line: None)


def states() -> list[State]:
    return [State(world().problem, world().prompt_ids, state) for state in world().states]


def test_monte_carlo_estimates_have_the_exact_error() -> None:
    """The mean squared error over all states and 40 draws is the mean variance of the reward over K."""
    w, s = world(), session()
    truth = np.array([w.value(state) for state in w.states])
    expected = np.mean([w.moments[state][1] for state in w.states]) / 3
    rows = [monte_carlo(s, states(), 3, reuse=False, iteration=i) for i in range(40)]
    found = [agreement.of_values(Gold(truth, np.zeros_like(truth)), row, np.zeros(len(truth))) for row in rows]
    assert np.mean([f["rmse"] ** 2 for f in found]) == pytest.approx(expected, rel=0.06)
    assert abs(np.mean([f["bias"] for f in found])) < 4 * math.sqrt(expected / len(truth) / 40)


def test_noisy_gold_gives_the_error_against_exact_values() -> None:
    """With gold from 16 continuations, the noise of gold is as large as the error of K = 16, and is subtracted."""
    w, s = world(), session()
    truth = np.array([w.value(state) for state in w.states])
    estimate = truth + 0.1
    found = []
    for i in range(60):
        gold = Gold.of_rewards(s.rewards(states(), 16, f"gold {i}"))
        found.append(agreement.of_values(gold, estimate, np.zeros(len(truth)))["rmse"] ** 2)
    assert np.mean(found) == pytest.approx(0.01, rel=0.1)


def test_gold_and_estimates_are_independent() -> None:
    """Gold's errors and an estimate's errors of the same states have no correlation."""
    w, s = world(), session()
    truth = np.array([w.value(state) for state in w.states])
    pairs = []
    for i in range(40):
        gold = Gold.of_rewards(s.rewards(states(), 4, f"gold {i}")).values - truth
        pairs.append(np.mean(gold * (monte_carlo(s, states(), 4, reuse=False, iteration=i) - truth)))
    scale = np.mean([w.moments[state][1] for state in w.states]) / 4
    assert abs(np.mean(pairs)) < 4 * scale / math.sqrt(40 * len(truth))


def rollout(ids: tuple[int, ...], reward: float | None) -> Rollout:
    return Rollout(world().prompt_ids, ids, (-1.0,) * len(ids), "stop", "", reward)


def test_values_from_a_group_by_hand() -> None:
    """Responses ab and ac (ids 1 2 and 1 3) share the first token; cb does not."""
    group = RolloutGroup(world().problem, (rollout((1, 2, 0), 1.0), rollout((1, 3, 0), 0.0), rollout((3, 2, 0), 0.0)))
    s = session()
    table = state_table([s.cut(0, group.problem, group.rollouts[0])], 0, 0)
    assert table.step_of.tolist() == [0, 1, 2] and table.afters.tolist() == [1, 2, -1]
    values = tempo_values([group], table)
    assert values == pytest.approx([1 / 3, 1 / 2, 1])
    assert table.advantages(values) == pytest.approx([1 / 6, 1 / 2, 0])
    assert group_means([group], table) == pytest.approx([0, 0, 0])


def test_a_sample_of_steps_has_both_states_of_each_step() -> None:
    s = session()
    response = s.cut(0, world().problem, rollout((1, 2, 3, 4), 1.0))
    table = state_table([response], 2, 5)
    assert len(table.befores) == 2
    for before, after in zip(table.befores, table.afters, strict=True):
        step = table.step_of[before]
        assert (after == -1) == (step == 3) and (after == -1 or table.step_of[after] == step + 1)


def test_the_rewards_of_a_state_at_the_length_limit_are_0() -> None:
    s = session()
    rewards = s.rewards([State(world().problem, world().prompt_ids, (1, 2, 3, 4))], 3, "gold")
    assert rewards.tolist() == [[0, 0, 0]]


def test_few_problems_do_not_show_whether_an_error_grows() -> None:
    rows = {"critic": {"trend": {"mean": 0.2, "low": 0.1, "high": 0.3}}, "MC": {"trend": {"low": -0.2, "high": 0.1}}}
    assert _picture(rows, 24) == {"critic": "grows", "MC": "not resolved"}
    assert _picture(rows, 9) == {"critic": "not resolved", "MC": "not resolved"}
