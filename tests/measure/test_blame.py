"""The intervention test in a world whose guilty steps are known, and the steps that a machine can check."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.world import build_policy
from vineppo.config.measure import BlameSpec
from vineppo.config.schema import TaskConfig
from vineppo.conformance.world import RandomRewards, TableSampler, World
from vineppo.measure import blame
from vineppo.measure.blame import Step, blamed_step, choose_trials, first_wrong_score, summarise
from vineppo.measure.blame_report import markdown
from vineppo.measure.checkers import evaluated, first_wrong_chain_step, first_wrong_sum_step
from vineppo.measure.session import Session
from vineppo.steps import build_splitter
from vineppo.tasks import build_task
from vineppo.types import Problem, Split


class GuiltyStep(RandomRewards):
    """The reward of problem i is 1 if the letter at position i % 4 is `a`, else 0. Truncated responses are graded."""

    grade_truncated = True

    def problem(self, split: Split, index: int) -> Problem:
        return Problem(id=f"{split}/{index}", prompt="ab", columns={"guilty": index % 4})

    def grade(
        self, problems: Sequence[Problem], texts: Sequence[str], completion_ids: Any = ()
    ) -> Sequence[float | None]:
        return [float(text[p.columns["guilty"]] == "a") for p, text in zip(problems, texts, strict=True)]


def session(num_problems: int, **settings: Any) -> Session:
    """Four letters per response, each step one letter, all letters equally likely."""
    policy, task = build_policy(), GuiltyStep()
    row = np.array([1e-12, *[(1 - 1e-12) / 4] * 4])
    table = {s: row for n in range(4) for s in itertools.product(range(1, 5), repeat=n)}
    problems = [task.problem("test", i) for i in range(num_problems)]
    world = World(problems[0], policy.codec.prompt_ids(problems[0]), 4, 1.0, replace_ungraded(task), table)
    spec = BlameSpec(num_problems=num_problems, splitter="tokens:1", max_new_tokens=4, **settings)
    return Session(spec, policy, task, TableSampler(world), build_splitter("tokens:1"), problems, lambda line: None)


def replace_ungraded(task: GuiltyStep) -> RandomRewards:
    """A task for the world itself, which grades also the responses that end early."""
    plain = RandomRewards()
    plain.grade_truncated = True
    return plain


def test_resampling_the_guilty_step_repairs_and_a_random_step_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """Resampling the guilty step gives success 1/4 in place of 0. The control is guilty in a seventh of the trials."""
    s = session(8, k=64, score=256, group_size=8, responses=4)
    monkeypatch.setattr(Session, "open", classmethod(lambda cls, spec, say: s))
    result = blame.measure_blame(s.spec, s.say)  # type: ignore[arg-type]
    assert result["num_responses"] == 32 and result["checked"] == {}
    for row in result["trials"]:
        assert row["step"] == int(row["problem"].split("/")[1]) % 4
        assert row["kept"] == 0 and row["resampled"] == pytest.approx(0.25, abs=0.12)
    assert result["blamed"]["mean"] == pytest.approx(0.25, abs=0.02)
    share = result["same_step"]
    assert 0 < share < 0.4
    assert result["difference"]["mean"] == pytest.approx(0.25 * (1 - share), abs=0.03)
    assert result["difference"]["low"] > 0.1
    assert result["sibling"]["mean"] == pytest.approx(0, abs=0.02)


def test_the_choice_does_not_flatter_the_effect(monkeypatch: pytest.MonkeyPatch) -> None:
    """With K = 2 the largest of four noisy drops is about 0.5, but the measured effect cannot exceed the true 0.25."""
    s = session(8, k=2, score=256, group_size=8, responses=8)
    monkeypatch.setattr(Session, "open", classmethod(lambda cls, spec, say: s))
    result = blame.measure_blame(s.spec, s.say)  # type: ignore[arg-type]
    assert result["drop"]["mean"] > 0.4
    assert result["blamed"]["mean"] < 0.25 + 0.02


def test_controls_are_at_the_same_depth_of_another_problem() -> None:
    drops = [[0.0, 0.5, 0.1], [0.2, 0.1], [0.9, 0.0, 0.0], [0.0]]
    trials = choose_trials(drops, [0, 0, 1, 2], seed=3)
    assert [t.blamed for t in trials] == [Step(0, 1), Step(1, 0), Step(2, 0), Step(3, 0)]
    assert trials[0].control == Step(2, 1)  # the only response to another problem that has a second step
    for trial in trials[1:]:
        assert trial.control.index == 0 and trial.control.response != trial.blamed.response
    assert trials[3].sibling is None and trials[0].sibling in (Step(0, 0), Step(0, 2))


def test_the_earliest_of_equal_drops_is_blamed() -> None:
    assert blamed_step([0.1, 0.4, 0.4]) == 1 and blamed_step([-0.5]) == 0


def test_the_difference_and_its_interval_by_hand() -> None:
    effects = {
        "blamed": np.array([0.5, 0.3, 0.2]),
        "control": np.array([0.1, 0.1, 0.0]),
        "sibling": np.array([0.0, math.nan, 0.1]),
        "resampled": np.array([0.5, 0.3, 0.2]),
        "kept": np.zeros(3),
    }
    found = summarise([0, 0, 1], effects, seed=0)
    assert found["difference"]["mean"] == pytest.approx((0.4 + 0.2 + 0.2) / 3)
    assert found["difference"]["low"] == pytest.approx(0.2) and found["difference"]["high"] == pytest.approx(0.3)
    assert found["difference_sibling"]["mean"] == pytest.approx((0.5 + 0.1) / 2)


# --- steps that a machine can check ---


def test_f1_of_the_first_wrong_step_by_hand() -> None:
    """Three wrong responses, one named rightly, one wrongly, one not at all; of two right ones, one is accused."""
    score = first_wrong_score([2, 3, 0, None, None], [2, 1, None, None, 4])
    assert score == pytest.approx({"precision": 1 / 3, "recall": 1 / 3, "f1": 1 / 3})
    assert first_wrong_score([1], [1])["f1"] == 1 and math.isnan(first_wrong_score([None], [None])["f1"])


def chain(*lines: str) -> int | None:
    """The first wrong step of a response to a=7;b=a*3;c=b+5."""
    problem = Problem("p", "", "6", {"start": 7, "steps": [("*", 3), ("+", 5)]})
    return first_wrong_chain_step(problem, lines)


@pytest.mark.parametrize(
    ("lines", "first"),
    [
        (("b=7*3 by rote = 1\n", "c=1+5 by rule is 6\n", "#### 6", ""), None),
        (("b=7*3 by rote = 2\n", "c=2+5 by rule is 7\n", "#### 7"), 0),
        (("b=7*3 by rote = 1\n", "c=2+5 by rule is 7\n", "#### 7"), 1),  # a wrong operand
        (("b=7*3 by rote = 1\n", "c=1+4 by rule is 5\n", "#### 5"), 1),  # another step than the problem's
        (("b=7*3 by rote = 1\n", "c=1+5 by rule -> 6\n", "#### 5"), 2),
        (("b=7*3 by rote = 1\n", "#### 1"), 1),  # a step is missing
        (("b=7*3 by rote = 1\n", "nonsense\n", "#### 6"), 1),
        (("b=7*3 by rote = 1\n", "c=1+5 by rule -> 6\n"), 1),  # no answer, but no wrong statement before it
    ],
)
def test_the_first_wrong_step_of_a_chain(lines: tuple[str, ...], first: int | None) -> None:
    if lines[-1].startswith("c="):
        assert chain(*lines) is None
    else:
        assert chain(*lines) == first


def test_demonstrations_of_the_chain_task_are_wrong_exactly_where_they_slip() -> None:
    task = build_task(TaskConfig(name="chain", level="judgement", num_steps=8))
    wrong = 0
    for index in range(0, 60, 2):
        problem = task.problem("train", index)
        _, response = task.demonstration("train", index)
        lines = response.splitlines(keepends=True)
        first = first_wrong_chain_step(problem, lines)
        assert (first is None) == (lines[-1] == f"#### {problem.answer}") or first is not None
        if first is not None:
            # The line before the wrong one has the right running value.
            wrong += 1
            left = int(problem.columns["start"])
            for line, (op, operand) in zip(lines[:first], problem.columns["steps"], strict=False):
                left = {"+": left + operand, "-": left - operand, "*": left * operand}[op] % 10
                assert line.rstrip().endswith(str(left))
    assert 5 < wrong < 30


def test_the_first_wrong_step_of_a_sum() -> None:
    problem = Problem("p", "", "5", {"entry": {"metadata": {"expression": "4 + 3 - 2"}}})
    assert first_wrong_sum_step(problem, ["4+3=7\n", "7-2=5\n", "#### 5"]) is None
    assert first_wrong_sum_step(problem, ["4+3=8\n", "8-2=6\n", "#### 6"]) == 0
    for right, wrong in (
        ("1. 4+3=7\n", "2. 7-2=6\n"),
        ("1) 4 + 3 = 7\n", "2) 7 - 2 = 4\n"),
        ("- 4+3=7\n", "* 7-2=6\n"),
    ):
        assert first_wrong_sum_step(problem, [right, wrong, "#### 6"]) == 1
    assert first_wrong_sum_step(problem, ["4+3=7\n", "7-3=4\n", "#### 4"]) == 1  # true, but no running sum
    assert first_wrong_sum_step(problem, ["4+3=7\n", "7-2=5\n", "#### 6"]) == 2


def test_only_arithmetic_is_evaluated() -> None:
    assert evaluated("2 + 3*(4-1)") == 11 and evaluated("-2") == -2
    for text in ("__import__('os')", "2**9", "1/0", "a+1", "", "9" * 300):
        assert evaluated(text) is None


def test_the_report_of_a_model_that_is_never_right_blames_no_step() -> None:
    recorded = json.loads((Path(__file__).parents[2] / "docs/results/blame/blame.json").read_text())
    larger, nothing = "larger than the effect", "**No continuation was right, so no step can be blamed;"
    assert larger in markdown(recorded) and nothing not in markdown(recorded)
    zero = {"mean": 0.0, "low": 0.0, "high": 0.0}
    text = markdown({**recorded, **dict.fromkeys(("resampled", "kept", "blamed", "drop"), zero)})
    assert larger not in text and nothing in text
