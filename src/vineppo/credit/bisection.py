"""VinePPO by bisection, which evaluates only the states around decisive steps instead of the states before all steps.

In a long response most steps do not change the expected reward. Bisection evaluates the first state and compares its
value with the reward of the response. If they differ by more than their noise, it evaluates the state in the middle of
the response and continues in the same way with each half. The number of evaluated states is then proportional to the
number of decisive steps times the logarithm of the number of steps. Without bisection it is the number of steps.
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
    """Build the credit function of VinePPO with bisection.

    A stretch is a range of neighbouring steps. V(a) is the value of the state before the stretch and V(b) that of the
    state after it; after the last step, V(b) is the reward. All tokens of the stretch get the advantage V(b) - V(a).
    The first stretch is the whole response. A stretch is halved if V(a) and V(b) differ (see `differ`): the state m in
    its middle is evaluated, and the halves get the advantages V(m) - V(a) and V(b) - V(m). The stretches of all
    responses are processed together, with one call of the estimator per round. The sum of V(s_0) and the step
    advantages of a response is its reward.

    Bisection biases the advantages. A change of the value that is too small for the stretch to be halved is assigned to
    the whole stretch instead of its step, so small differences between steps are underestimated. The bias of the
    expected advantage of a token is at most the mean, over the stretches that are not halved, of |V(m) - V(b)| for
    tokens in the first half and of |V(m) - V(a)| for tokens in the second half.

    Args:
        estimator: evaluates states.
        splitter: cuts a response into steps.
        token_texts: maps token ids to the text of each token.
        max_states: maximum number of steps per response; 0 means no limit. See `merge_steps`.
        level: confidence level at which the values at the ends of a stretch must differ, above 0 and below 1.
    """

    def credit(groups: list[RolloutGroup], iteration: int) -> tuple[list[TrainingSample], Metrics]:
        searches = [
            _Bisection(
                group.problem,
                rollout,
                (0, *step_ends(rollout, splitter, token_texts, max_states)),
                level,
            )
            for group in groups
            for rollout in group.rollouts
        ]
        cost, rounds = _evaluate(searches, estimator, iteration)
        samples = [search.sample() for search in searches]
        steps = sum(search.num_steps for search in searches)
        metrics = {"credit/rounds": float(rounds), "credit/measured_share": cost.states / max(1, steps)}
        return samples, {**value_metrics(samples, cost), **metrics}

    return credit


def _evaluate(searches: Sequence[_Bisection], estimator: ValueEstimator, iteration: int) -> tuple[ValueCost, int]:
    """Run all bisections to the end, and return the total cost and the number of rounds.

    In each round one batch of states is evaluated. Equal states of different responses are evaluated once.
    """
    known: dict[Key, Value] = {}
    costs: list[ValueCost] = []
    while pending := [(search, step) for search in searches for step in search.next_steps()]:
        states = {state.key: state for search, step in pending if (state := search.state(step)).key not in known}
        values, cost = estimator.evaluate(list(states.values()), iteration)
        costs.append(cost)
        known.update(zip(states, values, strict=True))
        for search, step in pending:
            search.values[step] = known[search.state(step).key]
    evaluated = sum(len(search.values) for search in searches)
    total = ValueCost(evaluated, len(known), sum(c.mc_rollouts for c in costs), sum(c.tokens for c in costs))
    return total, len(costs)


@dataclass(frozen=True)
class _Stretch:
    """The steps i of a response with start <= i < end, and the current advantage of their tokens."""

    start: int
    end: int
    advantage: float


@dataclass
class _Bisection:
    """The bisection of one response with S steps. State i is the state before step i; state S is the whole response."""

    problem: Problem
    rollout: Rollout
    boundaries: tuple[int, ...]
    """Number of response tokens in each state, shape (S + 1,): 0, followed by the end of each step."""
    level: float
    """Confidence level at which the values at the ends of a stretch must differ for it to be halved."""
    values: dict[int, Value] = field(default_factory=dict)
    """Values of the states that have been evaluated, by the index of the state."""
    finished: list[_Stretch] = field(default_factory=list)
    """Stretches that are not halved any further."""
    pending: list[_Stretch] = field(default_factory=list)
    """Stretches that are halved as soon as the state in their middle has been evaluated."""

    @property
    def num_steps(self) -> int:
        """Number of steps S."""
        return len(self.boundaries) - 1

    def state(self, step: int) -> State:
        """Return the state before a step."""
        response = self.rollout.response_ids
        return State(self.problem, self.rollout.prompt_ids, response[: self.boundaries[step]], self.rollout)

    def next_steps(self) -> list[int]:
        """Halve the pending stretches, and return the indices of the states that must be evaluated next.

        The caller must have added the values of the states that the previous call returned to `values`.
        """
        if not self.values:
            return [0]
        stretches = [half for stretch in self.pending for half in self._halves(stretch)]
        if not self.pending and not self.finished:
            stretches = [_Stretch(0, self.num_steps, self.rollout.reward - self.values[0].mean)]
        self.pending = []
        for stretch in stretches:
            (self.pending if self._must_be_halved(stretch) else self.finished).append(stretch)
        return [_middle(stretch) for stretch in self.pending]

    def _halves(self, stretch: _Stretch) -> tuple[_Stretch, _Stretch]:
        start, middle, end = (self._value(step).mean for step in (stretch.start, _middle(stretch), stretch.end))
        first = stretch.advantage + (middle - end)
        second = stretch.advantage + (start - middle)
        cut = _middle(stretch)
        return _Stretch(stretch.start, cut, first), _Stretch(cut, stretch.end, second)

    def _must_be_halved(self, stretch: _Stretch) -> bool:
        ends = self._value(stretch.start), self._value(stretch.end)
        return stretch.end - stretch.start > 1 and differ(*ends, self.level)

    def _value(self, step: int) -> Value:
        return self.values[step] if step < self.num_steps else Value(self.rollout.reward, 0)

    def sample(self) -> TrainingSample:
        """Build the training sample of the rollout. Its `StepCredit` contains each finished stretch as one step."""
        stretches = sorted(self.finished, key=lambda stretch: stretch.start)
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


def differ(first: Value, second: Value, level: float) -> bool:
    """Return whether two values differ by more than their noise.

    This is the case if the confidence interval of their difference excludes 0. The interval is that of Newcombe (1998,
    method 10), which combines the Wilson intervals of both values. A value without continuations is exact. If a value
    is outside [0, 1], the interval is not defined, and the result is whether the values are unequal.
    """
    if not (0 <= first.mean <= 1 and 0 <= second.mean <= 1):
        return first.mean != second.mean
    low, high = (first, second) if first.mean <= second.mean else (second, first)
    return high.mean - low.mean > math.hypot(_margin(low, level, above=True), _margin(high, level, above=False))


def _margin(value: Value, level: float, *, above: bool) -> float:
    """Return the distance from the value to the upper (`above`) or lower end of its Wilson interval."""
    if not value.num_mc_rollouts:
        return 0.0
    interval = wilson(value.mean * value.num_mc_rollouts, value.num_mc_rollouts, level)
    return interval.high - value.mean if above else value.mean - interval.low
