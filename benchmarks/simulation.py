"""Simulate iterations of training on many samplers with a queue of events, for benchmarks/scale.py.

An iteration has these parts, one after the other: the weights go to all samplers; the samplers sample the rollouts, cut
into units; the first process grades them and asks for continuations; the samplers sample the continuations, also in
units; the first process computes the credit; the trainers update the weights. A unit is work that one sampler does in
one batch. Units do not depend on the number of samplers.

`run_units` simulates the samplers. Each has a speed and may fail. Everything else is a formula. Seconds are simulated,
and random numbers come from a NumPy generator, so that the same seed gives the same result.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

DESIGNS = ("fixed shares", "stealing", "stealing and copies")
"""How units come to samplers. `fixed shares`: each sampler gets every W-th unit in advance. `stealing`: a sampler that
is free takes the next unit of a common list. `stealing and copies`: if the list is empty, a free sampler also starts a
copy of a unit that is still running, and the first result counts."""
MOST_COPIES = 2
"""Largest number of samplers that work on one unit at the same time: the first one and one copy."""
NEVER = math.inf

NextFailure = Callable[[int, float], float]
"""Function (sampler, time) -> time of its next failure after this time; NEVER if there is none."""


@dataclass
class Outcome:
    """What happened while the units were sampled."""

    seconds: float = 0.0
    """Time at which all units are done."""
    useful: float = 0.0
    """Seconds of samplers for results that counted."""
    wasted: float = 0.0
    """Seconds of samplers for copies that were not needed, and for units that were lost in a failure."""
    failures: int = 0
    """Number of failures while a sampler was working."""
    copies: int = 0
    """Number of copies that were started."""
    done_by: dict[int, int] = field(default_factory=dict)
    """Unit -> sampler whose result counted."""


@dataclass
class _Work:
    """A unit that a sampler is working on."""

    unit: int
    began: float


class _Pool:
    """The state of `run_units`."""

    def __init__(self, seconds: Sequence[float], speeds: Sequence[float], design: str, restart: float):
        self.seconds, self.speeds, self.design, self.restart = seconds, speeds, design, restart
        self.outcome = Outcome()
        self.events: list[tuple[float, int, str, int, int]] = []  # time, number, kind, sampler, its assignment
        self.counter = 0
        self.assignment = [0] * len(speeds)  # counts the assignments, so that events of earlier ones are ignored
        self.working: dict[int, _Work] = {}
        self.owners: dict[int, list[int]] = {}  # unit -> samplers that are working on it, the first one first
        self.single: dict[int, None] = {}  # units with one sampler, in the order in which they started
        self.idle: set[int] = set()
        if design == "fixed shares":
            count = len(speeds)
            self.lists = [deque(range(sampler, len(seconds), count)) for sampler in range(count)]
        else:
            self.lists = [deque(range(len(seconds)))] * len(speeds)

    def add(self, time: float, kind: str, sampler: int) -> None:
        """Add an event."""
        self.counter += 1
        heapq.heappush(self.events, (time, self.counter, kind, sampler, self.assignment[sampler]))

    def start(self, time: float, sampler: int, next_failure: NextFailure) -> None:
        """Give the next unit, or a copy, to a free sampler."""
        self.assignment[sampler] += 1
        units = self.lists[sampler]
        if units:
            unit = units.popleft()
        else:
            copy = self.to_copy()
            if copy is None:
                self.idle.add(sampler)
                return
            unit = copy
            self.outcome.copies += 1
        self.idle.discard(sampler)
        self.working[sampler] = _Work(unit, time)
        owners = self.owners.setdefault(unit, [])
        owners.append(sampler)
        self.single.pop(unit, None)
        if len(owners) < MOST_COPIES:
            self.single[unit] = None
        end, failure = time + self.seconds[unit] / self.speeds[sampler], next_failure(sampler, time)
        self.add(min(end, failure), "end" if end <= failure else "failure", sampler)

    def to_copy(self) -> int | None:
        """Return the unit that has been running for the longest time and may have one more copy, or None."""
        if self.design != "stealing and copies":
            return None
        return next(iter(self.single), None)

    def stop(self, time: float, sampler: int) -> _Work:
        """Take its unit from a sampler, and return what it was working on."""
        work = self.working.pop(sampler)
        self.owners[work.unit].remove(sampler)
        if self.owners[work.unit]:
            self.single[work.unit] = None
        else:
            del self.owners[work.unit]
            self.single.pop(work.unit, None)
        return work


def run_units(
    seconds: Sequence[float],
    speeds: Sequence[float],
    design: str,
    *,
    next_failure: NextFailure = lambda sampler, time: NEVER,
    restart: float = 0.0,
) -> Outcome:
    """Simulate samplers that work on units until all units are done.

    Args:
        seconds: seconds of each unit on a sampler with speed 1.
        speeds: speed of each sampler.
        design: one of DESIGNS.
        next_failure: when a sampler fails. What it was working on is lost, and the unit is the next of the list.
        restart: seconds until a new sampler stands in the place of a failed one.
    """
    pool = _Pool(seconds, speeds, design, restart)
    outcome = pool.outcome
    for sampler in range(len(speeds)):
        pool.start(0.0, sampler, next_failure)
    while pool.events and len(outcome.done_by) < len(seconds):
        time, _, kind, sampler, assignment = heapq.heappop(pool.events)
        if assignment != pool.assignment[sampler]:
            continue
        if kind == "end":
            work = pool.stop(time, sampler)
            outcome.useful += time - work.began
            outcome.done_by[work.unit] = sampler
            outcome.seconds = time
            free = [sampler]
            for other in list(pool.owners.get(work.unit, [])):  # copies that are not needed any more
                outcome.wasted += time - pool.stop(time, other).began
                free.append(other)
            for one in free:
                pool.start(time, one, next_failure)
        elif kind == "failure":
            work = pool.stop(time, sampler)
            outcome.wasted += time - work.began
            outcome.failures += 1
            pool.assignment[sampler] += 1
            pool.add(time + restart, "ready", sampler)
            if work.unit not in pool.owners:
                pool.lists[sampler].appendleft(work.unit)
                if design != "fixed shares" and pool.idle:
                    pool.start(time, min(pool.idle), next_failure)
        else:
            pool.start(time, sampler, next_failure)
    # What was running at the end was not needed.
    outcome.wasted += sum(outcome.seconds - work.began for work in pool.working.values())
    return outcome


def broadcast_seconds(way: str, nodes: int, size: float, speed: float, latency: float, pieces: int = 64) -> float:
    """Return the seconds until all nodes have the weights, of which one other process has the only copy.

    Args:
        way: `one source`: every node gets them from the first process, whose link they share. `tree`: every node that
            has them gives them to two others, one after the other (a binomial tree: the number of copies doubles).
            `chain`: they go from node to node in pieces, each passed on as soon as it arrives.
        nodes: number of nodes that receive them.
        size: bytes.
        speed: bytes per second and direction of a node's link.
        latency: seconds that one message takes in addition.
        pieces: number of pieces of a chain.
    """
    once = size / speed + latency
    if way == "one source":
        return nodes * once
    if way == "tree":
        return math.ceil(math.log2(nodes + 1)) * once
    return (size / pieces / speed + latency) * (pieces + nodes - 1)


@dataclass(frozen=True)
class Workload:
    """What an iteration has to do, and how long its parts take."""

    rollouts: int
    """Number of rollouts."""
    continuations: int
    """Number of continuations."""
    unit_rows: int
    """Number of completions of a unit."""
    rollout_seconds: Callable[[np.random.Generator, int, int], np.ndarray]
    """Function (generator, number of units, rows of a unit) -> seconds of each unit of rollouts."""
    continuation_seconds: Callable[[np.random.Generator, int, int], np.ndarray]
    """The same for units of continuations."""
    serial_seconds: float
    """Seconds of the first process for each completion."""
    update_seconds: float
    """Seconds of the update of one trainer alone, for the rollouts of this workload."""
    trainers: int
    """Largest number of samplers that also train, each with an equal share of the update."""
    update_fixed_seconds: float = 0.0
    """Seconds of the update that do not fall with the number of trainers (gathering weights, reducing gradients)."""

    def times(self, factor: int) -> Workload:
        """Return this workload with `factor` times as many rollouts and continuations, and as much more to update."""
        values = {name: getattr(self, name) for name in self.__dataclass_fields__}
        for name in ("rollouts", "continuations", "update_seconds"):
            values[name] *= factor
        return Workload(**values)


@dataclass(frozen=True)
class Machines:
    """Samplers, and what can go wrong with them."""

    samplers: int
    """Number of samplers."""
    per_node: int = 8
    """Number of samplers of a node."""
    spread: float = 0.0
    """Standard deviation of the logarithm of a sampler's speed, drawn anew in every iteration."""
    failure_seconds: float = NEVER
    """Mean seconds between two failures of one sampler, exponentially distributed."""
    restart_seconds: float = 0.0
    """Seconds until a failed sampler is replaced."""
    broadcast: str = "tree"
    """See `broadcast_seconds`."""
    weight_bytes: float = 0.0
    """Bytes of the weights."""
    link: float = 1.0
    """Bytes per second and direction of a node."""
    latency: float = 0.0
    """Seconds of a message."""


PARTS = ("broadcast", "rollouts", "continuations", "first process", "update")
"""The parts of an iteration."""


@dataclass(frozen=True)
class IterationResult:
    """One simulated iteration."""

    seconds: dict[str, float]
    """Part (one of PARTS) -> seconds."""
    useful: float
    """Seconds of all samplers together for completions that counted, if every sampler had speed 1."""
    wasted: float
    """Seconds of samplers for copies that were not needed and for lost units."""
    failures: int
    """Number of failures."""

    @property
    def total(self) -> float:
        """Seconds of the iteration."""
        return sum(self.seconds.values())


def simulate_iteration(workload: Workload, machines: Machines, design: str, seed: int) -> IterationResult:
    """Simulate one iteration.

    Args:
        workload: what there is to do.
        machines: the samplers.
        design: one of DESIGNS.
        seed: seed of lengths, speeds and failures. Lengths do not depend on the number of samplers.
    """
    lengths, speed_numbers, failure_numbers = (np.random.default_rng([seed, i]) for i in range(3))
    speeds = np.exp(machines.spread * speed_numbers.standard_normal(machines.samplers))

    def next_failure(sampler: int, time: float) -> float:
        if math.isinf(machines.failure_seconds):
            return NEVER
        return time + failure_numbers.exponential(machines.failure_seconds)

    outcomes, useful = {}, 0.0
    for part, count, draw in (
        ("rollouts", workload.rollouts, workload.rollout_seconds),
        ("continuations", workload.continuations, workload.continuation_seconds),
    ):
        units = math.ceil(count / workload.unit_rows)
        seconds = draw(lengths, units, workload.unit_rows)
        useful += float(seconds.sum())
        outcomes[part] = run_units(
            seconds.tolist(),
            speeds.tolist(),
            design,
            next_failure=next_failure,
            restart=machines.restart_seconds,
        )
    nodes = math.ceil(machines.samplers / machines.per_node)
    link = (machines.weight_bytes, machines.link, machines.latency)
    trainers = min(machines.samplers, workload.trainers)
    return IterationResult(
        seconds={
            "broadcast": broadcast_seconds(machines.broadcast, nodes, *link) if machines.weight_bytes else 0.0,
            "rollouts": outcomes["rollouts"].seconds,
            "continuations": outcomes["continuations"].seconds,
            "first process": workload.serial_seconds * (workload.rollouts + workload.continuations),
            "update": workload.update_seconds / trainers + workload.update_fixed_seconds,
        },
        useful=useful,
        wasted=sum(outcome.wasted for outcome in outcomes.values()),
        failures=sum(outcome.failures for outcome in outcomes.values()),
    )
