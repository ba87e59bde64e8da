"""The grader `boxed`: exact comparison, usual notations, no comparison that takes long (cases 10 and 11)."""

from __future__ import annotations

import itertools
import json
import random
import time
from fractions import Fraction
from pathlib import Path

import pytest

from tests.helpers import data_directory
from vineppo.tasks.grading.boxed import grade_boxed
from vineppo.tasks.grading.formulas import Malformed, parse
from vineppo.tasks.grading.notation import normal_notation
from vineppo.tasks.grading.values import same_up_to_factor, same_value

PAIRS = [
    line.rsplit(" | ", 2)
    for line in (Path(__file__).parent / "boxed_pairs.txt").read_text(encoding="utf-8").strip().split("\n")
]
"""(content of the box, reference answer, reward)."""


def reward(answer: str, reference: str) -> float | None:
    return grade_boxed(["?"], [rf"So it is $\boxed{{{answer}}}$."], [reference])[0]


def test_there_are_enough_pairs_of_both_kinds() -> None:
    rewards = [value for _, _, value in PAIRS]
    assert rewards.count("1") > 120 and rewards.count("0") > 120 and len(PAIRS) == len(rewards)


@pytest.mark.parametrize(("answer", "reference", "expected"), PAIRS)
def test_pairs_have_the_right_reward_in_both_directions(answer: str, reference: str, expected: str) -> None:
    """Cases 10 and 11 and their neighbours."""
    assert reward(answer, reference) == float(expected)
    # None (not applicable) where the former answer cannot be read as a reference.
    assert (reward(reference, answer) or 0.0) == float(expected)


def test_a_reference_that_cannot_be_read_gives_none_unless_the_texts_are_equal() -> None:
    assert reward("5", "1 2 3") is None
    assert reward("1 2 3", "1 2 3") == 1.0
    assert reward("1 2 3", "123") == 0.0


def test_sums_are_compared_by_math_verify() -> None:
    pytest.importorskip("math_verify")
    assert reward("6", r"\sum_{k=1}^{3} k") == 1.0
    assert reward("7", r"\sum_{k=1}^{3} k") == 0.0
    assert reward("5", r"\sum_{k=1}^{1000000000} k!") is None  # never evaluated
    assert reward(r"\sum_{k=1}^{3} k", "6") == 0.0  # may repeat the problem


LONG = [
    "(" * 300 + "1" + ")" * 300,
    r"\frac{1}{1+" * 60 + "1" + "}" * 60,
    "2^{" * 100 + "2" + "}" * 100,
    "9^{9^{9^{9}}}",
    "100000000!",
    "5" + "!" * 500,
    r"\binom{1000000000}{500000000}",
    "2^{-1000000000}",
    r"\sin(e^{100000})",
    r"e^{e^{e^{e^{e}}}}",
    r"\pi^{10^{100}}",
    "1/" * 450 + "1",
    r"\sqrt" * 300 + "2",
    "1 or " * 240,
    r"(1,2)\cup" * 100 + "(1,3)",
    "1" * 900 + "^{99}",
    "\ufdfa" * 900,
    "1e999999999",
    r"\text{" * 300,
    r"(x+y+z)^{500}",
]


@pytest.mark.parametrize("number", range(len(LONG)))
def test_case_10_no_comparison_takes_long(number: int) -> None:
    """The parser of math-verify needs minutes for some of these; most are refused before any number is computed."""
    start = time.process_time()
    for answer, reference in ((LONG[number], "5"), ("5", LONG[number]), (LONG[number] + "+1", LONG[number])):
        assert (reward(answer, reference) or 0.0) == 0.0
    assert time.process_time() - start < 5.0
    assert reward(LONG[number], LONG[number]) in (1.0, 0.0)


def gold_answers() -> list[str]:
    path = (data_directory() or Path("shared/data")) / "math" / "test.jsonl"
    if not path.exists():
        pytest.skip(f"no {path}: set VINEPPO_DATA to a folder with math/test.jsonl")
    return [json.loads(line)["answer"] for line in path.read_text(encoding="utf-8").split("\n") if line]


def test_case_11_gold_answers_of_math_are_right_and_answers_of_other_problems_wrong() -> None:
    golds = gold_answers()
    assert len(golds) == 2_500
    # A space in front keeps the texts different.
    assert [gold for gold in golds if reward(f" {gold} ", gold) != 1.0] == []
    unique = sorted({gold.replace("dfrac", "frac").replace("tfrac", "frac") for gold in golds})
    generator = random.Random(0)
    pairs = [generator.sample(unique, 2) for _ in range(2_000)]
    assert [pair for pair in pairs if reward(*pair)] == []


def test_case_11_gold_answers_of_gsm8k_are_right_and_answers_of_other_problems_wrong() -> None:
    path = (data_directory() or Path("shared/data")) / "gsm8k" / "test.jsonl"
    if not path.exists():
        pytest.skip(f"no {path}: set VINEPPO_DATA to a folder with gsm8k/test.jsonl")
    lines = path.read_text(encoding="utf-8").strip().split("\n")
    golds = [json.loads(line)["answer"].rpartition("#### ")[2] for line in lines]
    assert [gold for gold in golds if reward(f"{gold}.", gold) != 1.0] == []
    plain = sorted({gold.replace(",", "") for gold in golds})
    assert [pair for pair in itertools.pairwise(plain) if reward(*pair) != 0.0] == []


# ---- the parts


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("**½**", r"\frac{1}{2}"),
        (r"\dfrac{1}{2}", r"\frac {1}{2}"),
        ("10{,}000", "10000"),
        ("1,2", "1,2"),
        (r"0.1\overline{6}", r"(\frac{15}{90})"),
        ("3 1/2", r"3\frac{1}{2}"),
        (r"\text{ cm}", r"\text{ cm}"),
        (r"\mathrm{x}", "x"),
        ("$36", r"\money 36"),
    ],
)
def test_normal_notation(text: str, normal: str) -> None:
    assert normal_notation(text) == normal


@pytest.mark.parametrize("text", ["2 3", "", "(1", "1)", "x2", "1+", "^2", "2!!!", r"\sin x/2", "5 5", "1..2", "a,b"])
def test_what_has_no_single_meaning_is_malformed(text: str) -> None:
    with pytest.raises(Malformed):
        parse(text)


def test_trees_of_formulas() -> None:
    assert parse("-3^2") == ("neg", ("^", ("number", Fraction(3)), ("number", Fraction(2))))
    assert parse(r"3\frac12") == ("+", ("number", Fraction(3)), ("/", ("number", Fraction(1)), ("number", Fraction(2))))
    assert parse("0.10") == ("number", Fraction(1, 10))


def test_values_are_compared_with_more_digits_than_the_formulas_have() -> None:
    for digits in (10, 50, 300):
        assert not same_value(parse(rf"\sqrt2 + 10^{{-{digits}}}"), parse(r"\sqrt2"))
        assert same_value(parse(rf"\sqrt8 + 10^{{-{digits}}}"), parse(rf"2\sqrt2 + 10^{{-{digits}}}"))


def test_factors_between_equations() -> None:
    assert same_up_to_factor(parse("2x-4"), parse("x-2")) == 1.0
    assert same_up_to_factor(parse("2x-4"), parse("2-x")) == -1.0
    assert same_up_to_factor(parse("2x-4"), parse("x-3")) is None
    assert same_up_to_factor(parse("x-x"), parse("x-3")) is None
