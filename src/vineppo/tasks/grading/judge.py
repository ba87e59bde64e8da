"""Define the protocol `Judge`, and a judge that works in this process. A judge calls the reward functions of a task.

The result of grading one response is called a verdict. It is a tuple with one reward per reward function, or a
`Failure` with the reason why grading failed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from vineppo.tasks.grading.rewards import apply_rewards
from vineppo.types import Problem, RewardFn, Verdict


class Judge(Protocol):
    """Grades responses by calling reward functions.

    `InProcess` calls the functions in this process, and `workers.WorkerPool` in grader processes.
    """

    @property
    def grades_in_background(self) -> bool:
        """Whether a call of `expect` starts grading in the background."""
        ...

    def expect(
        self, problems: Sequence[Problem], texts: Sequence[str], completion_ids: Sequence[Sequence[int]]
    ) -> None:
        """Announce responses whose verdicts will be requested later, so that grading can start now.

        The arguments are the same as those of `verdicts`.
        """
        ...

    def verdicts(
        self, problems: Sequence[Problem], texts: Sequence[str], completion_ids: Sequence[Sequence[int]]
    ) -> list[Verdict]:
        """Return the verdict on each response.

        Args:
            problems: problem of each response.
            texts: response texts.
            completion_ids: token ids of each response; may be empty if they are unknown.
        """
        ...


@dataclass(frozen=True)
class InProcess:
    """A judge that calls each function in this process, once with all responses.

    If a function raises an exception, `verdicts` raises UserError, which ends the run.
    """

    fns: tuple[RewardFn, ...]
    grades_in_background: bool = False

    def expect(
        self, problems: Sequence[Problem], texts: Sequence[str], completion_ids: Sequence[Sequence[int]]
    ) -> None:
        """Do nothing, because all grading happens in `verdicts`."""

    def verdicts(
        self, problems: Sequence[Problem], texts: Sequence[str], completion_ids: Sequence[Sequence[int]]
    ) -> list[Verdict]:
        """Return the verdict on each response."""
        return list(apply_rewards(self.fns, problems, texts, completion_ids))
