"""Judges: objects that call the reward functions, in this process or in worker processes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from vineppo.tasks.grading.rewards import apply_rewards
from vineppo.types import Problem, RewardFn, Verdict


class Judge(Protocol):
    """Grades responses. `InProcess` does so in this process, `workers.WorkerPool` in other processes."""

    @property
    def early(self) -> bool:
        """Whether `expect` starts grading."""
        ...

    def expect(
        self, problems: Sequence[Problem], texts: Sequence[str], completion_ids: Sequence[Sequence[int]]
    ) -> None:
        """Announce responses whose verdicts will be requested soon; a judge may start grading them."""
        ...

    def verdicts(
        self, problems: Sequence[Problem], texts: Sequence[str], completion_ids: Sequence[Sequence[int]]
    ) -> list[Verdict]:
        """The verdict on each response."""
        ...


@dataclass(frozen=True)
class InProcess:
    """Calls the functions in this process with all responses in one call. Their exceptions end the run."""

    fns: tuple[RewardFn, ...]
    early: bool = False

    def expect(
        self, problems: Sequence[Problem], texts: Sequence[str], completion_ids: Sequence[Sequence[int]]
    ) -> None:
        """Does nothing."""

    def verdicts(
        self, problems: Sequence[Problem], texts: Sequence[str], completion_ids: Sequence[Sequence[int]]
    ) -> list[Verdict]:
        """The verdict on each response."""
        return list(apply_rewards(self.fns, problems, texts, completion_ids))
