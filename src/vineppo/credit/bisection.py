"""Compute the advantages of VinePPO by bisection, which evaluates only the states around decisive steps.

To evaluate a state means to estimate its value. Without bisection, VinePPO evaluates the state before every step. But
most steps of a long response do not change the expected reward. The steps that change it are called decisive here.

Bisection first evaluates the prompt and compares its value with the reward of the response. If the two differ by more
than their noise, it evaluates the state in the middle of the response and continues in the same way with each half. The
number of evaluated states is proportional to the number of decisive steps times the logarithm of the number of steps.
Without bisection, it is the number of steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from vineppo.credit.advantages import spread_over_tokens
from vineppo.credit.sample import one_per_rollout, reward_of, training_sample, with_reward
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
    keep: int = 0,
) -> CreditFn:
    """Build the credit function of VinePPO with bisection.

    A stretch is a range of neighbouring steps of a response. Let V(a) be the value of the state before the stretch and
    V(b) the value of the state after the stretch. If the stretch contains the last step, V(b) is the reward. All tokens
    of the stretch get the advantage V(b) - V(a).

    The search starts with the whole response as one stretch. If V(a) and V(b) of a stretch differ by more than their
    noise (see `differ`), the stretch is halved: the state m in its middle is evaluated, the first half becomes a
    stretch with the advantage V(m) - V(a), and the second half a stretch with the advantage V(b) - V(m). A stretch of
    one step is not halved. The search proceeds in rounds. Each round halves stretches of all responses and calls the
    estimator once.

    The value of the prompt plus the advantages of all stretches of a response is the reward of the response.

    A rollout without a reward has advantages of 0, and its states are not evaluated. If none of the continuations of a
    state has a reward, the state gets the value of the next evaluated state of the response, or the reward of the
    response if there is none (as in `vine_credit`).

    Bisection biases the advantages. If a stretch is not halved, a small change of the value at one of its steps is
    assigned to all its steps, so small differences between steps are underestimated. The advantages differ from those
    of the halves by V(b) - V(m) in the first half and by V(m) - V(a) in the second half. The bias of the expected
    advantage of a token is at most the mean absolute value of this difference over the stretches that are not halved.

    Args:
        estimator: estimates the values of states.
        splitter: cuts a response into steps.
        token_texts: maps token ids to the text of each token.
        max_states: maximum number of steps per response; 0 means no limit. See `merge_steps`.
        level: confidence level at which V(a) and V(b) must differ for a stretch to be halved, above 0 and below 1.
        keep: number of rollouts whose continuations are returned (`CreditParts.save_continuations`).
    """

    def credit(groups: list[RolloutGroup], iteration: int) -> tuple[list[TrainingSample], Metrics]:
        searches = [
            _Bisection(
                problem, rollout, (0, *step_ends(rollout, splitter, token_texts, max_states)), level, index < keep
            )
            for index, (problem, rollout) in enumerate(with_reward(groups))
        ]
        cost, rounds = _evaluate(searches, estimator, iteration)
        samples = [search.sample() for search in searches]
        steps = sum(search.num_steps for search in searches)
        metrics = {"credit/rounds": float(rounds), "credit/measured_share": cost.states / max(1, steps)}
        return one_per_rollout(groups, samples), {**value_metrics(samples, cost), **metrics}

    return credit


def _evaluate(searches: Sequence[_Bisection], estimator: ValueEstimator, iteration: int) -> tuple[ValueCost, int]:
    """Run the bisections of all responses to the end.

    In each round one batch of states is evaluated. Equal states of different responses are evaluated once.

    Returns:
        (total cost of all rounds, number of rounds).
    """
    # A state of a rollout whose continuations are kept may be evaluated first for another rollout.
    kept = {search.state(step).key for search in searches if search.keep for step in range(search.num_steps)}
    known: dict[Key, Value | None] = {}
    costs: list[ValueCost] = []
    while pending := [(search, step) for search in searches for step in search.next_steps()]:
        states: dict[Key, State] = {}
        for search, step in pending:
            state = search.state(step)
            if state.key not in known:
                states[state.key] = replace(state, keep=state.key in kept)
        values, cost = estimator.evaluate(list(states.values()), iteration)
        costs.append(cost)
        known.update(zip(states, values, strict=True))
        for search, step in pending:
            search.add(step, known[search.state(step).key])
    evaluated = sum(len(search.values) for search in searches)
    total = ValueCost(evaluated, len(known), sum(c.mc_rollouts for c in costs), sum(c.tokens for c in costs))
    return total, len(costs)


@dataclass(frozen=True)
class _Stretch:
    """A range of neighbouring steps of a response, and the advantage of all tokens of these steps."""

    start: int
    """Index of the first step."""
    end: int
    """Index of the last step plus 1."""
    advantage: float


@dataclass
class _Bisection:
    """The bisection of one response with S steps. State i is the state before step i. State S is the whole response."""

    problem: Problem
    rollout: Rollout
    boundaries: tuple[int, ...]
    """Number of response tokens in each state, shape (S + 1,): 0, followed by the end of each step."""
    level: float
    """Confidence level at which the values at the two ends of a stretch must differ for the stretch to be halved."""
    keep: bool = False
    """Whether the continuations are returned."""
    values: dict[int, Value] = field(default_factory=dict)
    """Dictionary from the index of each state that has been evaluated to the value of the state."""
    finished: list[_Stretch] = field(default_factory=list)
    """Stretches that are not halved any further."""
    pending: list[_Stretch] = field(default_factory=list)
    """Stretches that are halved as soon as the state in their middle has been evaluated."""

    @property
    def num_steps(self) -> int:
        """Number of steps S."""
        return len(self.boundaries) - 1

    def state(self, step: int) -> State:
        """Return the state before the step with the index `step`."""
        response = self.rollout.response_ids
        ids = response[: self.boundaries[step]]
        return State(self.problem, self.rollout.prompt_ids, ids, self.rollout, keep=self.keep)

    def next_steps(self) -> list[int]:
        """Halve the pending stretches, and return the indices of the states that must be evaluated next.

        The list is empty when the bisection is finished. Before the next call, the caller must `add` the values of the
        returned states.
        """
        if not self.values:
            return [0]
        stretches = [half for stretch in self.pending for half in self._halves(stretch)]
        if not self.pending and not self.finished:
            # Only the first state has been evaluated. The search starts with the whole response as one stretch.
            stretches = [_Stretch(0, self.num_steps, reward_of(self.rollout) - self.values[0].mean)]
        self.pending = []
        for stretch in stretches:
            (self.pending if self._must_be_halved(stretch) else self.finished).append(stretch)
        return [_middle(stretch) for stretch in self.pending]

    def add(self, step: int, value: Value | None) -> None:
        """Add the value of the state before a step.

        If it is None, the value of the next evaluated state is added instead, or the reward if there is none.
        """
        following = min((later for later in self.values if later > step), default=self.num_steps)
        self.values[step] = value or self._value(following)

    def _halves(self, stretch: _Stretch) -> tuple[_Stretch, _Stretch]:
        """Return both halves of a stretch with their advantages. The state in its middle must have been evaluated."""
        start, middle, end = (self._value(step).mean for step in (stretch.start, _middle(stretch), stretch.end))
        # The advantage of the stretch is end - start. That of the first half becomes middle - start, and that of the
        # second half end - middle.
        first = stretch.advantage + (middle - end)
        second = stretch.advantage + (start - middle)
        cut = _middle(stretch)
        return _Stretch(stretch.start, cut, first), _Stretch(cut, stretch.end, second)

    def _must_be_halved(self, stretch: _Stretch) -> bool:
        """Return whether a stretch has more than one step, and the values at its two ends differ (see `differ`)."""
        ends = self._value(stretch.start), self._value(stretch.end)
        return stretch.end - stretch.start > 1 and differ(*ends, self.level)

    def _value(self, step: int) -> Value:
        """Return the value of the state before a step; for `step` = S, the reward of the response."""
        return self.values[step] if step < self.num_steps else Value(reward_of(self.rollout), 0)

    def sample(self) -> TrainingSample:
        """Build the training sample of the rollout. In its `StepCredit`, each finished stretch counts as one step."""
        stretches = sorted(self.finished, key=lambda stretch: stretch.start)
        record = StepCredit(
            boundaries=tuple(self.boundaries[stretch.end] for stretch in stretches),
            values=tuple(self.values[stretch.start].mean for stretch in stretches),
            num_mc_rollouts=tuple(self.values[stretch.start].num_mc_rollouts for stretch in stretches),
            step_advantages=tuple(stretch.advantage for stretch in stretches),
        )
        advantages = spread_over_tokens(record.step_advantages, record.boundaries)
        # A state without a value has that of a later state, whose continuations count once.
        kept = [
            mc_rollout
            for step, value in sorted(self.values.items())
            for mc_rollout in value.mc_rollouts
            if self.keep and mc_rollout.state == self.boundaries[step]
        ]
        return training_sample(self.rollout, advantages, credit=record, mc_rollouts=kept)


def _middle(stretch: _Stretch) -> int:
    """Return the index of the state in the middle of a stretch, which is the state before its second half."""
    return (stretch.start + stretch.end) // 2


def differ(first: Value, second: Value, level: float) -> bool:
    """Return whether two values differ by more than their noise.

    This is the case if the confidence interval of their difference excludes 0. The interval is that of Newcombe (1998,
    method 10), which combines the Wilson intervals of both values. A value that was not estimated from continuations is
    treated as exact. The interval is only defined for values in [0, 1]. If a value is outside, the result is whether
    the two values are unequal.

    Args:
        level: confidence level of the interval, above 0 and below 1.
    """
    if not (0 <= first.mean <= 1 and 0 <= second.mean <= 1):
        return first.mean != second.mean
    low, high = (first, second) if first.mean <= second.mean else (second, first)
    return high.mean - low.mean > math.hypot(_margin(low, level, above=True), _margin(high, level, above=False))


def _margin(value: Value, level: float, *, above: bool) -> float:
    """Return the distance from a value to the upper end of its Wilson interval, or to the lower end if not `above`.

    The distance is 0 if the value is exact, that is, not estimated from continuations.
    """
    if not value.num_mc_rollouts:
        return 0.0
    interval = wilson(value.mean * value.num_mc_rollouts, value.num_mc_rollouts, level)
    return interval.high - value.mean if above else value.mean - interval.low
