"""Estimate the values of states in the ways that `vineppo values` compares.

A `StateTable` lists the states of responses. Every estimate is an array with one number per state, shape (n,), in which
NaN means that there is no estimate.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vineppo.credit.tempo import shared_lengths
from vineppo.measure.critics import Critic
from vineppo.measure.session import Response, Session
from vineppo.seeds import derive_seed
from vineppo.types import RolloutGroup
from vineppo.values import ReusingMonteCarlo, State, Value


@dataclass(frozen=True)
class StateTable:
    """The states of responses that are valued, and the steps between them."""

    responses: list[Response]
    response_of: np.ndarray
    """Index of the response of each state, shape (n,)."""
    step_of: np.ndarray
    """Number of steps before each state, shape (n,)."""
    befores: np.ndarray
    """For each step: index of the state before it, shape (steps,)."""
    afters: np.ndarray
    """For each step: index of the state after it, or -1 if the response ends with the step, shape (steps,)."""

    @property
    def states(self) -> list[State]:
        """The n states."""
        return [self.responses[r].state(int(s)) for r, s in zip(self.response_of, self.step_of, strict=True)]

    @property
    def problems(self) -> np.ndarray:
        """Index of the problem of each state, shape (n,)."""
        return np.array([self.responses[r].problem_index for r in self.response_of])

    @property
    def depths(self) -> np.ndarray:
        """Share of the steps of the response that stand before each state, shape (n,)."""
        return np.array([s / len(self.responses[r].ends) for r, s in zip(self.response_of, self.step_of, strict=True)])

    @property
    def rewards(self) -> np.ndarray:
        """Reward of the response of each step, shape (steps,)."""
        return np.array([self.responses[self.response_of[b]].reward for b in self.befores])

    def advantages(self, values: np.ndarray) -> np.ndarray:
        """Return the value after each step minus the value before it, shape (steps,).

        After the last step of a response, the value is its reward.
        """
        after = np.where(self.afters >= 0, values[self.afters], self.rewards)
        return after - values[self.befores]

    def variances(self, variances: np.ndarray) -> np.ndarray:
        """Return the variance of each advantage if the values are independent, shape (steps,)."""
        return np.where(self.afters >= 0, variances[self.afters], 0.0) + variances[self.befores]


def state_table(responses: Sequence[Response], steps: int, seed: int) -> StateTable:
    """List the states at both ends of steps of responses.

    Args:
        responses: the responses.
        steps: number of steps per response that are drawn at random; 0 takes all.
        seed: seed of the draw.
    """
    response_of: list[int] = []
    step_of: list[int] = []
    befores: list[int] = []
    afters: list[int] = []
    for number, response in enumerate(responses):
        S = len(response.ends)
        order = sorted(range(S), key=lambda step: derive_seed(seed, number, step))
        chosen = sorted(order[: steps or S])
        needed = sorted({s for step in chosen for s in (step, step + 1) if s < S})
        place = {step: len(step_of) + i for i, step in enumerate(needed)}
        response_of += [number] * len(needed)
        step_of += needed
        befores += [place[step] for step in chosen]
        afters += [place.get(step + 1, -1) for step in chosen]
    return StateTable(
        list(responses), np.array(response_of), np.array(step_of), np.array(befores), np.array(afters, dtype=int)
    )


def monte_carlo(session: Session, states: Sequence[State], k: int, reuse: bool, iteration: int = 0) -> np.ndarray:
    """Estimate values from K continuations per state, new ones or reused ones.

    Args:
        iteration: address of the random numbers; another number gives an independent estimate.
    """
    estimator = session.monte_carlo(k, f"{'reuse' if reuse else 'fresh'} {k}")
    found: Sequence[Value | None]
    if reuse:
        found, cost = ReusingMonteCarlo(estimator).evaluate(states, iteration)
    else:
        found, cost = estimator.evaluate(states, iteration)
    session.tokens += cost.tokens
    return np.array([math.nan if value is None else value.mean for value in found])


def critic_values(critic: Critic, states: Sequence[State]) -> np.ndarray:
    """Predict the values of states with a value network."""
    return np.array(critic(states))


def tempo_values(groups: Sequence[RolloutGroup], table: StateTable) -> np.ndarray:
    """Return TEMPO's value of each state: the mean reward of the responses of its group that pass through it.

    The response itself is one of them, so a state that no other response visits has the reward of the response.
    """
    values = []
    for response_index, step in zip(table.response_of, table.step_of, strict=True):
        response = table.responses[response_index]
        rollouts = [r for r in groups[response.problem_index].rollouts if r.reward is not None]
        own = next(i for i, r in enumerate(rollouts) if r is response.rollout)
        shared = shared_lengths([r.response_ids for r in rollouts])[own]
        start = (0, *response.ends)[step]
        values.append(np.mean([r.reward for r, n in zip(rollouts, shared, strict=True) if n >= start]))
    return np.array(values)


def group_means(groups: Sequence[RolloutGroup], table: StateTable) -> np.ndarray:
    """Return the mean reward of the other responses of the group, the same number for all states of a response."""
    values = []
    for response_index in table.response_of:
        response = table.responses[response_index]
        others = [
            r.reward
            for r in groups[response.problem_index].rollouts
            if r is not response.rollout and r.reward is not None
        ]
        values.append(np.mean(others) if others else math.nan)
    return np.array(values)
