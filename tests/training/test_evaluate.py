"""Mean reward and pass@k of a measurement."""

from __future__ import annotations

import math

import pytest

from vineppo.training.evaluate import Measurement


def measurement(*rewards: tuple[float | None, ...]) -> Measurement:
    return Measurement(rewards, tokens=0, truncated_share=0.0)


def test_partial_rewards_count_for_the_mean_but_not_for_pass_at_k() -> None:
    partial = measurement((1.0, 0.5, 0.5, 0.0), (0.8, 0.8, 0.8, 0.8))
    assert partial.graded
    assert partial.mean_reward(0).mean == pytest.approx((0.5 + 0.8) / 2)
    assert partial.pass_at_k(1, 0).mean == pytest.approx(0.25 / 2)
    assert partial.pass_at_k(4, 0).mean == pytest.approx(0.5)  # one of the two problems has a right response


def test_mean_reward_is_pass_at_1_for_rewards_of_0_and_1() -> None:
    plain = measurement((1.0, 0.0, 1.0), (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    assert not plain.graded
    assert plain.pass_at_k(1, 3).as_dict() == pytest.approx(plain.mean_reward(3).as_dict())
    assert plain.mean_reward(3).mean == pytest.approx(5 / 9)


def test_responses_without_a_reward_are_left_out_and_counted() -> None:
    """Case 3: the last problem has no reward, and the second too few for pass@2."""
    some = measurement((1.0, None, 0.0), (None, 1.0, None), (0.0, 0.0, 0.0), (None, None, None))
    assert not some.graded
    assert some.not_applicable_share == pytest.approx(6 / 12)
    assert some.mean_reward(0).mean == pytest.approx((0.5 + 1 + 0) / 3)
    assert some.pass_at_k(1, 0).mean == pytest.approx((0.5 + 1 + 0) / 3)
    assert some.pass_at_k(2, 0).mean == pytest.approx((1 + 0) / 2)
    assert some.pass_at_k(3, 0).mean == 0
    nothing = measurement((None,), (None,))
    assert nothing.not_applicable_share == 1
    assert math.isnan(nothing.mean_reward(0).mean)
    assert nothing.pass_at_k(1, 0).as_dict() == {"mean": None, "low": None, "high": None}
