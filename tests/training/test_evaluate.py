"""Mean reward and pass@k of a measurement."""

from __future__ import annotations

import pytest

from vineppo.training.evaluate import Measurement


def measurement(*rewards: tuple[float, ...]) -> Measurement:
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
