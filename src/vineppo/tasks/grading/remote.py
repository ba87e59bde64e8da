"""Grade responses with hosts on several machines, while sampling continues.

A host (`host.GraderHost`) receives a few responses at a time. If it dies, or is silent for longer than its responses
can take, it is replaced, and the responses without a verdict are graded again.

This module does not know how hosts are reached. `Crew` is what it needs of them; tasks/grading/ray.py has one for Ray.
"""

from __future__ import annotations

import time
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from vineppo.tasks.grading.host import Report
from vineppo.tasks.grading.jobs import Job, Jobs, Key
from vineppo.tasks.grading.output import print_to_stderr
from vineppo.tasks.grading.workers import START_SECONDS
from vineppo.types import Problem, TrainingWarning, UserError, Verdict

_MAX_DEATHS = 3
"""The run stops when this many hosts have died while they graded the same response."""
_RESTART_SECONDS = 20.0
"""Seconds that a host may need, beside the time limit of a response, to replace its grader process."""


class HostDied(RuntimeError):
    """A host ended, or cannot be reached, before it returned its report."""


class Crew(Protocol):
    """Hosts that grade responses. They have the numbers 0, 1, ... and each grades one list of responses at a time."""

    @property
    def size(self) -> int:
        """Number of hosts."""
        ...

    def start(self, host: int, jobs: Sequence[Job]) -> Any:
        """Let a host grade responses. Return a hashable handle, without waiting.

        Raises:
            UserError: if a problem cannot be sent.
        """
        ...

    def wait(self, handles: Sequence[Any], seconds: float) -> list[Any]:
        """Return the handles that are finished, as soon as there is one, or none after a number of seconds."""
        ...

    def result(self, handle: Any) -> Report:
        """Return the report of a finished handle.

        Raises:
            HostDied: if the host ended before.
        """
        ...

    def replace(self, host: int) -> None:
        """End a host, and start a new one in its place, without waiting for it."""
        ...

    def close(self) -> list[str]:
        """End all hosts. Return what their reward functions printed since the last reports."""
        ...


@dataclass(frozen=True)
class _Run:
    """Responses that a host grades."""

    host: int
    keys: tuple[Key, ...]
    until: float
    """Value of the clock after which the host counts as dead."""


class RemotePool:
    """Grades responses with the hosts of a crew; implements `judge.Judge`. Equal responses are graded once.

    Args:
        start_crew: function that starts the hosts; it is called when the first responses are submitted.
        seconds: time limit for grading one response with all functions, which the hosts observe.
        clock: function that returns the time in seconds.
    """

    grades_in_background = True
    """True, because `expect` starts grading in the hosts."""

    def __init__(self, start_crew: Callable[[], Crew], seconds: float, clock: Callable[[], float] = time.monotonic):
        self._start_crew, self._seconds, self._clock = start_crew, seconds, clock
        self._crew: Crew | None = None
        self._jobs = Jobs()
        self._running: dict[Any, _Run] = {}
        self._deaths: Counter[Key] = Counter()
        self._notices: set[str] = set()
        """Notices of hosts that were shown as a warning."""

    def expect(
        self, problems: Sequence[Problem], texts: Sequence[str], completion_ids: Sequence[Sequence[int]]
    ) -> None:
        """Start grading these responses in the background."""
        self._jobs.submit(problems, texts, completion_ids)
        self._serve(0.0)

    def verdicts(
        self, problems: Sequence[Problem], texts: Sequence[str], completion_ids: Sequence[Sequence[int]]
    ) -> list[Verdict]:
        """Wait until all responses have been graded, and return the verdict on each response.

        Raises:
            UserError: as `workers.WorkerPool.verdicts`, and if several hosts died while they graded a response.
        """
        keys = self._jobs.submit(problems, texts, completion_ids)
        while self._jobs.unfinished(keys):
            self._serve(1.0)
        for key in keys:
            self._deaths.pop(key, None)
        return self._jobs.collect(keys)

    def close(self) -> None:
        """End the hosts. A later call of `expect` or `verdicts` starts new ones."""
        crew, self._crew = self._crew, None
        for handle in list(self._running):
            self._jobs.put_back(self._running.pop(handle).keys)
        for output in crew.close() if crew else ():
            print_to_stderr(output)

    def __del__(self) -> None:
        self.close()

    def _serve(self, timeout: float) -> None:
        """Start the hosts, send queued jobs, receive verdicts, and replace hosts that died or are silent.

        Args:
            timeout: maximum time in seconds to wait for a report.
        """
        if self._crew is None:
            if not self._jobs.waiting:
                return
            self._crew = self._start_crew()
        self._send_jobs(self._crew)
        for handle in self._crew.wait(list(self._running), timeout) if self._running else ():
            run = self._running.pop(handle)
            try:
                self._receive(run, self._crew.result(handle))
            except HostDied as died:
                self._replace(self._crew, run, str(died))
        for handle, run in list(self._running.items()):
            if self._clock() > run.until:
                del self._running[handle]
                self._replace(self._crew, run, "it has given no sign of life for longer than its responses can take")
        self._send_jobs(self._crew)

    def _send_jobs(self, crew: Crew) -> None:
        """Send queued jobs to the hosts that have none, in equal shares."""
        busy = {run.host for run in self._running.values()}
        idle = [host for host in range(crew.size) if host not in busy]
        for index, host in enumerate(idle):
            keys = self._jobs.take(len(idle) - index)
            if keys:
                handle = crew.start(host, [self._jobs[key] for key in keys])
                limit = START_SECONDS + len(keys) * (self._seconds + _RESTART_SECONDS)
                self._running[handle] = _Run(host, tuple(keys), self._clock() + limit)

    def _receive(self, run: _Run, report: Report) -> None:
        """Store the verdicts of a report, and show its notices and output."""
        if report.output:
            print_to_stderr(report.output)
        for notice in report.notices:
            if notice not in self._notices:
                self._notices.add(notice)
                warnings.warn(notice, stacklevel=2)
        if report.error:
            self.close()
            raise UserError(report.error)
        for key, verdict in zip(run.keys, report.verdicts, strict=True):
            self._jobs.finish(key, verdict)

    def _replace(self, crew: Crew, run: _Run, reason: str) -> None:
        """Replace a host that died, and put its responses back to the front of the queue."""
        self._jobs.put_back(run.keys)
        self._deaths.update(run.keys)
        most = max(self._deaths[key] for key in run.keys)
        if most >= _MAX_DEATHS:
            self.close()
            raise UserError(
                f"{most} grading workers died while they graded the same response; the last one: {reason}; if memory "
                "is short, lower task.grading.memory or task.grading.workers, or set task.grading.pool to none"
            )
        crew.replace(run.host)
        warnings.warn(
            f"a grading worker died and was replaced ({reason}); responses that are graded again, with the same "
            f"result: {len(run.keys)}",
            TrainingWarning,
            stacklevel=2,
        )
