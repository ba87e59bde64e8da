"""Find the first wrong step of a response, for tasks whose steps a machine can check.

A step is wrong if it states something false: a wrong result, a wrong operand, or a number that an earlier step did not
give. Steps after the first wrong one are not judged, because they may be right for the wrong state.
"""

from __future__ import annotations

import ast
import itertools
import operator
import re
from collections.abc import Callable, Collection, Sequence
from typing import Any

from vineppo.config.schema import GYM
from vineppo.tasks.chain import answer_of, apply
from vineppo.types import Problem

Checker = Callable[[Problem, Sequence[str]], int | None]
"""Function (problem, texts of the S steps) -> index of the first wrong step, or None if no step is wrong."""

_CHAIN_LINE = re.compile(r"\s*([a-z])=(-?\d+)([-+*])(\d+)\D+?(\d+)\s*")
_EQUATION = re.compile(r"([-+*/() \d.]*\d[-+*/() \d.]*)=\s*(-?\d+(?:\.\d+)?)")
_MARK = re.compile(r"^[^\S\n]*(?:\d+[.)]|[-*+])[^\S\n]+", re.MULTILINE)
"""The mark of a list at the start of a line, such as `1. ` or `- `. The last one may also be a sign."""
_ANSWER = re.compile(r"####\s*(-?\d+(?:\.\d+)?)")
_OPERATORS: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


def checker_of_problem(task_name: str, problem: Problem) -> Checker | None:
    """Return the checker of a task, or None if its steps cannot be checked.

    Args:
        task_name: value of the setting `task.name`.
        problem: one of its problems, which must carry what the checker needs.
    """
    if task_name == "chain" and {"start", "steps"} <= set(problem.columns):
        return first_wrong_chain_step
    return first_wrong_sum_step if task_name.startswith(GYM) and expression_of(problem) is not None else None


def first_wrong_chain_step(problem: Problem, steps: Sequence[str]) -> int | None:
    """Return the first wrong step of a response to the task `chain`.

    Line i must compute the i-th variable of the problem from the result of the line before it. The answer line must
    repeat the last result. Empty steps (an end-of-sequence token alone) are not judged.
    """
    left, todo = int(problem.columns["start"]), list(problem.columns["steps"])
    for number, text in enumerate(steps):
        if not text.strip():
            continue
        if "####" in text:
            return None if not todo and answer_of(text.strip()) == str(left) else number
        match = _CHAIN_LINE.fullmatch(text)
        if not match or not todo:
            return number
        op, operand = todo.pop(0)
        stated = (int(match[2]), match[3], int(match[4]))
        if stated != (left, op, operand) or int(match[5]) != apply(left, op, operand):
            return number
        left = int(match[5])
    return None if not todo else len(steps) - 1


def expression_of(problem: Problem) -> str | None:
    """Return the arithmetic expression that an item of a reasoning-gym data set carries, or None."""
    entry = problem.columns.get("entry") or {}
    expression = (entry.get("metadata") or {}).get("expression")
    return expression if isinstance(expression, str) and evaluated(expression) is not None else None


def first_wrong_sum_step(problem: Problem, steps: Sequence[str]) -> int | None:
    """Return the first wrong step of a response to a data set whose items carry an expression, such as chain_sum.

    Every equation `expression = number` must be true. For an expression of additions and subtractions, its result must
    also be the value of the expression's terms up to some term, as in a running sum. A line that begins like an item of
    a list, such as `1. ` or `- `, may be true with the mark or without it. The answer line must have the value of the
    whole expression.
    """
    expression = expression_of(problem)
    assert expression is not None, "the checker needs an expression"
    partial = _partial_sums(expression)
    for number, text in enumerate(steps):
        if all(_states_something_false(form, partial) for form in {text, _MARK.sub("", text)}):
            return number
        answer = _ANSWER.search(text)
        if answer and float(answer[1]) != evaluated(expression):
            return number
    return None


def _states_something_false(text: str, partial: Collection[float]) -> bool:
    """Return whether an equation of a text is false, or its result is none of `partial`; empty allows all results."""
    for match in _EQUATION.finditer(text):
        value, stated = evaluated(match[1]), float(match[2])
        if value is None or abs(value - stated) > 1e-9 or (partial and stated not in partial):
            return True
    return False


def _partial_sums(expression: str) -> set[float]:
    """Return the values of the first two, three, ... terms of a sum; empty if it is not a sum of plain numbers."""
    terms = re.findall(r"[-+]?\s*\d+(?:\.\d+)?", expression)
    if re.sub(r"\s", "", "".join(terms)) != re.sub(r"\s", "", expression):
        return set()
    numbers = [float(re.sub(r"\s", "", term)) for term in terms]
    return set(list(itertools.accumulate(numbers))[1:])


def evaluated(expression: str) -> float | None:
    """Return the value of an expression of numbers, + - * / and parentheses, or None if it is nothing else."""
    if len(expression) > 200:
        return None
    try:
        return _value(ast.parse(expression.strip(), mode="eval").body)
    except (SyntaxError, ValueError, ZeroDivisionError, OverflowError, RecursionError):
        return None


def _value(node: ast.expr) -> float:
    """Return the value of a parsed expression.

    Raises:
        ValueError: if it contains anything else than numbers and the four operators.
    """
    if isinstance(node, ast.Constant) and isinstance(node.value, (int, float)):
        return float(node.value)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.UAdd, ast.USub)):
        return _value(node.operand) * (-1 if isinstance(node.op, ast.USub) else 1)
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        return float(_OPERATORS[type(node.op)](_value(node.left), _value(node.right)))
    raise ValueError("no arithmetic expression")
