"""Monte-Carlo values of intermediate states (VinePPO, arXiv 2410.01679).

A state is a prompt and the first tokens of a response to it. To evaluate a state, K continuations are sampled from it,
each at most so long that prefix and continuation together have the maximum length of a response. Prefix and
continuation together are graded as one response. The mean of the K rewards is an unbiased estimate of the value of the
state, which is the expected reward of responses that start with its tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from vineppo.sampling.graded import sampled_and_graded
from vineppo.seeds import derive_seed
from vineppo.types import Completion, Problem, Rollout, Sampler, SampleRequest, Task

Key = tuple[str, tuple[int, ...]]
"""Key of a state: the problem id, and the token ids of the prompt and of the response prefix."""


@dataclass(frozen=True)
class State:
    """The prompt and the first tokens of a response to a problem. States with equal keys are the same state."""

    problem: Problem
    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]
    rollout: Rollout | None = None
    """A rollout that starts with these tokens. Some estimators also use the later tokens of the rollout. The rollout is
    not part of the key."""

    @property
    def key(self) -> Key:
        """The problem id, and the token ids of the prompt and of the response prefix."""
        return self.problem.id, self.prompt_ids + self.response_ids


@dataclass(frozen=True)
class Value:
    """Estimate of the expected reward of a state."""

    mean: float
    """In reward units."""
    num_mc_rollouts: int
    """Number of continuations used; 0 if the value is known without sampling."""


@dataclass(frozen=True)
class Node:
    """The continuations that pass through the state before one token of a response, with next tokens and rewards."""

    followed: tuple[float, ...]
    """Rewards of the continuations whose next token is the response's token."""
    diverged: tuple[tuple[int, float], ...]
    """(next token, reward) of each of the other continuations."""


@dataclass(frozen=True)
class ValueCost:
    """Cost of evaluating a batch of states."""

    states: int
    """Number of states; equal states are counted separately."""
    distinct_states: int
    """Number of different states."""
    mc_rollouts: int
    """Number of sampled continuations."""
    tokens: int
    """Number of sampled tokens."""


class ValueEstimator(Protocol):
    """Estimates the values of states."""

    def evaluate(self, states: Sequence[State], iteration: int) -> tuple[list[Value], ValueCost]:
        """Return the value of each state, in the order of `states`, and the cost."""
        ...


class NodeEstimator(ValueEstimator, Protocol):
    """A value estimator that can also return the next tokens of its continuations at each token of a rollout."""

    def evaluate_nodes(
        self, states: Sequence[State], rollouts: Sequence[tuple[Problem, Rollout]], iteration: int
    ) -> tuple[list[Value], list[list[Node]], ValueCost]:
        """Evaluate states, and return nodes of rollouts.

        Args:
            states: the states to evaluate.
            rollouts: (problem, rollout) pairs. Each rollout must be the `State.rollout` of at least one of the states.
            iteration: index of the iteration.
        Returns:
            (value of each state, one list per rollout with a node per response token, cost).
        """
        ...


@dataclass(frozen=True)
class MonteCarlo:
    """Evaluates each state with K new continuations.

    Attributes:
        sampler: samples from the current policy.
        task: grades responses.
        decode: converts token ids to text without special tokens.
        num_mc_rollouts: K, the number of continuations per state.
        max_new_tokens: maximum number of tokens of a response, that is, of prefix and continuation together.
        run_seed: seed of the run. The seed of every request is derived from it.
        temperature: sampling temperature, the same as for rollouts.
        stop: strings that end a response, the same as for rollouts.
    """

    sampler: Sampler
    task: Task
    decode: Callable[[Sequence[int]], str]
    num_mc_rollouts: int
    max_new_tokens: int
    run_seed: int
    temperature: float
    stop: tuple[str, ...] = ()

    def evaluate(self, states: Sequence[State], iteration: int) -> tuple[list[Value], ValueCost]:
        """Return the value of each state, in the order of `states`, and the cost.

        Equal states share the same K continuations. A state with `max_new_tokens` response tokens is a response that
        was truncated by the length limit, so its value is 0 and nothing is sampled.
        """
        distinct = {state.key: state for state in states}
        known = {key: Value(0.0, 0) for key, s in distinct.items() if len(s.response_ids) >= self.max_new_tokens}
        open_states = [state for key, state in distinct.items() if key not in known]
        rewards, tokens = self._rewards(open_states, iteration)
        K = self.num_mc_rollouts
        for state, group in zip(open_states, rewards, strict=True):
            known[state.key] = Value(sum(group) / K, K)
        cost = ValueCost(len(states), len(distinct), K * len(open_states), tokens)
        return [known[state.key] for state in states], cost

    def _rewards(self, states: Sequence[State], iteration: int) -> tuple[list[list[float]], int]:
        """Return the rewards of K continuations of each state, and the total number of sampled tokens."""
        requests = [self.request(state, iteration, self.num_mc_rollouts) for state in states]
        rewards, completions = self.graded(states, requests)
        return rewards, total_tokens(completions)

    def request(
        self, state: State, iteration: int, num_samples: int, excluded_first: tuple[int, ...] = ()
    ) -> SampleRequest:
        """Return a request for continuations of a state.

        The response prefix and a continuation together have at most `max_new_tokens` tokens.

        Args:
            excluded_first: token ids that a continuation must not start with.
        """
        return SampleRequest(
            prompt_ids=state.prompt_ids + state.response_ids,
            num_samples=num_samples,
            max_new_tokens=self.max_new_tokens - len(state.response_ids),
            seed=self.seed(state, iteration, "mc"),
            response_tokens=len(state.response_ids),
            excluded_first=excluded_first,
            temperature=self.temperature,
            stop=self.stop,
        )

    def seed(self, state: State, iteration: int, purpose: str) -> int:
        """Return the seed of the request for a state.

        The seed is derived from the tokens of the state, so it does not depend on other states or on their order.
        """
        return derive_seed(self.run_seed, iteration, state.problem.id, purpose, derive_seed(*state.response_ids))

    def graded(
        self, states: Sequence[State], requests: Sequence[SampleRequest]
    ) -> tuple[list[list[float]], list[list[Completion]]]:
        """Sample and grade continuations of states, with one request per state.

        Returns:
            (rewards, completions), each with one list per request.
        """
        owners = [(state.problem, state.response_ids) for state in states]
        graded = sampled_and_graded(self.sampler, self.task, self.decode, requests, owners)
        rewards = [[reward for _, _, reward in group] for group in graded]
        return rewards, [[completion for completion, _, _ in group] for group in graded]


def total_tokens(completions: Sequence[Sequence[Completion]]) -> int:
    """Return the total number of tokens of all completions."""
    return sum(len(completion.token_ids) for group in completions for completion in group)
