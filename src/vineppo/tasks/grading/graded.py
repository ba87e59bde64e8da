"""The class `Graded`, a task that combines a source of problems with weighted reward functions.

Responses that could not be graded are counted separately from wrong ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from vineppo.tasks.grading.judge import Judge
from vineppo.types import Failure, Problem, ProblemSource, Split, Tally, UserError, Verdict

_MIN_GRADED = 20
"""Minimum denominator of the share of errors, because the share would be unreliable with fewer responses."""


@dataclass
class Graded:
    """Problems graded by reward functions; implements `types.Task`.

    The reward is the weighted sum over the functions that apply, None if no function applies, and 0 if grading failed.
    Too many failures stop the run, because the policy would learn from these wrong rewards.
    """

    source: ProblemSource
    judge: Judge
    names: tuple[str, ...]
    """Names of the reward functions, used in metrics."""
    weights: tuple[float, ...]
    max_error_share: float = 0.1
    grade_truncated: bool = False
    """Whether responses that were truncated by the length limit are graded."""
    tally: Tally = field(default_factory=Tally)
    """Counts since the last call of `count_anew`."""
    total: Tally = field(default_factory=Tally)
    """Counts since the task was created."""
    demonstrate: Callable[[Problem], str] | None = None
    """Function that returns the demonstration of a problem. If None, the demonstrations of `source` are used."""

    @property
    def grades_early(self) -> bool:
        """Whether `expect` starts grading in the background."""
        return self.judge.grades_in_background

    def size(self, split: Split) -> int | None:
        """Return the number of problems in a split, or None if the number is unlimited."""
        return self.source.size(split)

    def problem(self, split: Split, index: int) -> Problem:
        """Return the problem with this index in a split."""
        return self.source.problem(split, index)

    def demonstration(self, split: Split, index: int) -> tuple[str, str]:
        """Return a pair (prompt, response) for supervised fine-tuning."""
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
    ) -> list[float | None]:
        """Return the reward of each response to the problem at the same index, or None if no function applies to it.

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
        """Replace `tally` by a new, empty tally and return it. Later responses are counted there."""
        self.tally = Tally()
        return self.tally

    def _reward(self, verdict: Verdict) -> float | None:
        if isinstance(verdict, Failure):
            return 0.0
        if all(reward is None for reward in verdict):
            return None
        # math.fsum is exact: weights of 0.7, 0.2 and 0.1 sum to exactly 1.
        return math.fsum(w * reward for w, reward in zip(self.weights, verdict, strict=True) if reward is not None)
