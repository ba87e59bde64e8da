"""VinePPO by bisection: values where the response was decided, instead of at every step.

In a long chain most steps change nothing. So measure the state at the start, compare it with what came out, and look
between them only where the two differ by more than their noise; then the same in each half. The number of measured
states grows with the number of steps that mattered and the logarithm of the length, not with the length.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from vineppo.credit.advantages import spread_over_tokens
from vineppo.credit.sample import training_sample
from vineppo.credit.value_metrics import value_metrics
from vineppo.statistics import wilson
from vineppo.steps import Splitter, step_ends
from vineppo.types import CreditFn, Metrics, Problem, Rollout, RolloutGroup, StepCredit, TrainingSample
from vineppo.values import Key, State, Value, ValueCost, ValueEstimator


def bisected_vine_credit(
    estimator: ValueEstimator,
    splitter: Splitter,
    token_texts: Callable[[Sequence[int]], list[str]],
    max_states: int,
    level: float,
) -> CreditFn:
    """Bind VinePPO's credit function over the states that bisection chooses.

    A stretch [a, b) of steps has the advantage V(b) - V(a), and all its tokens have it. The first one is the whole
    response, with the reward for V(b). Looking inside of a stretch measures the state m in its middle; its halves
    become stretches, with V(m) - V(a) and V(b) - V(m). Stretches of all responses go on together: one call of the
    estimator per round.

    A stretch is looked into where its ends `differ`. V(s_0) plus the advantages is the reward.

    Bias: a fall is traced to its step, while a rise too small to look into is shared by the whole response; so what
    makes a step a little better or worse is understated. The expectation of a token's advantage is off by at most the
    mean of |V(m) - V(b)| (first half) or |V(m) - V(a)| (second half) over the stretches that were not looked into.

    Args:
        level: confidence with which the ends of a stretch must differ, above 0 and below 1.
    """

    def credit(groups: list[RolloutGroup], iteration: int) -> tuple[list[TrainingSample], Metrics]:
        searches = [
            _Search(
                group.problem,
                rollout,
                (0, *step_ends(rollout, splitter, token_texts, max_states)),
                level,
            )
            for group in groups
            for rollout in group.rollouts
        ]
        cost, rounds = _measure(searches, estimator, iteration)
        samples = [search.sample() for search in searches]
        steps = sum(search.last for search in searches)
        metrics = {"credit/rounds": float(rounds), "credit/measured_share": cost.states / max(1, steps)}
        return samples, {**value_metrics(samples, cost), **metrics}

    return credit


def _measure(searches: Sequence[_Search], estimator: ValueEstimator, iteration: int) -> tuple[ValueCost, int]:
    """Round by round, give every search the values it asks for; what they took, and the number of rounds."""
    known: dict[Key, Value] = {}
    costs: list[ValueCost] = []
    while wanted := [(search, place) for search in searches for place in search.wanted()]:
        states = {state.key: state for search, place in wanted if (state := search.state(place)).key not in known}
        values, cost = estimator.evaluate(list(states.values()), iteration)
        costs.append(cost)
        known.update(zip(states, values, strict=True))
        for search, place in wanted:
            search.values[place] = known[search.state(place).key]
    measured = sum(len(search.values) for search in searches)
    total = ValueCost(measured, len(known), sum(c.mc_rollouts for c in costs), sum(c.tokens for c in costs))
    return total, len(costs)


@dataclass(frozen=True)
class _Stretch:
    """Steps start <= i < end of a response, with the advantage that their tokens have so far."""

    start: int
    end: int
    advantage: float


@dataclass
class _Search:
    """What has been measured of one response. A place is an index of `boundaries`: the state before that step."""

    problem: Problem
    rollout: Rollout
    boundaries: tuple[int, ...]
    """Of all steps, with 0 in front, shape (S + 1,)."""
    level: float
    values: dict[int, Value] = field(default_factory=dict)
    stretches: list[_Stretch] = field(default_factory=list)
    """Those that are done with."""
    waiting: list[_Stretch] = field(default_factory=list)
    """Those whose middle is being measured."""

    @property
    def last(self) -> int:
        """Number of steps."""
        return len(self.boundaries) - 1

    def state(self, place: int) -> State:
        response = self.rollout.response_ids
        return State(self.problem, self.rollout.prompt_ids, response[: self.boundaries[place]], self.rollout)

    def wanted(self) -> list[int]:
        """Take the values that have come, and say which places to measure in the next round."""
        if not self.values:
            return [0]
        halves = [half for stretch in self.waiting for half in self._halves(stretch)]
        if not self.waiting and not self.stretches:
            halves = [_Stretch(0, self.last, self.rollout.reward - self.values[0].mean)]
        self.waiting = []
        for stretch in halves:
            (self.waiting if self._decisive(stretch) else self.stretches).append(stretch)
        return [_middle(stretch) for stretch in self.waiting]

    def _halves(self, stretch: _Stretch) -> tuple[_Stretch, _Stretch]:
        before, middle, behind = (self._value(p).mean for p in (stretch.start, _middle(stretch), stretch.end))
        first = stretch.advantage + (middle - behind)
        second = stretch.advantage + (before - middle)
        cut = _middle(stretch)
        return _Stretch(stretch.start, cut, first), _Stretch(cut, stretch.end, second)

    def _decisive(self, stretch: _Stretch) -> bool:
        """Whether to look inside."""
        ends = self._value(stretch.start), self._value(stretch.end)
        return stretch.end - stretch.start > 1 and differ(*ends, self.level)

    def _value(self, place: int) -> Value:
        return self.values[place] if place < self.last else Value(self.rollout.reward, 0)

    def sample(self) -> TrainingSample:
        """The rollout with its credit; unmeasured steps are merged in the record."""
        stretches = sorted(self.stretches, key=lambda stretch: stretch.start)
        record = StepCredit(
            boundaries=tuple(self.boundaries[stretch.end] for stretch in stretches),
            values=tuple(self.values[stretch.start].mean for stretch in stretches),
            num_mc_rollouts=tuple(self.values[stretch.start].num_mc_rollouts for stretch in stretches),
            step_advantages=tuple(stretch.advantage for stretch in stretches),
        )
        advantages = spread_over_tokens(record.step_advantages, record.boundaries)
        return training_sample(self.rollout, advantages, credit=record)


def _middle(stretch: _Stretch) -> int:
    return (stretch.start + stretch.end) // 2


def differ(one: Value, other: Value, level: float) -> bool:
    """Whether two values differ beyond their noise: 0 is outside of the interval of their difference.

    Newcombe's interval (1998, method 10): the Wilson intervals of both, put together. A value that no continuation
    stands behind is exact. Rewards outside of [0, 1] have no such interval; there any difference counts.
    """
    if not (0 <= one.mean <= 1 and 0 <= other.mean <= 1):
        return one.mean != other.mean
    low, high = (one, other) if one.mean <= other.mean else (other, one)
    return high.mean - low.mean > math.hypot(_margin(low, level, above=True), _margin(high, level, above=False))


def _margin(value: Value, level: float, *, above: bool) -> float:
    """From the value to the end of its interval."""
    if not value.num_mc_rollouts:
        return 0.0
    interval = wilson(value.mean * value.num_mc_rollouts, value.num_mc_rollouts, level)
    return interval.high - value.mean if above else value.mean - interval.low
