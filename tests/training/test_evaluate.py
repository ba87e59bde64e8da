"""What a measurement says of rewards: right answers counted, partial ones averaged."""

from __future__ import annotations

import pytest

from vineppo.training.evaluate import Measurement


def measurement(*rewards: tuple[float, ...]) -> Measurement:
    return Measurement(rewards, tokens=0, truncated_share=0.0)


def test_partial_rewards_count_in_the_mean_and_not_as_right() -> None:
    partial = measurement((1.0, 0.5, 0.5, 0.0), (0.8, 0.8, 0.8, 0.8))
    assert partial.graded
    assert partial.mean_reward(0).mean == pytest.approx((0.5 + 0.8) / 2)
    assert partial.pass_at_k(1, 0).mean == pytest.approx(0.25 / 2)
    assert partial.pass_at_k(4, 0).mean == pytest.approx(0.5)  # all four: one is right, or none


def test_rewards_of_0_and_1_have_one_pass_at_1() -> None:
    plain = measurement((1.0, 0.0, 1.0), (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    assert not plain.graded
    assert plain.pass_at_k(1, 3).as_dict() == pytest.approx(plain.mean_reward(3).as_dict())
    assert plain.mean_reward(3).mean == pytest.approx(5 / 9)
