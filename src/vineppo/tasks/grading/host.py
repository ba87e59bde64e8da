"""The part of a distributed judge that runs on another machine, or in another process: it has a grader process there.

The grader process has the limits and the sandbox of those that the trainer itself starts, so that a verdict does not
depend on where a response is graded.
"""

from __future__ import annotations

import sys
import warnings
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from vineppo.tasks.grading.jobs import Job
from vineppo.tasks.grading.sandbox import Protection
from vineppo.tasks.grading.workers import Place, WorkerPool
from vineppo.types import RewardFn, UserError, Verdict

_KEPT_LINES = 1000
"""Maximum number of pieces of output that a host keeps until its next report; the oldest are dropped."""


@dataclass(frozen=True)
class HostSettings:
    """What a host needs to start its grader process. It can be pickled."""

    loaders: tuple[Callable[[], RewardFn], ...]
    """Functions without arguments that return the reward functions."""
    seconds: float
    """Time limit for grading one response with all functions."""
    memory: int
    """Limit on the address space of the grader process in bytes; 0 means no limit."""
    protection: Protection
    """Whether the grader process runs in the sandbox."""
    place: Place
    """Where the trainer finds modules and files. The grader process looks there first, and then where its host does."""


@dataclass(frozen=True)
class Report:
    """What came of grading some responses."""

    verdicts: tuple[Verdict, ...] = ()
    """The verdict on each response."""
    error: str = ""
    """Message of an error that ends the run; empty without one."""
    notices: tuple[str, ...] = ()
    """Notices for the user, such as that the system refuses a limit."""
    output: str = ""
    """What the reward functions printed since the last report."""


class GraderHost:
    """Grades responses with one grader process.

    Args:
        settings: the reward functions and their limits.
    """

    def __init__(self, settings: HostSettings):
        self._output: deque[str] = deque(maxlen=_KEPT_LINES)
        # The packages of this machine may be in other directories than those of the trainer's machine.
        here = [entry for entry in sys.path if entry and entry not in settings.place.path]
        place = replace(settings.place, path=[*settings.place.path, *here])
        self._pool = WorkerPool(
            settings.loaders,
            1,
            settings.seconds,
            settings.memory,
            settings.protection,
            place=place,
            show=self._output.append,
        )

    def grade(self, jobs: Sequence[Job]) -> Report:
        """Return the verdicts on some responses. A mistake of the user is in the report, and not raised."""
        problems, texts, ids = zip(*jobs, strict=True)
        verdicts: tuple[Verdict, ...] = ()
        error = ""
        with warnings.catch_warnings(record=True) as given:
            warnings.simplefilter("always")
            try:
                verdicts = tuple(self._pool.verdicts(problems, texts, ids))
            except UserError as mistake:
                error = str(mistake)
        return Report(verdicts, error, tuple(str(warning.message) for warning in given), self._printed())

    def close(self) -> str:
        """End the grader process, and return what it printed since the last report."""
        self._pool.close()
        return self._printed()

    def _printed(self) -> str:
        pieces = [self._output.popleft() for _ in range(len(self._output))]
        return "".join(pieces)
