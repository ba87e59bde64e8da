"""Step-by-step solutions of problems of reasoning-gym, for supervised fine-tuning (`task.demonstrator`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def chain_sum(entry: Mapping[str, Any], answer: str, **_: Any) -> str:
    """One line per operation, such as `4+3=7` and `7-2=5`, then a line with the answer."""
    left, *rest = entry["metadata"]["expression"].split()
    lines = []
    for operator, right in zip(rest[::2], rest[1::2], strict=True):
        result = int(left) + int(right) * (1 if operator == "+" else -1)
        lines.append(f"{left}{operator}{right}={result}")
        left = str(result)
    return "\n".join([*lines, f"#### {answer}"])


def spell_backward(entry: Mapping[str, Any], answer: str, **_: Any) -> str:
    """The letters of the word, then its reversal with one more letter per line, then a line with the answer.

    For `ant` the lines are `a n t`, `t`, `t n`, `t n a` and `#### tna`.
    """
    letters = list(entry["metadata"]["word"])
    backward = letters[::-1]
    lines = [letters, *(backward[:count] for count in range(1, len(letters) + 1))]
    return "\n".join([*map(" ".join, lines), f"#### {answer}"])
