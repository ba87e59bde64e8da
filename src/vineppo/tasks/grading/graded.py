"""The one implementation of a task: problems from any source under weighted reward functions.

What failed is counted apart from what is wrong.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from vineppo.tasks.grading.judge import Judge
from vineppo.types import Failure, Problem, ProblemSource, Split, Tally, UserError, Verdict

_FEWEST = 20
"""Responses below which the share of errors says little: it is taken of this many at least."""


@dataclass
class Graded:
    """Problems under reward functions; implements `types.Task`.

    The reward is the weighted sum over the functions that apply, 0 where none does or grading failed. A run is stopped
    when too many failed: wrong rewards teach.
    """

    source: ProblemSource
    judge: Judge
    names: tuple[str, ...]
    """Of the functions, for metrics."""
    weights: tuple[float, ...]
    max_error_share: float = 0.1
    grade_truncated: bool = False
    """Whether responses that were cut off are graded like others."""
    tally: Tally = field(default_factory=Tally)
    """Since `count_anew`."""
    total: Tally = field(default_factory=Tally)
    """Since the beginning."""
    demonstrate: Callable[[Problem], str] | None = None
    """Writes demonstrations in the place of the source's own."""

    @property
    def grades_early(self) -> bool:
        """Whether the judge begins with what it is made to expect."""
        return self.judge.early

    def size(self, split: Split) -> int | None:
        """Number of problems in a split; None when endless."""
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
        """Begin to grade what `grade` will ask for, where the judge can."""
        self.judge.expect(problems, texts, completion_ids)

    def grade(
        self, problems: Sequence[Problem], texts: Sequence[str], completion_ids: Sequence[Sequence[int]] = ()
    ) -> list[float]:
        """Reward of each response text to the problem beside it.

        Raises:
            UserError: with the first error's text, when more than `max_error_share` of all responses so far, or of this
                iteration's (counted as 20 at least), could not be graded.
        """
        verdicts = self.judge.verdicts(problems, texts, completion_ids)
        for verdict in verdicts:
            self.tally.add(self.names, verdict)
            self.total.add(self.names, verdict)
        # Of the whole run, and since the last count: a grader that breaks late must not hide behind its past.
        for tally in (self.total, self.tally):
            if tally.errors > self.max_error_share * max(tally.graded, _FEWEST):
                raise UserError(
                    f"grading failed for {tally.errors} of {tally.graded} responses, {tally.timeouts} of them by the "
                    f"time limit (task.grading.max_error_share is {self.max_error_share}); the first error: "
                    f"{tally.first_error}"
                )
        return [self._reward(verdict) for verdict in verdicts]

    def count_anew(self) -> Tally:
        """A new `tally`, which counts from here on."""
        self.tally = Tally()
        return self.tally

    def _reward(self, verdict: Verdict) -> float:
        if isinstance(verdict, Failure):
            return 0.0
        # fsum: weights of 0.7, 0.2 and 0.1 make exactly 1.
        return math.fsum(w * reward for w, reward in zip(self.weights, verdict, strict=True) if reward is not None)
