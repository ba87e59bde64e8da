"""Grading of responses that may have been cut off."""

from __future__ import annotations

from collections.abc import Sequence

from vineppo.types import Problem, Task


def grade_finished(
    task: Task, problems: Sequence[Problem], texts: Sequence[str], finished: Sequence[bool]
) -> list[float]:
    """Rewards; a response that was cut off by the length limit has 0 and is never shown to the grader."""
    asked = [i for i, done in enumerate(finished) if done]
    rewards = [0.0] * len(texts)
    if asked:
        graded = task.grade([problems[i] for i in asked], [texts[i] for i in asked])
        for i, reward in zip(asked, graded, strict=True):
            rewards[i] = float(reward)
    return rewards
