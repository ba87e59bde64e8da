"""The subtraction behind a step, and the sum that leads to the reward."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.view.rows import responses, row
from vineppo.view.explain import one_line, signed, subtraction, telescoping, why
from vineppo.view.records import responses_of

LINES = ["a\n", "b\n", "c"]


def test_the_subtraction_by_hand() -> None:
    [response] = responses(row(LINES, 1.0, [0.5, 0.75, 0.25], num_mc_rollouts=4))
    first, second, last = (subtraction(response, step) for step in response.steps)
    assert first is not None and second is not None and last is not None
    assert (first.before.value, first.after.value, first.difference) == (0.5, 0.75, 0.25) and first.is_advantage
    assert (second.difference, second.before.num_mc_rollouts, second.after.num_mc_rollouts) == (-0.5, 4, 4)
    assert (last.after.value, last.after.is_reward, last.difference) == (1.0, True, 0.75)
    assert second.text == (
        "step 2: V after - V before = 0.25 (K = 4, 95% interval 0.05 to 0.70) - 0.75 (K = 4, 95% interval 0.30 to 0.95)"
        " = -0.50"
    )
    assert last.text.startswith("step 3: V after - V before = 1.00 (the reward) - 0.25 (K = 4")


def test_the_sum_leads_to_the_reward() -> None:
    [right, wrong] = responses(row(LINES, 1.0, [0.5, 0.75, 0.25]), row(LINES, 0.0, [0.5, 0.75, 0.25]))
    total = telescoping(right)
    assert total is not None and total.holds and (total.start, total.advantages) == (0.5, (0.25, -0.5, 0.75))
    assert total.text == "V(prompt) 0.50 + 0.25 - 0.50 + 0.75 = 1.00, the reward"
    total = telescoping(wrong)
    assert total is not None and total.holds and total.advantages == (0.25, -0.5, -0.25)


def test_advantages_that_do_not_add_up_are_reported() -> None:
    damaged = row(LINES, 1.0, [0.5, 0.75, 0.25]) | {"step_advantages": [0.25, -0.5, 0.5]}
    [response] = responses(damaged)
    total = telescoping(response)
    assert total is not None and not total.holds and total.text.endswith("= 0.75, but the reward is 1.00")
    lines = why(response, response.steps[2])
    assert lines[1] == "the recorded advantage is +0.50, which is not this difference"


def test_every_response_of_a_real_run_telescopes(vineppo_run: Path) -> None:
    for iteration in (1, 2):
        for response in responses_of(vineppo_run, iteration):
            total = telescoping(response)
            assert total is not None and total.holds
            for step in response.steps:
                found = subtraction(response, step)
                assert found is not None and found.is_advantage


def test_a_sum_of_many_steps_is_shortened() -> None:
    count = 30
    values = [i / count for i in range(count)]
    [response] = responses(row(["x\n"] * count, 1.0, values))
    total = telescoping(response)
    assert total is not None and total.holds and "(18 more steps)" in total.text


def test_credit_of_tokens_is_not_called_a_change_of_value() -> None:
    [response] = responses(row(["ab\n", "c"], 1.0, advantages=[0.0, 0.5, -0.125, 0.25]))
    assert telescoping(response) is None and subtraction(response, response.steps[0]) is None
    [line] = why(response, response.steps[0])
    assert line == (
        "step 1: +0.38 is the sum of the advantages of its tokens, not a change of value: 'b' +0.50, '\\n' -0.12"
    )
    [equal] = responses(row(["abc\n"], 1.0, advantages=[0.5] * 4))
    assert why(equal, equal.steps[0])[0].endswith("; 4 tokens have +0.50 each")
    [zero] = responses(row(["abc\n"], 1.0, advantages=[0.0] * 4))
    assert why(zero, zero.steps[0])[0].endswith("; all are 0")


def test_other_tokens_are_explained_with_their_rewards() -> None:
    others = [
        {"position": 1, "token_id": 8, "text": "B\x1b", "advantage": -0.5},
        {"position": 3, "token_id": 9, "text": "C", "advantage": -0.25},
    ]
    continuation = {"shared": 0, "num_tokens": 3, "text": "B\nc", "finish_reason": "stop", "state": 1, "reward": 0.0}
    columns: dict[str, Any] = {"alternatives": others, "continuations": [continuation | {"accepted": 2}]}
    [response] = responses(row(["ab\n", "c"], 1.0, advantages=[0.0, 0.5, 0.0, 0.25], **columns))
    assert why(response, response.steps[0])[1] == "trained, too: 'B\\x1b' instead of 'b' -0.50 (reward 0)"
    assert why(response, response.steps[1])[1] == "trained, too: 'C' instead of 'c' -0.25"


def test_real_counterfactual_credit_names_the_other_token(counterfactual_run: Path) -> None:
    lines = [
        line
        for response in responses_of(counterfactual_run, 1)
        for step in response.steps
        for line in why(response, step)
        if line.startswith("trained, too")
    ]
    assert lines and all("(reward 0)" in line and "instead of" in line for line in lines)


@pytest.mark.parametrize(
    ("number", "text"), [(0.5, "+0.50"), (-0.25, "-0.25"), (0.0, "+0.00"), (-0.0004, "-4e-04"), (12.345, "+12.35")]
)
def test_numbers_have_signs(number: float, text: str) -> None:
    assert signed(number) == text


def test_texts_in_one_line_have_no_control_characters() -> None:
    assert one_line("a\n\t\x1b[31m\u202eb\x00") == r"a\n\t\x1b[31m\u202eb\x00"
