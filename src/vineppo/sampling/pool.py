"""Distribute units over workers: prefix-affine queues, stealing, copies of slow units, and replacement of dead workers.

The results do not depend on the distribution, because a unit has the same bits on every worker (sampling/units.py).
Which worker samples what is therefore decided by the clock:

- The units of a family stay on one worker. Families are given to workers by their cost, the most expensive first.
- A worker without units takes one from the worker that has the most left.
- If no unit is left, a worker that has nothing to do takes a copy of a unit that runs much longer than units of its
  cost did before. The first result counts. The others do not wait for a slow worker: it finishes its unit, even after
  the end of the call, and gets no other unit until then.
- The unit of a worker that died is sampled again, and the worker is replaced.

This module does not know how workers are reached. `Crew` is what it needs of them; sampling/ray.py has one for Ray.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any, Protocol

from vineppo.sampling.trunks import empty_results
from vineppo.sampling.units import Unit
from vineppo.types import Completion, OnFinished, SampleRequest, UserError

_MAX_DEATHS = 3
"""The call fails when this many workers have died while they sampled the same unit."""
_MAX_COPIES = 2
"""Maximum number of workers that sample the same unit at the same time."""
_PATIENCE = 3.0
"""A copy of a unit is started when the unit has run for this many times the expected seconds."""
_PATIENCE_SECONDS = 1.0
"""The same as a minimum in seconds, because short times are uncertain."""
_FIRST_PATIENCE_SECONDS = 60.0
"""Seconds until a copy is started if no unit has finished yet, so that no time can be expected."""
_REMEMBERED = 256
"""Number of units from whose times the expected time is computed."""


class WorkerDied(RuntimeError):
    """A worker ended, or cannot be reached, before it returned its result."""


class Crew(Protocol):
    """Workers that sample units. They have the numbers 0, 1, ... and each samples one unit at a time."""

    @property
    def size(self) -> int:
        """Number of workers."""
        ...

    def start(self, worker: int, version: int, requests: Sequence[SampleRequest]) -> Any:
        """Let a worker sample requests with the weights of a version. Return a hashable handle, without waiting."""
        ...

    def wait(self, handles: Sequence[Any], seconds: float | None) -> list[Any]:
        """Return the handles that are finished, as soon as there is one, or none after a number of seconds."""
        ...

    def result(self, handle: Any) -> list[list[Completion]]:
        """Return the completions of a finished handle, one list per request.

        Raises:
            WorkerDied: if the worker ended before.
            Exception: the exception that the sampler of the worker raised.
        """
        ...

    def replace(self, worker: int) -> None:
        """Start a new worker with the current weights in the place of one that died, without waiting for it."""
        ...


@dataclass(frozen=True)
class _Run:
    """A unit that a worker samples."""

    unit: int
    worker: int
    since: float
    """Value of the clock when it was started."""


@dataclass
class Record:
    """What happened in a call of `Pool.sample`."""

    by: dict[int, int] = field(default_factory=dict)
    """Number of each unit -> the worker whose result was used."""
    started: Counter[int] = field(default_factory=Counter)
    """Number of each unit -> how often it was started."""
    died: list[str] = field(default_factory=list)
    """Why workers died, one text for each."""
    lost: list[int] = field(default_factory=list)
    """Number of each unit that a worker was sampling when it died."""


class Pool:
    """Samples units with the workers of a crew.

    Args:
        crew: the workers.
        clock: function that returns the time in seconds.
    """

    def __init__(self, crew: Crew, clock: Callable[[], float] = time.monotonic):
        self.crew, self.clock = crew, clock
        self.late: dict[Any, int] = {}
        """Handle of each unit whose result is no longer needed -> the worker that still samples it."""
        self.seconds_per_cost: deque[float] = deque(maxlen=_REMEMBERED)
        self.last = Record()
        """The record of the last call of `sample`."""

    def sample(
        self,
        requests: Sequence[SampleRequest],
        units: Sequence[Unit],
        version: int,
        on_finished: OnFinished | None = None,
    ) -> list[list[Completion]]:
        """Return one list of completions per request, in the order of the requests.

        Args:
            units: the units into which the requests were cut.
            version: version of the weights. A worker with another version refuses.
            on_finished: called with the completions of a unit as soon as the unit has ended.
        Raises:
            UserError: if several workers died while they sampled the same unit.
            Exception: the exception that the sampler of a worker raised.
        """
        self.last = Record()
        call = _Call(self, requests, units, version, on_finished, self.last)
        try:
            call.run()
        finally:
            self.late |= {handle: run.worker for handle, run in call.running.items()}
        return [[c for c in completions if c is not None] for completions in call.results]

    def patience(self, cost: int) -> float:
        """Return after how many seconds a copy of a running unit of this cost is started."""
        if not self.seconds_per_cost:
            return _FIRST_PATIENCE_SECONDS
        return max(_PATIENCE_SECONDS, _PATIENCE * cost * median(self.seconds_per_cost))


class _Call:
    """One call of `Pool.sample`."""

    def __init__(
        self,
        pool: Pool,
        requests: Sequence[SampleRequest],
        units: Sequence[Unit],
        version: int,
        on_finished: OnFinished | None,
        record: Record,
    ):
        self.pool, self.crew, self.units, self.version = pool, pool.crew, units, version
        self.on_finished, self.record = on_finished, record
        self.results: list[list[Completion | None]] = empty_results(requests, version)
        self.left = set(range(len(units)))
        self.running: dict[Any, _Run] = {}
        self.deaths: Counter[int] = Counter()
        self.queues = _queues(units, self.crew.size)

    def run(self) -> None:
        """Sample all units."""
        while self.left:
            self._start_units()
            handles = [*self.running, *self.pool.late]
            for handle in self.crew.wait(handles, self._seconds_to_next_copy()):
                if handle in self.running:
                    self._take(handle)
                else:
                    self._take_late(handle)

    def _idle(self) -> list[int]:
        """Return the workers that sample no unit."""
        busy = {run.worker for run in self.running.values()} | set(self.pool.late.values())
        return [worker for worker in range(self.crew.size) if worker not in busy]

    def _start_units(self) -> None:
        """Give a unit to every idle worker, as long as there is one that should be started."""
        for worker in self._idle():
            unit = self._next(worker)
            if unit is not None:
                self.record.started[unit] += 1
                handle = self.crew.start(worker, self.version, self.units[unit].requests)
                self.running[handle] = _Run(unit, worker, self.pool.clock())

    def _next(self, worker: int) -> int | None:
        """Return the unit that a worker should start: its own, another worker's, or a copy; None if there is none."""
        if self.queues[worker]:
            return self.queues[worker].popleft()
        # The last unit of a queue is of the family that its worker begins last.
        richest = max(self.queues, key=lambda queue: sum(self.units[unit].cost for unit in queue))
        if richest:
            return richest.pop()
        overdue = [run for run in self._copyable() if self._seconds_until_copy(run) <= 0]
        return max(overdue, key=lambda run: self.units[run.unit].cost).unit if overdue else None

    def _copyable(self) -> list[_Run]:
        """Return the runs of units of which a copy may be started."""
        copies = Counter(run.unit for run in self.running.values())
        return [run for run in self.running.values() if copies[run.unit] < _MAX_COPIES]

    def _seconds_until_copy(self, run: _Run) -> float:
        return run.since + self.pool.patience(self.units[run.unit].cost) - self.pool.clock()

    def _seconds_to_next_copy(self) -> float | None:
        """Return after how many seconds an idle worker should start a copy; None if there is nothing to copy."""
        if any(self.queues) or not self._idle():
            return None
        return min((max(0.01, self._seconds_until_copy(run)) for run in self._copyable()), default=None)

    def _take(self, handle: Any) -> None:
        """Store the result of a run, or start its unit again if its worker died."""
        run = self.running.pop(handle)
        try:
            groups = self.crew.result(handle)
        except WorkerDied as died:
            self._replace(run, died)
            return
        self.pool.seconds_per_cost.append((self.pool.clock() - run.since) / self.units[run.unit].cost)
        if run.unit not in self.left:
            return
        self.left.remove(run.unit)
        self.record.by[run.unit] = run.worker
        for part, group in zip(self.units[run.unit].parts, groups, strict=True):
            self.results[part.index][part.first : part.first + len(group)] = group
        if self.on_finished:
            parts = self.units[run.unit].parts
            self.on_finished([(p.index, c) for p, group in zip(parts, groups, strict=True) for c in group])
        self._let_go(run.unit)

    def _let_go(self, unit: int) -> None:
        """No longer wait for the other copies of a unit that has ended."""
        for handle in [handle for handle, run in self.running.items() if run.unit == unit]:
            self.pool.late[handle] = self.running.pop(handle).worker

    def _take_late(self, handle: Any) -> None:
        """Note that a worker has ended a unit whose result is no longer needed, and replace the worker if it died."""
        worker = self.pool.late.pop(handle)
        try:
            self.crew.result(handle)
        except WorkerDied as died:
            self.record.died.append(str(died))
            self.crew.replace(worker)
        except Exception:
            return  # The call that the unit belonged to has ended, with the result of another worker or with an error.

    def _replace(self, run: _Run, died: WorkerDied) -> None:
        """Replace a worker that died, and put its unit back if no other worker samples it."""
        self.record.died.append(str(died))
        self.record.lost.append(run.unit)
        self.crew.replace(run.worker)
        self.deaths[run.unit] += 1
        if self.deaths[run.unit] >= _MAX_DEATHS:
            raise UserError(
                f"{self.deaths[run.unit]} workers died while they sampled the same unit; the last one: {died}; if "
                "memory is short, lower sampler.unit_rows or sampler.unit_memory"
            )
        if run.unit in self.left and all(other.unit != run.unit for other in self.running.values()):
            self.queues[run.worker].appendleft(run.unit)


def _queues(units: Sequence[Unit], size: int) -> list[deque[int]]:
    """Distribute units over the queues of workers. The units of a family are in one queue.

    The most expensive family is given first, always to the worker with the least cost so far. A queue begins with the
    units of its most expensive family, and of these with the most expensive unit.
    """
    families: dict[int, list[int]] = {}
    for number, unit in enumerate(units):
        families.setdefault(unit.family, []).append(number)
    cost = {family: sum(units[unit].cost for unit in numbers) for family, numbers in families.items()}
    queues: list[deque[int]] = [deque() for _ in range(size)]
    costs = [0] * size
    for family in sorted(families, key=lambda family: -cost[family]):
        worker = costs.index(min(costs))
        costs[worker] += cost[family]
        queues[worker].extend(sorted(families[family], key=lambda unit: -units[unit].cost))
    return queues
