"""Define `Graded`, the class of all built-in tasks: a source of problems combined with weighted reward functions.

A response whose grading fails is counted as an error and not as a wrong response.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from vineppo.tasks.grading.judge import Judge
from vineppo.types import Failure, Problem, ProblemSource, Split, Tally, UserError, Verdict

_MIN_GRADED = 20
"""Minimum denominator of the share of errors. With a smaller denominator, one early error could stop the run."""


@dataclass
class Graded:
    """Problems graded by reward functions; implements `types.Task`.

    The reward of a response is the weighted sum of the rewards that the functions return. A function can return None,
    which means that it does not apply to the response; it is then left out of the sum. The reward is None if no
    function applies, and 0 if grading fails. If grading fails too often, `grade` raises UserError, which stops the run:
    otherwise the policy would learn from wrong rewards.
    """

    source: ProblemSource
    """The problems and their demonstrations."""
    judge: Judge
    """Calls the reward functions."""
    names: tuple[str, ...]
    """Names of the reward functions, used in metrics."""
    weights: tuple[float, ...]
    """Weight of each reward function, in the order of `names`."""
    max_error_share: float = 0.1
    """`grade` raises UserError if the share of responses whose grading failed exceeds this value."""
    grade_truncated: bool = False
    """Whether responses that were truncated by the length limit are graded."""
    tally: Tally = field(default_factory=Tally)
    """Statistics of the responses that were graded since the last call of `count_anew`."""
    total: Tally = field(default_factory=Tally)
    """Statistics of the responses that were graded since the task was created."""
    demonstrate: Callable[[Problem], str] | None = None
    """Function that returns the response to imitate for a problem. If None, the demonstrations of `source` are used."""
    train_problems: int | None = None
    """Size of the split `train`, which then has the first problems of `source`. None: all problems."""

    @property
    def grades_early(self) -> bool:
        """Whether a call of `expect` starts grading in the background."""
        return self.judge.grades_in_background

    def size(self, split: Split) -> int | None:
        """Return the number of problems in a split, or None if the number is unlimited."""
        size = self.source.size(split)
        if split != "train" or self.train_problems is None:
            return size
        return self.train_problems if size is None else min(size, self.train_problems)

    def problem(self, split: Split, index: int) -> Problem:
        """Return the problem with this index in a split."""
        return self.source.problem(split, index)

    def demonstration(self, split: Split, index: int) -> tuple[str, str]:
        """Return a pair (prompt, response to imitate) for supervised fine-tuning."""
        if self.demonstrate is None:
            return self.source.demonstration(split, index)
        problem = self.source.problem(split, index)
        return problem.prompt, self.demonstrate(problem)

    def expect(
        self, problems: Sequence[Problem], texts: Sequence[str], completion_ids: Sequence[Sequence[int]] = ()
    ) -> None:
        """Start grading responses that will be passed to `grade` later. Do nothing if `grades_early` is false."""
        self.judge.expect(problems, texts, completion_ids)

    def grade(
        self, problems: Sequence[Problem], texts: Sequence[str], completion_ids: Sequence[Sequence[int]] = ()
    ) -> list[float | None]:
        """Return the reward of each response to the problem at the same index, or None if no function applies to it.

        Raises:
            UserError: if grading failed for more than the share `max_error_share` of the responses counted in `total`
                or in `tally`. If fewer than 20 responses are counted, the share is computed as if there were 20. The
                message contains the first error.
        """
        verdicts = self.judge.verdicts(problems, texts, completion_ids)
        for verdict in verdicts:
            self.tally.add(self.names, verdict)
            self.total.add(self.names, verdict)
        # `tally` is checked too, because `total` reacts slowly if a grader starts to fail late in a run.
        for tally in (self.total, self.tally):
            if tally.errors > self.max_error_share * max(tally.graded, _MIN_GRADED):
                raise UserError(
                    f"grading failed for {tally.errors} of {tally.graded} responses, {tally.timeouts} of them because "
                    f"of the time limit (task.grading.max_error_share is {self.max_error_share}); the first error: "
                    f"{tally.first_error}"
                )
        return [self._reward(verdict) for verdict in verdicts]

    def count_anew(self) -> Tally:
        """Replace `tally` by a new, empty tally, and return the new tally. Later responses are counted in it."""
        self.tally = Tally()
        return self.tally

    def _reward(self, verdict: Verdict) -> float | None:
        """Return the weighted sum of the rewards in a verdict, None if all are None, or 0 if grading failed."""
        if isinstance(verdict, Failure):
            return 0.0
        if all(reward is None for reward in verdict):
            return None
        # math.fsum rounds only once, so that the weights 0.7, 0.2 and 0.1 sum to exactly 1.
        return math.fsum(w * reward for w, reward in zip(self.weights, verdict, strict=True) if reward is not None)
