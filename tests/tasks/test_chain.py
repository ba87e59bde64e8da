"""The embedded task: splits, arithmetic, traps and the habits of demonstrations, checked against independent counts."""

from __future__ import annotations

import re
from collections import Counter

import pytest

from vineppo.tasks.chain import (
    LEVELS,
    OPERANDS,
    TRAPS,
    USUAL,
    WAYS,
    ChainTask,
    answer_of,
    apply,
    grade_chain,
    slipping_way,
    written,
)

LINE = re.compile(r"([a-z])=(\d)([-+*])(\d)( by rote| by rule| in haste| with care)( = | is | -> )(\d)")
FACTS = [(left, operator, operand) for left in range(10) for operator in "+-*" for operand in OPERANDS[operator]]


def test_the_splits_share_no_prompt() -> None:
    task = ChainTask("judgement", 2)  # only 4,410 different problems, so that a leak would be noticed
    prompts = {split: {task.problem(split, i).prompt for i in range(1500)} for split in ("train", "validation", "test")}
    assert not prompts["train"] & prompts["validation"]
    assert not prompts["train"] & prompts["test"]
    assert not prompts["validation"] & prompts["test"]
    assert min(map(len, prompts.values())) > 300


@pytest.mark.parametrize("level", LEVELS)
def test_the_answer_is_the_value_of_the_expression(level: str) -> None:
    for index in range(100):
        problem = ChainTask(level, 10).problem("test", index)
        *assignments, question = problem.prompt.strip().split(";")
        scope: dict[str, int] = {}
        for assignment in assignments:
            name, expression = assignment.split("=")
            scope[name] = eval(expression, {}, scope) % 10
        assert str(scope[question.rstrip("?")]) == problem.answer
        texts = [f"x\n#### {problem.answer}", f"#### {problem.answer} 1", ""]
        assert grade_chain(completions=texts, answer=[problem.answer] * 3) == [1.0, 0.0, 0.0]


def test_every_operation_is_a_bijection() -> None:
    for operator, operands in OPERANDS.items():
        for operand in operands:
            assert sorted(apply(left, operator, operand) for left in range(10)) == list(range(10))


def test_a_third_of_the_kinds_are_traps_and_the_ways_slip_equally_often() -> None:
    assert (len(TRAPS), len(USUAL)) == (14, 42)
    assert Counter(TRAPS.values()) == {0: 7, 1: 7}
    assert Counter(operator for operator, _, _ in TRAPS) == {"+": 6, "-": 6, "*": 2}


def test_the_slipping_way_is_always_wrong_and_the_other_way_never() -> None:
    for level in LEVELS:
        for fact in FACTS:
            slipping = slipping_way(level, *fact)
            for way in (0, 1):
                assert (written(level, *fact, way) == apply(*fact)) == (way != slipping)
    assert {slipping_way("habit", *fact) for fact in FACTS} == {None, 0}
    assert [slipping_way("habit", *f) is None for f in FACTS] == [slipping_way("judgement", *f) is None for f in FACTS]


@pytest.mark.parametrize("level", LEVELS)
def test_demonstrations_slip_at_traps_only_and_have_the_stated_habits(level: str) -> None:
    task = ChainTask(level, 10)
    taken: Counter[tuple[str, bool]] = Counter()
    right = in_one_way = 0
    for index in range(0, 3000, 2):
        prompt, response = task.demonstration("train", index)
        *lines, answer = response.split("\n")
        left, ways = int(prompt[2]), []
        for line in lines:
            match = LINE.fullmatch(line)
            assert match and int(match[2]) == left
            way, operator, operand = WAYS[level].index(match[5]), match[3], int(match[4])
            slipping = slipping_way(level, left, operator, operand)
            kind = operator, operand, left % 2
            ways.append(way)
            taken["free" if slipping is None else "trap", way == (USUAL[kind] if slipping is None else slipping)] += 1
            left = int(match[7])
            assert left == written(level, int(match[2]), operator, operand, way)
        assert answer == f"#### {left}"
        in_one_way += len(set(ways)) == 1
        right += answer_of(response) == task.problem("train", index).answer
    # Tolerances are four standard errors, for about 5,000 traps, 10,000 free steps and 1,500 responses.
    at_traps = taken["trap", True] / (taken["trap", True] + taken["trap", False])
    if level == "judgement":
        assert abs(at_traps - 0.6) < 0.03
        assert abs(taken["free", True] / (taken["free", True] + taken["free", False]) - 0.95) < 0.01
        assert in_one_way < 60
    else:
        assert abs(at_traps - 0.9) < 0.035
        assert in_one_way == 1500
    # Without a slip, judgement: 0.8 ** 10 = 11%; habit: 10% with care and (2 / 3) ** 10 = 2% in haste. Other responses
    # are right by chance.
    assert 0.12 < right / 1500 < 0.25


def test_every_second_demonstration_is_shorter() -> None:
    lengths = Counter(len(ChainTask("habit", 10).demonstration("train", i)[1].split("\n")) - 1 for i in range(400))
    assert lengths[10] >= 200
    assert set(lengths) == {2, 3, 4, 5, 6, 7, 8, 9, 10}


def test_wavering_writers_use_the_usual_way_of_a_kind_even_at_traps() -> None:
    """They use it in 80% of the cases; at ten of the fourteen traps it is the slipping way."""
    task = ChainTask("judgement", 10, "wavering")
    usual: Counter[bool] = Counter()
    links: Counter[str] = Counter()
    for index in range(0, 1000, 2):
        for line in task.demonstration("train", index)[1].split("\n")[:-1]:
            match = LINE.fullmatch(line)
            assert match
            kind = match[3], int(match[4]), int(match[2]) % 2
            usual[WAYS["judgement"].index(match[5]) == USUAL[kind]] += 1
            links[match[6]] += 1
    assert abs(usual[True] / 5000 - 0.8) < 0.023
    assert max(abs(count / 5000 - 1 / 3) for count in links.values()) < 0.027
    assert sum(USUAL[kind] == way for kind, way in TRAPS.items()) == 10


def test_free_writers_differ_from_settled_ones_in_the_words_that_do_not_matter() -> None:
    free, settled = ChainTask("judgement", 10, "free"), ChainTask("judgement", 10)
    links: Counter[str] = Counter()
    ways: Counter[tuple[bool, bool]] = Counter()
    for index in range(0, 1000, 2):
        for line in free.demonstration("train", index)[1].split("\n")[:-1]:
            match = LINE.fullmatch(line)
            assert match
            kind = match[3], int(match[4]), int(match[2]) % 2
            ways[kind in TRAPS, WAYS["judgement"].index(match[5]) == TRAPS.get(kind, USUAL[kind])] += 1
            links[match[6]] += 1
    assert max(abs(count / 5000 - 1 / 3) for count in links.values()) < 0.027
    assert abs(ways[True, True] / (ways[True, True] + ways[True, False]) - 0.6) < 0.05
    assert abs(ways[False, True] / (ways[False, True] + ways[False, False]) - 0.95) < 0.016
    assert free.problem("train", 3) == settled.problem("train", 3)


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_trap_share_is_the_share_of_traps_on_the_right_path(share: float) -> None:
    task = ChainTask("judgement", 12, trap_share=share)
    traps = 0
    for index in range(200):
        problem = task.problem("validation", index)
        left = problem.columns["start"]
        for operator, operand in problem.columns["steps"]:
            traps += (operator, operand, left % 2) in TRAPS
            left = apply(left, operator, operand)
        assert problem.answer == str(left)
    assert abs(traps / 2400 - share) <= 4 * (share * (1 - share) / 2400) ** 0.5


def test_the_problems_of_the_published_results_stay_the_same() -> None:
    prompt = "a=8;b=a-6;c=b-8;d=c+2;e=d*9;f=e-6;g=f-3;h=g+7;i=h-8;j=i-5;k=j-1;k?\n"
    assert ChainTask("judgement", 10).problem("train", 0).prompt == prompt
