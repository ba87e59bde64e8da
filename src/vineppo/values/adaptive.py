"""Adaptive K: more continuations for the states that are undecided, and values that stay exactly unbiased.

A state whose first continuations all agree needs no more of them; one whose outcome is open does. So every state starts
with a few, and those with a wide Wilson interval get more, in rounds that are sampled together, up to K.

The mean of all continuations would be biased then, because their number was chosen by what they earned: three rewards
of 1 end the sampling at a value of 1, two of them do not. Instead the value is the mean of the *first round*, averaged
over all orders in which the same outcomes could have come without ending the sampling sooner. The first round's mean is
unbiased whatever follows it, and so is its average (Rao-Blackwell); for two kinds of outcomes it is the estimator of
Girshick, Mosteller and Savage (1946) for sequential sampling plans.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from math import comb

from vineppo.statistics import wilson
from vineppo.values.monte_carlo import Key, MonteCarlo, State, Value, ValueCost, total_tokens

SUCCESS_ABOVE = 0.5
"""A reward above this counts as a success where it is decided whether to go on. Rewards need not be 0 or 1: inside
each of the two kinds they are averaged, so the threshold decides where continuations go and biases nothing."""


@dataclass(frozen=True)
class SamplingPlan:
    """When to stop, and what the outcome is worth then: made once for (first, last, width)."""

    rounds: tuple[int, ...]
    """Continuations after each round, ascending."""
    shares: dict[tuple[int, int], float]
    """(continuations, successes) -> unbiased estimate of the chance of success, for every outcome that stops."""


def interval_width(successes: float, trials: int) -> float:
    """Of Wilson's 95% interval."""
    interval = wilson(successes, trials)
    return interval.high - interval.low


@cache
def sampling_plan(first: int, last: int, width: float) -> SamplingPlan:
    """Start with `first` continuations and double them up to `last`, while Wilson's interval is wider than `width`.

    An outcome's estimate is (orders that lead to it, weighted by their first round's share of successes) divided by
    (orders that lead to it), counted from round to round.

    Raises:
        ValueError: unless 1 <= first <= last and width > 0.
    """
    if not 1 <= first <= last or not width > 0:
        raise ValueError(f"a plan from {first} to {last} continuations with width {width}: needs 1 <= first <= last")
    rounds, shares, n = [first], {}, first
    # successes -> (orders, orders times successes in the first round)
    reached = {s: (comb(first, s), comb(first, s) * s) for s in range(first + 1)}
    while True:
        on: dict[int, tuple[int, int]] = {}
        for successes, (orders, weighted) in reached.items():
            if n == last or interval_width(successes, n) <= width:
                shares[n, successes] = weighted / (orders * first)
            else:
                on[successes] = orders, weighted
        if not on:
            return SamplingPlan(tuple(rounds), shares)
        more = min(n, last - n)
        sums: dict[int, tuple[int, int]] = defaultdict(lambda: (0, 0))
        for successes, (orders, weighted) in on.items():
            for s in range(more + 1):
                a, b = sums[successes + s]
                sums[successes + s] = a + orders * comb(more, s), b + weighted * comb(more, s)
        n, reached = n + more, dict(sums)
        rounds.append(n)


@dataclass(frozen=True)
class AdaptiveMonteCarlo:
    """Between `first` and K continuations of each state, all of them fresh.

    Bias: none, for any rewards and any width. Precision: no unbiased value that stops by its own outcomes has a
    variance below V (1 - V) / E[continuations] for 0/1 rewards (Wolfowitz 1947), so one state alone gains nothing. The
    gain is between states: those that are nearly decided leave their continuations to the others.

    Attributes:
        plain: sampler, grader, K and budget.
        first: continuations of the first round.
        width: of the 95% Wilson interval at which a state is decided; 0 for that of K / 2 successes in K.
    """

    plain: MonteCarlo
    first: int
    width: float

    def evaluate(self, states: Sequence[State], iteration: int) -> tuple[list[Value], ValueCost]:
        """Value of each state, in order; equal states are sampled once, a state without budget is worth 0."""
        K = self.plain.num_mc_rollouts
        plan = sampling_plan(min(self.first, K), K, self.width or interval_width(K / 2, K))
        known, undecided = self.plain.split(states)
        rewards: dict[Key, list[float]] = {key: [] for key in undecided}
        tokens = 0
        for start, end in pairwise((0, *plan.rounds)):
            asked = list(undecided.values())
            requests = [self.plain.request(s, iteration, end - start, purpose=f"mc from {start}") for s in asked]
            graded, completions = self.plain.graded(asked, requests)
            tokens += total_tokens(completions)
            for key, group in zip(list(undecided), graded, strict=True):
                rewards[key] += group
                value = _value(plan, rewards[key])
                if value is not None:
                    known[key] = value
                    del undecided[key]
            if not undecided:
                break
        cost = ValueCost(len(states), len(known), sum(map(len, rewards.values())), tokens)
        return [known[state.key] for state in states], cost


def _value(plan: SamplingPlan, rewards: Sequence[float]) -> Value | None:
    """The value that these rewards stand for; None where the plan goes on."""
    high = [reward for reward in rewards if reward > SUCCESS_ABOVE]
    low = [reward for reward in rewards if reward <= SUCCESS_ABOVE]
    share = plan.shares.get((len(rewards), len(high)))
    if share is None:
        return None
    mean = share * (sum(high) / len(high) if high else 0.0) + (1 - share) * (sum(low) / len(low) if low else 0.0)
    return Value(mean, len(rewards))
