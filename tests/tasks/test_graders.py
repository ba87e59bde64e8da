"""Graders: cases in which published graders were too lenient, treated the two sides differently or hid an error."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.helpers import data_directory
from vineppo.tasks.grading.graders import grade_exact, grade_hash, hash_number, load_grader
from vineppo.tasks.grading.rewards import apply_rewards
from vineppo.types import Failure, Problem, UserError


def by_hash(completion: str, answer: str) -> float:
    return float(grade_hash(["?"], [completion], [answer])[0] or 0.0)


def test_exact_compares_the_whole_response() -> None:
    completions = [" 7\n", "7.0", "the answer is 7", ""]
    assert grade_exact(["?"] * 4, completions, ["7", "7", "7", "7"]) == [1.0, 0.0, 0.0, 0.0]


@pytest.mark.parametrize("completion", ["so it is 72", "72", "", "72 ####", "#### \n72", "### 72", "# # # # 72"])
def test_trap_11_no_fallback_to_the_last_number(completion: str) -> None:
    assert by_hash(completion, "#### 72") == 0.0


@pytest.mark.parametrize("completion", ["#### 7200", "#### 0.72", "#### 72%", "#### -72", "#### 72.001", "#### 720"])
def test_trap_11_no_factor_of_100_and_no_tolerance(completion: str) -> None:
    assert by_hash(completion, "#### 72") == 0.0


@pytest.mark.parametrize("one", ["1,234", "1234", "$1,234", "1234.", "1,234.00", "+1234", "$1234.0."])
@pytest.mark.parametrize("other", ["1,234", "1234", "$1,234", "1234.", "1,234.00"])
def test_trap_11_commas_and_dollars_are_stripped_on_both_sides(one: str, other: str) -> None:
    assert by_hash(f"so\n#### {one}", f"because\n#### {other}") == 1.0


@pytest.mark.parametrize(
    "text", ["1,23", "12,34", ",123", "1234,567", "1,2,3", "1 2", "7 or 8", "1/2", "5 clips", "1e3"]
)
@pytest.mark.parametrize("other", ["--5", "-$-5", "$", ".", "-", "٣", "NaN", "inf", "0x10", "5..", "1_000"])
def test_text_that_is_not_a_number_always_grades_0(text: str, other: str) -> None:
    assert hash_number(f"#### {text}") is None
    assert hash_number(f"#### {other}") is None
    for gold in ("123", "1234567", "12", "7", "5", "1000", "0"):
        assert by_hash(f"#### {text}", f"#### {gold}") == by_hash(f"#### {other}", f"#### {gold}") == 0.0


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("#### 3.0", "3"),
        ("####3", "3"),
        ("#### 1\n#### 2", "2"),  # the last mark is used
        ("#### 2\nand 5 more", "2"),  # only to the end of the line
        ("##### 4", "4"),
        ("#### -$5", "-5"),
        ("#### $-5", "-5"),
        ("#### .5", "0.5"),
        ("#### 007", "7"),
        ("#### -0", "0"),
        ("#### 109,200,000\r\n", "109200000"),
    ],
)
def test_hash_reads_the_number_after_the_last_mark(text: str, number: str) -> None:
    assert hash_number(text) == Decimal(number)


def test_decimals_are_compared_exactly() -> None:
    assert by_hash("#### 0.10", "#### 0.1") == 1.0
    assert by_hash("#### 9007199254740993", "#### 9007199254740992") == 0.0  # equal as floats
    assert by_hash("#### 0.30000000000000001", "#### 0.3") == 0.0


def test_trap_11_a_huge_number_neither_hangs_nor_crashes() -> None:
    assert by_hash("#### " + "9" * 200_000, "#### 9") == 0.0  # int() refuses more than 4,300 digits
    assert by_hash("#### " + "9" * 200_000, "#### " + "9" * 200_000 + ".0") == 1.0
    assert by_hash("#### " + "1," * 200_000, "#### 1") == 0.0
    assert by_hash("#" * 200_000 + "1", "#### 1") == 1.0


def test_trap_11_an_answer_that_cannot_be_graded_raises() -> None:
    with pytest.raises(UserError, match=r"the reference answer '72' has no number after `####`"):
        by_hash("#### 72", "72")


def gsm8k_answers() -> list[str]:
    path = (data_directory() or Path("shared/data")) / "gsm8k" / "test.jsonl"
    if not path.exists():
        pytest.skip(f"no {path}: set VINEPPO_DATA to a folder with gsm8k/test.jsonl")
    return [json.loads(line)["answer"] for line in path.read_text(encoding="utf-8").split("\n") if line]


def test_gsm8k_gold_answers_grade_1_and_perturbed_ones_0() -> None:
    golds = gsm8k_answers()
    assert len(golds) >= 100
    heads, numbers = zip(*(gold.split("#### ") for gold in golds), strict=True)
    plain = [int(number.replace(",", "")) for number in numbers]
    prompts = ["?"] * len(golds)

    def mean(completions: Sequence[str]) -> float:
        return float(np.mean([float(reward or 0) for reward in grade_hash(prompts, completions, golds)]))

    pairs = list(zip(heads, plain, strict=True))
    assert mean(golds) == 1.0
    assert mean([f"{head}#### ${number:,}.00." for head, number in pairs]) == 1.0
    assert mean([f"#### {number}" for number in plain]) == 1.0
    assert mean([f"{head}#### {number + 1}" for head, number in pairs]) == 0.0
    # An answer of 0 is left out: 100 times 0 is the right answer.
    assert mean([f"{head}#### {number * 100}" for head, number in pairs if number] + ["#### x"] * plain.count(0)) == 0.0
    assert mean([f"{head}The answer is {number}" for head, number in pairs]) == 0.0
    assert mean([f"{head}#### {number + 1}\nor rather {number}" for head, number in pairs]) == 0.0
    assert mean([f"{head}#### unknown, perhaps {number}" for head, number in pairs]) == 0.0


# ---- apply_reward


def apply_reward(fn: Any, problems: Sequence[Problem], texts: Sequence[str]) -> list[float | None]:
    verdicts = apply_rewards([fn], problems, texts)
    assert not any(isinstance(verdict, Failure) for verdict in verdicts)
    return [reward for (reward,) in verdicts]  # type: ignore[misc]


PROBLEMS = [Problem("a", "1+1", "2", {"level": 1}), Problem("b", "2+2", "4", {"level": 2, "unit": "cm"})]


def test_reward_functions_are_called_once_with_every_column() -> None:
    calls: list[dict[str, Any]] = []

    def reward(prompts: list[str], completions: list[str], **columns: Any) -> list[float | None]:
        calls.append({"prompts": prompts, "completions": completions, **columns})
        return [0.25, None]

    assert apply_reward(reward, PROBLEMS, ["2", "5"]) == [0.25, None]
    assert calls == [
        {
            "prompts": ["1+1", "2+2"],
            "completions": ["2", "5"],
            "completion_ids": [[], []],
            "answer": ["2", "4"],
            "level": [1, 2],
            "unit": [None, "cm"],
        }
    ]


def test_columns_do_not_override_the_prompts_or_the_answer() -> None:
    taken = {"prompts": "x", "completions": "x", "answer": "x"}
    assert apply_reward(grade_exact, [Problem("a", "?", "7", taken)], ["7"]) == [1.0]


def test_rewards_may_be_a_numpy_array_and_no_function_is_called_without_problems() -> None:
    def as_array(prompts: list[str], completions: list[str], **_: Any) -> Any:
        return np.array([0.5, 1.0])

    def never(**_: Any) -> list[float]:
        raise AssertionError("called without a completion")

    assert apply_reward(as_array, PROBLEMS, ["", ""]) == [0.5, 1.0]
    assert apply_reward(never, [], []) == []


@pytest.mark.parametrize("bad", ["1.0", [1.0], torch.zeros(2), "two\nlines"])
def test_a_reward_that_is_not_a_number_raises_with_its_index(bad: Any) -> None:
    with pytest.raises(UserError, match=r"reward 1 is .*allowed: a number from -1e12 to 1e12, or None") as caught:
        apply_reward(lambda prompts, completions, **_: [1.0, bad], PROBLEMS, ["", ""])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("bad", "shown"),
    [
        (math.nan, "nan"),
        (-math.inf, "-inf"),
        (1e308, "1e\\+308"),
        (10**400, "1000000000[0]*"),
        (10**5000, "a value of type int that cannot be shown"),
    ],
    ids=["nan", "infinity", "1e308", "401 digits", "5001 digits"],
)
def test_a_reward_that_is_nan_or_too_large_is_a_failure_of_its_response_only(bad: Any, shown: str) -> None:
    """Cases 1 and 4: squares of such rewards would overflow; other responses keep their rewards."""
    first, second = apply_rewards([lambda prompts, completions, **_: [1e12, bad]], PROBLEMS, ["", ""])
    assert first == (1e12,)
    assert isinstance(second, Failure) and re.search(
        f"reward 1 is {shown}; allowed: a number from -1e12 to 1e12, or None$", second.text
    )


def test_a_wrong_number_of_rewards_raises() -> None:
    with pytest.raises(UserError, match="returned 1 rewards for 2 completions"):
        apply_reward(lambda prompts, completions, **_: [1.0], PROBLEMS, ["", ""])


def test_an_exception_in_a_reward_function_is_reported_in_one_line_with_its_name() -> None:
    def broken(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
        raise RuntimeError("first line\nsecond line")

    with pytest.raises(
        UserError, match=r"broken failed: RuntimeError: first line; .*columns level, unit, answer"
    ) as caught:
        apply_reward(broken, PROBLEMS, ["", ""])
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="TypeError"):
        apply_reward(lambda prompts, completions, **_: 1.0, PROBLEMS, ["", ""])
    with pytest.raises(UserError, match="unexpected keyword argument"):
        apply_reward(lambda prompts, completions, answer: [0.0, 0.0], PROBLEMS, ["", ""])


# ---- load_grader


@pytest.fixture
def working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", ["/nowhere"])
    return tmp_path


def test_graders_by_name() -> None:
    assert load_grader("exact") is grade_exact
    assert load_grader("hash") is grade_hash


def test_a_grader_from_the_current_directory(working_directory: Path) -> None:
    (working_directory / "my_length_grader.py").write_text(
        "def shorter(prompts, completions, **columns):\n    return [-len(text) for text in completions]\n"
    )
    assert apply_reward(load_grader("my_length_grader:shorter"), PROBLEMS, ["ab", ""]) == [-2.0, 0.0]
    with pytest.raises(UserError, match=re.escape("has no 'shorte'; did you mean 'shorter'?")):
        load_grader("my_length_grader:shorte")
    with pytest.raises(UserError, match="it has: shorter"):
        load_grader("my_length_grader:xyz")
    with pytest.raises(UserError, match="is a str; it must be a function"):
        load_grader("my_length_grader:__name__")


@pytest.mark.parametrize("spec", ["", "exct", "module", "module:", ":function"])
def test_the_message_for_an_unknown_grader_lists_the_allowed_ones(spec: str) -> None:
    with pytest.raises(UserError, match="allowed: exact, hash, boxed, or module:function"):
        load_grader(spec)


def test_a_missing_module_is_distinguished_from_one_that_fails(working_directory: Path) -> None:
    (working_directory / "my_broken_grader.py").write_text("import surely_not_there\n")
    (working_directory / "my_misspelt_grader.py").write_text("def f(:\n")
    with pytest.raises(UserError, match="no module 'absent_grader' in the current directory"):
        load_grader("absent_grader:f")
    with pytest.raises(UserError, match=r"no module 'json\.absent'"):
        load_grader("json.absent:f")
    with pytest.raises(UserError, match=r"importing 'my_broken_grader' failed: .*surely_not_there"):
        load_grader("my_broken_grader:f")
    with pytest.raises(UserError, match="importing 'my_misspelt_grader' failed: SyntaxError"):
        load_grader("my_misspelt_grader:f")
    with pytest.raises(UserError, match=r"grader '\.x:f'"):
        load_grader(".x:f")
