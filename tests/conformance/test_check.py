"""The conformance package: exact bias and variance of known advantages, by hand and by enumeration."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pytest

from vineppo.conformance import Conformance, World, build_world, check_advantages, check_credit
from vineppo.conformance.world import NUM_TOKENS
from vineppo.credit.advantages import grpo_advantages, leave_one_out_advantages
from vineppo.credit.rloo import RLOO
from vineppo.types import Rollout

Rows = list[list[float]]


def constant(value_of_reward: float, offset: float) -> object:
    def advantages(rollouts: Sequence[Rollout]) -> Rows:
        return [[value_of_reward * (r.reward or 0.0) + offset] * len(r.response_ids) for r in rollouts]

    return advantages


def reinforce(rollouts: Sequence[Rollout]) -> Rows:
    return [[r.reward or 0.0] * len(r.response_ids) for r in rollouts]


def spread(rollouts: Sequence[Rollout], row: Sequence[float]) -> Rows:
    return [[a] * len(r.response_ids) for r, a in zip(rollouts, row, strict=True)]


def rloo(rollouts: Sequence[Rollout]) -> Rows:
    return spread(rollouts, leave_one_out_advantages([r.reward for r in rollouts]))


def dr_grpo(rollouts: Sequence[Rollout]) -> Rows:
    return spread(rollouts, grpo_advantages([r.reward for r in rollouts], scale_by_std=False))


def exact_steps(world: World) -> object:
    """Advantages from exact values, one token per step."""

    def advantages(rollouts: Sequence[Rollout]) -> Rows:
        rows = []
        for r in rollouts:
            values = [world.value(r.response_ids[:t]) for t in range(len(r.response_ids))] + [r.reward or 0.0]
            rows.append([after - before for before, after in pairwise(values)])
        return rows

    return advantages


def test_a_world_of_one_token_by_hand() -> None:
    """With one token per response, the gradient of logit a is p_a (r_a - V), and REINFORCE's second moment follows."""
    w = build_world(1)
    p = w.table[()]
    rewards = np.array([w.outcomes[0].rollout.reward, 0, 0, 0, 0])  # a letter is cut off at the limit: reward 0
    assert [o.rollout.response_ids for o in w.outcomes] == [(0,), (1,), (2,), (3,), (4,)]
    exact = p * (rewards - p @ rewards)
    assert w.table_gradient == pytest.approx(exact[None], abs=1e-15)
    terms = [rewards[a] * (np.eye(NUM_TOKENS)[a] - p) for a in range(5)]
    second = sum(p[a] * (terms[a] @ terms[a]) for a in range(5))
    result = check_advantages(reinforce, world=w)
    assert result.bias == pytest.approx(0, abs=1e-7)
    assert result.variance == pytest.approx((second - exact @ exact) / (exact @ exact), rel=1e-12)


def test_unbiased_methods_are_unbiased_and_exact_values_have_less_variance() -> None:
    w = build_world(3)
    plain = check_advantages(reinforce, world=w)
    exact = check_advantages(exact_steps(w), world=w)  # type: ignore[arg-type]
    assert plain.enumerated and plain.groups == 85 and math.isnan(plain.z)
    for result in (plain, exact):
        assert result.bias < 1e-7 and result.length == pytest.approx(1) and result.cosine == pytest.approx(1)
    assert exact.variance < plain.variance / 2


def test_a_scaled_advantage_has_the_length_of_its_scale_and_a_shifted_one_no_bias() -> None:
    """A constant baseline is unbiased; half of the reward gives half of the gradient."""
    half = check_advantages(constant(0.5, 0.0))  # type: ignore[arg-type]
    assert half.length == pytest.approx(0.5) and half.cosine == pytest.approx(1) and half.bias == pytest.approx(0.5)
    assert check_advantages(constant(1.0, -0.4)).bias < 1e-7  # type: ignore[arg-type]


@pytest.mark.parametrize("group_size", [2, 3])
def test_groups_by_enumeration(group_size: int) -> None:
    """RLOO is unbiased; Dr. GRPO's mean contains the response itself, so its length is (G - 1) / G."""
    unbiased, shrunk = (check_advantages(f, group_size=group_size) for f in (rloo, dr_grpo))
    assert unbiased.groups == 21**group_size
    assert unbiased.bias < 1e-7
    assert shrunk.length == pytest.approx((group_size - 1) / group_size) and shrunk.cosine == pytest.approx(1)
    assert shrunk.variance == pytest.approx(unbiased.variance * shrunk.length**2)


def test_token_mean_per_response_is_biased() -> None:
    """Dividing a response's loss by its own length changes the direction of the gradient."""

    def divided(rollouts: Sequence[Rollout]) -> Rows:
        return [[(r.reward or 0.0) / len(r.response_ids)] * len(r.response_ids) for r in rollouts]

    assert check_advantages(divided).cosine < 0.99


def test_sampled_groups_agree_with_the_enumeration_and_flag_a_bias() -> None:
    exact, sampled = check_advantages(rloo, group_size=2), check_advantages(rloo, group_size=2, groups=3000)
    assert not sampled.enumerated and abs(sampled.z) < 4 and sampled.bias < 3 * sampled.noise
    assert sampled.variance == pytest.approx(exact.variance, rel=0.15)
    assert check_advantages(dr_grpo, group_size=2, groups=3000).z > 4


def test_monte_carlo_advantages_from_the_continuations_of_the_world() -> None:
    """VinePPO with K = 2 and one token per step, as another trainer would compute it."""
    w, calls = build_world(3), iter(range(10**9))

    def value(state: tuple[int, ...]) -> float:
        if len(state) == w.max_new_tokens:
            return 0.0
        return float(np.mean([r.reward or 0.0 for r in w.continuations(state, 2, next(calls))]))

    def vines(rollouts: Sequence[Rollout]) -> Rows:
        rows = []
        for r in rollouts:
            values = [value(r.response_ids[:t]) for t in range(len(r.response_ids))] + [r.reward or 0.0]
            rows.append([after - before for before, after in pairwise(values)])
        return rows

    result = check_advantages(vines, groups=1500, world=w)
    assert abs(result.z) < 4
    assert result.variance > check_advantages(exact_steps(w), world=w).variance  # type: ignore[arg-type]


def test_a_credit_function_gives_the_numbers_of_its_advantages() -> None:
    credit = RLOO.build(RLOO.settings(), None)  # type: ignore[arg-type]
    assert close(check_credit(credit, group_size=2), check_advantages(rloo, group_size=2))


def close(a: Conformance, b: Conformance) -> bool:
    return all(
        getattr(a, name) == pytest.approx(getattr(b, name), abs=1e-9)
        for name in ("bias", "length", "cosine", "variance", "groups")
    )


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda rollouts: [[1.0]], "one row per response with one number per token"),
        (lambda rollouts: [[math.nan] * len(r.response_ids) for r in rollouts], "not finite"),
    ],
)
def test_wrong_results_are_refused(function: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_advantages(function)  # type: ignore[arg-type]


def test_too_many_groups_are_refused() -> None:
    with pytest.raises(ValueError, match="194,481 groups, more than 20,000; set groups"):
        check_advantages(rloo, group_size=4)


def test_the_world_is_the_same_everywhere() -> None:
    """The table and the rewards come from hashes; these numbers are those of every machine."""
    w = build_world(2)
    assert len(w.responses) == 21 and sum(w.probabilities) == pytest.approx(1)
    assert w.table[()] == pytest.approx([0.260301, 0.25028351, 0.18334898, 0.2304512, 0.0756153], abs=1e-7)
    assert w.value(()) == pytest.approx(0.12113825962919204)
