"""The implementation of a task: problems from any source, graded by weighted reward functions.

Responses that could not be graded are counted separately from wrong ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from vineppo.tasks.grading.judge import Judge
from vineppo.types import Failure, Problem, ProblemSource, Split, Tally, UserError, Verdict

_MIN_GRADED = 20
"""The share of errors is computed over at least this many responses; with fewer it would be unreliable."""


@dataclass
class Graded:
    """Problems graded by reward functions; implements `types.Task`.

    The reward is the weighted sum over the functions that apply, and 0 if none applies or grading failed. Too many
    failures stop the run, because the policy would learn from these wrong rewards.
    """

    source: ProblemSource
    judge: Judge
    names: tuple[str, ...]
    """Names of the reward functions, used in metrics."""
    weights: tuple[float, ...]
    max_error_share: float = 0.1
    grade_truncated: bool = False
    """Whether responses that the length limit cut off are graded like others."""
    tally: Tally = field(default_factory=Tally)
    """Counts since the last call of `count_anew`."""
    total: Tally = field(default_factory=Tally)
    """Counts since the task was created."""
    demonstrate: Callable[[Problem], str] | None = None
    """Writes the demonstration of a problem; if None, the source's demonstrations are used."""

    @property
    def grades_early(self) -> bool:
        """Whether `expect` starts grading in the background."""
        return self.judge.early

    def size(self, split: Split) -> int | None:
        """Number of problems in a split, or None if unlimited."""
        return self.source.size(split)

    def problem(self, split: Split, index: int) -> Problem:
        """The problem at an address."""
        return self.source.problem(split, index)

    def demonstration(self, split: Split, index: int) -> tuple[str, str]:
        """(prompt, response) for supervised fine-tuning."""
        if self.demonstrate is None:
            return self.source.demonstration(split, index)
        problem = self.source.problem(split, index)
        return problem.prompt, self.demonstrate(problem)

    def expect(
        self, problems: Sequence[Problem], texts: Sequence[str], completion_ids: Sequence[Sequence[int]] = ()
    ) -> None:
        """Start grading responses that will be passed to `grade` later, if the judge supports it."""
        self.judge.expect(problems, texts, completion_ids)

    def grade(
        self, problems: Sequence[Problem], texts: Sequence[str], completion_ids: Sequence[Sequence[int]] = ()
    ) -> list[float]:
        """Reward of each response text to the problem at the same index.

        Raises:
            UserError: if more than `max_error_share` of the responses since the start, or since `count_anew`, could not
                be graded (the share is computed over at least 20 responses). The message has the first error.
        """
        verdicts = self.judge.verdicts(problems, texts, completion_ids)
        for verdict in verdicts:
            self.tally.add(self.names, verdict)
            self.total.add(self.names, verdict)
        # The recent tally is checked too, so that a grader that breaks late in a run is noticed.
        for tally in (self.total, self.tally):
            if tally.errors > self.max_error_share * max(tally.graded, _MIN_GRADED):
                raise UserError(
                    f"grading failed for {tally.errors} of {tally.graded} responses, {tally.timeouts} of them because "
                    f"of the time limit (task.grading.max_error_share is {self.max_error_share}); the first error: "
                    f"{tally.first_error}"
                )
        return [self._reward(verdict) for verdict in verdicts]

    def count_anew(self) -> Tally:
        """Replace `tally` by an empty one and return it; later responses are counted there."""
        self.tally = Tally()
        return self.tally

    def _reward(self, verdict: Verdict) -> float:
        if isinstance(verdict, Failure):
            return 0.0
        # math.fsum is exact: weights of 0.7, 0.2 and 0.1 sum to exactly 1.
        return math.fsum(w * reward for w, reward in zip(self.weights, verdict, strict=True) if reward is not None)
