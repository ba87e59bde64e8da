"""Judges call the reward functions, either in this process or in worker processes.

The result of grading one response is called its verdict: the rewards, or the reason why grading failed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from vineppo.tasks.grading.rewards import apply_rewards
from vineppo.types import Problem, RewardFn, Verdict


class Judge(Protocol):
    """Grades responses. `InProcess` does so in this process, `workers.WorkerPool` in other processes."""

    @property
    def grades_in_background(self) -> bool:
        """Whether `expect` starts grading in the background."""
        ...

    def expect(
        self, problems: Sequence[Problem], texts: Sequence[str], completion_ids: Sequence[Sequence[int]]
    ) -> None:
        """Announce responses whose verdicts will be requested soon, so that grading may start."""
        ...

    def verdicts(
        self, problems: Sequence[Problem], texts: Sequence[str], completion_ids: Sequence[Sequence[int]]
    ) -> list[Verdict]:
        """Return the verdict on each response."""
        ...


@dataclass(frozen=True)
class InProcess:
    """Calls each function in this process, once for all responses. An exception of a function ends the run."""

    fns: tuple[RewardFn, ...]
    grades_in_background: bool = False

    def expect(
        self, problems: Sequence[Problem], texts: Sequence[str], completion_ids: Sequence[Sequence[int]]
    ) -> None:
        """Do nothing."""

    def verdicts(
        self, problems: Sequence[Problem], texts: Sequence[str], completion_ids: Sequence[Sequence[int]]
    ) -> list[Verdict]:
        """Return the verdict on each response."""
        return list(apply_rewards(self.fns, problems, texts, completion_ids))
