"""Sets of real numbers: `x > 2`, `(2, \\infty)`, `\\{x | x > 2\\}` and `\\mathbb{R} \\setminus \\{2\\}` in one form."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from vineppo.tasks.grading.answers import FLIPPED, Answer
from vineppo.tasks.grading.formulas import Node
from vineppo.tasks.grading.values import real_constant, same_value

_INFINITY: Node = ("constant", "inf")
_MINUS_INFINITY: Node = ("neg", _INFINITY)
_KINDS = ("relation", "or", "and", "union", "without", "reals")


@dataclass(frozen=True)
class _Interval:
    low: Node
    low_closed: bool
    high: Node
    high_closed: bool


_REALS = _Interval(_MINUS_INFINITY, False, _INFINITY, False)


def same_region(one: Answer, other: Answer) -> bool | None:
    """Return whether two answers are the same set of real numbers; None if they are not both such sets.

    At least one of them must be an inequality, a union or a similar set. Two pairs of numbers in brackets are compared
    elsewhere, because they may be points.
    """
    if one.kind not in _KINDS and other.kind not in _KINDS:
        return None
    if one.kind == other.kind == "relation" and _variable(one) != _variable(other):
        return None
    first, second = _region(one), _region(other)
    if first is None or second is None:
        return None
    return len(first) == len(second) and all(
        a.low_closed == b.low_closed
        and a.high_closed == b.high_closed
        and same_value(a.low, b.low)
        and same_value(a.high, b.high)
        for a, b in zip(first, second, strict=True)
    )


def _region(answer: Answer) -> list[_Interval] | None:
    """Return the intervals of a set of real numbers in order, without overlaps; None if the answer is no such set."""
    if answer.kind == "reals":
        return [_REALS]
    if answer.kind == "row":
        return _interval(answer)
    if answer.kind == "set":
        points = [part.node for part in answer.parts if part.kind == "scalar" and real_constant(part.node) is not None]
        return _merged(_Interval(p, True, p, True) for p in points) if len(points) == len(answer.parts) else None
    if answer.kind == "relation":
        return _relation(answer)
    if answer.kind not in _KINDS:
        return None
    parts = [_region(part) for part in answer.parts]
    if any(part is None for part in parts) or len({_variable(part) for part in answer.parts} - {None}) > 1:
        return None
    regions = [part for part in parts if part is not None]
    if answer.kind in ("union", "or"):
        return _merged(interval for region in regions for interval in region)
    result = regions[0]
    for region in regions[1:]:
        result = _intersection(result, _complement(region) if answer.kind == "without" else region)
    return result


def _interval(answer: Answer) -> list[_Interval] | None:
    if len(answer.parts) != 2 or any(part.kind != "scalar" or part.unit for part in answer.parts) or not answer.signs:
        return None
    low, high = (part.node for part in answer.parts)
    interval = _Interval(low, answer.signs[0] == "[", high, answer.signs[1] == "]")
    if _key(low) is None or _key(high) is None or not _key(low) < _key(high):
        return None
    return [_bounded(interval)]


def _bounded(interval: _Interval) -> _Interval:
    """Return the interval with open ends at infinity: (2, infinity] is (2, infinity)."""
    return replace(
        interval,
        low_closed=interval.low_closed and interval.low != _MINUS_INFINITY,
        high_closed=interval.high_closed and interval.high != _INFINITY,
    )


def _key(bound: Node) -> Any:
    """Return a number for comparisons; infinite for infinity, None for a bound that is not a real constant."""
    if bound in (_INFINITY, ("+", _INFINITY)):
        return float("inf")
    return float("-inf") if bound == _MINUS_INFINITY else real_constant(bound)


def _variable(answer: Answer) -> str | None:
    """Return the text of the only side of a relation that is a variable."""
    if answer.kind != "relation":
        names = {_variable(part) for part in answer.parts if part.kind == "relation"}
        return names.pop() if len(names) == 1 else None
    names = {part.text for part in answer.parts if part.node[:1] == ("name",)}
    return names.pop() if len(names) == 1 else None


def _relation(answer: Answer) -> list[_Interval] | None:
    """Return the solutions of `2 < x <= 3`, `x > 2` or `x \\ne 2`; None for other relations."""
    if _variable(answer) is None or any(part.kind != "scalar" for part in answer.parts) or "=" in answer.signs:
        return None
    result = [_REALS]
    for index, sign in enumerate(answer.signs):
        left, right = answer.parts[index].node, answer.parts[index + 1].node
        if right[:1] == ("name",):
            left, right, sign = right, left, FLIPPED[sign]
        if left[:1] != ("name",) or _key(right) is None:
            return None
        if sign == "!=":
            result = _intersection(result, _complement([_Interval(right, True, right, True)]))
        elif sign in ("<", "<="):
            result = _intersection(result, [_bounded(_Interval(_MINUS_INFINITY, False, right, sign == "<="))])
        else:
            result = _intersection(result, [_bounded(_Interval(right, sign == ">=", _INFINITY, False))])
    return result


def _merged(intervals: Iterable[_Interval]) -> list[_Interval]:
    result: list[_Interval] = []
    for interval in sorted(intervals, key=lambda i: (_key(i.low), not i.low_closed)):
        last = result[-1] if result else None
        if last is None or not _touch(last, interval):
            result.append(interval)
        elif _key(interval.high) > _key(last.high) or (same_value(interval.high, last.high) and interval.high_closed):
            result[-1] = replace(last, high=interval.high, high_closed=interval.high_closed)
    return result


def _touch(left: _Interval, right: _Interval) -> bool:
    if same_value(left.high, right.low):
        return left.high_closed or right.low_closed
    return bool(_key(left.high) > _key(right.low))


def _complement(region: list[_Interval]) -> list[_Interval]:
    bounds = [(_MINUS_INFINITY, True), *((i.high, i.high_closed) for i in region)]
    ends = [*((i.low, i.low_closed) for i in region), (_INFINITY, True)]
    gaps = [_Interval(low, not was, high, not next_) for (low, was), (high, next_) in zip(bounds, ends, strict=True)]
    return [gap for gap in gaps if _is_nonempty(gap)]


def _intersection(one: list[_Interval], other: list[_Interval]) -> list[_Interval]:
    # The intersection is what is outside the union of the complements.
    return _complement(_merged([*_complement(one), *_complement(other)]))


def _is_nonempty(interval: _Interval) -> bool:
    if same_value(interval.low, interval.high):
        return interval.low_closed and interval.high_closed
    return bool(_key(interval.low) < _key(interval.high))
