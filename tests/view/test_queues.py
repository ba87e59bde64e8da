"""The lists of responses that are worth reading first."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.view.rows import responses, row
from vineppo.types import UserError
from vineppo.view.queues import (
    Entry,
    beyond_noise,
    disagree,
    drops,
    lucky,
    most_telling,
    step_to_explain,
    truncated,
)
from vineppo.view.records import responses_of

LINES = ["a\n", "b\n", "c"]


def places(entries: list[Entry]) -> list[tuple[int, int | None]]:
    """Return (number of the response, number of the step) of each entry."""
    return [(entry.response.number, entry.step.number if entry.step else None) for entry in entries]


def test_the_largest_fall_comes_first() -> None:
    found = responses(
        row(LINES, 1.0, [0.5, 0.25, 0.75]),  # -0.25 in step 1
        row(LINES, 0.0, [0.5, 0.75, 0.25]),  # -0.5 in step 2; -0.25 in step 3
        row(LINES, 1.0, [0.25, 0.5, 0.75]),  # never falls
        row(LINES, 0.0, [0.25, 0.25, 0.5]),  # -0.5 in step 3
        row(["ab\n", "c"], 0.0, advantages=[0.0, -0.25, -0.5, 0.0]),  # token advantages: -0.75 in step 1
    )
    entries = drops(found)
    assert places(entries) == [(5, 1), (2, 2), (4, 3), (1, 1)]
    assert entries[1].reason == "value 0.75 to 0.25 (-0.50)" and entries[0].reason == "token advantages -0.75"
    assert most_telling(found) is found[4] and most_telling(found[:4]) is found[1]
    assert most_telling([found[2]]) is found[2]


def test_right_responses_with_a_wrong_step() -> None:
    found = responses(
        row(LINES, 1.0, [0.75, 0.0, 0.5]),  # fell by 0.75 to 0 in step 1
        row(LINES, 1.0, [0.75, 0.5, 0.25]),  # fell by 0.5 to 0.25 in step 2
        row(LINES, 1.0, [0.75, 0.5, 0.3]),  # 0.3 is not low
        row(LINES, 1.0, [0.125, 0.125, 0.0]),  # low from the start: the fall is too small
        row(LINES, 0.0, [0.75, 0.0, 0.5]),  # wrong
        row(LINES, 1.0, [0.25, 0.75, 0.0], num_mc_rollouts=3),  # fell by 0.75 to 0 in step 2, from fewer MC rollouts
        row(LINES, 1.0),  # no values
    )
    entries = lucky(found)
    assert places(entries) == [(1, 1), (6, 2), (2, 2)]
    assert entries[0].reason == "right, but the value after this step was 0.00 (-0.75 on the way)"


def test_low_is_relative_to_the_rewards() -> None:
    """With rewards from -1 to 3, a value of 0 is at a quarter of the range."""
    rows = [row(LINES, 3.0, [2.0, 0.0, 1.0]), row(LINES, 3.0, [2.0, 0.5, 1.0]), row(LINES, -1.0, [2.0, 0.0, 1.0])]
    assert places(lucky(responses(*rows))) == [(1, 1)]
    assert places(lucky(responses(row(LINES, 0.0, [0.5, 0.0, 0.5])))) == []  # nothing is right
    assert lucky([]) == []


def test_without_values_no_response_can_be_called_lucky() -> None:
    with pytest.raises(UserError, match="no response has values of its states, so a low value on the way cannot"):
        lucky(responses(row(LINES, 1.0), row(LINES, 0.0)))


def test_truncated_responses() -> None:
    found = responses(row(LINES, 0.0, finish_reason="length"), row(LINES, 1.0), row(LINES, 0.0, finish_reason="length"))
    entries = truncated(found)
    assert places(entries) == [(1, None), (3, None)] and entries[0].reason == "cut off after 5 tokens"


def test_a_change_counts_if_it_is_beyond_its_noise() -> None:
    """With K = 9, 0.9 to 0.1 is beyond the noise and 0.5 to 0.25 is not; with K = 100 the latter is, too."""
    cases = [(9, [0.5, 0.25, 0.25], False), (100, [0.5, 0.25, 0.25], True), (9, [8 / 9, 1 / 9, 1 / 9], True)]
    for count, values, expected in cases:
        [response] = responses(row(LINES, 1.0, values, num_mc_rollouts=count))
        assert beyond_noise(response, response.steps[0]) is expected
        assert not beyond_noise(response, response.steps[1])  # no change
    [response] = responses(row(LINES, 1.0, [0.5, 0.5, 0.0], num_mc_rollouts=9))
    assert beyond_noise(response, response.steps[2])  # the reward has no noise


def test_disagreements_in_sign_and_in_rank() -> None:
    values = [0.9, 0.1, 0.9]
    same = row(LINES, 0.0, values, num_mc_rollouts=100)
    # The falls are 0.8 in step 1 and 0.9 in step 3; the rise in step 2 is 0.8.
    sign = row(LINES, 0.0, values, num_mc_rollouts=100, advantages=[-0.8, -0.8, -0.1, -0.1, -0.9])
    rank = row(LINES, 0.0, values, num_mc_rollouts=100, advantages=[-0.8, -0.8, 0.8, 0.8, -0.1])
    entries = disagree(responses(same, sign, rank))
    assert places(entries) == [(3, 3), (2, 2)]
    assert entries[0].reason == "value -0.90, but trained with -0.10 per token; step 1 got -0.80"
    assert entries[1].reason == "value +0.80, but trained with -0.10 per token"


def test_responses_without_values_cannot_disagree() -> None:
    with pytest.raises(UserError, match="no response has both credit and Monte-Carlo values"):
        disagree(responses(row(LINES, 1.0, advantages=[0.5] * 5)))


def test_credit_that_is_the_change_of_the_value_never_disagrees(vineppo_run: Path) -> None:
    assert [disagree(responses_of(vineppo_run, i)) for i in (1, 2)] == [[], []]


def test_the_step_to_explain() -> None:
    falls, rises, nothing = responses(
        row(LINES, 0.0, [0.5, 0.75, 0.25]), row(LINES, 1.0, [0.25, 0.5, 0.5]), row(LINES, 1.0, token_advantages=[])
    )
    numbers = [step.number for response in (falls, rises) if (step := step_to_explain(response))]
    assert numbers == [2, 3] and step_to_explain(nothing) is None
