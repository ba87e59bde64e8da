"""Step-by-step solutions of reasoning-gym's problems, for supervised fine-tuning (`task.demonstrator`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def chain_sum(entry: Mapping[str, Any], answer: str, **_: Any) -> str:
    """One line per operation: `4+3=7`, `7-2=5`, then the answer."""
    left, *rest = entry["metadata"]["expression"].split()
    lines = []
    for operator, right in zip(rest[::2], rest[1::2], strict=True):
        result = int(left) + int(right) * (1 if operator == "+" else -1)
        lines.append(f"{left}{operator}{right}={result}")
        left = str(result)
    return "\n".join([*lines, f"#### {answer}"])


def word_sorting(entry: Mapping[str, Any], answer: str, **_: Any) -> str:
    """One line per word, with those that are left: `ant (left: cow, bee)`, then the answer."""
    left = list(entry["metadata"]["transformed_words"])
    lines = []
    for word in entry["metadata"]["sorted_words"]:
        left.remove(word)
        lines.append(f"{word} (left: {', '.join(left)})" if left else word)
    return "\n".join([*lines, f"#### {answer}"])
