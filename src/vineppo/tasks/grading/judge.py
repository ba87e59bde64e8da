"""Judges: what reaches verdicts on responses, in this process or in others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from vineppo.tasks.grading.rewards import apply_rewards
from vineppo.types import Problem, RewardFn, Verdict


class Judge(Protocol):
    """Reaches verdicts. `WorkerPool` does so in other processes."""

    @property
    def early(self) -> bool:
        """Whether `expect` does anything."""
        ...

    def expect(
        self, problems: Sequence[Problem], texts: Sequence[str], completion_ids: Sequence[Sequence[int]]
    ) -> None:
        """These will be asked for soon; a judge may begin."""
        ...

    def verdicts(
        self, problems: Sequence[Problem], texts: Sequence[str], completion_ids: Sequence[Sequence[int]]
    ) -> list[Verdict]:
        """One for each response."""
        ...


@dataclass(frozen=True)
class InProcess:
    """Calls the functions here, all responses at once; what they raise ends the run."""

    fns: tuple[RewardFn, ...]
    early: bool = False

    def expect(
        self, problems: Sequence[Problem], texts: Sequence[str], completion_ids: Sequence[Sequence[int]]
    ) -> None:
        """Nothing begins early."""

    def verdicts(
        self, problems: Sequence[Problem], texts: Sequence[str], completion_ids: Sequence[Sequence[int]]
    ) -> list[Verdict]:
        """One for each response."""
        return list(apply_rewards(self.fns, problems, texts, completion_ids))
