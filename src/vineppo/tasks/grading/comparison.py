"""Exact comparison of two answers. Different notations of one thing are equal."""

from __future__ import annotations

import re
from collections.abc import Sequence

from vineppo.tasks.grading.answers import FLIPPED, Answer
from vineppo.tasks.grading.formulas import Node
from vineppo.tasks.grading.regions import same_region
from vineppo.tasks.grading.values import names, same_up_to_factor, same_value

_PUNCTUATION = re.compile(r"(?:\\text\s*|[\s{}()\[\],;!?'\"]|\\(?![A-Za-z])|\.(?!\d))+")


def same_answer(one: Answer, other: Answer) -> bool:
    """Return whether two answers are equal. Different notations of one thing are equal; the order is irrelevant."""
    if one.text and _compact(one.text) == _compact(other.text):
        return True
    if "words" in (one.kind, other.kind):
        return plain(one.text) == plain(other.text)
    if "unreadable" in (one.kind, other.kind):
        return False
    if one.kind == other.kind == "list":
        one, other = _without_variable(one, other)
    elif "list" in (one.kind, other.kind):
        if other.kind == "list":
            one, other = other, one
        return _list_is(one, other)
    if (region := same_region(one, other)) is not None:
        return region
    if one.kind == other.kind == "relation":
        return _same_relation(one, other)
    if "relation" in (one.kind, other.kind):
        value, rest = (_assigned(one), other) if one.kind == "relation" else (_assigned(other), one)
        return value is not None and same_answer(value, rest)
    if one.kind == other.kind:
        return _same_kind(one, other)
    if "set" in (one.kind, other.kind):
        group, rest = (one, other) if one.kind == "set" else (other, one)
        return len(group.parts) == 1 and rest.kind == "scalar" and same_answer(group.parts[0], rest)
    return False


def _same_kind(one: Answer, other: Answer) -> bool:
    if one.kind == "scalar":
        return (not one.unit or not other.unit or one.unit == other.unit) and same_value(one.node, other.node)
    if one.kind in ("list", "or", "and"):
        return _same_in_any_order(one.parts, other.parts)
    if one.kind == "set":
        return all(
            any(same_answer(a, b) for b in second)
            for first, second in ((one.parts, other.parts), (other.parts, one.parts))
            for a in first
        )
    return one.signs == other.signs and _same_in_order(one.parts, other.parts)


def _same_in_order(one: Sequence[Answer], other: Sequence[Answer]) -> bool:
    return len(one) == len(other) and all(same_answer(a, b) for a, b in zip(one, other, strict=True))


def _same_in_any_order(one: Sequence[Answer], other: Sequence[Answer]) -> bool:
    rest = list(other)
    for part in one:
        match = next((i for i, candidate in enumerate(rest) if same_answer(part, candidate)), None)
        if match is None:
            return False
        del rest[match]
    return not rest


def _list_is(items: Answer, other: Answer) -> bool:
    """Return whether a list without brackets equals an answer that is no list."""
    if other.kind == "set":
        return _same_kind(Answer("set", items.text, items.parts), other)
    names = [_assigned_name(part) for part in items.parts]
    if other.kind == "row" and other.signs == ("(", ")"):
        parts = list(items.parts)
        if all(names) and len(set(names)) == len(names):  # x = 1, y = 2 is the point (1, 2)
            parts = [part for _, part in sorted(zip(names, parts, strict=True), key=lambda pair: str(pair[0]))]
            parts = [_assigned(part) or part for part in parts]
        return _same_in_order(parts, other.parts)
    return False


def _without_variable(one: Answer, other: Answer) -> tuple[Answer, Answer]:
    """Remove the variable of `x = 1, x = 2` or `x = 1, 2` if the other list has no relations."""
    for first, second in ((one, other), (other, one)):
        names = {_assigned_name(part) for part in first.parts if part.kind == "relation"}
        if len(names) == 1 and None not in names and not any(part.kind == "relation" for part in second.parts):
            parts = tuple(_assigned(part) or part for part in first.parts)
            bare = Answer("list", first.text, parts)
            return (bare, other) if first is one else (one, bare)
    return one, other


def _assigned_name(answer: Answer) -> str | None:
    """Return the name on the left of `x = 5`, `f(x) = 5` or `(x, y) = (1, 2)`; None if there is no single name."""
    if answer.kind != "relation" or set(answer.signs) != {"="}:
        return None
    left = answer.parts[0]
    nodes = [part.node for part in left.parts] if left.kind == "row" else [left.node]
    is_name = left.kind == "words" or all(node and node[0] in ("name", "opaque") for node in nodes)
    return left.text if is_name else None


def _assigned(answer: Answer) -> Answer | None:
    """Return the value 5 of `x = 5` or `5 = x`."""
    if _assigned_name(answer) is not None:
        return answer.parts[-1]
    if answer.kind == "relation" and answer.signs == ("=",) and answer.parts[1].node[:1] == ("name",):
        return answer.parts[0]
    return None


def _same_relation(one: Answer, other: Answer) -> bool:
    """Return whether two equations or two inequalities are equal, apart from a constant factor.

    If one of them is solved for its only variable, as x = 2, the other one must be solved too: 3x + 1 = 7 may be the
    equation of the problem.
    """
    for candidate in (one, Answer("relation", "", one.parts[::-1], signs=tuple(FLIPPED[s] for s in one.signs[::-1]))):
        if candidate.signs == other.signs and _same_in_order(candidate.parts, other.parts):
            return True
    if len(one.signs) != 1 or len(other.signs) != 1 or _is_solved(one) or _is_solved(other):
        return False
    differences = [_difference(answer) for answer in (one, other)]
    if differences[0] is None or differences[1] is None:
        return False
    sign = same_up_to_factor(differences[0], differences[1])
    if sign is None:
        return False
    if one.signs[0] in ("=", "!="):
        return one.signs == other.signs
    return (one.signs[0] if sign > 0 else FLIPPED[one.signs[0]]) == other.signs[0]


def _is_solved(answer: Answer) -> bool:
    """Return whether one side of a relation is a name and the other one a constant."""
    left, right = answer.parts
    return any(
        a.node[:1] == ("name",) and b.kind == "scalar" and not names(b.node) for a, b in ((left, right), (right, left))
    )


def _difference(answer: Answer) -> Node | None:
    """Return left side minus right side of a relation between two formulas."""
    left, right = answer.parts
    if left.kind != "scalar" or right.kind != "scalar" or left.unit or right.unit:
        return None
    return ("+", left.node, ("neg", right.node))


def _compact(text: str) -> str:
    """Remove the spaces that separate neither two digits nor two letters."""
    return re.sub(r"(?<![0-9A-Za-z]) | (?![0-9A-Za-z])", "", text)


def plain(text: str) -> str:
    """Return the words of an answer without case, white space, punctuation and brackets.

    Between two digits, a space remains: June 1, 23 is not June 12, 3.
    """
    text = _PUNCTUATION.sub(_space_between_digits, text)
    return text if len(text) == 1 else text.lower()


def _space_between_digits(match: re.Match[str]) -> str:
    """Return a space if the match separates two numbers; a comma between groups of three digits does not."""
    before, after = match.string[: match.start()][-1:], match.string[match.end() :][:4]
    groups = match[0] == "," and re.fullmatch(r"\d{3}\D?", after)
    return " " if before.isdigit() and after[:1].isdigit() and not groups else ""
