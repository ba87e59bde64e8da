"""The vines: Monte-Carlo values of intermediate states (VinePPO, arXiv 2410.01679).

A state is a token prefix of one problem's response. Go back to it, sample K fresh continuations with what is left of
the response budget, grade prefix plus continuation: their mean reward is an unbiased value of the state.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from vineppo.sampling.graded import sampled_and_graded
from vineppo.seeds import derive_seed
from vineppo.types import Completion, Problem, Rollout, Sampler, SampleRequest, Task

Key = tuple[str, tuple[int, ...]]
"""What makes two states the same: the problem that is graded and the tokens."""


@dataclass(frozen=True)
class State:
    """A prefix of a response to a problem; equal token ids are one state."""

    problem: Problem
    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]
    rollout: Rollout | None = None
    """A rollout that begins with these tokens, for estimators that use how it goes on; it is no part of the state."""

    @property
    def key(self) -> Key:
        """What makes two states the same: the problem that is graded and the tokens."""
        return self.problem.id, self.prompt_ids + self.response_ids


@dataclass(frozen=True)
class Value:
    """Estimate of a state's expected reward."""

    mean: float
    """In reward units."""
    num_mc_rollouts: int
    """Continuations behind it; 0 where the outcome is known without sampling."""


@dataclass(frozen=True)
class Node:
    """A place of a response, before one of its tokens: what the continuations that came by did there, and earned."""

    followed: tuple[float, ...]
    """Rewards of those that chose the response's token."""
    left: tuple[tuple[int, float], ...]
    """(token, reward) of those that chose another one."""


@dataclass(frozen=True)
class ValueCost:
    """What a batch of values took."""

    states: int
    distinct_states: int
    mc_rollouts: int
    tokens: int


class ValueEstimator(Protocol):
    """Values of states, whoever makes them."""

    def evaluate(self, states: Sequence[State], iteration: int) -> tuple[list[Value], ValueCost]:
        """Value of each state, in order, and what they took."""
        ...


class NodeEstimator(ValueEstimator, Protocol):
    """One that can also say what its continuations did along each rollout."""

    def evaluate_nodes(
        self, states: Sequence[State], rollouts: Sequence[tuple[Problem, Rollout]], iteration: int
    ) -> tuple[list[Value], list[list[Node]], ValueCost]:
        """Value of each state; the T nodes of each rollout, which must be one that the states lie on; the cost."""
        ...


@dataclass(frozen=True)
class MonteCarlo:
    """Everything needed to value states: bound once, then called per iteration.

    Attributes:
        sampler: of the current policy.
        task: grades the finished texts.
        decode: token ids to text, special tokens removed.
        num_mc_rollouts: K.
        max_new_tokens: response budget; a continuation gets what the prefix left of it.
        run_seed: part of every request's address.
        temperature: of sampling, that of the rollouts themselves.
        stop: strings that end a response, those of the rollouts themselves.
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
        """Value of each state, in order; equal states are sampled once.

        A state that has used up its budget is a response cut off by the length limit: its value is 0, without sampling.
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
        """Rewards of K continuations of each state, shape (states, K), and the tokens they took."""
        requests = [self.request(state, iteration, self.num_mc_rollouts) for state in states]
        rewards, completions = self.graded(states, requests)
        return rewards, total_tokens(completions)

    def request(
        self, state: State, iteration: int, num_samples: int, excluded_first: tuple[int, ...] = ()
    ) -> SampleRequest:
        """What asks for continuations of a state, with what the prefix left of the budget."""
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
        """The prefix itself is the address: the order of states and the batch they come in cannot matter."""
        return derive_seed(self.run_seed, iteration, state.problem.id, purpose, derive_seed(*state.response_ids))

    def graded(
        self, states: Sequence[State], requests: Sequence[SampleRequest]
    ) -> tuple[list[list[float]], list[list[Completion]]]:
        """The continuations that each state's request asks for, and their rewards."""
        owners = [(state.problem, state.response_ids) for state in states]
        graded = sampled_and_graded(self.sampler, self.task, self.decode, requests, owners)
        rewards = [[reward for _, _, reward in group] for group in graded]
        return rewards, [[completion for completion, _, _ in group] for group in graded]


def total_tokens(completions: Sequence[Sequence[Completion]]) -> int:
    """Tokens that were generated for completions."""
    return sum(len(completion.token_ids) for group in completions for completion in group)
