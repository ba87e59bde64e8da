"""Grading: several weighted reward functions become one number; what failed is counted apart from what is wrong.

A *verdict* on a response is a reward, or None for "not applicable", from every function; or the text of the error that
kept them from one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from vineppo.tasks.grading.rewards import apply_rewards
from vineppo.types import Problem, ProblemSource, RewardFn, Split, UserError

_FEWEST = 20
"""Responses below which the share of errors says little: it is taken of this many at least."""


@dataclass(frozen=True)
class Failure:
    """Why there is no verdict on a response."""

    text: str
    timed_out: bool = False


Verdict = tuple[float | None, ...] | Failure


@dataclass
class Tally:
    """What happened to the responses that were graded."""

    graded: int = 0
    errors: int = 0
    """Time-outs included."""
    timeouts: int = 0
    not_applicable: int = 0
    """Responses on which no function gave a reward."""
    first_error: str = ""
    sums: dict[str, float] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    """Sum and number of the rewards of each function."""

    def add(self, names: Sequence[str], verdict: Verdict) -> None:
        """Count one response."""
        self.graded += 1
        if isinstance(verdict, Failure):
            self.errors += 1
            self.timeouts += verdict.timed_out
            self.first_error = self.first_error or verdict.text
            return
        self.not_applicable += all(reward is None for reward in verdict)
        for name, reward in zip(names, verdict, strict=True):
            if reward is not None:
                self.sums[name] = self.sums.get(name, 0.0) + reward
                self.counts[name] = self.counts.get(name, 0) + 1

    def shares(self) -> dict[str, float]:
        """`grader/*`."""
        if not self.graded:
            return {}
        return {
            "grader/graded": float(self.graded),
            "grader/error_share": self.errors / self.graded,
            "grader/timeout_share": self.timeouts / self.graded,
            "grader/not_applicable_share": self.not_applicable / self.graded,
        }

    def means(self) -> dict[str, float]:
        """`rewards/<function>/mean`, over the responses that it applied to."""
        return {f"rewards/{name}/mean": total / self.counts[name] for name, total in self.sums.items()}


class Judge(Protocol):
    """Who reaches verdicts: in this process, or in others."""

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
