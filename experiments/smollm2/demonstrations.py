"""Write step-by-step solutions of reasoning-gym problems, for supervised fine-tuning with `vineppo sft`.

Each function solves the problems of the data set with the same name. The recipes in this folder select a function with
the setting `task.demonstrator`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def chain_sum(entry: Mapping[str, Any], answer: str, **_: Any) -> str:
    """Return a solution with one line per operation and a line with the answer.

    For `4 + 3 - 2` the lines are `4+3=7`, `7-2=5` and `#### 5`.

    Args:
        entry: the entry of the data set. Its metadata contain the expression.
        answer: the reference answer.
    """
    left, *rest = entry["metadata"]["expression"].split()
    lines = []
    for operator, right in zip(rest[::2], rest[1::2], strict=True):
        result = int(left) + int(right) * (1 if operator == "+" else -1)
        lines.append(f"{left}{operator}{right}={result}")
        left = str(result)
    return "\n".join([*lines, f"#### {answer}"])


def spell_backward(entry: Mapping[str, Any], answer: str, **_: Any) -> str:
    """Return a solution that spells a word backward letter by letter.

    The first line has the letters of the word. Each further line has one letter more of the reversed word. The last
    line has the answer. For `ant` the lines are `a n t`, `t`, `t n`, `t n a` and `#### tna`.

    Args:
        entry: the entry of the data set. Its metadata contain the word.
        answer: the reference answer.
    """
    letters = list(entry["metadata"]["word"])
    backward = letters[::-1]
    lines = [letters, *(backward[:count] for count in range(1, len(letters) + 1))]
    return "\n".join([*map(" ".join, lines), f"#### {answer}"])
