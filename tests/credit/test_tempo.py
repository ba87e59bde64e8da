"""TEMPO: advantages by hand, its expected gradient in the enumerable world, and groups with nothing to compare."""

from __future__ import annotations

from typing import Any

import pytest

from tests.credit.enumerated import cosine, error, length, of_groups
from tests.credit.test_credit import group_with, response_part
from tests.credit.test_ground_truth import world
from vineppo.credit.tempo import TempoSettings, leave_one_out_tree, paper_tree, shared_lengths, tempo_credit
from vineppo.types import RolloutGroup

THREE = [(1, 2, 0), (1, 3, 0), (2, 0)]
"""Two responses that share their first token, and a third one."""


def test_shared_lengths_by_hand() -> None:
    assert shared_lengths([*THREE, (1, 2)]) == [[3, 1, 0, 2], [1, 3, 0, 1], [0, 0, 2, 0], [2, 1, 0, 2]]


def test_leave_one_out_by_hand() -> None:
    """Rewards 1, 0, 0. The second response's baseline after its first token is (1 + prior * 1/2) / (1 + prior)."""
    assert leave_one_out_tree(THREE, [1.0, 0.0, 0.0], prior=1.0) == [[0.5, 1, 1], [0, -0.75, -0.75], [-0.5, -0.5]]
    assert leave_one_out_tree(THREE, [1.0, 0.0, 0.0], prior=0.0) == [[0.5, 1, 1], [0, -1, -1], [-0.5, -0.5]]


def test_the_paper_form_by_hand() -> None:
    """GRPO's advantages are 2/3 and -1/3; the values are 1/3 at the prompt, 1/2 after token 1, then the rewards."""
    assert paper_tree(THREE, [1.0, 0.0, 0.0], scale_by_std=False) == [
        pytest.approx([2 / 3 + 1 / 6, 2 / 3 + 1 / 2, 2 / 3]),
        pytest.approx([-1 / 3 + 1 / 6, -1 / 3 - 1 / 2, -1 / 3]),
        pytest.approx([-1 / 3 - 1 / 3, -1 / 3]),
    ]
    scaled, plain = (paper_tree(THREE, [1.0, 0.0, 0.0], scale_by_std=scale) for scale in (True, False))
    assert scaled[0][1] / plain[0][1] == pytest.approx(1 / ((1 / 3) ** 0.5 + 1e-4))


@pytest.mark.parametrize("prior", [0.0, 1.0, 4.0])
@pytest.mark.parametrize(("group_size", "max_new_tokens"), [(2, 3), (3, 2)])
def test_the_expected_gradient_is_the_policy_gradient(group_size: int, max_new_tokens: int, prior: float) -> None:
    w = world(max_new_tokens)
    gradient = of_groups(w, tempo_credit(TempoSettings(prior=prior)), group_size)
    assert error(gradient, group_size * w.table_gradient) < 1e-9


@pytest.mark.parametrize(
    ("settings", "expected_length", "expected_cosine"),
    [
        ({"form": "paper", "scale_by_std": False}, 1.0470, 0.97348),
        ({"form": "paper"}, 3.3678, 0.49476),
        ({"divide_by_visits": True, "prior": 1.0}, 0.9506, 0.99830),
    ],
)
def test_other_forms_are_biased(settings: dict[str, Any], expected_length: float, expected_cosine: float) -> None:
    """Length along the exact gradient, and cosine with it, for groups of three."""
    w = world(2)
    gradient = of_groups(w, tempo_credit(TempoSettings(**settings)), 3)
    assert length(gradient, 3 * w.table_gradient) == pytest.approx(expected_length, abs=1e-3)
    assert cosine(gradient, w.table_gradient) == pytest.approx(expected_cosine, abs=1e-4)


@pytest.mark.parametrize("form", ["leave_one_out", "paper"])
def test_groups_with_nothing_to_compare_have_no_credit(form: str) -> None:
    credit = tempo_credit(TempoSettings(form=form))
    groups = [group_with(rewards) for rewards in ([0.3, 0.3, 0.3], [None, 0.7, None], [None, None], [0.1], [1, 0])]
    samples, metrics = credit(groups, 1)
    assert {a for sample in samples[:-2] for a in response_part(sample)} == {0.0}
    assert all(a != 0 for sample in samples[-2:] for a in response_part(sample))
    assert metrics["credit/zero_group_share"] == 4 / 5


def test_a_response_without_a_reward_is_not_in_the_tree() -> None:
    credit = tempo_credit(TempoSettings())
    with_none, without = credit([group_with([1, None, 0])], 1)[0], group_with([1, None, 0])
    kept = RolloutGroup(without.problem, (without.rollouts[0], without.rollouts[2]))
    assert [with_none[0].advantages, with_none[2].advantages] == [s.advantages for s in credit([kept], 1)[0]]


def test_tokens_that_all_responses_share_are_counted() -> None:
    w = world(3)
    rollouts = {outcome.rollout.response_ids: outcome.rollout for outcome in w.outcomes}
    group = RolloutGroup(w.problem, tuple(rollouts[ids] for ids in [(1, 2, 0), (1, 3, 0), (2, 0)]))
    plain, metrics = tempo_credit(TempoSettings())([group], 1)
    divided, _ = tempo_credit(TempoSettings(divide_by_visits=True))([group], 1)
    assert metrics["credit/shared_share"] == 2 / 8
    prompt = len(w.prompt_ids)
    for sample, other, visits in zip(plain, divided, ([2, 1, 1], [2, 1, 1], [1, 1]), strict=True):
        assert list(other.advantages[prompt:]) == [
            a / n for a, n in zip(sample.advantages[prompt:], visits, strict=True)
        ]
